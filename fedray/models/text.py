"""Models of tokens: int64 (batch, length) in, logits (batch, length, vocabulary) or (batch, num_classes) out."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedray.errors import ConfigError


def token_length(shape: tuple[int, ...], vocabulary: int | None, name: str) -> tuple[int, int]:
    """Length and vocabulary of token data; refuses other data."""
    if len(shape) != 1 or vocabulary is None:
        raise ConfigError(
            f"model={name} reads tokens, and the data has samples of shape {shape}"
            f"{' that are no tokens' if len(shape) == 1 else ''}; use data of text, or another model"
        )
    return shape[0], vocabulary


def _at_least_one(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"model.{name} is {size}; it must be at least 1")


class CharLSTM(nn.Module):
    """The next character from an LSTM: logits (batch, length, vocabulary), each from the characters up to there.

    McMahan et al. 2017, section 3, and LEAF: an embedding of 8, two layers of 256, then one linear layer. With 90
    characters 822,570 parameters: PyTorch has two biases for each gate, 2,048 more than TensorFlow's 820,522.
    embedding, hidden: widths. layers: how many LSTM layers.
    """

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        vocabulary: int | None,
        embedding: int = 8,
        hidden: int = 256,
        layers: int = 2,
    ) -> None:
        super().__init__()
        _, tokens = token_length(shape, vocabulary, "char_lstm")
        _at_least_one(embedding=embedding, hidden=hidden, layers=layers)
        self.embedding = nn.Embedding(tokens, embedding)
        self.lstm = nn.LSTM(embedding, hidden, layers, batch_first=True)
        self.fc = nn.Linear(hidden, tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        outputs, _ = self.lstm(self.embedding(tokens))
        return self.fc(outputs)  # type: ignore[no-any-return]


class GPT(nn.Module):
    """A decoder in the form of GPT-2: logits (batch, length, vocabulary), each from the tokens up to there.

    Pre-norm blocks of causal attention and a layer of 4 * width units with GELU, learned positions, a last norm.
    Radford et al. 2019; with 50,257 tokens, length 1,024, width 768, 12 layers and a tied head 124,439,808 parameters.
    tied: the head's weight is the embedding's, one tensor under the embedding's name. dropout: after the embeddings,
    in attention, and after each half of a block.
    """

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        vocabulary: int | None,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        tied: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        length, count = token_length(shape, vocabulary, "gpt")
        self.token = nn.Embedding(count, width)
        self.position = nn.Parameter(torch.zeros(length, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = _blocks(width, layers, heads, dropout, causal=True)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, count, bias=False)
        _initialise(self, layers)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.dropout(self.token(tokens) + self.position)
        for block in self.blocks:
            x = block(x, None)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


class LSTMClassifier(nn.Module):
    """A class of a text: embedding, LSTM, mean of its outputs over the text, one linear layer.

    padding: the token that fills up short texts at their end; it is not read. None where there is none.
    """

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        num_classes: int,
        vocabulary: int | None,
        embedding: int = 64,
        hidden: int = 128,
        layers: int = 1,
        padding: int | None = 0,
    ) -> None:
        super().__init__()
        _, tokens = token_length(shape, vocabulary, "lstm_classifier")
        _at_least_one(embedding=embedding, hidden=hidden, layers=layers)
        self.padding = padding
        self.embedding = nn.Embedding(tokens, embedding)
        self.lstm = nn.LSTM(embedding, hidden, layers, batch_first=True)
        self.fc = nn.Linear(hidden, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        outputs, _ = self.lstm(self.embedding(tokens))
        return self.fc(_mean(outputs, _read(tokens, self.padding)))  # type: ignore[no-any-return]


class TransformerClassifier(nn.Module):
    """A class of a text: the blocks of `GPT` without causality, mean over the text, one linear layer.

    padding: the token that fills up short texts; nobody attends to it. None where there is none.
    """

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        num_classes: int,
        vocabulary: int | None,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        dropout: float = 0.0,
        padding: int | None = 0,
    ) -> None:
        super().__init__()
        length, count = token_length(shape, vocabulary, "transformer_classifier")
        self.padding = padding
        self.token = nn.Embedding(count, width)
        self.position = nn.Parameter(torch.zeros(length, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = _blocks(width, layers, heads, dropout, causal=False)
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, num_classes)
        _initialise(self, layers)

    def forward(self, tokens: Tensor) -> Tensor:
        read = _read(tokens, self.padding)
        x = self.dropout(self.token(tokens) + self.position)
        for block in self.blocks:
            x = block(x, None if read is None else read[:, None, None, :])
        return self.fc(_mean(self.norm(x), read))  # type: ignore[no-any-return]


def _read(tokens: Tensor, padding: int | None) -> Tensor | None:
    """Which positions count, bool (batch, length); all of them where a text is nothing but padding."""
    if padding is None:
        return None
    kept = tokens != padding
    return kept | ~kept.any(1, keepdim=True)


def _mean(outputs: Tensor, read: Tensor | None) -> Tensor:
    if read is None:
        return outputs.mean(1)
    weights = read.to(outputs.dtype)
    mean: Tensor = torch.einsum("blw,bl->bw", outputs, weights / weights.sum(1, keepdim=True))
    return mean


def _blocks(width: int, layers: int, heads: int, dropout: float, *, causal: bool) -> nn.ModuleList:
    _at_least_one(width=width, layers=layers, heads=heads)
    if width % heads:
        raise ConfigError(
            f"model.heads is {heads}; every head has an equal share of model.width, which is {width}: choose a divisor"
        )
    return nn.ModuleList(_Block(width, heads, dropout, causal) for _ in range(layers))


class _Block(nn.Module):
    """Attention, then two linear layers; each reads a norm of the stream and adds to it.

    The class attributes and `skipped` are for `find_structure`.
    """

    residual_branch: ClassVar = ("norm1", "attention", "projection", "norm2", "expansion", "contraction")
    fused_attention: ClassVar = ("attention", "projection")

    def __init__(self, width: int, heads: int, dropout: float, causal: bool) -> None:
        super().__init__()
        self.head_width, self.causal, self.rate = width // heads, causal, dropout
        self.skipped = False
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.expansion = nn.Linear(width, 4 * width)
        self.contraction = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, read: Tensor | None) -> Tensor:
        if self.skipped:
            return x
        x = x + self.dropout(self.projection(self._attended(self.norm1(x), read)))
        return x + self.dropout(self.contraction(F.gelu(self.expansion(self.norm2(x)), approximate="tanh")))  # type: ignore[no-any-return]

    def _attended(self, x: Tensor, read: Tensor | None) -> Tensor:
        batch, length, _ = x.shape
        query, key, value = self.attention(x).view(batch, length, 3, -1, self.head_width).unbind(2)
        mixed: Tensor = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=read,
            dropout_p=self.rate if self.training else 0.0,
            is_causal=self.causal,
        )
        return mixed.transpose(1, 2).flatten(2)


def _initialise(module: nn.Module, layers: int) -> None:
    """Normal weights of deviation 0.02, those that add to the stream smaller by sqrt(2 * layers) (GPT-2)."""
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() > 1:
            added = name.endswith(("projection.weight", "contraction.weight"))
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if added else 0.02)
