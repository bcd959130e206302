"""Models whose units can be counted by hand, and the world of conftest with one of them in it."""

from dataclasses import dataclass, replace

import numpy as np

from fedray.prune.structure import Group, Member, Structure
from fedray.tree import Layout

NOTHING = Layout((), ())


@dataclass(frozen=True)
class Model:
    """structure: the units. stats: the layout of the buffers. prunable: the weights."""

    structure: Structure
    stats: Layout = NOTHING

    @property
    def layout(self):
        return self.structure.layout

    @property
    def prunable(self):
        return tuple(name for name in self.layout.names if len(self.layout.shape(name)) > 1)


def layout_of(**shapes):
    return Layout(tuple(name.replace("__", ".") for name in shapes), tuple(shapes.values()))


def units(tensor, size, dim=0, width=1, output=True):
    return Member(tensor, dim, np.arange(size * width).reshape(size, width), output)


def reads(tensor, size, width=1):
    return units(tensor, size, dim=1, width=width, output=False)


def chain():
    """Three linear layers: 3 inputs, 4 and 5 units, 2 outputs."""
    layout = layout_of(a__weight=(4, 3), a__bias=(4,), b__weight=(5, 4), b__bias=(5,), c__weight=(2, 5), c__bias=(2,))
    a = Group("a", "neuron", 4, (units("a.weight", 4), units("a.bias", 4), reads("b.weight", 4)))
    b = Group("b", "neuron", 5, (units("b.weight", 5), units("b.bias", 5), reads("c.weight", 5)))
    return Model(Structure(layout, (a, b)))


def normed():
    """A convolution of 4 filters with batch normalisation, flattened over 2 pixels into 3 outputs."""
    layout = layout_of(conv__weight=(4, 1, 3, 3), norm__weight=(4,), norm__bias=(4,), fc__weight=(3, 8), fc__bias=(3,))
    stats = layout_of(norm__running_mean=(4,), norm__running_var=(4,))
    names = ("conv.weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var")
    filters = Group("conv", "filter", 4, (*(units(name, 4) for name in names), reads("fc.weight", 4, width=2)))
    return Model(Structure(layout, (filters,), (), stats), stats)


def residual():
    """A stream of 4 channels that two blocks add to, of 6 and 2 inner filters, and 3 outputs."""
    layout = layout_of(
        stem__weight=(4, 2, 3, 3),
        one__in__weight=(6, 4, 3, 3),
        one__out__weight=(4, 6, 3, 3),
        two__in__weight=(2, 4, 3, 3),
        two__out__weight=(4, 2, 3, 3),
        fc__weight=(3, 4),
    )
    stream = [units(name, 4) for name in ("stem.weight", "one.out.weight", "two.out.weight")]
    stream += [reads(name, 4) for name in ("one.in.weight", "two.in.weight", "fc.weight")]
    groups = [Group("stem", "filter", 4, tuple(stream))]
    for name, size in (("one", 6), ("two", 2)):
        inner = (units(f"{name}.in.weight", size), reads(f"{name}.out.weight", size))
        groups.append(Group(f"{name}.in", "filter", size, inner))
    for name, size in (("one", 6), ("two", 2)):
        branch = [Member(f"{name}.{end}.weight", 0, np.arange(n)[None], True) for end, n in (("in", size), ("out", 4))]
        groups.append(Group(name, "block", 1, tuple(branch), 0))
    return Model(Structure(layout, tuple(groups)))


def placed(world, model, sizes=(10, 30, 5), labels=None):
    """`world` with this model in it; labels: of each client, its examples by class."""

    class Placed(type(world)):
        def ctx(self, number, client=None, seed=0):
            ctx = replace(super().ctx(number, client, seed), structure=model.structure)
            if client is None or labels is None:
                return ctx
            return replace(ctx, client=replace(ctx.client, label_counts=labels[client]))

    return Placed(layout=model.layout, stats=model.stats, prunable=model.prunable, sizes=sizes)
