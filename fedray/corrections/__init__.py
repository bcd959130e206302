"""Corrections: what pulls clients together that drift apart, one published method per file."""

from fedray.corrections.fedlc import FedLC
from fedray.corrections.fedprox import FedProx
from fedray.corrections.fedsam import FedSAM
from fedray.corrections.label_smoothing import LabelSmoothing
from fedray.corrections.scaffold import Scaffold

__all__ = ["FedLC", "FedProx", "FedSAM", "LabelSmoothing", "Scaffold"]
