"""How the networks are made that are measured as modules, and their batches.

Networks of transformers, torchvision and timm are built from configurations with random weights, so that nothing is
loaded; the others are written here, or in `benchmarks.networks`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from functorch_mnist import losses, random

from . import networks
from .networks import CLASSES


class Sizes(NamedTuple):
    """Of a network and its batch."""

    batch: int
    positions: int
    layers: int
    width: int
    heads: int = 1
    tokens: int = 1000
    side: int = 0
    """Of an image."""


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy, of an example or of a batch: examples have equally many targets."""
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))


def mean(losses: Tensor, _: Tensor) -> Tensor:
    """The mean loss of a network that takes its targets as inputs and returns losses."""
    return losses.mean()


class Recipe(NamedTuple):
    """How a network is made, for which others' packages may be needed."""

    name: str
    module: Callable[[Sizes], nn.Module]
    batch: Callable[[Sizes], tuple[dict[str, Tensor], Tensor]]
    """The forward's inputs by name, and the targets."""
    logits: Callable[[Any], Tensor]
    """Of what the forward returns, for the targets, of an example or of a batch."""
    sizes: Sizes
    max_norm: float = 1.0
    """Of clipped sums: among the norms of the examples, so that some are clipped and others are not."""
    compiles: bool = True
    as_loop: Callable[[Sizes], nn.Module] | None = None
    """The same network as a loop over positions, its parameters in the same order."""
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    """Of logits and targets, of an example or of a batch."""


def bert(sizes: Sizes) -> nn.Module:
    package: Any = import_module("transformers")
    config = package.BertConfig(
        vocab_size=sizes.tokens, hidden_size=sizes.width, num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads, intermediate_size=4 * sizes.width, max_position_embeddings=sizes.positions,
        num_labels=CLASSES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    module: nn.Module = package.BertForSequenceClassification(config)
    return module


def llama(sizes: Sizes) -> nn.Module:
    package: Any = import_module("transformers")
    config = package.LlamaConfig(
        vocab_size=sizes.tokens, hidden_size=sizes.width, num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads, num_key_value_heads=sizes.heads, intermediate_size=4 * sizes.width,
        max_position_embeddings=sizes.positions, use_cache=False,
    )  # fmt: skip
    module: nn.Module = package.LlamaForCausalLM(config)
    return module


def gpt2(sizes: Sizes) -> nn.Module:
    package: Any = import_module("transformers")
    config = package.GPT2Config(
        vocab_size=sizes.tokens, n_embd=sizes.width, n_layer=sizes.layers, n_head=sizes.heads,
        n_positions=sizes.positions, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    module: nn.Module = package.GPT2LMHeadModel(config)
    return module


def densenet121(_: Sizes) -> nn.Module:
    package: Any = import_module("torchvision.models")
    module: nn.Module = package.densenet121(num_classes=CLASSES)
    return module


def mobilenet(_: Sizes) -> nn.Module:
    package: Any = import_module("torchvision.models")
    module: nn.Module = package.mobilenet_v3_small(num_classes=CLASSES)
    return module


def vit_tiny(sizes: Sizes) -> nn.Module:
    package: Any = import_module("timm")
    module: nn.Module = package.create_model("vit_tiny_patch16_224", img_size=sizes.side, num_classes=CLASSES)
    return module


def mlp(sizes: Sizes) -> nn.Module:
    """Linear layers, all as wide as the inputs but the last."""
    return networks.mlp((*[sizes.width] * sizes.layers, CLASSES))


def cnn(_: Sizes) -> nn.Module:
    """The article's network without dropout."""
    return networks.Net()


class Words(nn.Module):
    """A table of vectors and nothing else: the mean of their tanh is the logits."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.table = nn.Embedding(sizes.tokens, sizes.width)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.table(tokens).tanh().mean(-2)
        return logits


class Tied(nn.Module):
    """The losses of the next tokens by one table at both ends: the embedding and the output layer."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.table = nn.Embedding(sizes.tokens, sizes.width)
        nn.init.normal_(self.table.weight, std=sizes.width**-0.5)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        return self.losses(self.table(tokens).tanh(), labels)

    def losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """(…): of each position."""
        logits = F.linear(hidden, self.table.weight)
        found = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
        return found.view(labels.shape)


class TiedInBlocks(Tied):
    """The same, in blocks of the vocabulary."""

    def losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return losses.chunked_cross_entropy(hidden, self.table.weight, labels)


class FusedBlock(networks.Block):
    """A transformer's causal block whose attention is one op, which keeps no square of the length."""

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()  # (B, heads, T, D)
        values = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        found: Tensor = self.project(values.transpose(1, 2).flatten(2))
        return found


class Language(nn.Module):
    """The logits of the next tokens by a causal transformer, norms first. It learns no positions.

    So it has the same parameters at every length.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embed = nn.Embedding(sizes.tokens, sizes.width)
        blocks = [FusedBlock(sizes.width, sizes.heads, causal=True) for _ in range(sizes.layers)]
        self.blocks = nn.Sequential(*blocks)
        self.norm, self.head = nn.LayerNorm(sizes.width), nn.Linear(sizes.width, sizes.tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.blocks(self.embed(tokens))))
        return logits


class Lstm(nn.Module):
    """An LSTM and a linear layer of its last output."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.lstm = nn.LSTM(sizes.width, sizes.width, sizes.layers, batch_first=True)
        self.head = nn.Linear(sizes.width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.lstm(x)[0][:, -1])
        return logits


class LstmLoop(nn.Module):
    """The same, one cell after another."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.cells = nn.ModuleList([nn.LSTMCell(sizes.width, sizes.width) for _ in range(sizes.layers)])
        self.head = nn.Linear(sizes.width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        inputs = list(x.unbind(1))
        for cell in self.cells:
            state = x.new_zeros(2, len(x), self.head.in_features).unbind()
            for t, value in enumerate(inputs):
                state = cell(value, state)
                inputs[t] = state[0]
        logits: Tensor = self.head(inputs[-1])
        return logits


def _tokens(sizes: Sizes) -> Tensor:
    return random.randint(random.key(1), (sizes.batch, sizes.positions), 0, sizes.tokens)


def _labels(sizes: Sizes) -> Tensor:
    return random.randint(random.key(2), (sizes.batch,), 0, CLASSES)


def texts(sizes: Sizes) -> tuple[dict[str, Tensor], Tensor]:
    return {"input_ids": _tokens(sizes)}, _labels(sizes)


def padded_texts(sizes: Sizes) -> tuple[dict[str, Tensor], Tensor]:
    """Half of the positions are there in the shortest text, all in the longest."""
    lengths = torch.linspace(sizes.positions / 2, sizes.positions, sizes.batch).long()
    there = torch.arange(sizes.positions) < lengths[:, None]
    return {"input_ids": _tokens(sizes), "attention_mask": there.long()}, _labels(sizes)


def next_tokens(sizes: Sizes) -> tuple[dict[str, Tensor], Tensor]:
    tokens = _tokens(sizes)
    return {"input_ids": tokens}, tokens[:, 1:]


def vectors(sizes: Sizes) -> tuple[dict[str, Tensor], Tensor]:
    return {"x": random.normal(random.key(1), (sizes.batch, sizes.positions, sizes.width))}, _labels(sizes)


def following(sizes: Sizes) -> tuple[dict[str, Tensor], Tensor]:
    """Texts, and the token after each of theirs."""
    tokens = _tokens(sizes._replace(positions=sizes.positions + 1))
    return {"tokens": tokens[:, :-1].contiguous()}, tokens[:, 1:].contiguous()


def following_within(sizes: Sizes) -> tuple[dict[str, Tensor], Tensor]:
    """The same for a network that takes its targets as inputs."""
    inputs, targets = following(sizes)
    return {**inputs, "labels": targets}, targets


def words(sizes: Sizes) -> tuple[dict[str, Tensor], Tensor]:
    """Texts in as many classes as vectors are wide."""
    return {"tokens": _tokens(sizes)}, random.randint(random.key(2), (sizes.batch,), 0, sizes.width)


def images(sizes: Sizes) -> tuple[dict[str, Tensor], Tensor]:
    return {"x": random.normal(random.key(1), (sizes.batch, 3, sizes.side, sizes.side))}, _labels(sizes)


def gray_images(sizes: Sizes) -> tuple[dict[str, Tensor], Tensor]:
    return {"x": random.normal(random.key(1), (sizes.batch, 1, sizes.side, sizes.side))}, _labels(sizes)


def points(sizes: Sizes) -> tuple[dict[str, Tensor], Tensor]:
    return {"input": random.normal(random.key(1), (sizes.batch, sizes.width))}, _labels(sizes)


def of_output(outputs: Any) -> Tensor:
    logits: Tensor = outputs.logits
    return logits


def but_the_last(outputs: Any) -> Tensor:
    return of_output(outputs)[..., :-1, :]


def itself(outputs: Any) -> Tensor:
    logits: Tensor = outputs
    return logits
