"""What one training step costs: functional against eager and compiled `nn.Module`, tutorial CNN without dropout.

    python -m benchmarks.step [--batch-size 64] [--rounds 60] [--default-allocator]

All arms start from the same weights and take the same batch; the step includes casting, normalising and the optimizer.
They share one process, in which freed memory is kept, as the `train` command does. With glibc's own setting every arm
faults its buffers in anew at each step, some 4,000 pages of them, and the ratios drown in that.
"""

import argparse
from collections.abc import Callable
from typing import TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from functorch_mnist import allocator, data, losses, models, optim, random, train, tree

from . import measure

MEAN, DEVIATION, LR, MOMENTUM = 0.1307, 0.3081, 0.01, 0.9

T = TypeVar("T")
Work: TypeAlias = tuple[Callable[[], None], Callable[[], T]]
"""What is timed, and what it has computed: for a step the update of the parameters that the steps so far have made."""


class Net(nn.Module):
    """The article's network without dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 32, 3), nn.Conv2d(32, 64, 3)
        self.fc1, self.fc2 = nn.Linear(9216, 128), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv2(F.relu(self.conv1(x))), 2)
        return F.log_softmax(self.fc2(F.relu(self.fc1(x.flatten(1)))), dim=1)


def module_arm(params: models.Params, images: Tensor, labels: Tensor, *, compile: bool) -> Work[models.Params]:
    """A step of `nn.Module` and `torch.optim.SGD`, on images normalised beforehand as a data loader would."""
    net = Net()
    models.load_into(net, params)
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=MOMENTUM)
    forward = torch.compile(net) if compile else net
    x = data.normalize(images, MEAN, DEVIATION)

    def call() -> None:
        optimizer.zero_grad()
        F.cross_entropy(forward(x), labels).backward()
        optimizer.step()

    return call, lambda: {name: p.detach() - params[name] for name, p in net.named_parameters()}


def functional_arm(
    params: models.Params, images: Tensor, labels: Tensor, *, compile: bool, dtype: torch.dtype
) -> Work[models.Params]:
    """A step of this library, on images as they are stored."""
    apply = train.in_precision(models.cnn(dropout=(0, 0)).apply, dtype)

    def losses_fn(params: models.Params, images: Tensor, labels: Tensor) -> Tensor:
        return losses.cross_entropy(apply(params, data.normalize(images, MEAN, DEVIATION)), labels)

    optimizer = optim.sgd(LR, momentum=MOMENTUM)
    step = train.make_step(train.batch_gradient(losses_fn), optimizer)
    step = train.compiled(step) if compile else step
    state = train.init_state(params, optimizer, random.key(0))

    def call() -> None:
        nonlocal state
        state, _ = step(state, images, labels)

    return call, lambda: tree.map(torch.sub, state.params, params)


def relative_difference(update: models.Params, expected: models.Params) -> float:
    """How far an update of the parameters is from the expected one, relative to its norm."""
    return float(tree.norm(tree.map(torch.sub, update, expected)) / tree.norm(expected))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--default-allocator", action="store_true", help="let the C library give freed memory back")
    options = parser.parse_args()
    kept = not options.default_allocator and allocator.keep_freed_memory()
    split = data.load("mnist").train
    images, labels = split.images[: options.batch_size], split.labels[: options.batch_size]
    params = models.cnn().init(random.key(0))

    def module(compile: bool) -> Work[models.Params]:
        return module_arm(params, images, labels, compile=compile)

    def functional(compile: bool, dtype: torch.dtype) -> Work[models.Params]:
        return functional_arm(params, images, labels, compile=compile, dtype=dtype)

    arms = [
        measure.Arm("compiled nn.Module, float32", *module(True)),
        measure.Arm("eager nn.Module, float32", *module(False), 1e-4),
        measure.Arm("functional, eager, float32", *functional(False, torch.float32), 1e-4),
        measure.Arm("functional, compiled, float32", *functional(True, torch.float32), 1e-4),
        measure.Arm("functional, eager, bfloat16", *functional(False, torch.bfloat16), 5e-2),
        measure.Arm("functional, compiled, bfloat16", *functional(True, torch.bfloat16), 5e-2),
    ]
    settings = {"batch_size": options.batch_size, "keep_freed_memory": kept, "model": "cnn without dropout"}
    result = measure.compare(
        "step", arms, rounds=options.rounds, difference=relative_difference, settings=settings, warmups=5
    )
    print(f"\n{measure.table(result)}\n\nWritten to {measure.write(result)}")


if __name__ == "__main__":
    main()
