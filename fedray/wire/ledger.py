"""What every transfer cost: parameters and bytes by round, client, direction and part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

Direction = Literal["down", "up"]
FLOAT_BYTES = 4
WAYS: tuple[Direction, ...] = ("up", "down")
UNITS = ("params", "bytes")
KINDS = ("value_bytes", "mask_bytes", "header_bytes")


@dataclass(frozen=True, kw_only=True)
class PartSize:
    """The share of one part in a payload. The part "message" stands for the frame and the message's mask.

    chain:   the stages that wrote it, as in "topk:0.1+int8".
    size:    coordinates of its layout; kept: of its support; params: values that travelled, after selection.
    weights: of params, those in tensors of two or more dimensions.
    bits:    nominal bits of one travelling value.
    Counts are of all payloads together where several crossed.
    mask_coder: how the message's mask was written; only on "message".
    """

    part: str
    chain: str = ""
    size: int = 0
    kept: int = 0
    params: int = 0
    weights: int = 0
    bits: float = 0
    value_bytes: int = 0
    mask_bytes: int = 0
    header_bytes: int = 0
    mask_coder: str = ""

    @property
    def total_bytes(self) -> int:
        return self.value_bytes + self.mask_bytes + self.header_bytes

    def __add__(self, other: PartSize) -> PartSize:
        """The shares of the same part in two payloads together."""
        counts = ("size", "kept", "params", "weights", *KINDS)
        return replace(other, **{name: getattr(self, name) + getattr(other, name) for name in counts})


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """What crossed between the server and one client in one direction of a round.

    payloads: how many crossed; more than one where a client caught up with what it had missed.
    exchange: what for: "train", or a question beside the training.
    """

    round: int
    client: int
    direction: Direction
    sizes: tuple[PartSize, ...]
    payloads: int = 1
    exchange: str = "train"

    @property
    def total_bytes(self) -> int:
        return sum(size.total_bytes for size in self.sizes)

    @property
    def params(self) -> int:
        return sum(size.params for size in self.sizes)

    @property
    def dense_bytes(self) -> int:
        """What the same parts would weigh as dense float32, sent once."""
        return sum(size.size for size in self.sizes) * FLOAT_BYTES // self.payloads

    def rows(self) -> list[dict[str, object]]:
        """One dict a part, as it stands in transfers.jsonl."""
        several: dict[str, object] = {"payloads": self.payloads} if self.payloads > 1 else {}
        if self.exchange != "train":
            several["exchange"] = self.exchange
        return [
            {
                "round": self.round,
                "client": self.client,
                "direction": self.direction,
                "part": size.part,
                "chain": size.chain,
                "size": size.size,
                "kept": size.kept,
                "params": size.params,
                "weights": size.weights,
                "bits": size.bits,
                "value_bytes": size.value_bytes,
                "mask_bytes": size.mask_bytes,
                "header_bytes": size.header_bytes,
                **(
                    {"ratio": round(size.size * FLOAT_BYTES / self.payloads / size.total_bytes, 4)} if size.size else {}
                ),
                **several,
                **({"mask_coder": size.mask_coder} if size.part == "message" else {}),
            }
            for size in self.sizes
        ]


def together(payloads: Sequence[tuple[PartSize, ...]]) -> tuple[PartSize, ...]:
    """The sizes of several payloads, added by part."""
    total: dict[str, PartSize] = {}
    for sizes in payloads:
        for size in sizes:
            total[size.part] = total[size.part] + size if size.part in total else size
    return tuple(total.values())


@dataclass
class Ledger:
    """Running totals over a run, by direction."""

    total: dict[str, int] = field(
        default_factory=lambda: {f"{way}_{unit}": 0 for unit in (*UNITS, "dense_bytes") for way in WAYS}
    )

    def enter(self, transfers: Iterable[Transfer]) -> dict[str, float]:
        """Enter one round's transfers and return its `wire/*` metrics, those of the round and the cumulative ones."""
        now = dict.fromkeys(self.total, 0)
        kinds = {f"wire/{way}_{kind}": 0 for way in WAYS for kind in KINDS}
        for transfer in transfers:
            way = transfer.direction
            now[f"{way}_params"] += transfer.params
            now[f"{way}_bytes"] += transfer.total_bytes
            now[f"{way}_dense_bytes"] += transfer.dense_bytes
            for size in transfer.sizes:
                for kind in KINDS:
                    kinds[f"wire/{way}_{kind}"] += getattr(size, kind)
        for name, value in now.items():
            self.total[name] += value
        metrics: dict[str, float] = {f"wire/{way}_{unit}": now[f"{way}_{unit}"] for unit in UNITS for way in WAYS}
        metrics |= kinds
        for unit in UNITS:
            metrics[f"wire/total_{unit}"] = sum(self.total[f"{way}_{unit}"] for way in WAYS)
            metrics |= {f"wire/total_{way}_{unit}": self.total[f"{way}_{unit}"] for way in WAYS}
        for way in WAYS:
            metrics[f"wire/{way}_ratio"] = _ratio(now[f"{way}_dense_bytes"], now[f"{way}_bytes"])
        dense = sum(self.total[f"{way}_dense_bytes"] for way in WAYS)
        metrics["wire/total_ratio"] = _ratio(dense, int(metrics["wire/total_bytes"]))
        return metrics


def _ratio(dense: int, sent: int) -> float:
    """Compression: dense float32 bytes to bytes that crossed; 1.0 where nothing did."""
    return dense / sent if sent else 1.0
