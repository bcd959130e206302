"""Downloads that depend on earlier ones: the server's error feedback, and receivers that follow by changes.

The server keeps one copy of what receivers hold, and sends the coded change of it (Sattler et al. 2019, "Robust and
communication-efficient federated learning from non-i.i.d. data", algorithm 2, server side). What one change loses is
in the next one. A client that was away gets every payload that it missed or the whole copy, whichever is smaller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate, takewhile
from typing import Any

from fedray.keys import Key
from fedray.round import Message
from fedray.tree import Mask
from fedray.wire.codec import NOTHING, Codec, Packet, Trees
from fedray.wire.ledger import PartSize, together

REMEMBERED = 256  # payloads whose sizes are kept: who was away for longer gets the whole


@dataclass(frozen=True, kw_only=True)
class Downlink:
    """What the server remembers between downloads.

    version:   the round of the last one; 0 before the first.
    held:      the parts that receivers of that version hold; mask: the mask that they hold.
    residuals: what was lost of parts that are not followed.
    missed:    the sizes of the last payloads, newest last.
    """

    version: int = 0
    held: Trees = field(default_factory=dict)
    mask: Mask | None = None
    residuals: Trees = field(default_factory=dict)
    warm: Trees = field(default_factory=dict)
    missed: tuple[tuple[PartSize, ...], ...] = ()

    def plain(self) -> dict[str, Any]:
        """As a dict of numbers, trees, masks, lists and dicts: for checkpoints."""
        facts = {name: getattr(self, name) for name in ("version", "held", "mask", "residuals", "warm")}
        return facts | {"missed": [[asdict(size) for size in sizes] for sizes in self.missed]}

    @classmethod
    def of_plain(cls, facts: Mapping[str, Any]) -> Downlink:
        missed = tuple(tuple(PartSize(**size) for size in sizes) for sizes in facts["missed"])
        return cls(**{**facts, "missed": missed})


@dataclass(frozen=True, kw_only=True)
class Download:
    """One round's download, made by the server and read where clients live.

    change:  the payload for those who hold the version before; whole: the one for everybody else. Both None where
             nothing is followed: then each client's is made by its mask from `wanted`, the message with what earlier
             ones lost, which is None where it is not needed.
    before, before_mask: what the change changes.
    missed:  the sizes of the last payloads, newest last, this one included, as long as together they are smaller
             than the whole.
    """

    version: int
    wanted: Message | None = None
    change: Packet | None = None
    whole: Packet | None = None
    before: Trees = field(default_factory=dict)
    before_mask: Mask | None = None
    missed: tuple[tuple[PartSize, ...], ...] = ()

    def sizes(self, version: int) -> tuple[tuple[PartSize, ...], int] | None:
        """What a client that holds `version` is sent, and in how many payloads; None if that is the whole."""
        count = self.version - version
        return (together(self.missed[-count:]), count) if 0 < count <= len(self.missed) else None


def advance(codec: Codec, message: Message, state: Downlink, *, round: int, key: Key) -> tuple[Download, Downlink]:
    """The download of this message, and what the server remembers after it. Raises NumericError."""
    wanted = codec.add_residuals(message, state.residuals, "down")
    first = not state.held
    known = None if first else state.mask
    change = codec.encode(wanted, direction="down", known=known, key=key, reference=state.held, warm=state.warm)
    received = codec.decode(change.payload, direction="down", known=known, reference=state.held)
    residuals = codec.residuals(wanted, received, state.residuals, "down")
    if not codec.followed:
        warm = {**state.warm, **change.warm}
        after = replace(state, version=round, mask=received.mask, residuals=residuals, warm=warm)
        return Download(version=round, wanted=wanted), after
    held = {name: part.value for name, part in received.parts.items() if name in codec.followed}
    whole = change
    if not first:
        # Those who get the whole must decode the same bits: followed parts as they are held now, the others again.
        copy = {name: received.parts[name] if name in held else part for name, part in wanted.parts.items()}
        whole = codec.encode(
            replace(wanted, parts=copy), direction="down", known=None, key=key, reference=NOTHING, warm=state.warm
        )
    # In the first round there is nothing that could have been missed: the whole is all there is.
    history = () if first else (*state.missed, change.sizes)[-REMEMBERED:]
    totals = accumulate(sum(size.total_bytes for size in sizes) for sizes in reversed(history))
    cheaper = sum(1 for _ in takewhile(lambda total: total < len(whole.payload), totals))
    after = Downlink(
        version=round,
        held=held,
        mask=received.mask,
        residuals=residuals,
        warm={**state.warm, **change.warm},
        missed=history,
    )
    download = Download(
        version=round,
        change=replace(change, warm=NOTHING),
        whole=replace(whole, warm=NOTHING),
        before=state.held,
        before_mask=state.mask,
        missed=history[len(history) - cheaper :],
    )
    return download, after
