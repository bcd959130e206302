"""Personalisation: what a client keeps to itself, and which model it runs, one published method per file."""

from fedray.personal.ditto import Ditto
from fedray.personal.fedbn import FedBN
from fedray.personal.fedper import FedPer
from fedray.personal.fedrep import FedRep
from fedray.personal.local_fine_tuning import LocalFineTuning
from fedray.personal.static_norm import StaticNorm

__all__ = ["Ditto", "FedBN", "FedPer", "FedRep", "LocalFineTuning", "StaticNorm"]
