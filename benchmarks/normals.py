"""What keyed normals cost: 1.2 million of them, compiled, against `torch.randn`.

1.2 million is the number of the tutorial CNN's parameters: the noise of one private step. Each arm's mean and standard
deviation are held against 0 and 1.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from functorch_mnist import random, train

from .measure import Arm, Case, Question, Setup, Work

COUNT = 1_200_000
TOLERANCE = 0.01
"""Eleven standard deviations of the mean."""


def drawn(draw: Callable[[], Tensor]) -> Work:
    """Work whose outputs are the mean and the standard deviation of what it drew last."""
    last: list[Tensor] = []

    def call() -> None:
        last[:] = [draw()]

    return Work(call, lambda: (float(last[0].mean()), float(last[0].std())))


def keyed(normal: Callable[[Tensor, tuple[int]], Tensor], device: str) -> Work:
    """Compiled draws from a key."""
    draw = train.compiled(lambda key: normal(key, (COUNT,)))
    return drawn(partial(draw, random.key(0, device=device)))


def farther(found: tuple[float, float], expected: tuple[float, float]) -> float:
    """How far the mean or the deviation is from the expected one, whichever is farther."""
    return max(abs(a - b) for a, b in zip(found, expected, strict=True))


def cases(setup: Setup) -> Iterator[Case]:
    """One case."""
    works = {
        "torch.randn": partial(drawn, partial(torch.randn, COUNT, device=setup.device)),
        "random.normal, compiled": partial(keyed, random.normal, setup.device),
        "random.box_muller, compiled": partial(keyed, random.box_muller, setup.device),
    }
    arms = [Arm(name, work, TOLERANCE, expected=lambda: (0.0, 1.0)) for name, work in works.items()]
    rounds = 10 if setup.quick else 60
    yield Case("1.2 million", arms, farther, rounds, warmups=5, settings={"count": COUNT})


QUESTION = Question("normals", "keyed normal numbers, compiled, against torch.randn", cases)
