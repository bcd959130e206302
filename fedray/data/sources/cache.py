"""What is decoded once: arrays on disk under the hash of what they were read from, mapped by all who need them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedray.data.dataset import Dataset, Kind, digest_arrays, seal
from fedray.data.sources.images import statistics
from fedray.data.sources.splits import Decoded
from fedray.errors import ConfigError

_log = logging.getLogger(__name__)

_CACHE_FORMAT = 2  # raise it when what is written to the cache changes
_ARRAYS = ("train_x", "train_y", "test_x", "test_y")
_OWNERS = ("train_owner", "test_owner")

Decoder = Callable[[Path], Decoded]
Constants = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Something that can be decoded.

    kind, settings: how it is read; with the contents they name the folder in the cache.
    place:          where it lies, for a log.
    contents:       hashes of what is read, by split.
    open:           checks what can be checked before anything is written, and gives the decoder: it may put large
                    arrays as memory maps into the folder that it is called with.
    """

    kind: str
    settings: Mapping[str, Any]
    place: str
    contents: Callable[[], Mapping[str, Sequence[str]]]
    open: Callable[[], Decoder]


def hash_file(path: Path) -> str:
    """Hex blake2b of the content. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, hashlib.blake2b).hexdigest()
    except OSError as error:
        raise ConfigError(f"data.path has {path}, which cannot be read ({error.strerror}); allow reading it") from error


def hash_files(files: Mapping[str, Iterable[Path]]) -> dict[str, list[str]]:
    return {split: [hash_file(path) for path in paths] for split, paths in files.items()}


def cached(
    source: Source,
    *,
    name: str,
    constants: Constants | None = None,
    num_classes: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Dataset:
    """The data set of a source, mapped read-only from FEDRAY_CACHE (default ~/.cache/fedray/data), decoded if new.

    constants:   mean and standard deviation of each channel; None for those of the training samples.
    num_classes: None for what the source says, or one more than the largest label.
    mean, std:   in place of those, whatever the samples are; unchecked.
    """
    folder = cache_root() / _fingerprint(source)
    if not folder.exists():
        _decode(source, folder)
    return _load(name, folder, constants, num_classes, mean, std)


def cache_root() -> Path:
    return Path(os.environ.get("FEDRAY_CACHE") or "~/.cache/fedray/data").expanduser()


def _fingerprint(source: Source) -> str:
    """Hex blake2b of contents and of how they are read; names and places of files do not matter."""
    facts = {"format": _CACHE_FORMAT, "kind": source.kind, "settings": source.settings, "contents": source.contents()}
    text = json.dumps(facts, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _decode(source: Source, folder: Path) -> None:
    """Write the decoded arrays as `folder`, which appears whole or not at all."""
    decode = source.open()
    _log.info("decoding %s into %s, once", source.place, folder)
    scratch = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        scratch.mkdir(parents=True)
        decoded = decode(scratch)
        arrays = decoded.arrays()
        for which, array in arrays.items():
            _store(array, scratch, which)
        for path in scratch.glob("raw_*"):
            path.unlink()
        mean, std = ((0.0,), (1.0,)) if decoded.vocabulary is not None else statistics(arrays["train_x"])
        meta = {
            "content": digest_arrays(*arrays.values()),
            "num_classes": decoded.classes(),
            "objective": decoded.objective,
            "vocabulary": decoded.vocabulary,
            "mean": mean,
            "std": std,
        }
        with (scratch / "meta.json").open("w") as file:
            json.dump(meta, file)
            file.flush()
            os.fsync(file.fileno())
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.exists():  # if it does, another process has decoded the same files meanwhile
                raise
    except OSError as error:  # reading raises ConfigError, so this is about writing
        raise ConfigError(
            f"FEDRAY_CACHE is {str(folder.parent)!r}, where decoded data go; it cannot be written ({error.strerror}), "
            "so set it to a folder that can"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)  # gone already if it was renamed


def _store(array: np.ndarray, scratch: Path, which: str) -> None:
    if isinstance(array, np.memmap) and array.filename is not None and Path(array.filename).parent == scratch:
        array.flush()
        Path(array.filename).rename(scratch / f"{which}.npy")
    else:
        np.save(scratch / f"{which}.npy", array)


def _load(
    name: str,
    folder: Path,
    constants: Constants | None,
    num_classes: int | None,
    chosen_mean: tuple[float, ...] | None,
    chosen_std: tuple[float, ...] | None,
) -> Dataset:
    """The data set that lies decoded in `folder`."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        there = [*_ARRAYS, *(which for which in _OWNERS if (folder / f"{which}.npy").exists())]
        arrays = {which: np.asarray(np.load(folder / f"{which}.npy", mmap_mode="r")) for which in there}
        content, objective, vocabulary = meta["content"], meta["objective"], meta["vocabulary"]
        if num_classes is None:
            num_classes = int(meta["num_classes"])
        mean, std = tuple(meta["mean"]), tuple(meta["std"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"FEDRAY_CACHE has the damaged folder {folder} ({error}); delete that folder") from error
    # Constants are those of pixels; samples of any other kind keep their own.
    if constants is not None and arrays["train_x"].dtype == np.uint8 and arrays["train_x"].ndim == 4:
        if len(constants[0]) != len(mean):
            raise ConfigError(
                f"data.name is {name!r}, whose images have {len(constants[0])} channels, and those in data.path have "
                f"{len(mean)}; give the folder of {name} or another data.name"
            )
        mean, std = constants
    mean = mean if chosen_mean is None else chosen_mean
    std = std if chosen_std is None else chosen_std
    scale = 1 / 255 if arrays["train_x"].dtype == np.uint8 and vocabulary is None else 1.0
    kind: Kind = objective
    dataset = Dataset(
        name=name,
        **arrays,
        num_classes=num_classes,
        mean=mean,
        std=std,
        scale=scale,
        digest=seal(
            content,
            num_classes=num_classes,
            mean=mean,
            std=std,
            scale=scale,
            objective=kind,
            vocabulary=vocabulary,
        ),
        objective=kind,
        vocabulary=vocabulary,
    )
    dataset.check()
    return dataset
