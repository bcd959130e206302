"""Strategies: what clients send, and how the server takes it into the model, one published method per file."""

from fedray.strategies.fedavg import FedAvg
from fedray.strategies.fedavgm import FedAvgM
from fedray.strategies.feddyn import FedDyn
from fedray.strategies.fednova import FedNova
from fedray.strategies.fedopt import FedAdagrad, FedAdam, FedYogi
from fedray.strategies.fedsgd import FedSGD

__all__ = ["FedAdagrad", "FedAdam", "FedAvg", "FedAvgM", "FedDyn", "FedNova", "FedSGD", "FedYogi"]
