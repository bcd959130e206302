"""Where examples come from, who gets which, and what each client is tested on.

Sources are functions that return a `Dataset`; partitions are values that deal its training samples to clients;
`local_tests` gives each client test samples that look like its training data. Importing this package imports
NumPy only: a source imports what it reads with when it is called.
"""

from __future__ import annotations

from fedray.data.dataset import Dataset
from fedray.data.partition import (
    Classes,
    Dirichlet,
    DirichletPrior,
    Iid,
    LogNormal,
    Mixed,
    Natural,
    Partition,
    PowerLaw,
    Quantity,
    Shards,
    Sizes,
    histogram,
    manifest,
)
from fedray.data.sources import digits, hub, mnist5k, regression, shakespeare, synthetic, text
from fedray.data.views import carve_validation, local_tests

__all__ = [
    "Classes",
    "Dataset",
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
    "carve_validation",
    "digits",
    "histogram",
    "hub",
    "local_tests",
    "manifest",
    "mnist5k",
    "regression",
    "shakespeare",
    "synthetic",
    "text",
]
