"""What is trained: a network as a module and as a pure function, its weights and a batch, the same for all arms."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from functorch_mnist import data, models, random

from . import networks
from .measure import Start, digest

MEAN, DEVIATION = 0.1307, 0.3081


@dataclass(frozen=True)
class Problem:
    """One network at one point, and one batch."""

    module: Callable[[], nn.Module]
    """A new module of the network, with weights of its own."""
    apply: models.Apply
    """The same network as a pure function, of examples or batches."""
    params: models.Params
    stored: Tensor
    """(B, …), the examples as they are stored."""
    prepare: Callable[[Tensor], Tensor]
    """From the stored examples to what the network takes: part of this library's step, done beforehand for a module."""
    labels: Tensor
    """(B,)."""

    @property
    def x(self) -> Tensor:
        """(B, …), what the network takes."""
        return self.prepare(self.stored)

    def loaded(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A module that has the weights."""
        module = self.module().to(self.labels.device, dtype)
        models.load_into(module, self.params)
        return module

    def rounding(self, draws: int = 4) -> float:
        """How far rounding takes the gradient of the mean loss, relative to its norm: the most of some draws.

        In float64, with each weight changed in the 21st binary digit, as float32 does to what comes of many sums. A
        ReLU whose input is zero up to that switches on or off, and takes its path's gradient along.
        """
        found = []
        for draw in range(draws + 1):
            module = self.loaded(torch.float64)
            with torch.no_grad():
                for i, p in enumerate(module.parameters()):
                    noise = random.normal(random.fold_in(random.key(draw), i), tuple(p.shape))
                    p.mul_(1 + (2.0**-21 * noise if draw else 0))
            F.cross_entropy(module(self.x.double()), self.labels).backward()
            found.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]))
        return max(float((gradient - found[0]).norm() / found[0].norm()) for gradient in found[1:])


def start(weights: Iterable[Tensor], batch: Iterable[Tensor], dtype: torch.dtype) -> Start:
    """What an arm starts from, from the tensors that it holds."""
    threads = torch.get_num_threads()
    return Start(_digest(weights), _digest(batch), precision(dtype), threads)


def precision(dtype: torch.dtype) -> str:
    """The name of a precision, as in `float32`."""
    return str(dtype).removeprefix("torch.")


def _digest(tensors: Iterable[Tensor]) -> str:
    return digest(tensor.detach().cpu() for tensor in tensors)


def cnn(batch_size: int, device: str = "cpu") -> Problem:
    """The article's network on MNIST."""
    model, (stored, labels) = models.cnn(dropout=(0, 0)), _mnist(batch_size, device)
    params = {name: w.to(device) for name, w in model.init(random.key(0)).items()}
    return Problem(networks.Net, model.apply, params, stored, normalized, labels)


def mlp(batch_size: int, device: str = "cpu", *, hidden: tuple[int, ...] = (512, 256)) -> Problem:
    """Linear layers on MNIST, from flat images."""
    widths = (784, *hidden, networks.CLASSES)
    model, (stored, labels) = models.mlp(widths), _mnist(batch_size, device)
    params = {name: w.to(device) for name, w in model.init(random.key(0)).items()}
    return Problem(partial(networks.mlp, widths), model.apply, params, stored, flat, labels)


def resnet18(batch_size: int, device: str = "cpu") -> Problem:
    """ResNet-18 with group norms, on random images of 3x32x32. The pure function's kernels lie channels last."""
    return _of_module(networks.ResNet18, _images(batch_size), device)


def vit(batch_size: int, device: str = "cpu") -> Problem:
    """A small vision transformer, on random images of 3x32x32."""
    return _of_module(networks.vit, _images(batch_size), device)


def sequence(length: int, batch_size: int, device: str = "cpu") -> Problem:
    """A small causal transformer, on random tokens."""
    tokens = random.randint(random.key(1), (batch_size, length), 0, 256)
    return _of_module(partial(networks.sequence, length), tokens, device)


def _of_module(module: Callable[[], nn.Module], x: Tensor, device: str) -> Problem:
    """A module's problem, on examples that it takes as they are stored."""
    _, model = models.from_module(module().to(device).to(memory_format=torch.channels_last), example_ndim=x.dim() - 1)
    labels = random.randint(random.key(2), (len(x),), 0, networks.CLASSES).to(device)
    return Problem(module, model.apply, model.init(random.key(0)), x.to(device), _as_stored, labels)


def _images(batch_size: int) -> Tensor:
    return random.normal(random.key(1), (batch_size, 3, 32, 32))


def _as_stored(x: Tensor) -> Tensor:
    return x


def flat(images: Tensor) -> Tensor:
    """MNIST's images as a network of flat inputs takes them."""
    return normalized(images).flatten(-3)


def normalized(images: Tensor) -> Tensor:
    """MNIST's images as the networks take them."""
    return data.normalize(images, MEAN, DEVIATION)


def _mnist(batch_size: int, device: str) -> tuple[Tensor, Tensor]:
    split = data.load("mnist").train
    return split.images[:batch_size].to(device), split.labels[:batch_size].to(device)
