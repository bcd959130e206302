"""Pruners: who cuts which parameters when, one published method per file."""

from fedray.pruners.feddst import FedDST
from fedray.pruners.magnitude import Magnitude
from fedray.pruners.none import NoPruning
from fedray.pruners.random_mask import Random

__all__ = ["FedDST", "Magnitude", "NoPruning", "Random"]
