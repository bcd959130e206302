"""Images in folders that are called as their classes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from fedray.data.sources.cache import Decoder, Source, hash_file
from fedray.data.sources.images import Mode, stack
from fedray.data.sources.splits import Decoded, Split, refuse_no_test, settle
from fedray.data.sources.tables import TEST_SPLITS
from fedray.errors import ConfigError

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".ppm", ".pgm", ".tif", ".tiff"}
_ANNOTATIONS = "val_annotations.txt"

Labelled = list[tuple[Path, str]]


def source(folder: Path, *, size: int | None, mode: Mode | None, test_fraction: float | None) -> Source | None:
    """train/CLASS/*.png and test/CLASS/*.png (or validation, valid, val, dev), or CLASS/*.png without a test set.

    Images may lie deeper in a class. Tiny-ImageNet: the classes of val/images stand in val/val_annotations.txt, and
    its test folder, whose classes were never published, is left out.
    """
    files: dict[str, Labelled] = {"train": _labelled(folder / "train")}
    if files["train"]:
        for name in TEST_SPLITS:
            if name == "test" and (folder / "val" / _ANNOTATIONS).is_file():
                continue
            if found := _labelled(folder / name):
                files["test"] = found
                break
    else:
        files["train"] = _labelled(folder, deep=False)
        if not files["train"]:
            return None
    holds_test = "test" in files
    if not holds_test:
        refuse_no_test(folder, "test/CLASS/*.png", test_fraction)
    return Source(
        kind="folders",
        settings={"size": size, "mode": mode, "test_fraction": None if holds_test else test_fraction},
        place=str(folder),
        contents=lambda: {split: _hashes(labelled) for split, labelled in files.items()},
        open=partial(_open, files, size, mode, test_fraction),
    )


def _labelled(folder: Path, *, deep: bool = True) -> Labelled:
    """Images with their classes, in sorted order of classes and names; deep: those in folders of a class too."""
    if not folder.is_dir():
        return []
    annotations = folder / _ANNOTATIONS
    if annotations.is_file():
        return _annotated(folder, annotations)
    return [
        (path, home.name)
        for home in sorted(folder.iterdir())
        if home.is_dir() and not home.name.startswith(".")
        for path in sorted(home.rglob("*") if deep else home.glob("*"))
        if path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")
    ]


def _annotated(folder: Path, annotations: Path) -> Labelled:
    found = []
    for number, line in enumerate(annotations.read_text().splitlines(), 1):
        fields = line.split("\t")
        path = folder / "images" / fields[0]
        if len(fields) < 2 or not path.is_file():
            raise ConfigError(
                f"data.path has {annotations}, whose line {number} names no image and class; fetch the folder anew"
            )
        found.append((path, fields[1]))
    return sorted(found)


def _hashes(labelled: Labelled) -> list[str]:
    """One hash for all images of a split: their contents, names and classes."""
    state = hashlib.blake2b(digest_size=16)
    for path, label in labelled:
        state.update(f"{label}\0{path.name}\0{hash_file(path)}\n".encode())
    return [state.hexdigest()]


def _open(files: Mapping[str, Labelled], size: int | None, mode: Mode | None, test_fraction: float | None) -> Decoder:
    try:
        import PIL.Image  # noqa: F401  here, so that it is missed before anything is written
    except ImportError as error:
        raise ConfigError(
            f"data.path is a folder of images, and {error.name} to read them cannot be imported; run "
            '`pip install "fedray[hub]"`'
        ) from error

    def decode(scratch: Path) -> Decoded:
        splits = {}
        for split, labelled in files.items():
            file = scratch / f"raw_{split}.npy"
            x = stack(_contents(labelled), count=len(labelled), file=file, size=size, mode=mode)
            splits[split] = Split(x=x, y=np.array([label for _, label in labelled]))
        return settle(splits["train"], splits.get("test"), scratch=scratch, test_fraction=test_fraction)

    return decode


def _contents(labelled: Labelled) -> Iterator[tuple[bytes, str]]:
    for path, _ in labelled:
        try:
            yield path.read_bytes(), str(path)
        except OSError as error:
            raise ConfigError(f"data.path has {path}, which cannot be read ({error.strerror})") from error
