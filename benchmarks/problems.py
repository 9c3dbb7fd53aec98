"""What is trained: a network as a module and as a pure function, its weights and a batch, the same for all arms."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from functorch_mnist import data, models, random

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

    def loaded(self) -> nn.Module:
        """A module that has the weights."""
        module = self.module().to(self.labels.device)
        models.load_into(module, self.params)
        return module


def start(weights: Iterable[Tensor], batch: Iterable[Tensor], dtype: torch.dtype) -> Start:
    """What an arm starts from, given the tensors that it holds."""
    threads = torch.get_num_threads()
    return Start(_digest(weights), _digest(batch), precision(dtype), threads)


def precision(dtype: torch.dtype) -> str:
    """The name of a precision, as in `float32`."""
    return str(dtype).removeprefix("torch.")


def _digest(tensors: Iterable[Tensor]) -> str:
    return digest(tensor.detach().cpu() for tensor in tensors)


class Net(nn.Module):
    """The article's network without dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 32, 3), nn.Conv2d(32, 64, 3)
        self.fc1, self.fc2 = nn.Linear(9216, 128), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv2(F.relu(self.conv1(x))), 2)
        return F.log_softmax(self.fc2(F.relu(self.fc1(x.flatten(1)))), dim=1)


def cnn(batch_size: int, device: str = "cpu") -> Problem:
    """The article's network on MNIST."""
    model, (stored, labels) = models.cnn(dropout=(0, 0)), _mnist(batch_size, device)
    params = {name: w.to(device) for name, w in model.init(random.key(0)).items()}
    return Problem(Net, model.apply, params, stored, normalized, labels)


def normalized(images: Tensor) -> Tensor:
    """MNIST's images as the networks take them."""
    return data.normalize(images, MEAN, DEVIATION)


def _mnist(batch_size: int, device: str) -> tuple[Tensor, Tensor]:
    split = data.load("mnist").train
    return split.images[:batch_size].to(device), split.labels[:batch_size].to(device)
