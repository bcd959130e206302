"""Working buffers of a process: one flat tensor each, with a view for every parameter.

Trees lie in logical order. On the way into a working buffer four-dimensional weights are stored channels-last,
because convolutions are a fifth faster on it; every flat operation is indifferent to the order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedray.tree import Layout


class Arrangement:
    """Where each tensor of a layout lies in a working buffer, and the way there and back."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout = layout
        self.device = device
        self.reordered = any(len(shape) == 4 for shape in layout.shapes)

    def empty(self) -> Tensor:
        return torch.zeros(self.layout.size, device=self.device)

    def views(self, flat: Tensor) -> list[Tensor]:
        """One view per name, with the parameter's logical shape."""
        found = []
        for name, shape in zip(self.layout.names, self.layout.shapes, strict=True):
            piece = flat[self.layout.spans[name]]
            if len(shape) == 4:
                out_channels, in_channels, height, width = shape
                found.append(piece.view(out_channels, height, width, in_channels).permute(0, 3, 1, 2))
            else:
                found.append(piece.view(shape))
        return found

    def load(self, work: Tensor, logical: Tensor) -> None:
        """Write a tree's flat tensor into a working buffer."""
        if not self.reordered:
            work.copy_(logical)
            return
        for name, view in zip(self.layout.names, self.views(work), strict=True):
            view.copy_(logical[self.layout.spans[name]].view(view.shape))

    def arranged(self, logical: Tensor) -> Tensor:
        """A fresh working buffer with this content."""
        work = torch.empty(self.layout.size, dtype=logical.dtype, device=self.device)
        self.load(work, logical)
        return work

    def logical(self, work: Tensor) -> Tensor:
        """A fresh flat tensor on the CPU in the order of trees."""
        if not self.reordered:
            return work.to("cpu", copy=True)
        pieces = [view.reshape(-1) for view in self.views(work)]  # reshape copies into logical order
        return torch.cat(pieces).cpu()
