"""Sequences of tokens cut into samples."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def windows(tokens: np.ndarray, length: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of all samples: (n, length) as the tokens, and int64 (n, length) one place further.

    A remainder that fills no sample is left out.
    """
    if len(tokens) <= length:
        return np.empty((0, length), tokens.dtype), np.empty((0, length), np.int64)
    both = np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[::stride]
    return np.ascontiguousarray(both[:, :-1]), both[:, 1:].astype(np.int64)


def encode(texts: Mapping[str, str]) -> tuple[dict[str, np.ndarray], str]:
    """Each text as numbers of its characters (uint8 where all fit, else int32), and all characters in order."""
    points = {who: np.frombuffer(text.encode("utf-32-le"), "<u4") for who, text in texts.items()}
    vocabulary = np.unique(np.concatenate([np.unique(values) for values in points.values()]))
    kind = np.uint8 if len(vocabulary) <= 256 else np.int32
    codes = {who: np.searchsorted(vocabulary, values).astype(kind) for who, values in points.items()}
    return codes, "".join(map(chr, vocabulary.tolist()))
