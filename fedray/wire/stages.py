"""From the values of one part to the array that travels, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedray.errors import NumericError


class Stage(Protocol):
    """How values are written. dtype is what travels; both arrays have the same length."""

    dtype: np.dtype

    def encode(self, values: np.ndarray) -> np.ndarray:
        """float32 (n,) to dtype (n,)."""
        ...

    def decode(self, data: np.ndarray) -> np.ndarray:
        """dtype (n,) to float32 (n,)."""
        ...


@dataclass(frozen=True, kw_only=True)
class Float32:
    """Lossless: four bytes a value, little-endian."""

    dtype = np.dtype("<f4")

    def encode(self, values: np.ndarray) -> np.ndarray:
        return values

    def decode(self, data: np.ndarray) -> np.ndarray:
        return data


@dataclass(frozen=True, kw_only=True)
class Float16:
    """IEEE half precision, rounded to nearest even: two bytes a value; at most 65,504 in magnitude."""

    dtype = np.dtype("<f2")

    def encode(self, values: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            half = values.astype(self.dtype)
        if not np.isfinite(half).all():
            raise NumericError(
                f"a value of {values[~np.isfinite(half)][0]:g} does not fit float16, which ends at 65504; "
                "use wire=float32 or lower trainer.lr"
            )
        return half

    def decode(self, data: np.ndarray) -> np.ndarray:
        return data.astype(np.float32)
