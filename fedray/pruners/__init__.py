"""Pruners: who cuts which parameters when, one published method per file."""

from fedray.pruners.feddst import FedDST
from fedray.pruners.fedrolex import FedRolex
from fedray.pruners.fedtiny import FedTiny
from fedray.pruners.fjord import FjORD
from fedray.pruners.grasp import GraSP
from fedray.pruners.heterofl import HeteroFL
from fedray.pruners.hybrid import Hybrid
from fedray.pruners.iterative import Iterative
from fedray.pruners.lamp import Lamp
from fedray.pruners.local_magnitude import LocalMagnitude
from fedray.pruners.lotteryfl import LotteryFL
from fedray.pruners.magnitude import Magnitude
from fedray.pruners.none import NoPruning
from fedray.pruners.prunefl import PruneFL
from fedray.pruners.random_mask import Random
from fedray.pruners.rigl import RigL
from fedray.pruners.set_ import SET
from fedray.pruners.snip import Snip
from fedray.pruners.structured import Structured
from fedray.pruners.subfedavg import SubFedAvg
from fedray.pruners.subfedavg_hybrid import SubFedAvgHybrid
from fedray.pruners.synflow import SynFlow
from fedray.pruners.threshold import Threshold

__all__ = [
    "SET",
    "FedDST",
    "FedRolex",
    "FedTiny",
    "FjORD",
    "GraSP",
    "HeteroFL",
    "Hybrid",
    "Iterative",
    "Lamp",
    "LocalMagnitude",
    "LotteryFL",
    "Magnitude",
    "NoPruning",
    "PruneFL",
    "Random",
    "RigL",
    "Snip",
    "Structured",
    "SubFedAvg",
    "SubFedAvgHybrid",
    "SynFlow",
    "Threshold",
]
