"""Laws of data sets by name: columns by role, splits by name, folders of images, and a set that nobody foresaw."""

from __future__ import annotations

import importlib
import io
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import yaml

from fedray.data import hub
from fedray.data.sources.named import NAMED
from fedray.errors import ConfigError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
Image = pytest.importorskip("PIL.Image")

CONF = Path(__file__).parents[2] / "conf" / "data"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDRAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refused(sentence, **settings):
    with pytest.raises(ConfigError, match=re.escape(sentence)) as info:
        hub(**{"name": "mine", **settings})
    assert "\n" not in str(info.value)


def random(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def encoded(pixels, mode=None, kind="png", **options):
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(file, kind, **options)
    return file.getvalue()


def write(path, columns, metadata=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path, row_group_size=3)
    return str(path.parent)


def both(folder, columns, names=("train", "test")):
    """The same columns as train and test set."""
    for name in names:
        write(folder / f"{name}-00000-of-00001.parquet", columns)
    return str(folder)


def images(n, seed=0):
    return [encoded(x) for x in random(n, 5, 4, seed=seed)]


# --- what is known of names ---


@pytest.mark.parametrize("name", NAMED)
def test_every_named_set_has_a_yaml_that_says_what_is_known_of_it(name):
    settings = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    assert (settings["name"], settings["_target_"]) == (name, "fedray.data.hub")
    assert settings["columns"] == dict(NAMED[name].columns)
    assert NAMED[name].subset in (None, settings["subset"])
    assert settings["path"] is None


def test_what_samples_are_normalised_by_can_be_given(tmp_path):
    path = both(tmp_path / "data", {"img": images(4), "label": [0, 1, 0, 1]})
    usual = hub(name="mnist", path=path, columns={"image": "img", "label": "label"})
    raw = hub(name="mnist", path=path, columns={"image": "img", "label": "label"}, mean=[0], std=[1])
    assert (raw.mean, raw.std) == ((0.0,), (1.0,))
    assert raw.digest != usual.digest
    assert hub(name="mnist", path=path, columns={"image": "img", "label": "label"}, mean=[0.1307]) == usual
    measured = hub(name="mine", path=path, columns={"image": "img", "label": "label"}, std=[0.5])
    assert measured.std == (0.5,)
    assert measured.mean == hub(name="mine", path=path, columns={"image": "img", "label": "label"}).mean


def test_what_samples_cannot_be_normalised_by_is_refused(tmp_path):
    path = both(tmp_path / "data", {"image": images(4), "label": [0, 1, 0, 1]})
    refused("data.mean is 'grey'; it must be a list of numbers, such as [0.5], or null", path=path, mean="grey")
    refused("data.std is [True]; it must be a list of numbers", path=path, std=[True])
    with pytest.raises(ConfigError, match=r"data\.std is .*; it must be finite and above 0"):
        hub(name="mine", path=path, std=[0]).check()
    with pytest.raises(ConfigError, match=r"data\.mean has 2 values for samples of shape"):
        hub(name="mine", path=path, mean=[0, 0]).check()
    text = both(tmp_path / "text", {"text": ["a", "b"], "label": [0, 1]})
    columns = {"text": "text", "label": "label"}
    refused("data.mean is set and samples are tokens; leave it null", path=text, columns=columns, length=2, mean=[0])


@pytest.mark.parametrize("name", sorted(set(NAMED) - {"emnist"}))
def test_every_named_set_is_read_from_the_hubs_files_with_its_own_columns(tmp_path, name):
    known = NAMED[name]
    settings = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    del settings["_target_"]
    column = next(iter(set(known.columns) - {"label", "owner"}))
    channels = 3 if known.constants and len(known.constants[0]) == 3 else 1
    shape = (6, 5, 4, 3) if channels == 3 else (6, 5, 4)
    pixels = random(*shape)
    values = (
        [f"item {i}" for i in range(6)] if column == "text" else [{"bytes": encoded(x), "path": None} for x in pixels]
    )
    columns = {known.columns[column]: values, known.columns["label"]: [0, 1, 0, 1, 0, 1]}
    if "owner" in known.columns:
        columns[known.columns["owner"]] = ["f1", "f2", "f1", "f2", "f2", "f1"]
    names = ("train", "valid") if name == "tiny_imagenet" else ("train",) if name == "femnist" else ("train", "test")
    path = both(tmp_path / "data", columns, names)
    fraction = 0.4 if name == "femnist" else None
    data = hub(**{**settings, "path": path, "test_fraction": fraction})
    assert data.num_classes == next(iter(known.classes.values()))
    if known.constants:
        assert (data.mean, data.std) == known.constants
    if column == "text":
        assert (data.vocabulary, data.shape) == (256, (settings["length"],))
        assert bytes(data.train_x[3]).rstrip(b"\0") == b"item 3"
        assert (data.mean, data.std, data.scale) == ((0.0,), (1.0,), 1.0)
    elif name != "femnist":
        assert np.array_equal(data.train_x, pixels[:, None] if channels == 1 else pixels.transpose(0, 3, 1, 2))
    else:
        assert sorted(data.train_owner) == [0, 0, 1, 1]
        assert sorted(data.test_owner) == [0, 1]


# --- a set that nobody foresaw ---


def test_an_unseen_folder_works_by_name_path_and_columns_alone(tmp_path):
    colours = random(10, 6, 6, 3)
    columns = {
        "id": list(range(10)),
        "pixel": [{"bytes": encoded(x), "path": f"{i}.png"} for i, x in enumerate(colours)],
        "class": ["wolf", "cat", "dog", "wolf", "cat"] * 2,
        "photographer": ["zoe", "ann"] * 5,
    }
    path = tmp_path / "snapshot"
    write(path / "default" / "train" / "0000.parquet", columns)
    write(path / "default" / "validation" / "0000.parquet", {**columns, "class": ["dog"] * 10})
    roles = {"image": "pixel", "label": "class", "owner": "photographer"}
    data = hub(name="user/anything", path=str(path), columns=roles)
    assert np.array_equal(data.train_x, colours.transpose(0, 3, 1, 2))
    assert data.train_y.tolist() == [2, 0, 1, 2, 0] * 2  # cat, dog, wolf
    assert data.test_y.tolist() == [1] * 10
    assert data.train_owner.tolist() == [1, 0] * 5
    assert (data.num_classes, data.name) == (3, "user/anything")
    assert hub(name="user/anything", path=str(path), columns={"image": "pixel", "label": "class"}).train_owner is None


@pytest.mark.parametrize(
    "layout",
    ["train.parquet", "data/train-00000-of-00001.parquet", "train/0000.parquet", "default/train/0000.parquet"],
)
@pytest.mark.parametrize("test", ["test", "validation", "valid", "val", "dev"])
def test_splits_are_found_under_the_names_of_the_hub(tmp_path, layout, test):
    columns = {"image": images(3), "label": [0, 1, 2]}
    write(tmp_path / "set" / layout, columns)
    write(tmp_path / "set" / layout.replace("train", test), {**columns, "label": [2, 2, 2]})
    assert hub(name="mine", path=str(tmp_path / "set")).test_y.tolist() == [2, 2, 2]


def test_test_is_preferred_to_validation_and_a_subset_names_a_folder(tmp_path):
    columns = {"image": images(3), "label": [0, 1, 2]}
    both(tmp_path / "a", columns, ("train", "validation"))
    write(tmp_path / "a" / "test.parquet", {**columns, "label": [1, 1, 1]})
    assert hub(name="mine", path=str(tmp_path / "a")).test_y.tolist() == [1, 1, 1]
    both(tmp_path / "b", {**columns, "label": [0, 0, 0]})
    refused("the folders ['a', 'b'] in it all hold data; give one of them", path=str(tmp_path))
    assert hub(name="mine", path=str(tmp_path), subset="b").num_classes == 1


def test_without_a_test_split_a_share_of_each_class_is_held_out_the_same_way_every_time(tmp_path, monkeypatch):
    columns = {"image": images(40), "label": [0, 1, 1, 1] * 10}
    path = both(tmp_path / "set", columns, ["train"])
    refused("or hold out a share of them with data.test_fraction=0.2", path=path)
    data = hub(name="mine", path=path, test_fraction=0.2)
    assert (np.bincount(data.train_y).tolist(), np.bincount(data.test_y).tolist()) == ([8, 24], [2, 6])
    every = np.concatenate([data.train_x, data.test_x])
    assert {x.tobytes() for x in every} == {x.tobytes() for x in random(40, 5, 4)}
    monkeypatch.setenv("FEDRAY_CACHE", str(tmp_path / "other"))
    assert hub(name="mine", path=path, test_fraction=0.2) == data
    assert hub(name="mine", path=path, test_fraction=0.4) != data
    refused("data.test_fraction is 0.01; of 40 samples it leaves none to test on", path=path, test_fraction=0.01)


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_json_lines_and_csv_files_are_tables_too(tmp_path, suffix):
    rows = [(0.5, 3, "yes"), (1.5, 4, "no"), (2.5, 5, "yes")]
    lines = {
        "jsonl": "\n".join(f'{{"a": {a}, "b": {b}, "c": "{c}"}}' for a, b, c in rows),
        "csv": "a,b,c\n" + "\n".join(f"{a},{b},{c}" for a, b, c in rows),
    }
    for split in ("train", "test"):
        (tmp_path / f"{split}.{suffix}").write_text(lines[suffix])
    data = hub(name="mine", path=str(tmp_path), columns={"features": ["a", "b"], "label": "c"})
    assert data.train_x.tolist() == [[0.5, 3], [1.5, 4], [2.5, 5]]
    assert data.train_y.tolist() == [1, 0, 1]
    data = hub(name="mine", path=str(tmp_path), columns={"features": ["b"], "target": "a"})
    assert (data.objective, data.train_y.tolist()) == ("regression", [[0.5], [1.5], [2.5]])


# --- roles ---


def test_lists_of_numbers_are_features_normalised_each_by_itself(tmp_path):
    x = np.column_stack([np.arange(9.0), np.full(9, 7.0), 1e6 * np.arange(9.0) ** 2])
    path = both(tmp_path / "set", {"x": x.tolist(), "y": np.linspace(-1, 1, 9)})
    data = hub(name="mine", path=path, columns={"features": "x", "target": "y"})
    assert (data.train_x.dtype, data.shape, data.objective) == (np.float32, (3,), "regression")
    seen = (data.train_x.astype(np.float64) - data.mean) / data.std
    assert np.allclose(seen.mean(axis=0), 0)
    assert np.allclose(seen.std(axis=0), [1, 0, 1])  # what never changes is left at 0
    assert np.array_equal(data.train_y[:, 0], np.linspace(-1, 1, 9, dtype=np.float32))


@pytest.mark.parametrize("fixed", [False, True])
def test_nested_lists_are_images(tmp_path, fixed):
    grey, colour = random(5, 3, 4), random(5, 6, 4, 3)
    kind = pa.list_(pa.list_(pa.uint8(), 4), 3) if fixed else pa.list_(pa.list_(pa.uint8()))
    columns = {"g": pa.array(grey.tolist(), kind), "c": colour.tolist(), "f": (grey / 7).tolist(), "y": [True] * 5}
    path = both(tmp_path / "set", columns)
    data = hub(name="mine", path=path, columns={"image": "g", "label": "y"})
    assert np.array_equal(data.train_x, grey[:, None])
    assert data.train_y.tolist() == [1] * 5
    assert np.array_equal(
        hub(name="mine", path=path, columns={"image": "c", "label": "y"}).train_x, colour.transpose(0, 3, 1, 2)
    )
    floats = hub(name="mine", path=path, columns={"image": "f", "label": "y"})
    assert np.array_equal(floats.train_x, (grey / 7).astype(np.float32)[:, None])
    assert floats.scale == 1.0


def test_text_without_a_target_is_to_be_continued(tmp_path):
    path = both(tmp_path / "set", {"story": ["abcdefg", "hij", "klm"], "who": ["x", "y", "x"]})
    data = hub(name="mine", path=path, columns={"text": "story"}, length=5)
    assert [bytes(row) for row in data.train_x] == [b"abcde", b"fg\nhi"]
    assert [bytes(row.astype(np.uint8)) for row in data.train_y] == [b"bcdef", b"g\nhij"]
    assert (data.objective, data.vocabulary, data.num_classes) == ("next_token", 256, 256)
    owned = hub(name="mine", path=path, columns={"text": "story", "owner": "who"}, length=3)
    assert [bytes(row) for row in owned.train_x] == [b"abc", b"def", b"g\nk"]
    assert owned.train_owner.tolist() == [0, 0, 0]
    refused("data.length is null; text needs the number of bytes", path=path, columns={"text": "story"})
    refused("data.length is 30; no text has one byte more than that", path=path, columns={"text": "story"}, length=30)


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"label": "y"}, "data.columns has the keys ['label']; give image and label"),
        ({"image": "i", "text": "t", "label": "y"}, "data.columns has the keys ['image', 'label', 'text']; give"),
        ({"image": "i", "label": "y", "target": "f"}, "data.columns has the keys ['image', 'label', 'target']; give"),
        ({"image": "i", "label": "y", "colour": "f"}, "data.columns has the keys ['colour', 'image', 'label']; give"),
        ({"image": ["i"], "label": "y"}, "data.columns.image is ['i']; give the name of a column"),
        ({"image": "i", "label": "f"}, "has type double, so name the one with integer labels, names or booleans, or"),
        ({"image": "i", "target": "t"}, "has type string, so name the one with numbers"),
        ({"features": "t", "label": "y"}, "has type string, so name the one with numbers or lists of them"),
        ({"features": ["f", "no"], "label": "y"}, "data.columns.features is 'no'; train-00000-of-00001.parquet has"),
        ({"text": "y", "label": "y"}, "has type int64, so name the one with text"),
        ({"image": "i", "label": "y", "owner": "f"}, "has type double, so name the one with names or integers"),
        ({"features": "ragged", "label": "y"}, "data.path has lists of 1 and of 2 values in"),
        ({"features": "holes", "label": "y"}, "row 1; fill in or drop such rows"),
        ({"image": "deep", "label": "y"}, "its arrays have the shape (1,), and an image has (H, W)"),
        ({"image": "huge", "label": "y"}, "data.path has a pixel of 256 in"),
    ],
)
def test_wrong_columns_are_refused(tmp_path, columns, sentence):
    table = {
        "i": images(3), "t": ["a", "b", "c"], "y": [0, 1, 0], "f": [0.5, 1.5, 2.5], "ragged": [[1], [1, 2], [1]],
        "holes": [1.0, None, 2.0], "deep": [[1], [2], [3]], "huge": [[[256]], [[0]], [[1]]],
    }  # fmt: skip
    refused(sentence, path=both(tmp_path / "set", table), columns=columns, length=4 if "text" in columns else None)


def test_a_class_or_a_type_of_label_that_only_the_test_set_has_is_refused(tmp_path):
    write(tmp_path / "train.parquet", {"image": images(2), "label": ["a", "b"]})
    write(tmp_path / "test.parquet", {"image": images(2), "label": ["a", "c"]})
    refused("data.path has the class 'c' in its test samples only", path=str(tmp_path))
    write(tmp_path / "test.parquet", {"image": images(2), "label": [0, 1]})
    refused("data.path has class names in its training samples and numbers in its test samples", path=str(tmp_path))


def test_settings_that_nothing_would_read_are_refused(tmp_path):
    path = both(tmp_path / "set", {"image": images(2), "label": [0, 1], "x": [[1.5], [2.5]], "f": [[[0.5]], [[1.5]]]})
    refused("data.length is 9; it is for text columns and data.columns names none", path=path, length=9)
    features = {"features": "x", "label": "label"}
    refused("data.size is 9; it is for image columns and data.columns names none", path=path, columns=features, size=9)
    floats = {"image": "f", "label": "label"}
    refused("data.size and data.mode change images of 8 bits", path=path, columns=floats, size=9)
    refused("data.mode is 'blue'; choose grey, rgb or null", path=path, mode="blue")
    refused("data.size is 0; it must be a whole number of at least 1", path=path, size=0)
    refused("data.name is null; give one", path=path, name=None)


# --- images ---


def test_images_of_unequal_size_or_colour_are_refused_with_the_setting_that_mends_it(tmp_path):
    grey, colour = random(5, 4), random(7, 9, 3)
    path = both(tmp_path / "set", {"image": [encoded(grey), encoded(colour)], "label": [0, 1]})
    refused("so set data.size=32 to resize all of them, or data.mode=grey or rgb", path=path)
    refused("row 1; all must have the shape (1, 6, 6)", path=path, size=6)
    refused("row 1; all must have the shape (1, 5, 4)", path=path, mode="grey")
    assert hub(name="mine", path=path, size=6, mode="grey").shape == (1, 6, 6)
    assert hub(name="mine", path=path, size=6, mode="rgb").shape == (3, 6, 6)


def test_a_named_sets_constants_are_not_those_of_another_number_of_channels(tmp_path):
    path = both(tmp_path / "set", {"image": images(4), "label": [0, 1, 2, 3]})
    assert hub(name="mnist", path=path).mean == (0.1307,)
    assert len(hub(name="mnist", path=path, mode="rgb").mean) == 3


def test_other_modes_become_grey_or_rgb_as_a_page_shows_them(tmp_path):
    grey, colour = random(5, 4), random(5, 4, 3)
    alpha = np.dstack([colour, np.full((5, 4), 255, np.uint8)])
    alpha[0, 0, 3] = 0
    shown = colour.copy()
    shown[0, 0] = 255
    palette = Image.fromarray(colour).quantize(8)
    file = io.BytesIO()
    palette.save(file, "png")
    cases = {
        "1": (encoded(grey > 99), (grey > 99)[None] * 255),
        "LA": (encoded(np.dstack([grey, np.full_like(grey, 255)])), grey[None]),
        "RGBA": (encoded(alpha), shown.transpose(2, 0, 1)),
        "P": (file.getvalue(), np.asarray(palette.convert("RGB")).transpose(2, 0, 1)),
        "CMYK": (encoded(colour, "CMYK", "tiff"), colour.transpose(2, 0, 1)),
    }
    for mode, (data, expected) in cases.items():
        with Image.open(io.BytesIO(data)) as image:
            assert image.mode == mode
        got = hub(name="mine", path=both(tmp_path / mode, {"image": [data], "label": [0]})).train_x
        assert np.array_equal(got[0], expected), mode


# --- folders of images ---


def put(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.mark.parametrize("test", ["test", "val"])
def test_folders_of_images_are_classes_in_sorted_order(tmp_path, test):
    x = random(6, 5, 4, 3)
    for i, name in enumerate(["train/dog/b.png", "train/dog/a.png", "train/cat/1.png", f"{test}/dog/x.png"]):
        put(tmp_path / name, x[i])
    (tmp_path / "train" / "dog" / "notes.txt").write_text("no image")
    data = hub(name="mine", path=str(tmp_path))
    assert np.array_equal(data.train_x, x[[2, 1, 0]].transpose(0, 3, 1, 2))
    assert (data.train_y.tolist(), data.test_y.tolist(), data.num_classes) == ([0, 1, 1], [1], 2)
    first = data.digest
    (tmp_path / "train" / "dog" / "a.png").rename(tmp_path / "train" / "cat" / "a.png")
    assert hub(name="mine", path=str(tmp_path)).digest != first


def test_folders_of_classes_without_splits_hold_out_a_share(tmp_path):
    for i, x in enumerate(random(10, 4, 4)):
        put(tmp_path / "set" / "ab"[i % 2] / f"{i}.png", x)
    refused("no test/CLASS/*.png in", path=str(tmp_path / "set"))
    data = hub(name="mine", path=str(tmp_path / "set"), test_fraction=0.2)
    assert (np.bincount(data.train_y).tolist(), np.bincount(data.test_y).tolist()) == ([4, 4], [1, 1])


def test_tiny_imagenets_own_folders_are_read_and_its_unlabelled_test_images_left_out(tmp_path):
    x = random(5, 8, 8, 3)
    root = tmp_path / "tiny-imagenet-200"
    put(root / "train" / "n02" / "images" / "n02_0.png", x[0])
    put(root / "train" / "n01" / "images" / "n01_0.png", x[1])
    put(root / "val" / "images" / "val_0.png", x[2])
    put(root / "val" / "images" / "val_1.png", x[3])
    put(root / "test" / "images" / "test_0.png", x[4])
    (root / "val" / "val_annotations.txt").write_text("val_0.png\tn02\t0\t0\t9\t9\nval_1.png\tn01\t0\t0\t9\t9\n")
    data = hub(name="tiny_imagenet", path=str(root), mode="rgb")
    assert np.array_equal(data.train_x, x[[1, 0]].transpose(0, 3, 1, 2))
    assert (data.train_y.tolist(), data.test_y.tolist(), data.num_classes) == ([0, 1], [1, 0], 200)
    (root / "val" / "val_annotations.txt").write_text("val_0.png\tn02\nmissing.png\tn01\n")
    refused("val_annotations.txt, whose line 2 names no image and class", path=str(root))


def test_a_damaged_image_in_a_folder_is_named(tmp_path):
    for split in ("train", "test"):
        put(tmp_path / split / "a" / "1.png", random(4, 4))
    (tmp_path / "train" / "a" / "2.png").write_bytes(b"no image")
    refused(f"an image that cannot be decoded in {tmp_path / 'train' / 'a' / '2.png'} (", path=str(tmp_path))


def test_a_folder_that_holds_nothing_known_is_refused_with_what_is_known(tmp_path):
    (tmp_path / "readme.md").write_text("")
    refused("no train-*.parquet in", path=str(tmp_path))
    refused("nor IDX, CIFAR, SVHN or LEAF files, nor folders of images by class", path=str(tmp_path))


# --- the package `datasets` ---


class Rows:
    """What the sources use of datasets.Dataset."""

    def __init__(self, table):
        self.table = table
        self.features = types.SimpleNamespace(arrow_schema=table.schema)

    def __len__(self):
        return self.table.num_rows

    def with_format(self, kind):
        assert kind == "arrow"
        return self

    def select_columns(self, columns):
        return Rows(self.table.select(columns))

    def iter(self, batch_size):
        for start in range(0, len(self), batch_size):
            yield self.table.slice(start, batch_size)


def test_without_a_path_the_datasets_package_is_asked_and_gives_what_the_files_give(tmp_path, monkeypatch):
    pixels = random(6, 5, 4, 3)
    columns = {"image": [{"bytes": encoded(x), "path": None} for x in pixels], "label": [0, 1, 2] * 2}
    asked = []

    def load_dataset(repository, subset):
        asked.append((repository, subset))
        return {"train": Rows(pa.table(columns)), "test": Rows(pa.table(columns))}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert hub(name="svhn") == hub(name="svhn", path=both(tmp_path / "set", columns))
    assert hub(name="user/anything", subset="x").num_classes == 3
    assert asked == [("ufldl-stanford/svhn", "cropped_digits"), ("user/anything", "x")]


def test_a_hub_that_cannot_be_reached_is_one_sentence_with_the_ways_out(monkeypatch):
    def load_dataset(repository, subset):
        raise ConnectionError("Couldn't reach it\nbecause")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    refused(
        "data.name is 'cifar10'; uoft-cs/cifar10 cannot be loaded from the Hugging Face hub (Couldn't reach",
        name="cifar10",
    )
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused("or run `pip install 'fedray[hub]'` to have it fetched", name="user/anything")
    refused("so fetch its files from https://huggingface.co/datasets/Heliosoph/EMNIST and pass", name="emnist")
    refused("or name one of mnist, fashion_mnist,", name="anything")


def test_the_real_package_gives_what_its_stand_in_gives(tmp_path, monkeypatch):
    if importlib.util.find_spec("datasets") is None:
        pytest.skip("needs the package datasets")
    import datasets

    columns = {"image": [{"bytes": data, "path": None} for data in images(6)], "label": [0, 1, 2] * 2}
    path = both(tmp_path / "set", columns)
    loaded = datasets.load_dataset("parquet", data_dir=path, cache_dir=str(tmp_path / "hf"))
    loaded = loaded.cast_column("image", datasets.Image())
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: loaded)
    assert hub(name="user/anything") == hub(name="user/anything", path=path)
