"""Image sets in the formats in which their authors publish them: IDX, CIFAR's pickles, SVHN's MATLAB files."""

from __future__ import annotations

import gzip
import importlib
import io
import math
import pickle
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedray.data.sources.cache import Source, hash_files
from fedray.data.sources.images import Mode, fit
from fedray.data.sources.splits import Decoded, Split, settle
from fedray.errors import ConfigError

_IDX = re.compile(
    r"(?:emnist-(?P<variant>\w+)-)?(?P<split>train|t10k|test)-(?P<what>images|labels)[-.]idx\d-ubyte(?:\.gz)?"
)
_EMNIST_CLASSES = {"byclass": 62, "bymerge": 47, "balanced": 47, "letters": 26, "digits": 10, "mnist": 10}
_CIFAR_BATCH = re.compile(r"data_batch_(\d)")
_CIFAR_SHAPE = (3, 32, 32)

Load = Callable[[Sequence[Path]], tuple[np.ndarray, np.ndarray]]
"""Files of one split to images, uint8 (n, C, H, W), and labels, int64 (n,)."""


def _source(
    kind: str,
    files: Mapping[str, Sequence[Path]],
    load: Load,
    size: int | None,
    mode: Mode | None,
    num_classes: int | None,
    detail: str = "",
) -> Source:
    def decode(scratch: Path) -> Decoded:
        splits = {}
        for split, paths in files.items():
            x, y = load(paths)
            if len(x) != len(y) or not len(x):
                raise ConfigError(
                    f"data.path has {len(x)} images and {len(y)} labels in {paths[0].parent}; fetch its files anew"
                )
            splits[split] = Split(x=fit(x, size, mode), y=y)
        return settle(splits["train"], splits["test"], scratch=scratch, test_fraction=None, num_classes=num_classes)

    return Source(
        kind=kind,
        settings={"size": size, "mode": mode, "num_classes": num_classes, "detail": detail},
        place=str(files["train"][0].parent),
        contents=lambda: hash_files(files),
        open=lambda: decode,
    )


# --- IDX: MNIST, Fashion-MNIST, EMNIST ---


def idx(folder: Path, *, name: str, subset: str | None, size: int | None, mode: Mode | None) -> Source | None:
    """MNIST's format: train-images-idx3-ubyte, train-labels-idx1-ubyte and the same with t10k or test, also as .gz.

    EMNIST's names begin with emnist-VARIANT-; `subset` chooses among several. Its images are stored transposed, and
    its letters are numbered from 1: both are put right, also for files without that prefix if data.name is emnist.
    """
    found: dict[str, dict[tuple[str, str], Path]] = {}
    for path in sorted(folder.iterdir(), reverse=True):  # a plain file comes after its .gz, and is taken
        match = _IDX.fullmatch(path.name)
        if match and path.is_file():
            split = "train" if match["split"] == "train" else "test"
            found.setdefault(match["variant"] or "", {})[split, match["what"]] = path
    if not found:
        return None
    if subset not in found and (len(found) > 1 or (subset is not None and "" not in found)):
        raise ConfigError(
            f"data.subset is {subset!r}; {folder} has the variants {sorted(found)}, so choose one of them, as in "
            f"data.subset={max(found)}"
        )
    variant = subset if subset in found else next(iter(found))
    there = found[variant]
    for split in ("train", "test"):
        for what in ("images", "labels"):
            if (split, what) not in there:
                raise ConfigError(
                    f"data.path is {str(folder)!r}: its {split} {what} (idx-ubyte) are missing, so fetch them"
                )
    emnist = bool(variant) or name == "emnist"
    letters = emnist and (variant or subset) == "letters"

    def load(paths: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
        x, y = _read_idx(paths[0], 3), _read_idx(paths[1], 1).astype(np.int64)
        return (x.transpose(0, 2, 1) if emnist else x)[:, None], y - letters

    files = {split: [there[split, "images"], there[split, "labels"]] for split in ("train", "test")}
    classes = _EMNIST_CLASSES.get(variant or subset or "") if emnist else None
    return _source("idx", files, load, size, mode, classes, "emnist" if emnist else "")


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The array of uint8 in an IDX file: two zero bytes, type, number of dimensions, sizes (big-endian), values."""
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path, "IDX", str(error)) from error
    head = 4 + 4 * dimensions
    if len(data) < head or data[:4] != bytes((0, 0, 8, dimensions)):
        raise _damaged(path, "IDX", f"it does not start as {dimensions} dimensions of bytes")
    sizes = tuple(np.frombuffer(data[4:head], ">u4").tolist())
    if len(data) - head != math.prod(sizes):
        raise _damaged(path, "IDX", f"it says {math.prod(sizes)} bytes and has {len(data) - head}")
    return np.frombuffer(data, np.uint8, offset=head).reshape(sizes)


def _damaged(path: Path, kind: str, reason: str) -> ConfigError:
    reason = reason.splitlines()[0] if reason else "damaged"
    return ConfigError(f"data.path has {path}, which cannot be read as {kind} ({reason}); fetch the file anew")


# --- CIFAR's pickles ---


def cifar(folder: Path, *, label: str | None, size: int | None, mode: Mode | None) -> Source | None:
    """CIFAR for Python: data_batch_1 to 5 and test_batch (CIFAR-10), or train and test beside meta (CIFAR-100).

    label: "coarse_label" for CIFAR-100's 20 superclasses, anything else for its 100 classes. The pickles are read
    without running code: see `read_pickle`.
    """
    names = {path.name for path in folder.iterdir() if path.is_file()}
    batches = sorted(name for name in names if _CIFAR_BATCH.fullmatch(name))
    if batches or "test_batch" in names:
        wanted = [f"data_batch_{part}" for part in range(1, 6)]
        missing = [name for name in [*wanted, "test_batch"] if name not in names]
        if missing:
            raise ConfigError(f"data.path is {str(folder)!r}: {', '.join(missing)} missing, so fetch CIFAR-10 anew")
        files, labels = {"train": wanted, "test": ["test_batch"]}, "labels"
    elif {"train", "test", "meta"} <= names:
        files = {"train": ["train"], "test": ["test"]}
        labels = "coarse_labels" if label == "coarse_label" else "fine_labels"
    else:
        return None

    def load(paths: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
        parts = [_cifar_batch(path, labels) for path in paths]
        return np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts])

    paths = {split: [folder / name for name in parts] for split, parts in files.items()}
    classes = {"labels": 10, "fine_labels": 100, "coarse_labels": 20}[labels]
    return _source("cifar", paths, load, size, mode, classes)


def _cifar_batch(path: Path, labels: str) -> tuple[np.ndarray, np.ndarray]:
    content = read_pickle(path)
    if isinstance(content, dict):
        content = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in content.items()}
    try:
        x, y = np.asarray(content["data"]), np.asarray(content[labels])
        if x.dtype != np.uint8 or x.ndim != 2 or y.dtype.kind not in "iu" or y.ndim != 1:
            raise ValueError(f"data of type {x.dtype} and shape {x.shape}, labels of type {y.dtype}")
        return x.reshape(-1, *_CIFAR_SHAPE), y.astype(np.int64)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, "a batch of CIFAR", str(error)) from error


def read_pickle(path: Path) -> Any:
    """What a pickle of arrays, dictionaries, lists, texts and numbers holds, without running any code of it.

    Nothing that the file names is imported: the few names by which NumPy saves an array stand for the plain values
    below, and every other name is refused. Text of Python 2 becomes bytes. Raises ConfigError.
    """
    try:
        return _rebuild(_Reader(io.BytesIO(path.read_bytes()), encoding="bytes").load())
    except ConfigError:
        raise
    except _ForeignName as error:
        raise ConfigError(
            f"data.path has {path}, a pickle that asks for {error}; only arrays, lists, texts and numbers are read, so "
            "fetch the file from its authors"
        ) from error
    except Exception as error:  # whatever a broken pickle makes Python raise
        raise _damaged(path, "a pickle", f"{type(error).__name__}: {error}") from error


class _ForeignName(Exception):
    """A name that a pickle of arrays has no need of."""


class _Type:
    """A type of values as NumPy pickles it: "u1" and the byte order."""

    def __init__(self, code: str | bytes, *_: object) -> None:
        self.code = code.decode("latin1") if isinstance(code, bytes) else code
        self.order = "|"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1]
        self.order = order.decode("latin1") if isinstance(order, bytes) else order

    def plain(self) -> np.dtype[Any]:
        if not re.fullmatch(r"[|<>=]?[biuf][1248]", self.code) or self.order not in ("|", "<", ">", "="):
            raise _ForeignName(f"an array of type {self.code!r}")
        return np.dtype(self.code).newbyteorder(self.order)  # type: ignore[arg-type]


class _Array:
    """An array as NumPy pickles it: shape, type and bytes."""

    def __init__(self, shape: Any = (), kind: Any = None, by_columns: bool = False, data: Any = b"") -> None:
        self.shape, self.kind, self.by_columns, self.data = shape, kind, by_columns, data

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, self.kind, self.by_columns, self.data = state

    def plain(self) -> np.ndarray:
        if not isinstance(self.kind, _Type) or not isinstance(self.data, bytes | bytearray):
            raise _ForeignName("an array of objects")
        values = np.frombuffer(self.data, self.kind.plain())
        return values.reshape(tuple(self.shape), order="F" if self.by_columns else "C")


class _NdarrayName:
    """Stands for numpy.ndarray where a pickle only mentions it."""


def _empty_array(*_: object) -> _Array:
    return _Array()


def _array_of_buffer(data: bytes, kind: _Type, shape: tuple[int, ...], order: str) -> _Array:
    return _Array(shape=shape, kind=kind, by_columns=order == "F", data=data)


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise _ForeignName(f"the encoding {encoding!r}")
    return text.encode("latin1")


_NAMES: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _NdarrayName,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _latin1,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _empty_array for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _array_of_buffer for core in ("core", "_core")},
    **{(builtins, "bytearray"): bytearray for builtins in ("builtins", "__builtin__")},
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise _ForeignName(f"{module}.{name}")
        return _NAMES[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise _ForeignName(f"the persistent object {pid!r}")


def _rebuild(value: Any) -> Any:
    """Arrays in the place of what stood for them."""
    if isinstance(value, _Array):
        return value.plain()
    if isinstance(value, dict):
        return {key: _rebuild(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rebuild(inner) if isinstance(inner, _Array | dict | list) else inner for inner in value]
    return value


# --- SVHN ---


def svhn(folder: Path, *, size: int | None, mode: Mode | None) -> Source | None:
    """SVHN's cropped digits: train_32x32.mat and test_32x32.mat, whose label 10 is the digit 0."""
    files = {split: [folder / f"{split}_32x32.mat"] for split in ("train", "test")}
    there = [split for split, paths in files.items() if paths[0].is_file()]
    if not there:
        return None
    if len(there) == 1:
        missing = ({*files} - {*there}).pop()
        raise ConfigError(f"data.path is {str(folder)!r}: {missing}_32x32.mat is missing, so fetch it")
    return _source("svhn", files, lambda paths: _read_mat(paths[0]), size, mode, 10)


def _read_mat(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        content = importlib.import_module("scipy.io").loadmat(str(path), variable_names=["X", "y"])
        x, y = np.asarray(content["X"]), np.asarray(content["y"]).reshape(-1)
        if x.dtype != np.uint8 or x.ndim != 4 or y.dtype.kind not in "iu":
            raise ValueError(f"X of type {x.dtype} and shape {x.shape}, y of type {y.dtype}")
    except ImportError as error:
        raise ConfigError(
            f"data.path has {path}, and scipy to read it cannot be imported; run `pip install scipy`"
        ) from error
    except Exception as error:  # whatever a broken file makes scipy raise
        raise _damaged(path, "a MATLAB file of SVHN", f"{type(error).__name__}: {error}") from error
    return np.ascontiguousarray(x.transpose(3, 2, 0, 1)), y.astype(np.int64) % 10
