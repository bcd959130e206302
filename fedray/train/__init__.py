"""Jobs into fits, and models into scores."""

from fedray.train.engine import Engine, Samples
from fedray.train.schedule import LearningRate

__all__ = ["Engine", "LearningRate", "Samples"]
