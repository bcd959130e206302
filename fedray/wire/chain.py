"""A chain of stages: the values of one part to bytes and back.

    delta?  transform*  writer?  squeeze?

`delta` sends the change against what the receiver holds; a chain without a writer writes float32.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from fedray.errors import ConfigError, NumericError, WireError
from fedray.keys import Key
from fedray.tree import Tree, tensor_view
from fedray.wire.packet import Bytes
from fedray.wire.values import Entropy, Squeeze, Transform, Where, Writer, expect
from fedray.wire.writers import Float32

FLOAT32 = Float32()
SIDE = struct.Struct("<I")  # the length of a transform's side information


@dataclass(frozen=True, kw_only=True)
class Delta:
    """The change against what the receiver holds: on the way down the model that it decoded last, on the way up what
    it sent for the same part. Adding a float32 difference back may be off by a rounding, so it counts as lossy."""

    label = "delta"
    lossy = True
    changes_only = False


@dataclass(frozen=True)
class Written:
    """What a chain made of the values of one part.

    pieces: their bytes, in order. inner: what the written values stand for. side_bytes, framing_bytes: the shares
    of positions and factors' shapes, and of their lengths. warm: what the sender starts from next time.
    """

    pieces: tuple[Bytes, ...]
    inner: Where
    side_bytes: int
    framing_bytes: int
    warm: Tree | None

    @property
    def num_bytes(self) -> int:
        return sum(len(piece) for piece in self.pieces)


@dataclass(frozen=True)
class Chain:
    """Stages in the one order that makes sense; `Chain.of` refuses any other."""

    delta: bool = False
    transforms: tuple[Transform, ...] = ()
    writer: Writer = FLOAT32
    squeeze: Squeeze | None = None

    @classmethod
    def of(cls, stages: Mapping[str, Any], group: str) -> Chain:
        """The chain of these stages, by the names under which the configuration has them.

        Raises ConfigError, which names the stage and the rule, for an order that makes no sense.
        """
        kinds, found = [], {"delta": [], "transform": [], "writer": [], "squeeze": []}  # type: ignore[var-annotated]
        for name, stage in _flattened(stages):
            kind = _kind(stage)
            if kind is None:
                raise ConfigError(f"{group}.{name} is a {type(stage).__name__}; it must be a stage of fedray.wire")
            if kinds and ORDER.index(kind) < ORDER.index(kinds[-1]):
                raise ConfigError(f"{group}.{name} is a {NAMES[kind]}; it comes before a {NAMES[kinds[-1]]}: {RULE}")
            if kind != "transform" and kind in kinds:
                raise ConfigError(
                    f"{group}.{name} is a second {NAMES[kind]}; a chain has one at most: leave one out, as in "
                    f"{group}.{name}=null"
                )
            if kind == "transform" and any(one.structured for one in (*found[kind], stage)) and found[kind]:
                raise ConfigError(f"{group}.{name} cannot stand beside a low-rank stage; leave one of them out")
            kinds.append(kind)
            found[kind].append(stage)
        return cls(
            delta=bool(found["delta"]),
            transforms=tuple(found["transform"]),
            writer=found["writer"][0] if found["writer"] else FLOAT32,
            squeeze=found["squeeze"][0] if found["squeeze"] else None,
        )

    @cached_property
    def label(self) -> str:
        """How the ledger names it: "topk:0.1+int8"."""
        stages = [*self.transforms, self.writer, *([self.squeeze] if self.squeeze else [])]
        if self.transforms and isinstance(self.writer, Float32):
            stages.remove(self.writer)
        return "+".join(["delta"] * self.delta + [stage.label for stage in stages])

    @property
    def lossy(self) -> bool:
        return self.delta or any(stage.lossy for stage in (*self.transforms, self.writer))

    @property
    def changes_only(self) -> bool:
        return not self.delta and any(stage.changes_only for stage in (*self.transforms, self.writer))

    def encode(
        self,
        values: np.ndarray,
        where: Where,
        *,
        key: Key,
        warm: Tree | None,
        entropy: Entropy,
        checked: bool = True,
    ) -> Written:
        """float32 (n,), after the difference if there is one. checked: whether NaN and infinities are refused here,
        by NumericError naming the tensor; a chain with loss always does.
        """
        if checked or self.lossy:
            _finite(values, where)
        pieces: list[Bytes] = []
        side_bytes = 0
        for number, transform in enumerate(self.transforms):
            keyed = key.fold(number)
            values, where, side, warm = transform.encode(values, where, key=keyed, warm=warm, entropy=entropy)
            pieces += [SIDE.pack(len(side)), side]
            side_bytes += len(side)
        data = self.writer.encode(values, where, key=key)
        pieces.append(data if self.squeeze is None else self.squeeze.encode(data))
        return Written(tuple(pieces), where, side_bytes, SIDE.size * len(self.transforms), warm)

    def decode(self, data: memoryview, where: Where) -> np.ndarray:
        """float32 (where.size,), possibly a read-only view of the data. Raises WireError."""
        places, sides = [where], []
        for transform in self.transforms:
            expect(len(data) >= SIDE.size, "the values of a part end before their positions")
            (length,) = SIDE.unpack_from(data)
            expect(length <= len(data) - SIDE.size, f"the positions of a part declare {length} bytes, and fewer follow")
            sides.append(bytes(data[SIDE.size : SIDE.size + length]))
            data = data[SIDE.size + length :]
            places.append(transform.place(sides[-1], places[-1]))
        num_bytes = self.writer.num_bytes(places[-1])
        if self.squeeze is not None:
            data = memoryview(self.squeeze.decode(data, num_bytes))
        if len(data) != num_bytes:
            raise WireError(f"{len(data)} bytes of values; {num_bytes} were expected for {places[-1].size} of them")
        values = self.writer.decode(data, places[-1])
        for number in reversed(range(len(self.transforms))):
            values = self.transforms[number].decode(values, sides[number], places[number], places[number + 1])
        return values


ORDER = ("delta", "transform", "writer", "squeeze")
NAMES = dict(zip(ORDER, ("delta", "selection or low rank", "number format", "zstd"), strict=True))
RULE = "a chain goes from delta to selection or low rank, then to a number format, then to zstd"


def _kind(stage: Any) -> str | None:
    if isinstance(stage, Delta):
        return "delta"
    if hasattr(stage, "place"):
        return "transform"
    if hasattr(stage, "num_bytes"):
        return "writer"
    return "squeeze" if hasattr(stage, "encode") and hasattr(stage, "label") else None


def _flattened(stages: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Stages one by one: a function such as `stc` gives several."""
    flat = []
    for name, stage in stages.items():
        flat += [(name, one) for one in stage] if isinstance(stage, tuple | list) else [(name, stage)]
    return flat


def _finite(values: np.ndarray, where: Where) -> None:
    if not len(values):
        return
    # NaN and infinities come through a sum, which takes a fifth of the time of looking at each value.
    if math.isfinite(float(tensor_view(values).sum())):
        return
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):  # not only a sum beyond float32
        at = int(bad[0])
        raise NumericError(
            f"tensor {where.name_of(at)!r}: a value is {values[at]}, which cannot be sent; lower trainer.lr or set "
            "trainer.clip_norm"
        )
