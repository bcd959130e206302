"""Messages to bytes and back: restrict to the support, write the values, code the masks that are not known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedray.errors import NumericError, WireError
from fedray.round import Message, Part, PartSpec
from fedray.tree import Layout, Mask, Tree, tensor_view
from fedray.wire import packet
from fedray.wire.ledger import Direction, PartSize
from fedray.wire.masks import CODER_NAMES, NONE, MaskCoder
from fedray.wire.packet import ALL, OWN, PART, SHARED, PartHeader
from fedray.wire.stages import Stage


@dataclass(frozen=True)
class Packet:
    """A payload and what its bytes are for; the sizes add up to len(payload)."""

    payload: bytes
    sizes: tuple[PartSize, ...]
    mask_coder: str


class Codec:
    """One wire: the parts that may cross, which coordinates may be cut, and how values are written each way.

    Knows nothing of policies but their parts. Stateless: what the receiver knows is an argument.
    """

    def __init__(
        self,
        specs: Mapping[str, PartSpec],
        params: Layout,
        prunable: tuple[str, ...],
        *,
        down: Stage,
        up: Stage,
    ) -> None:
        self.names = tuple(specs)
        self.specs = dict(specs)
        self.masks = MaskCoder(params, prunable)
        self.stages: dict[Direction, Stage] = {"down": down, "up": up}

    def encode(self, message: Message, *, direction: Direction, known: Mask | None) -> Packet:
        """known: the mask that the receiver holds. Values travel on the support alone.

        Raises NumericError where a stage cannot hold a value.
        """
        stage = self.stages[direction]
        mask_code, mask = (NONE, b"") if message.mask is None else self.masks.encode(message.mask, known)
        headers, values, sizes = [], [], []
        for name, part in message.parts.items():
            spec = self.specs.get(name)
            if spec is None or spec.direction not in (direction, "both"):
                raise ValueError(f"part {name!r} goes {direction}, but no policy declares it so in `parts`")
            support, own_code, own = self._support(part, message.mask)
            data = self._values(stage, name, part)
            headers.append(PartHeader(self.names.index(name), support, own_code, len(data), part.weight, own))
            values.append(data)
            sizes.append(
                PartSize(
                    part=name, params=len(data), value_bytes=data.nbytes, mask_bytes=len(own), header_bytes=PART.size
                )
            )
        head = packet.pack(mask_code, mask, headers)
        frame_bytes = len(head) - len(mask) - sum(size.header_bytes + size.mask_bytes for size in sizes)
        # The mask's code is the one byte that an unchanged mask costs; without a mask it belongs to the frame.
        code_bytes = 0 if mask_code == NONE else 1
        message_size = PartSize(
            part="message",
            params=0,
            value_bytes=0,
            mask_bytes=len(mask) + code_bytes,
            header_bytes=frame_bytes - code_bytes,
        )
        payload = b"".join([head, *(memoryview(data).cast("B") for data in values if len(data))])
        return Packet(payload, (message_size, *sizes), CODER_NAMES[mask_code])

    def decode(self, payload: bytes, *, direction: Direction, known: Mask | None) -> Message:
        """The message that was encoded, with zeros outside each support. Raises WireError on a bad payload."""
        stage = self.stages[direction]
        frame = packet.unpack(payload)
        mask = self.masks.decode(frame.mask_code, frame.mask, known)
        parts: dict[str, Part] = {}
        at = frame.values_at
        for header in frame.parts:
            name, support = self._read_header(header, direction, mask)
            if name in parts:
                raise WireError(f"a payload holds part {name!r} twice")
            layout = self.specs[name].layout
            expected = layout.size if support is None else len(support.indices)
            num_bytes = header.count * stage.dtype.itemsize
            if header.count != expected or at + num_bytes > len(payload):
                raise WireError(
                    f"part {name!r} declares {header.count} values in a payload of {len(payload)} bytes; "
                    f"{expected} were expected"
                )
            values = tensor_view(stage.decode(np.frombuffer(payload, stage.dtype, header.count, at)))
            if support is not None:
                values = torch.zeros(layout.size).index_copy_(0, support.indices, values)
            parts[name] = Part(value=Tree(layout, values), weight=header.weight, support=support)
            at += num_bytes
        if at != len(payload):
            raise WireError(f"a payload has {len(payload) - at} bytes too many")
        return Message(parts=parts, mask=mask)

    def _values(self, stage: Stage, name: str, part: Part) -> Any:
        """The array that travels, which numpy's stubs do not know as a buffer."""
        flat = part.value.flat if part.support is None else part.value.flat[part.support.indices]
        try:
            return stage.encode(flat.numpy())
        except NumericError as error:
            for tensor, values in part.value.items():
                try:
                    stage.encode(values.reshape(-1).numpy())
                except NumericError:
                    raise NumericError(f"part {name!r}, tensor {tensor!r}: {error}") from error
            raise

    def _read_header(self, header: PartHeader, direction: Direction, mask: Mask | None) -> tuple[str, Mask | None]:
        """The name of a part and the mask of its values; mask: the message's."""
        name = self.names[header.index] if header.index < len(self.names) else None
        if name is None or self.specs[name].direction not in (direction, "both"):
            raise WireError(f"a payload names part {header.index}, and no such part goes {direction}")
        if header.support == ALL:
            return name, None
        support: Mask | None = None
        if header.support == SHARED:
            support = mask
        elif header.support == OWN:
            support = self.masks.decode(header.mask_code, header.own, mask)
        if support is None or support.layout != self.specs[name].layout:
            raise WireError(f"part {name!r} has support code {header.support}, and there is no such mask for it")
        return name, support

    def _support(self, part: Part, mask: Mask | None) -> tuple[int, int, bytes]:
        if part.support is None:
            return ALL, NONE, b""
        if mask is not None and (part.support is mask or part.support.digest == mask.digest):
            return SHARED, NONE, b""
        return OWN, *self.masks.encode(part.support, mask)
