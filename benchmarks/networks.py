"""The networks as modules.

Each is of batches. Attention is written out in products and a softmax, and means stand where torch has pooling, so that
every op has a batching rule and every matrix a factored gradient.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 10


class Net(nn.Module):
    """The article's network without dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 32, 3), nn.Conv2d(32, 64, 3)
        self.fc1, self.fc2 = nn.Linear(9216, 128), nn.Linear(128, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv2(F.relu(self.conv1(x))), 2)
        return F.log_softmax(self.fc2(F.relu(self.fc1(x.flatten(1)))), dim=1)


def mlp(widths: tuple[int, ...]) -> nn.Sequential:
    """Linear layers of these widths, from the inputs to the outputs, with ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.GroupNorm(32, outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.GroupNorm(32, outputs)
        self.shortcut = nn.Sequential()
        if (inputs, stride) != (outputs, 1):
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.GroupNorm(32, outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 of 3x32x32 images: the first convolution keeps their size, and group norms stand for batch norms.

    Reference: He et al., "Deep residual learning for image recognition", CVPR 2016, section 3.3 and table 1.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (64, 64, 128, 256, 512)
        self.conv, self.norm = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.GroupNorm(32, widths[0])
        blocks: list[nn.Module] = []
        for (inputs, outputs), stride in zip(pairwise(widths), (1, 2, 2, 2), strict=True):
            blocks += [BasicBlock(inputs, outputs, stride), BasicBlock(outputs, outputs, 1)]
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(widths[-1], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm(self.conv(x))))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class Block(nn.Module):
    """A transformer's block, norms first: attention and two linear layers, each added to its input."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        more: Tensor = self.contract(F.gelu(self.expand(self.norm2(x))))
        return x + more

    def attend(self, x: Tensor) -> Tensor:
        """Softmax attention of x (B, T, W) to itself, to earlier positions alone if causal."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()  # (B, heads, T, D)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if self.causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(later, -math.inf)
        values: Tensor = self.project((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return values


class Transformer(nn.Module):
    """Blocks between an embedding and a linear layer of the positions' mean."""

    def __init__(
        self, embed: nn.Module, positions: int, *, width: int, depth: int, heads: int, causal: bool = False
    ) -> None:
        super().__init__()
        self.embed, self.positions = embed, nn.Parameter(torch.empty(positions, width))
        self.blocks = nn.Sequential(*[Block(width, heads, causal=causal) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the positions."""
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.embed(x) + self.positions)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


def vit(*, size: int = 32, patch: int = 4, width: int = 192, depth: int = 6, heads: int = 3) -> Transformer:
    """A vision transformer of 3 x size x size images, with the mean of positions in place of a class token.

    Reference: Dosovitskiy et al., "An image is worth 16x16 words", ICLR 2021, section 3.1.
    """
    patches = nn.Sequential(nn.Conv2d(3, width, patch, patch), nn.Flatten(2), _Swapped())
    return Transformer(patches, (size // patch) ** 2, width=width, depth=depth, heads=heads)


def sequence(length: int, *, tokens: int = 256, width: int = 128, depth: int = 2, heads: int = 4) -> Transformer:
    """A causal transformer that classifies sequences of `length` tokens."""
    embed = nn.Embedding(tokens, width)
    return Transformer(embed, length, width=width, depth=depth, heads=heads, causal=True)


class _Swapped(nn.Module):
    """The last two axes swapped."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mT
