"""Strategies: what clients send, and how the server takes it into the model, one published method per file."""

from fedray.strategies.fedavg import FedAvg
from fedray.strategies.fedsgd import FedSGD

__all__ = ["FedAvg", "FedSGD"]
