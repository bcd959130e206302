"""Laws of original formats: what authors' files hold is what comes out, damage is named, and no pickle runs code."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import pickle
import re
import struct
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedray.data import hub
from fedray.data.sources.originals import read_pickle
from fedray.errors import ConfigError


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


# --- IDX ---


def idx_bytes(array):
    return struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder, prefix="", test="t10k", packed=False, labels=(0, 1, 2, 3, 4, 5)):
    folder.mkdir(parents=True, exist_ok=True)
    train, held = random(6, 5, 4), random(3, 5, 4, seed=1)
    arrays = {
        "train-images-idx3": train,
        "train-labels-idx1": np.array(labels, np.uint8),
        f"{test}-images-idx3": held,
        f"{test}-labels-idx1": np.array(labels[:3], np.uint8),
    }
    for name, array in arrays.items():
        data = idx_bytes(array)
        path = folder / f"{prefix}{name}-ubyte{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(data) if packed else data)
    return train, held


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("place", ["", "raw", "MNIST/raw"])
def test_idx_files_are_read_where_they_lie(tmp_path, name, packed, place):
    train, held = write_idx(tmp_path / "set" / place, packed=packed)
    data = hub(name=name, path=str(tmp_path / "set"))
    assert np.array_equal(data.train_x, train[:, None])
    assert np.array_equal(data.test_x, held[:, None])
    assert (data.train_y.tolist(), data.test_y.tolist()) == ([0, 1, 2, 3, 4, 5], [0, 1, 2])
    assert (data.num_classes, data.train_x.dtype, len(data.mean)) == (10, np.uint8, 1)


def test_emnists_images_are_turned_upright_its_letters_start_at_0_and_variants_are_chosen(tmp_path):
    train, _ = write_idx(tmp_path, "emnist-letters-", "test", packed=True, labels=(1, 2, 3, 4, 5, 26))
    data = hub(name="emnist", path=str(tmp_path))
    assert np.array_equal(data.train_x[:, 0], train.transpose(0, 2, 1))
    assert data.train_y.tolist() == [0, 1, 2, 3, 4, 25]
    assert data.num_classes == 26
    refused("data.subset is 'balanced'; ", name="emnist", path=str(tmp_path), subset="balanced")
    write_idx(tmp_path, "emnist-balanced-", "test", packed=True)
    refused("has the variants ['balanced', 'letters'], so choose one of them", name="emnist", path=str(tmp_path))
    balanced = hub(name="emnist", path=str(tmp_path), subset="balanced")
    assert (balanced.num_classes, balanced.train_y.tolist()) == (47, [0, 1, 2, 3, 4, 5])


def test_damaged_idx_files_are_refused(tmp_path):
    write_idx(tmp_path)
    file = tmp_path / "train-images-idx3-ubyte"
    whole = file.read_bytes()
    for data, reason in [
        (whole[:-1], "it says 120 bytes and has 119"),
        (whole + b"\0", "it says 120 bytes and has 121"),
        (whole[:9], "it does not start as 3 dimensions of bytes"),
        (b"\0\0\x0d\3" + whole[4:], "it does not start as 3 dimensions of bytes"),
        (gzip.compress(whole)[:-9], "Compressed file ended before"),
        (b"", "it does not start as 3 dimensions of bytes"),
    ]:
        file.write_bytes(data)
        refused(f"data.path has {file}, which cannot be read as IDX ({reason}", path=str(tmp_path))
    file.write_bytes(idx_bytes(random(4, 5, 4)))
    refused(f"data.path has 4 images and 6 labels in {tmp_path}; fetch its files anew", path=str(tmp_path))
    file.unlink()
    refused("its train images (idx-ubyte) are missing, so fetch them", path=str(tmp_path))


# --- CIFAR ---


def python2_pickle(content):
    """As Python 2 wrote CIFAR: protocol 2, byte strings as BINSTRING, arrays of numpy.core.multiarray."""

    def string(value):
        return b"T" + struct.pack("<i", len(value)) + value

    def value_of(value):
        if isinstance(value, bytes):
            return string(value)
        if isinstance(value, int):
            return b"J" + struct.pack("<i", value)
        if isinstance(value, list):
            return b"]" + b"(" + b"".join(map(value_of, value)) + b"e"
        if isinstance(value, tuple):
            return b"(" + b"".join(map(value_of, value)) + b"t"
        dtype = b"cnumpy\ndtype\n" + value_of((b"u1", 0, 1)) + b"R"
        dtype += b"(" + value_of(3) + string(b"|") + b"NNN" + value_of(-1) + value_of(-1) + value_of(0) + b"tb"
        start = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + value_of((0,)) + string(b"b") + b"tR"
        state = b"(" + value_of(1) + value_of(value.shape) + dtype + b"\x89" + string(value.tobytes()) + b"t"
        return start + state + b"b"

    return b"\x80\x02}(" + b"".join(string(key) + value_of(value) for key, value in content.items()) + b"u."


def dumps(protocol):
    return lambda content: pickle.dumps(content, protocol=protocol)


def write_cifar10(folder, dump):
    folder.mkdir(parents=True, exist_ok=True)
    images = random(12, 3072)
    for part, rows in enumerate([(0, 2), (2, 4), (4, 6), (6, 8), (8, 10), (10, 12)]):
        content = {
            b"batch_label": b"a batch",
            b"labels": [int(row) % 10 for row in range(*rows)],
            b"data": images[slice(*rows)],
            b"filenames": [b"a.png", b"b.png"],
        }
        name = f"data_batch_{part + 1}" if part < 5 else "test_batch"
        (folder / name).write_bytes(dump(content))
    return images.reshape(-1, 3, 32, 32)


@pytest.mark.parametrize("dump", [python2_pickle, *map(dumps, range(2, 6))], ids=["python 2", "2", "3", "4", "5"])
def test_cifar10s_pickles_come_out_in_order(tmp_path, dump):
    images = write_cifar10(tmp_path / "cifar-10-batches-py", dump)
    data = hub(name="cifar10", path=str(tmp_path))
    assert np.array_equal(data.train_x, images[:10])
    assert np.array_equal(data.test_x, images[10:])
    assert (data.train_y.tolist(), data.test_y.tolist()) == (list(range(10)), [0, 1])
    assert (data.num_classes, data.mean) == (10, (0.4914, 0.4822, 0.4465))


def test_python_itself_reads_the_pickle_that_the_test_calls_python_2s():
    content = {b"data": random(2, 3), b"labels": [1, 2]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy's old names and aligned types
        read = pickle.loads(python2_pickle(content), encoding="bytes")
    assert np.array_equal(read[b"data"], content[b"data"])
    assert read[b"labels"] == [1, 2]


def test_cifar100_has_fine_labels_or_coarse_ones(tmp_path):
    for name, n in (("train", 6), ("test", 3)):
        content = {
            b"data": random(n, 3072),
            b"fine_labels": [90 + i for i in range(n)],
            b"coarse_labels": [14 + i for i in range(n)],
        }
        (tmp_path / name).write_bytes(python2_pickle(content))
    (tmp_path / "meta").write_bytes(b"")
    fine = hub(name="cifar100", path=str(tmp_path))
    coarse = hub(name="cifar100", path=str(tmp_path), columns={"image": "img", "label": "coarse_label"})
    assert (fine.num_classes, fine.train_y[0], coarse.num_classes, coarse.train_y[0]) == (100, 90, 20, 14)
    assert fine.digest != coarse.digest


class Attack:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("place", ["whole", "inside"])
def test_a_pickle_that_would_run_code_is_refused_by_name_and_does_not_run(tmp_path, protocol, place):
    write_cifar10(tmp_path, dumps(2))
    mark = tmp_path / "it ran"
    attack = Attack(os.system, f"touch '{mark}'")
    content = attack if place == "whole" else {b"data": random(2, 3072), b"labels": [0, 1], b"x": [attack]}
    file = tmp_path / "data_batch_3"
    file.write_bytes(pickle.dumps(content, protocol=protocol))
    refused(f"data.path has {file}, a pickle that asks for {os.system.__module__}.system; only arrays", path=tmp_path)
    assert not mark.exists()
    pickle.loads(file.read_bytes())
    assert mark.exists()  # it would have run


@pytest.mark.parametrize(
    "text",
    [
        b"cbuiltins\neval\n(Vprint(1)\ntR.",
        b"c__builtin__\ngetattr\n(cnumpy\nndarray\nV__class__\ntR.",
        b"cnumpy\nload\n(Vx\ntR.",
        b"cnumpy.core.multiarray\n_reconstruct.__globals__\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x11ndarray.__class__\x93.",
        b"c_codecs\nencode\n(Vx\nVrot13\ntR.",
        b"Psomewhere\n.",
        b"cfunctools\npartial\n(tR.",
        pickle.dumps(np.array([print], dtype=object)),
        pickle.dumps(np.array([None], dtype=object)),
        pickle.dumps({"data": np.zeros(2, [("a", "u1")])}),
    ],
)
def test_names_that_arrays_do_not_need_are_refused(tmp_path, text):
    (tmp_path / "file").write_bytes(text)
    with pytest.raises(ConfigError, match=r"a pickle that asks for .*; only arrays, lists, texts and numbers are read"):
        read_pickle(tmp_path / "file")


@settings(max_examples=60)
@given(data=st.data())
def test_bytes_that_are_no_pickle_end_in_a_sentence(tmp_path_factory, data):
    whole = python2_pickle({b"data": random(2, 6), b"labels": [1, 2]})
    cut = data.draw(st.integers(0, len(whole) - 1))
    noise = data.draw(st.binary(max_size=20))
    file = tmp_path_factory.mktemp("pickle") / "file"
    file.write_bytes(whole[:cut] + noise)
    with contextlib.suppress(ConfigError):  # and nothing else; noise after the end is no error
        read_pickle(file)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", ["u1", "<i4", ">i8", "f4", "?"])
@pytest.mark.parametrize("protocol", range(2, 6))
def test_arrays_of_every_type_and_order_come_out_as_pickle_itself_reads_them(tmp_path, kind, order, protocol):
    array = np.asarray(random(3, 4, 2) % 2, dtype=kind, order=order)
    (tmp_path / "file").write_bytes(pickle.dumps([array, {"a": array}, "text", 1.5], protocol=protocol))
    read = read_pickle(tmp_path / "file")
    assert np.array_equal(read[0], array)
    assert read[0].dtype == array.dtype
    assert np.array_equal(read[1]["a" if "a" in read[1] else b"a"], array)


def test_wrong_cifar_folders_are_refused(tmp_path):
    write_cifar10(tmp_path, dumps(2))
    file = tmp_path / "data_batch_2"
    for content, reason in [
        (b"\x80\x02}", "a pickle (EOFError: Ran out of input)"),
        (pickle.dumps([1, 2]), "a batch of CIFAR (list indices must be"),
        (pickle.dumps({"data": random(2, 3072)}), "a batch of CIFAR ('labels')"),
        (pickle.dumps({"data": random(2, 100), "labels": [0, 1]}), "a batch of CIFAR (cannot reshape"),
        (pickle.dumps({"data": np.zeros((2, 3072)), "labels": [0, 1]}), "a batch of CIFAR (data of type float64"),
    ]:
        file.write_bytes(content)
        refused(f"data.path has {file}, which cannot be read as {reason}", path=str(tmp_path))
    file.unlink()
    refused("data_batch_2 missing, so fetch CIFAR-10 anew", path=str(tmp_path))


# --- SVHN ---


def test_svhns_matlab_files_come_out_with_10_as_the_digit_0(tmp_path):
    io = pytest.importorskip("scipy.io")
    images = random(7, 3, 32, 32)
    for split, rows in (("train", slice(0, 5)), ("test", slice(5, 7))):
        y = np.array([10, 1, 2, 9, 10, 3, 10], np.uint8)[rows, None]
        io.savemat(tmp_path / f"{split}_32x32.mat", {"X": images[rows].transpose(2, 3, 1, 0), "y": y})
    data = hub(name="svhn", path=str(tmp_path))
    assert np.array_equal(data.train_x, images[:5])
    assert np.array_equal(data.test_x, images[5:])
    assert (data.train_y.tolist(), data.test_y.tolist()) == ([0, 1, 2, 9, 0], [3, 0])
    (tmp_path / "test_32x32.mat").write_bytes((tmp_path / "test_32x32.mat").read_bytes()[:300])
    refused("test_32x32.mat, which cannot be read as a MATLAB file of SVHN (", path=str(tmp_path))
    (tmp_path / "test_32x32.mat").unlink()
    refused("test_32x32.mat is missing, so fetch it", path=str(tmp_path))


def test_size_and_mode_change_the_images_of_original_formats_too(tmp_path):
    write_idx(tmp_path)
    data = hub(name="mnist", path=str(tmp_path), size=8, mode="rgb")
    assert data.shape == (3, 8, 8)
    assert np.array_equal(data.train_x[:, 0], data.train_x[:, 2])


# --- LEAF ---


def write_leaf(folder, users):
    """users: split -> user -> (x, y), in two files per split."""
    for split, part in users.items():
        (folder / split).mkdir(parents=True)
        names = list(part)
        for number, some in enumerate([names[:1], names[1:]]):
            content = {
                "users": some,
                "num_samples": [len(part[who][1]) for who in some],
                "user_data": {who: {"x": part[who][0], "y": part[who][1]} for who in some},
            }
            (folder / split / f"all_data_{number}_niid_0_keep_0_{split}_9.json").write_text(json.dumps(content))
    return str(folder)


def test_leafs_femnist_comes_out_as_256_levels_with_its_writers(tmp_path):
    images = random(6, 784)
    x = (images / 255).round(6).tolist()
    users = {
        "train": {"f0001_41": (x[:3], [0, 61, 7]), "f0000_14": (x[3:4], [10])},
        "test": {"f0000_14": (x[4:5], [5]), "e0002_00": (x[5:], [6])},
    }
    data = hub(name="femnist", path=write_leaf(tmp_path, users))
    assert np.array_equal(data.train_x, images[:4].reshape(-1, 1, 28, 28))
    assert np.array_equal(data.test_x, images[4:].reshape(-1, 1, 28, 28))
    assert (data.num_classes, data.train_y.tolist()) == (62, [0, 61, 7, 10])
    assert (data.train_owner.tolist(), data.test_owner.tolist()) == ([2, 2, 2, 1], [1, 0])


def test_leafs_numbers_are_features_and_fractions_are_a_regression(tmp_path):
    x = np.random.default_rng(0).normal(size=(4, 3)).tolist()
    classes = hub(name="mine", path=write_leaf(tmp_path / "a", {s: {"u": (x, [0.0, 1.0, 2.0, 0.0])} for s in SPLITS}))
    assert (classes.objective, classes.num_classes, classes.train_y.dtype) == ("classification", 3, np.int64)
    assert np.array_equal(classes.train_x, np.array(x, np.float32))
    numbers = hub(name="mine", path=write_leaf(tmp_path / "b", {s: {"u": (x, [0.5, 1, 2, 0])} for s in SPLITS}))
    assert (numbers.objective, numbers.train_y.tolist()) == ("regression", [[0.5], [1], [2], [0]])


SPLITS = ("train", "test")


def test_leaf_without_a_test_folder_holds_out_a_share_of_each_user(tmp_path):
    x = random(40, 3).tolist()
    users = {f"u{k}": ([[*row, k] for row in x[10 * k : 10 * k + 10]], [0] * 10) for k in range(4)}
    path = write_leaf(tmp_path, {"train": users})
    refused("no test/*.json in", path=path)
    data = hub(name="mine", path=path, test_fraction=0.2)
    assert np.bincount(data.train_owner).tolist() == [8] * 4
    assert np.bincount(data.test_owner).tolist() == [2] * 4
    assert np.array_equal(data.train_x[:, 3], data.train_owner)


def test_wrong_leaf_files_are_refused(tmp_path):
    path = write_leaf(tmp_path / "set", {s: {"u": ([[1.0, 2.0]], [0])} for s in SPLITS})
    file = tmp_path / "set" / "train" / "all_data_1_niid_0_keep_0_train_9.json"
    for text, reason in [
        ("{", "(JSONDecodeError: Expecting"),
        ("[]", "(TypeError: list indices"),
        ('{"users": ["a"], "user_data": {}}', "(KeyError: 'a')"),
        ('{"users": ["a"], "user_data": {"a": {"x": [[1]], "y": []}}}', "(ValueError: user a has 1 samples and 0 "),
    ]:
        file.write_text(text)
        refused(f"data.path has {file}, which cannot be read as LEAF's JSON {reason}", path=path)
    file.write_text('{"users": ["a"], "user_data": {"a": {"x": ["a.jpg"], "y": [1]}}}')
    refused("whose samples are not lists of numbers of one length", path=path)
