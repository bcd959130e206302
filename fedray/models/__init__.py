"""Plain modules, and the task that says how to train and judge them."""

from fedray.models.cnn import BatchNormCNN, LeNet, McMahanCNN, SmallCNN
from fedray.models.mlp import MLP, Linear
from fedray.models.resnet import ResNet
from fedray.models.structure import Logits, head_names
from fedray.models.task import Scope, Task
from fedray.models.text import GPT, CharLSTM, LSTMClassifier, TransformerClassifier
from fedray.models.vgg import VGG11

__all__ = [
    "GPT",
    "MLP",
    "VGG11",
    "BatchNormCNN",
    "CharLSTM",
    "LSTMClassifier",
    "LeNet",
    "Linear",
    "Logits",
    "McMahanCNN",
    "ResNet",
    "Scope",
    "SmallCNN",
    "Task",
    "TransformerClassifier",
    "head_names",
]
