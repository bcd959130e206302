"""Messages to bytes and back: restrict to the support, run each part's chain, code the masks that are not known."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from fedray.errors import ConfigError, NumericError, WireError
from fedray.keys import Key
from fedray.round import Message, Part, PartSpec
from fedray.tree import Layout, Mask, Tree, restrict, tensor_view
from fedray.wire import packet
from fedray.wire.chain import Chain, Written
from fedray.wire.ledger import Direction, PartSize
from fedray.wire.masks import CODER_NAMES, NONE, MaskCoder
from fedray.wire.packet import ALL, OWN, PART, SHARED, PartHeader
from fedray.wire.values import Entropy, Where

Trees = Mapping[str, Tree]
NOTHING: Trees = {}
PLAIN = Chain()
"""Float32 and nothing else: for parts that admit no loss, and for what a receiver does not follow yet."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """How one direction is written.

    chain:    stages by name, in order, for every part that admits loss; empty for float32.
    parts:    chains of single parts, by the part's name.
    feedback: whether what a lossy chain lost is added to the sender's next message of that part.
    decay:    factor on what was lost before it is added, above 0 and at most 1: a client that is sampled rarely
              would otherwise send what is long out of date.
    """

    chain: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    feedback: bool = False
    decay: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Wire:
    """Both directions, and how masks and positions are squeezed."""

    down: Way = Way()
    up: Way = Way()
    entropy: Entropy = "zstd"


@dataclass(frozen=True)
class Packet:
    """A payload and what its bytes are for; the sizes add up to len(payload).

    warm: by part, what the sender starts from next time.
    """

    payload: bytes
    sizes: tuple[PartSize, ...]
    warm: Trees = field(default_factory=dict)

    @property
    def mask_coder(self) -> str:
        """How the message's mask was written."""
        return self.sizes[0].mask_coder


class Codec:
    """One wire: the parts that may cross, which coordinates may be cut, and how values are written each way.

    Knows nothing of policies but their parts. What it is asked decides what it answers: what the receiver knows is an
    argument, and so is what the sender remembers. It only caches.
    """

    def __init__(
        self,
        specs: Mapping[str, PartSpec],
        params: Layout,
        prunable: tuple[str, ...],
        wire: Wire,
        *,
        unstructured: bool = False,
    ) -> None:
        """unstructured: whether masks of no structure will come. Raises ConfigError for chains that cannot work."""
        self.names = tuple(specs)
        self.specs = dict(specs)
        self.wire = wire
        self.masks = MaskCoder(params, prunable, wire.entropy)
        self.chains = {
            ("down", name): chain for name, chain in self._chains("down", wire.down, unstructured).items()
        } | {("up", name): chain for name, chain in self._chains("up", wire.up, unstructured).items()}
        down = [name for way, name in self.chains if way == "down"]
        self.followed = frozenset(name for name in down if self.chains["down", name].delta)
        """Parts of which receivers hold a copy that every download changes."""
        self.refers = any(way == "up" and chain.delta for (way, _), chain in self.chains.items())
        """Whether an upload changes what was sent down."""
        # The last payload each way that was made to be read here: it has no checksum, and needs none.
        self._unsealed: dict[Direction, bytes] = {}
        self._fed: dict[Direction, frozenset[str]] = {"down": self._feeding("down"), "up": self._feeding("up")}
        self._refuse_idle("down", bool(self.followed))
        self._refuse_idle("up", False)

    def feeds_back(self, direction: Direction) -> frozenset[str]:
        """The parts whose loss the sender keeps and adds to its next message.

        Followed parts are not among them: a change against what receivers hold has every earlier loss in it.
        """
        return self._fed[direction]

    def _feeding(self, direction: Direction) -> frozenset[str]:
        if not self._way(direction).feedback:
            return frozenset()
        return frozenset(
            name
            for (way, name), chain in self.chains.items()
            if way == direction and chain.lossy and not (way == "down" and chain.delta)
        )

    # -- bytes -----------------------------------------------------------------------------------------------------

    def encode(
        self,
        message: Message,
        *,
        direction: Direction,
        known: Mask | None,
        key: Key,
        reference: Trees = NOTHING,
        warm: Trees = NOTHING,
        leaves: bool = True,
    ) -> Packet:
        """known: the mask that the receiver holds; reference: the parts that it holds, by name. A part that travels
        as a change and is not among them is sent in full. Values travel on the support alone. leaves: False for a
        payload that only this codec will read, before it makes another one of that direction: no checksum is made.

        Raises NumericError, with part and tensor, where a value cannot be sent.
        """
        mask_code, mask = (NONE, b"") if message.mask is None else self.masks.encode(message.mask, known)
        headers, pieces, sizes, kept_warm = [], [], [], {}
        for name, part in message.parts.items():
            if (direction, name) not in self.chains:
                raise ValueError(f"part {name!r} goes {direction}, but no policy declares it so in `parts`")
            support, own_code, own = self._support(part, message.mask)
            chain, whole = self.chain(direction, name, reference)
            # What is added up here is checked by the sum, value by value.
            checked = leaves or direction == "down"
            written = self._write(chain, name, part, reference, key.fold(name), warm.get(name), checked)
            if written.warm is not None:
                kept_warm[name] = written.warm
            headers.append(
                PartHeader(self.names.index(name), support, own_code, whole, written.num_bytes, part.weight, own)
            )
            pieces.append(written.pieces)
            sizes.append(_size_of(name, chain, part, written, own_bytes=len(own)))
        payload = packet.pack(mask_code, mask, headers, pieces, sealed=leaves)
        if not leaves:
            self._unsealed[direction] = payload
        accounted = len(mask) + sum(size.total_bytes for size in sizes)
        # The mask's code is the one byte that an unchanged mask costs; without a mask it belongs to the frame.
        code_bytes = 0 if mask_code == NONE else 1
        frame = PartSize(
            part="message",
            mask_bytes=len(mask) + code_bytes,
            header_bytes=len(payload) - accounted - code_bytes,
            mask_coder=CODER_NAMES[mask_code],
        )
        return Packet(payload, (frame, *sizes), kept_warm)

    def decode(
        self, payload: bytes, *, direction: Direction, known: Mask | None, reference: Trees = NOTHING
    ) -> Message:
        """The message that was encoded, with zeros outside each support. Raises WireError on a bad payload."""
        frame = packet.unpack(payload, sealed=payload is not self._unsealed.get(direction))
        mask = self.masks.decode(frame.mask_code, frame.mask, known)
        parts: dict[str, Part] = {}
        for header, data in zip(frame.parts, frame.values, strict=True):
            name, support = self._read_header(header, direction, mask)
            if name in parts:
                raise WireError(f"a payload holds part {name!r} twice")
            chain = self.chains[direction, name]
            layout = self.specs[name].layout
            try:
                values = tensor_view((PLAIN if header.whole else chain).decode(data, _where(layout, support)))
            except WireError as error:
                raise WireError(f"part {name!r}: {error}") from error
            if chain.delta and not header.whole:
                if name not in reference:
                    raise WireError(f"part {name!r} is a change, and the receiver holds nothing that it changes")
                held = reference[name].flat
                values = values + (held if support is None else held[support.indices])
            if support is not None:
                values = torch.zeros(layout.size).index_copy_(0, support.indices, values)
            parts[name] = Part(value=Tree(layout, values), weight=header.weight, support=support)
        return Message(parts=parts, mask=mask)

    def chain(self, direction: Direction, name: str, reference: Trees) -> tuple[Chain, int]:
        """The chain of a part for a receiver that holds `reference`, and 1 if the part is sent in full for want of
        anything to change."""
        chain = self.chains[direction, name]
        return (PLAIN, 1) if chain.delta and name not in reference else (chain, 0)

    # -- error feedback ----------------------------------------------------------------------------------------------

    def add_residuals(self, message: Message, residuals: Trees, direction: Direction) -> Message:
        """The message that the sender wants to be received: with what earlier ones lost, on each part's support."""
        decay = self._way(direction).decay
        for name in sorted(self.feeds_back(direction) & residuals.keys() & message.parts.keys()):
            part = message.parts[name]
            lost = restrict(residuals[name], part.support).flat
            wanted = part.value.flat + (lost if decay == 1.0 else lost * decay)
            message = message.put(name, replace(part, value=Tree(part.value.layout, wanted)))
        return message

    def residuals(self, wanted: Message, received: Message, before: Trees, direction: Direction) -> Trees:
        """float32(wanted - received) of each part that feeds back; a part that was not sent keeps what it had."""
        fed = self.feeds_back(direction)
        if not fed:
            return before
        lost = {
            name: Tree(part.value.layout, part.value.flat - received[name].flat)
            for name, part in wanted.parts.items()
            if name in fed
        }
        return {**before, **lost}

    # -- the inside ----------------------------------------------------------------------------------------------------

    def _way(self, direction: Direction) -> Way:
        return self.wire.down if direction == "down" else self.wire.up

    def _write(
        self, chain: Chain, name: str, part: Part, reference: Trees, key: Key, warm: Tree | None, checked: bool
    ) -> Written:
        flat, where = part.value.flat, _where(part.value.layout, part.support)
        if chain.delta:
            flat = flat - reference[name].flat
        if part.support is not None:
            flat = flat[part.support.indices]
        entropy = self.wire.entropy
        try:
            return chain.encode(flat.numpy(), where, key=key, warm=warm, entropy=entropy, checked=checked)
        except NumericError as error:
            raise NumericError(f"part {name!r}, {error}") from error

    def _read_header(self, header: PartHeader, direction: Direction, mask: Mask | None) -> tuple[str, Mask | None]:
        """The name of a part and the mask of its values; mask: the message's."""
        name = self.names[header.index] if header.index < len(self.names) else None
        if name is None or (direction, name) not in self.chains:
            raise WireError(f"a payload names part {header.index}, and no such part goes {direction}")
        if header.whole and not (header.whole == 1 and self.chains[direction, name].delta):
            raise WireError(f"part {name!r} is marked as sent in full ({header.whole}), and it is never a change")
        # A weight is a number of examples, or 1: never zero, negative or not finite.
        if not 0.0 < header.weight < np.inf:
            raise WireError(f"part {name!r} has weight {header.weight}; it must be above 0 and finite")
        if header.support != OWN and (header.mask_code != NONE or header.own):
            raise WireError(f"part {name!r} brings a mask of {len(header.own)} bytes that nothing refers to")
        if header.support == ALL:
            return name, None
        support: Mask | None = None
        if header.support == SHARED:
            support = mask
        elif header.support == OWN:
            support = self.masks.decode_support(header.mask_code, header.own, mask)
        if support is None or support.layout != self.specs[name].layout:
            raise WireError(f"part {name!r} has support code {header.support}, and there is no such mask for it")
        return name, support

    def _support(self, part: Part, mask: Mask | None) -> tuple[int, int, bytes]:
        if part.support is None:
            return ALL, NONE, b""
        if mask is not None and (part.support is mask or part.support.digest == mask.digest):
            return SHARED, NONE, b""
        return OWN, *self.masks.encode_support(part.support, mask)

    # -- what can go together ----------------------------------------------------------------------------------------

    def _chains(self, direction: Direction, way: Way, unstructured: bool) -> dict[str, Chain]:
        """The chain of every part that goes this way. Raises ConfigError."""
        group = f"wire.{direction}"
        if not 0.0 < way.decay <= 1.0:
            raise ConfigError(
                f"{group}.decay is {way.decay!r}; it is above 0 and at most 1, and 1 keeps all that was lost"
            )
        specs = {name: spec for name, spec in self.specs.items() if spec.direction in (direction, "both")}
        for name in way.parts:
            if name not in specs:
                near = difflib.get_close_matches(name, specs, n=1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(specs)}"
                raise ConfigError(f"{group}.parts.{name} is not a part that goes {direction}; {hint}")
        default = Chain.of(way.chain, f"{group}.chain")
        chains = {}
        for name, spec in specs.items():
            if name in way.parts:
                at = f"{group}.parts.{name}"
                chains[name] = Chain.of(way.parts[name], at)
                if not spec.lossy and chains[name].lossy:
                    raise ConfigError(
                        f"{at} is {chains[name].label}; part {name!r} admits no loss: use float32, or zstd"
                    )
            else:
                at = f"{group}.chain"
                chains[name] = default if spec.lossy else PLAIN
            self._check(chains[name], at, name, spec, direction, way, unstructured)
        return chains

    def _refuse_idle(self, direction: Direction, followed: bool) -> None:
        """Refuse settings of feedback that would do nothing."""
        group, way = f"wire.{direction}", self._way(direction)
        if way.decay != 1.0 and not self._fed[direction]:
            why = "changes have all that was lost in them" if followed else "nothing is fed back here"
            raise ConfigError(f"{group}.decay is {way.decay}; {why}, so leave it at 1.0")
        if way.feedback and not (self._fed[direction] or followed):
            raise ConfigError(
                f"{group}.feedback is True; {group}.chain loses nothing that could be fed back: set it to false, or "
                "choose a wire with loss"
            )

    def _check(
        self, chain: Chain, at: str, name: str, spec: PartSpec, direction: Direction, way: Way, unstructured: bool
    ) -> None:
        if chain.delta and direction == "up" and spec.direction != "both":
            raise ConfigError(
                f"{at} has a delta; part {name!r} goes up only, so the server holds nothing that it could change (what "
                "clients send is a difference already): leave delta out"
            )
        if chain.delta and direction == "down" and not way.feedback:
            raise ConfigError(
                f"{at} has a delta and wire.down.feedback is False; a change against what receivers hold always has "
                "the earlier losses in it: set wire.down.feedback=true"
            )
        if spec.absolute and chain.changes_only:
            raise ConfigError(
                f"{at} is {chain.label}; part {name!r} is no difference, and such a chain would destroy what it does "
                "not send: put a delta before it (fedray.wire.Delta), or use a number format alone"
            )
        if way.feedback and any(transform.unbiased_scale for transform in chain.transforms):
            raise ConfigError(
                f"{at} is {chain.label} and {at.split('.parts')[0].removesuffix('.chain')}.feedback "
                "is True; feedback would return what the scaling has added: set one of them to false"
            )
        if unstructured and any(transform.structured for transform in chain.transforms):
            raise ConfigError(
                f"{at} is {chain.label}; it needs whole matrices, and this pruner cuts single weights out of them: use "
                "pruner=none or another wire"
            )


def _where(layout: Layout, support: Mask | None) -> Where:
    return Where(layout, None if support is None else support.indices.numpy())


def _size_of(name: str, chain: Chain, part: Part, written: Written, *, own_bytes: int) -> PartSize:
    inner = written.inner
    return PartSize(
        part=name,
        chain=chain.label,
        size=part.value.layout.size,
        kept=part.value.layout.size if part.support is None else len(part.support.indices),
        params=inner.size,
        weights=inner.num_weights,
        bits=chain.writer.bits,
        value_bytes=written.num_bytes - written.side_bytes - written.framing_bytes,
        mask_bytes=own_bytes + written.side_bytes,
        header_bytes=PART.size + written.framing_bytes,
    )
