"""Corrections: what pulls clients together that drift apart, one published method per file."""

from fedray.corrections.fedprox import FedProx

__all__ = ["FedProx"]
