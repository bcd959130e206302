"""Laws of the sources: what is in the files is what comes out, decoded once, and every wrong setting is named."""

from __future__ import annotations

import io
import operator
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from fedray.data import digits, hub
from fedray.data.sources import tables
from fedray.errors import ConfigError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
Image = pytest.importorskip("PIL.Image")

CONF = Path(__file__).parents[2] / "conf"
COLUMNS = {"image": "img", "label": "fine"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDRAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def png(pixels, mode=None):
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(file, "png")
    return file.getvalue()


def pixels(n, channels, seed):
    shape = (n, 5, 4) if channels == 1 else (n, 5, 4, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def write(path, images, labels, *, image="image", label="label", raw=False, metadata=None):
    """One parquet file in hub layout: images are encoded bytes."""
    values = images if raw else [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(images)]
    kind = pa.binary() if raw else pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({image: pa.array(values, kind), label: pa.array(labels, pa.int64())})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=3)


@pytest.fixture
def folder(tmp_path):
    """Eight grey training and four test images in hub layout, labels 0 to 3."""
    root = tmp_path / "set"
    write(root / "train-00000-of-00001.parquet", [png(x) for x in pixels(8, 1, 0)], [0, 1, 2, 3] * 2)
    write(root / "test-00000-of-00001.parquet", [png(x) for x in pixels(4, 1, 1)], [0, 1, 2, 3])
    return root


def refused(sentence, **settings):
    with pytest.raises(ConfigError, match=re.escape(sentence)) as info:
        hub(**{"name": "mine", **settings})
    assert "\n" not in str(info.value)


def test_grey_images_come_out_as_they_went_in(folder):
    data = hub(name="mine", path=str(folder))
    assert np.array_equal(data.train_x, pixels(8, 1, 0)[:, None])
    assert np.array_equal(data.test_x, pixels(4, 1, 1)[:, None])
    assert data.train_y.tolist() == [0, 1, 2, 3] * 2
    assert data.test_y.tolist() == [0, 1, 2, 3]
    assert data.train_x.dtype == np.uint8
    assert data.train_y.dtype == np.int64
    assert (data.num_classes, data.shape, data.scale) == (4, (1, 5, 4), 1 / 255)


@pytest.mark.parametrize("raw", [False, True], ids=["struct", "bytes"])
@pytest.mark.parametrize("place", ["", "data", "plain_text"])
def test_colour_images_in_parts_come_out_channel_first_in_order(tmp_path, raw, place):
    images, names = pixels(7, 3, 0), {"image": "img", "label": "fine", "raw": raw}
    root = tmp_path / "set" / place
    for part, rows in enumerate([slice(0, 3), slice(3, 4), slice(4, 7)]):
        labels = list(range(7))[rows]
        write(root / f"train-0000{part}-of-00003.parquet", [png(x) for x in images[rows]], labels, **names)
    write(root / "test-00000-of-00001.parquet", [png(images[0])], [0], **names)
    data = hub(name="mine", path=str(tmp_path / "set"), columns=COLUMNS)
    assert np.array_equal(data.train_x, images.transpose(0, 3, 1, 2))
    assert data.train_y.tolist() == list(range(7))


def test_unknown_sets_are_normalised_by_their_own_statistics(tmp_path):
    images = pixels(9, 3, 0)
    write(tmp_path / "train-00000-of-00001.parquet", [png(x) for x in images], [0] * 9)
    write(tmp_path / "test-00000-of-00001.parquet", [png(images[0])], [0])
    data = hub(name="mine", path=str(tmp_path))
    x = (data.train_x.astype(np.float64) * data.scale - np.reshape(data.mean, (3, 1, 1))) / np.reshape(
        data.std, (3, 1, 1)
    )
    assert x.mean(axis=(0, 2, 3)) == pytest.approx(0, abs=1e-12)
    assert x.std(axis=(0, 2, 3)) == pytest.approx(1)


def test_known_sets_have_the_constants_of_the_literature_and_so_another_digest(folder):
    known, mine = hub(name="mnist", path=str(folder)), hub(name="mine", path=str(folder))
    assert (known.mean, known.std) == ((0.1307,), (0.3081,))
    assert known.digest != mine.digest
    refused(
        "data.name is 'cifar10', whose images have 3 channels, and those in data.path have 1;",
        name="cifar10",
        path=folder,
        columns={"image": "image", "label": "label"},
    )


def test_class_names_in_the_metadata_count_classes_that_no_sample_has(folder):
    names = b'{"info": {"features": {"label": {"names": ["a", "b", "c", "d", "e"], "_type": "ClassLabel"}}}}'
    images = [png(x) for x in pixels(8, 1, 0)]
    write(folder / "train-00000-of-00001.parquet", images, [0, 1, 2, 3] * 2, metadata={b"huggingface": names})
    assert hub(name="mine", path=str(folder)).num_classes == 5


def test_a_second_call_maps_the_cache_and_decodes_nothing(folder, cache, monkeypatch):
    first = hub(name="mine", path=str(folder))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "PIL", None)
    second = hub(name="mine", path=str(folder))
    assert second == first
    assert np.array_equal(second.train_x, first.train_x)
    assert isinstance(second.train_x.base, np.memmap)
    assert not second.train_x.flags.writeable
    assert [path.name[0] == "." for path in cache.iterdir()] == [False]  # nothing unfinished lies about


def test_a_moved_folder_hits_the_cache_and_a_changed_file_does_not(folder, cache):
    first = hub(name="mine", path=str(folder))
    moved = folder.rename(folder.with_name("moved"))
    assert hub(name="mine", path=str(moved)) == first
    assert len(list(cache.iterdir())) == 1
    write(moved / "test-00000-of-00001.parquet", [png(x) for x in pixels(4, 1, 1)], [3, 1, 2, 0])
    changed = hub(name="mine", path=str(moved))
    assert changed.test_y.tolist() == [3, 1, 2, 0]
    assert changed.digest != first.digest


def test_another_column_of_the_same_files_is_another_data_set(folder):
    for split, n in (("train", 8), ("test", 4)):
        (file,) = folder.glob(f"{split}-*")
        table = pq.read_table(file)
        pq.write_table(table.append_column("coarse", pa.array([0, 1] * (n // 2), pa.int64())), file)
    fine = hub(name="mine", path=str(folder))
    coarse = hub(name="mine", path=str(folder), columns={"image": "image", "label": "coarse"})
    assert (fine.num_classes, coarse.num_classes) == (4, 2)


def test_a_failed_decoding_leaves_nothing_in_the_cache(folder, cache):
    write(folder / "test-00000-of-00001.parquet", [b"no image"], [0])
    refused("cannot be decoded", path=folder)
    assert list(cache.iterdir()) == []


def test_losing_a_race_uses_what_the_winner_wrote(folder, cache, monkeypatch):
    read, winner = tables.read, []

    def race(*arguments):
        if not winner:
            winner.append("runs")
            winner.append(hub(name="mine", path=str(folder)))
        return read(*arguments)

    monkeypatch.setattr(tables, "read", race)
    assert hub(name="mine", path=str(folder)) == winner[1]
    assert len(list(cache.iterdir())) == 1


def test_a_damaged_cache_is_refused_by_its_folder(folder, cache):
    hub(name="mine", path=str(folder))
    (entry,) = cache.iterdir()
    (entry / "train_x.npy").write_bytes(b"short")
    refused(f"FEDRAY_CACHE has the damaged folder {entry}", path=folder)


def test_a_cache_that_cannot_be_written_is_refused(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDRAY_CACHE", str(tmp_path / "file"))
    refused(f"FEDRAY_CACHE is '{tmp_path}/file', where decoded data go; it cannot be written", path=folder)


def test_no_path_and_a_wrong_path_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # whether or not it is installed
    where = "fetch its train-*.parquet and test-*.parquet from https://huggingface.co/datasets/ylecun/mnist and pass"
    refused(f"data.path is null; mnist does not come with fedray, so {where} data.path=FOLDER", name="mnist")
    refused("data.path is null; mine does not come with fedray", path=None)
    refused("data.path is '/nowhere': no such folder; give the folder that holds train-*.parquet", path="/nowhere")


def test_a_folder_without_a_split_or_with_too_many_is_refused(folder, tmp_path):
    refused(f"data.path is '{tmp_path / 'empty'}': no train-*.parquet in", path=make(tmp_path / "empty"))
    refused(
        "the folders ['coarse', 'fine'] in it all hold data; give one of them", path=two_sets(tmp_path / "two", folder)
    )
    (folder / "test-00000-of-00001.parquet").unlink()
    refused(f"data.path is '{folder}': no test-*.parquet in {folder}; give the folder", path=str(folder))


def make(path):
    path.mkdir()
    return str(path)


def two_sets(root, folder):
    for name in ("fine", "coarse"):
        (root / name).mkdir(parents=True)
        for file in folder.iterdir():
            (root / name / file.name).write_bytes(file.read_bytes())
    return str(root)


@pytest.mark.parametrize("name", ["train-00001-of-00003.parquet", "train-extra.parquet", "train.parquet"])
def test_files_that_are_not_the_parts_of_one_split_are_refused(folder, name):
    write(folder / name, [png(pixels(1, 1, 0)[0])], [0])
    refused("are not the parts of one split, each once, so fetch what is missing", path=folder)


def test_a_missing_part_is_refused(folder):
    (folder / "train-00000-of-00001.parquet").rename(folder / "train-00000-of-00002.parquet")
    refused("are not the parts of one split, each once, so fetch what is missing", path=folder)


def test_wrong_columns_are_refused_with_those_that_exist(folder):
    there = "train-00000-of-00001.parquet has the columns ['image', 'label'], so name one of them"
    refused(f"data.columns.image is 'img'; {there}", path=folder, columns={"image": "img", "label": "label"})
    refused(f"data.columns.label is 'fine'; {there}", path=folder, columns={"image": "image", "label": "fine"})
    refused("data.columns has the keys ['image']; give image and label", path=folder, columns={"image": "image"})
    swapped = {"image": "label", "label": "image"}
    wrong = "data.columns.image is 'label'; that column of train-00000-of-00001.parquet has type int64, so name the one"
    refused(wrong, path=folder, columns=swapped)
    both = {"image": "image", "label": "image"}
    refused("data.columns.label is 'image'; that column of", path=folder, columns=both)


@pytest.mark.parametrize("module", ["pyarrow", "PIL.Image"])
def test_a_missing_extra_is_named_before_anything_is_written(folder, cache, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    refused(f'{module} to read them cannot be imported; run `pip install "fedray[hub]"`', path=folder)
    assert not cache.exists()


@pytest.mark.parametrize(
    ("image", "label", "sentence"),
    [
        (b"no image", 0, "data.path has an image that cannot be decoded in {file}, row 4 ("),
        (png(pixels(1, 1, 0)[0])[:60], 0, "data.path has an image that cannot be decoded in {file}, row 4 ("),
        (None, 0, "data.path has no image bytes in {file}, row 4; images must lie in the parquet file"),
        (
            png(pixels(1, 3, 0)[0]),
            0,
            "data.path has an image of shape (3, 5, 4) in {file}, row 4; all must have the shape",
        ),
        (
            png(np.zeros((5, 4), np.uint16)),
            0,
            "data.path has an image of mode I;16 in {file}, row 4; only 8 bits per channel are read, so convert it",
        ),
        (png(pixels(1, 1, 0)[0]), None, "data.path has no label in {file}, row 4; drop unlabelled rows"),
        (png(pixels(1, 1, 0)[0]), -1, "data.train_y is -1 at sample 4; labels must lie from 0 to 0"),
    ],
)
def test_a_bad_row_is_refused_with_its_file_and_number(folder, image, label, sentence):
    file = folder / "train-00000-of-00001.parquet"
    good = [png(x) for x in pixels(4, 1, 0)]
    write(file, [*good, image], [0, 0, 0, 0, label])
    write(folder / "test-00000-of-00001.parquet", good, [0] * 4)
    refused(sentence.format(file=file), path=folder)


def test_a_broken_or_empty_file_is_refused(folder):
    write(folder / "test-00000-of-00001.parquet", [], [])
    refused("data.path has no samples in", path=folder)
    (folder / "test-00000-of-00001.parquet").write_bytes(b"PAR1 broken")
    refused("test-00000-of-00001.parquet, which cannot be read as parquet (", path=folder)
    write(folder / "test-00000-of-00001.parquet", [png(pixels(1, 1, 0)[0])], [0], metadata={b"huggingface": b"{"})
    refused("test-00000-of-00001.parquet, which cannot be read as parquet (", path=folder)


def test_digits_are_all_there_split_once_and_in_equal_shares():
    pytest.importorskip("sklearn")
    data = digits()
    assert data == digits()
    assert len(data.train_y) + len(data.test_y) == 1797
    assert (data.shape, data.num_classes, data.train_x.dtype) == ((1, 8, 8), 10, np.uint8)
    train, test = np.bincount(data.train_y), np.bincount(data.test_y)
    assert abs(test - 0.2 * (train + test)).max() < 1
    every = {x.tobytes() for x in np.concatenate([data.train_x, data.test_x])}
    from sklearn.datasets import load_digits

    assert every == {x.tobytes() for x in load_digits().images.astype(np.uint8)}
    assert digits(test_fraction=0.4).digest != data.digest
    x = (data.train_x * data.scale - data.mean[0]) / data.std[0]
    assert (x.mean(), x.std()) == (pytest.approx(0, abs=1e-12), pytest.approx(1))


def test_the_digits_test_set_is_drawn_and_not_cut_off():
    pytest.importorskip("sklearn")
    from sklearn.datasets import load_digits

    last = load_digits().images[-359:].astype(np.uint8)[:, None]
    assert not np.array_equal(digits().test_x, last)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"path": "/nowhere"}, "data.path is '/nowhere': no such folder; digits is built in and reads no path"),
        (
            {"path": "/"},
            "data.path is '/': digits is built in and reads no path, so leave data.path out or choose data=mnist",
        ),
        ({"test_fraction": 0}, "data.test_fraction is 0; it must lie between 0 and 1"),
        ({"test_fraction": 1.0}, "data.test_fraction is 1.0; it must lie between 0 and 1"),
        ({"test_fraction": 1e-9}, "data.test_fraction is 1e-09; it leaves a class without training or test samples"),
        ({"test_fraction": 0.9999}, "data.test_fraction is 0.9999; it leaves a class without training or test samples"),
    ],
)
def test_wrong_settings_of_digits_are_refused(settings, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        digits(**settings)


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match=r"run `pip install scikit-learn`"):
        digits()


@pytest.mark.parametrize("group", ["data", "partition"])
def test_every_yaml_names_a_target_and_all_of_its_arguments_with_a_comment_above_each(group):
    import inspect

    import fedray.data

    for file in (CONF / group).glob("*.yaml"):
        settings = yaml.safe_load(file.read_text())
        target = settings.pop("_target_")
        if not target.startswith("fedray.data."):
            continue
        function = operator.attrgetter(target.removeprefix("fedray.data."))(fedray.data)
        accepted = set(inspect.signature(function).parameters)
        # A preset of a partition says only what its paper chose.
        assert set(settings) == accepted if group == "data" else set(settings) <= accepted, file
        lines = file.read_text().splitlines()
        assert all(
            above[0] == "#"
            for above, line in zip(["", *lines], lines, strict=False)
            if line[0] not in "# -" and line[-1] != ":"
        )
