"""LEAF's JSON files (Caldas et al. 2018): {"users": [...], "num_samples": [...], "user_data": {user: {x, y}}}."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedray.data.dataset import Kind
from fedray.data.sources.cache import Source, hash_files
from fedray.data.sources.images import Mode, fit
from fedray.data.sources.splits import Decoded, Split, refuse_no_test, settle
from fedray.data.sources.windows import encode
from fedray.errors import ConfigError

_FEMNIST_SIDE = 28


def find(folder: Path) -> dict[str, list[Path]] | None:
    """The JSON files of each split in folder/train and folder/test; None if there are none."""
    files = {split: sorted((folder / split).glob("*.json")) for split in ("train", "test")}
    return {split: paths for split, paths in files.items() if paths} if files["train"] else None


def source(
    files: Mapping[str, Sequence[Path]],
    *,
    test_fraction: float | None,
    length: int | None = None,
    size: int | None = None,
    mode: Mode | None = None,
) -> Source:
    """LEAF's files as a source; the owner of a sample is its user.

    What samples are is told by the first one: text of several characters is to be continued (its last target is y);
    784 numbers between 0 and 1 are FEMNIST's images of 28x28, kept as 256 levels; other numbers are features. y is a
    class if it is whole, else a number to predict.
    """
    if "test" not in files:
        refuse_no_test(files["train"][0].parent.parent, "test/*.json", test_fraction)
    fraction = None if "test" in files else test_fraction
    settings = {"size": size, "mode": mode, "length": length, "test_fraction": fraction}

    def decode(scratch: Path) -> Decoded:
        splits = {split: _read(paths) for split, paths in files.items()}
        if isinstance(splits["train"].x[0], str):
            return _text(splits, scratch, fraction, length)
        return _numbers(splits, scratch, fraction, size, mode)

    return Source(
        kind="leaf",
        settings=settings,
        place=str(files["train"][0].parent),
        contents=lambda: hash_files(files),
        open=lambda: decode,
    )


@dataclass(frozen=True, kw_only=True)
class _Samples:
    """Of one split, as they stand in its files. place: of the first file, for sentences."""

    place: Path
    x: list[Any]
    y: list[Any]
    owner: np.ndarray


def _read(paths: Sequence[Path]) -> _Samples:
    x: list[Any] = []
    y: list[Any] = []
    owners: list[np.ndarray] = []
    for path in paths:
        try:
            content = json.loads(path.read_bytes())
            for user in content["users"]:
                data = content["user_data"][user]
                if len(data["x"]) != len(data["y"]):
                    raise ValueError(f"user {user} has {len(data['x'])} samples and {len(data['y'])} targets")
                # FEMNIST's numbers would take many times their room as Python's lists.
                x += [np.array(each, np.float32) if isinstance(each, list) else each for each in data["x"]]
                y += data["y"]
                owners.append(np.full(len(data["x"]), str(user)))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"data.path has {path}, which cannot be read as LEAF's JSON ({type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else 'empty'}); make it anew with LEAF's preprocess.sh"
            ) from error
    if not x:
        raise ConfigError(f"data.path has no samples in {paths[0]}; make the file anew with LEAF's preprocess.sh")
    return _Samples(place=paths[0], x=x, y=y, owner=np.concatenate(owners))


def _text(splits: Mapping[str, _Samples], scratch: Path, test_fraction: float | None, length: int | None) -> Decoded:
    """Each sample and its next character: targets are the sample one place further, LEAF's y the last of them."""
    lines: dict[str, str] = {}
    for split, samples in splits.items():
        there = len(samples.x[0])
        for x, y in zip(samples.x, samples.y, strict=True):
            if not isinstance(x, str) or not isinstance(y, str) or len(y) != 1 or len(x) != there:
                raise ConfigError(
                    f"data.path has {samples.place}, where x is {str(x)[:20]!r} and y is {str(y)[:20]!r}; only texts "
                    "of one length with the character that follows are read"
                )
        if length not in (None, there):
            raise ConfigError(
                f"data.length is {length}; the samples in {samples.place} have {there} characters, so write that"
            )
        lines[split] = "".join(x + y for x, y in zip(samples.x, samples.y, strict=True))
    codes, vocabulary = encode(lines)
    found = {}
    for split, samples in splits.items():
        both = codes[split].reshape(len(samples.x), -1)
        found[split] = Split(x=np.ascontiguousarray(both[:, :-1]), y=both[:, 1:].astype(np.int64), owner=samples.owner)
    return settle(
        found["train"],
        found.get("test"),
        scratch=scratch,
        test_fraction=test_fraction,
        objective="next_token",
        vocabulary=len(vocabulary),
    )


def _numbers(
    splits: Mapping[str, _Samples], scratch: Path, test_fraction: float | None, size: int | None, mode: Mode | None
) -> Decoded:
    found = {}
    objective: Kind = "classification"
    images = splits["train"].x[0].size == _FEMNIST_SIDE**2 if isinstance(splits["train"].x[0], np.ndarray) else False
    for split, samples in splits.items():
        try:
            x, y = np.stack(samples.x), np.asarray(samples.y)
            if x.dtype != np.float32 or x.ndim != 2 or y.dtype.kind not in "iuf" or y.ndim != 1:
                raise ValueError(f"x of type {x.dtype} and shape {x.shape[1:]}, y of type {y.dtype}")
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"data.path has {samples.place}, whose samples are not lists of numbers of one length ({error}); only "
                "those and texts to be continued are read"
            ) from error
        images = images and bool(x.min() >= 0) and bool(x.max() <= 1)
        if y.dtype.kind == "f" and (y == np.rint(y)).all():
            y = y.astype(np.int64)
        if y.dtype.kind == "f":
            objective, y = "regression", y.astype(np.float32)[:, None]
        else:
            y = y.astype(np.int64)
        found[split] = Split(x=x, y=y, owner=samples.owner)
    if (size is not None or mode is not None) and not images:
        raise ConfigError("data.size and data.mode change images, and LEAF's samples are none here; leave them null")
    finished = {}
    for split, part in found.items():
        if images:
            levels = np.rint(part.x * 255).astype(np.uint8).reshape(-1, 1, _FEMNIST_SIDE, _FEMNIST_SIDE)
            x = fit(levels, size, mode)
        else:
            x = part.x
        y = part.y.astype(np.float32).reshape(-1, 1) if objective == "regression" else part.y
        finished[split] = Split(x=x, y=y, owner=part.owner)
    return settle(
        finished["train"],
        finished.get("test"),
        scratch=scratch,
        test_fraction=test_fraction,
        objective=objective,
    )
