"""Randomness as a pure function of (seed, names).

A key is a 128-bit digest of a path of names. Folding in more names gives another key; drawing from a key gives
the same numbers whenever, wherever and however often it is done. So a client's batches do not depend on its
place in the cohort, on the actor it runs in or on what was drawn before.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch as pytorch

Name = str | int


@dataclass(frozen=True)
class Key:
    """A named source of randomness: `Key.of(seed).fold("round", 3, "client", 7, "batches")`."""

    digest: bytes

    @classmethod
    def of(cls, seed: int) -> Key:
        return cls(b"").fold("seed", seed)

    def fold(self, *names: Name) -> Key:
        """The key of a longer path. Ints and strings are told apart, and "ab", "c" from "a", "bc"."""
        state = hashlib.blake2b(self.digest, digest_size=16)
        for name in names:
            # NumPy's integers are the same names as Python's.
            data = f"str:{name}".encode() if isinstance(name, str) else f"int:{int(name)}".encode()
            state.update(len(data).to_bytes(4, "little") + data)
        return Key(state.digest())

    @property
    def seed(self) -> int:
        """63 bits of the key, for generators that take an int."""
        return int.from_bytes(self.digest[:8], "little") >> 1

    def numpy(self) -> np.random.Generator:
        """A fresh counter-based NumPy generator at the start of this key's stream."""
        return np.random.Generator(np.random.Philox(key=np.frombuffer(self.digest, "<u8")))

    def torch(self, device: str = "cpu") -> pytorch.Generator:
        """A fresh torch generator seeded by this key."""
        return pytorch.Generator(device=device).manual_seed(self.seed)

    def permutation(self, n: int) -> pytorch.Tensor:
        """A permutation of range(n), int64, shape (n,)."""
        return pytorch.from_numpy(self.numpy().permutation(n))
