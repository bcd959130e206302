"""What every transfer cost: parameters and bytes by round, client, direction and part."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

Direction = Literal["down", "up"]


@dataclass(frozen=True, kw_only=True)
class PartSize:
    """The share of one part in a payload. The part "message" stands for the frame and the message's mask."""

    part: str
    params: int
    value_bytes: int
    mask_bytes: int
    header_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.value_bytes + self.mask_bytes + self.header_bytes


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """One payload that crossed. mask_coder: how its mask was written."""

    round: int
    client: int
    direction: Direction
    mask_coder: str
    sizes: tuple[PartSize, ...]

    @property
    def total_bytes(self) -> int:
        return sum(size.total_bytes for size in self.sizes)

    @property
    def params(self) -> int:
        return sum(size.params for size in self.sizes)

    def rows(self) -> list[dict[str, object]]:
        """One dict a part, as it stands in transfers.jsonl."""
        return [
            {
                "round": self.round,
                "client": self.client,
                "direction": self.direction,
                "part": size.part,
                "params": size.params,
                "value_bytes": size.value_bytes,
                "mask_bytes": size.mask_bytes,
                "header_bytes": size.header_bytes,
                **({"mask_coder": self.mask_coder} if size.part == "message" else {}),
            }
            for size in self.sizes
        ]


@dataclass
class Ledger:
    """Running totals over a run, by direction."""

    total: dict[str, int] = field(
        default_factory=lambda: {"up_params": 0, "up_bytes": 0, "down_params": 0, "down_bytes": 0}
    )

    def enter(self, transfers: Iterable[Transfer]) -> dict[str, float]:
        """Enter one round's transfers and return its `wire/*` metrics, those of the round and the cumulative ones."""
        now = dict.fromkeys(self.total, 0)
        for transfer in transfers:
            now[f"{transfer.direction}_params"] += transfer.params
            now[f"{transfer.direction}_bytes"] += transfer.total_bytes
        for name, value in now.items():
            self.total[name] += value
        metrics: dict[str, float] = {f"wire/{name}": value for name, value in now.items()}
        for unit in ("params", "bytes"):
            metrics[f"wire/total_{unit}"] = self.total[f"up_{unit}"] + self.total[f"down_{unit}"]
            metrics[f"wire/total_up_{unit}"] = self.total[f"up_{unit}"]
            metrics[f"wire/total_down_{unit}"] = self.total[f"down_{unit}"]
        return metrics
