"""How the cost of a step grows: with the batch, with the length of sequences, and with the width of layers.

Ordinary and clipped steps and norms, as in `benchmarks.models`: of the CNN for batch sizes, of a causal transformer for
lengths, of a network with two hidden layers for widths. A power is fitted to each arm's times and memory.
"""

from collections.abc import Iterator
from typing import NamedTuple

from . import problems
from .measure import Axis, Case, Question, Setup
from .models import arms
from .problems import Problem
from .steps import relative_difference

ARMS = (
    "compiled nn.Module, float32", "functional, compiled, float32", "clipped, compiled, float32",
    "norms, compiled, float32", "clipped, vmap(grad), eager, float32",
)  # fmt: skip


class Point(NamedTuple):
    """A value on an axis."""

    axis: str
    value: int
    max_norm: float
    """Lies among the examples' norms."""

    def problem(self, device: str) -> Problem:
        """What is measured there."""
        if self.axis == "B":
            return problems.cnn(self.value, device)
        if self.axis == "T":
            return problems.sequence(self.value, 16, device)
        return problems.mlp(64, device, hidden=(self.value, self.value))


POINTS = [
    *(Point("B", batch_size, 11.0) for batch_size in (16, 64, 256, 1024)),
    *(Point("T", length, max_norm) for length, max_norm in ((16, 5.4), (64, 3.9), (256, 3.4))),
    *(Point("width", width, max_norm) for width, max_norm in ((64, 4.5), (256, 5.5), (1024, 7.5), (4096, 14.5))),
]


def cases(setup: Setup) -> Iterator[Case]:
    """A case for each point."""
    for point in POINTS[:2] if setup.quick else POINTS:
        yield Case(
            f"{point.axis}={point.value}",
            [arm for arm in arms(point.problem(setup.device), point.max_norm) if arm.name in ARMS],
            relative_difference,
            6,
            warmups=2,
            settings={"max_norm": point.max_norm},
            axis=Axis(point.axis, point.value),
            memory=True,
        )


QUESTION = Question("scaling", "how steps grow with the batch, the length of sequences and the width of layers", cases)
