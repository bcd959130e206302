"""Plain modules, and the task that says how to train and judge them."""

from fedray.models.cnn import BatchNormCNN, LeNet, McMahanCNN, SmallCNN
from fedray.models.mlp import MLP
from fedray.models.task import Scope, Task

__all__ = ["MLP", "BatchNormCNN", "LeNet", "McMahanCNN", "Scope", "SmallCNN", "Task"]
