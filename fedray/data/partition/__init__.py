"""Who gets which training samples.

A partition is a value that is called with the labels and a key. Laws: parts are disjoint; every client has at least
one sample; the same key gives the same parts; a call always ends. All deal out every sample, save `Classes` with
`samples` or with too few slots for all classes, `Natural` that takes the largest, and a `Mixed` of such.
"""

from __future__ import annotations

from fedray.data.partition.base import Partition, Sizes, apportion, by_label, histogram, manifest
from fedray.data.partition.labels import Classes, Dirichlet, DirichletPrior, Shards
from fedray.data.partition.mixed import Mixed
from fedray.data.partition.natural import Natural
from fedray.data.partition.sizes import Iid, LogNormal, PowerLaw, Quantity

__all__ = [
    "Classes",
    "Dirichlet",
    "DirichletPrior",
    "Iid",
    "LogNormal",
    "Mixed",
    "Natural",
    "Partition",
    "PowerLaw",
    "Quantity",
    "Shards",
    "Sizes",
    "apportion",
    "by_label",
    "histogram",
    "manifest",
]
