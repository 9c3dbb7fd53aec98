"""Whether the plan picks the fastest way of taking inner products: predicted against measured, layer by layer.

Each case is one linear map or convolution at T positions and B examples. Its arms take the squared norms of the sample
gradients from the same factors, compiled, float32, by each way that there is; the plan of a loss with this one layer
says which it would take. A way that would store more than a GiB is left out.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from functorch_mnist import per_sample, random, train
from functorch_mnist.per_sample.terms import Term

from .measure import Arm, Case, Comparison, Question, Setup, Work
from .problems import start

LINEAR = [(64, 64), (784, 128)]
"""Inputs and outputs."""
CONVOLUTIONS = [(1, 32, 3), (32, 64, 3)]
"""Channels in and out, and the kernel's width; padded so that T is the image's size."""
POSITIONS, BATCH_SIZES = (1, 4, 16, 64, 256, 1024), (16, 64, 512)
MOST = 2**30
"""Bytes that a way may store."""


@dataclass(frozen=True)
class Layer:
    """A layer on its own: a loss of one example, and where its one parameter and its input come from."""

    name: str
    op: Callable[[Tensor, Tensor], Tensor]
    weight: tuple[int, ...]
    example: tuple[int, ...]

    def loss(self, params: dict[str, Tensor], x: Tensor) -> Tensor:
        """Half the outputs' squared norm, so the cotangent is the output."""
        return self.op(x, params["weight"]).square().sum() / 2


def layers() -> Iterator[Layer]:
    """The grid, without the batch sizes."""
    for (inputs, outputs), t in itertools.product(LINEAR, POSITIONS):
        yield Layer(f"linear {inputs} to {outputs}, T={t}", F.linear, (outputs, inputs), (t, inputs))
    for (channels, outputs, kernel), t in itertools.product(CONVOLUTIONS, POSITIONS):
        op = partial(F.conv2d, padding=kernel // 2)
        name = f"conv {channels} to {outputs}, {kernel}x{kernel}, T={t}"
        yield Layer(name, op, (outputs, channels, kernel, kernel), (channels, round(t**0.5), round(t**0.5)))


def cases(setup: Setup) -> Iterator[Case]:
    """A case for each layer and batch size."""
    grid = list(itertools.product(layers(), BATCH_SIZES))
    for layer, batch_size in grid[::20] if setup.quick else grid:
        weight_key, x_key = random.split(random.key(0))
        params = {"weight": random.normal(weight_key, layer.weight).to(setup.device)}
        plan = per_sample.plan(
            layer.loss, params, torch.zeros(layer.example, device=setup.device), batch_size=batch_size
        )
        row = plan.rows[0]
        ways = {
            way: cost
            for way, cost in row.costs.items()
            if way != "dense" and cost.memory * row.itemsize * batch_size <= MOST
        }
        if len(ways) < 2 or row.way not in ways:
            continue
        x = random.normal(x_key, (batch_size, *layer.example)).to(setup.device)
        arms = [
            Arm(way, partial(_squares, layer, params, x, plan.override("weight", way)), 1e-4, baseline=True)
            for way in ways
        ]
        yield Case(
            f"{layer.name}, B={batch_size}",
            arms,
            lambda found, expected: float((found - expected).norm() / expected.norm()),
            rounds=15,
            warmups=2,
            sample=2e-3,
            settings={
                "layer": layer.name,
                "batch_size": batch_size,
                "predicted": row.way,
                "arithmetic": {way: cost.arithmetic for way, cost in ways.items()},
                "memory": {way: cost.memory * row.itemsize * batch_size for way, cost in ways.items()},
            },
        )


def _squares(layer: Layer, params: dict[str, Tensor], x: Tensor, plan: per_sample.Plan) -> Work:
    """The squared norms, from factors taken beforehand."""
    (term,) = per_sample.factored(layer.loss, params, x, plan=plan).terms
    run, found = train.compiled(_square_norms), [torch.zeros(0)]

    def call() -> None:
        found[0] = run(term)

    return Work(call, lambda: found[0], start(params.values(), [x], torch.float32))


def _square_norms(term: Term) -> Tensor:
    return term.square_norms()


def conclude(comparisons: Sequence[Comparison]) -> str:
    """How often the plan picked the fastest way, and what its other picks lose."""
    rows = [_judged(comparison) for comparison in comparisons]
    right = [row for row in rows if row.fastest]
    lines = [
        f"The plan picks the fastest way, or one within its 95 % interval, in {len(right)} of {len(rows)} cases; "
        f"the one with the least median in {sum(row.loss == 0 for row in rows)}.",
    ]
    wrong = sorted((row for row in rows if not row.fastest), key=lambda row: -row.loss)
    if wrong:
        lines += [
            "",
            "| layer | picked | fastest | slower by | arithmetic of the next, over it |",
            "|---|---|---|---:|---:|",
        ]
        lines += [f"| {r.case} | {r.picked} | {r.best} | {100 * r.loss:.0f} % | {r.margin:.2f} |" for r in wrong]
    return "\n".join(lines)


@dataclass(frozen=True)
class _Judged:
    """The plan's pick against the measured times."""

    case: str
    picked: str
    best: str
    loss: float
    """By how much the picked way takes longer than the fastest."""
    fastest: bool
    """Whether the 95 % interval of that reaches zero."""
    margin: float
    """The arithmetic of the cheapest other way over that of the picked one."""


def _judged(comparison: Comparison) -> _Judged:
    picked: str = comparison.settings["predicted"]
    arithmetic: dict[str, Any] = comparison.settings["arithmetic"]
    timing = next(t for t in comparison.timings if t.name == picked)
    others = [cost for way, cost in arithmetic.items() if way != picked]
    return _Judged(
        comparison.case,
        picked,
        comparison.reference.name,
        comparison.ratio(timing) - 1,
        comparison.interval(timing)[0] <= 1,
        min(others) / arithmetic[picked],
    )


QUESTION = Question(
    "strategies", "the plan's predicted ways of taking inner products against the measured ones", cases, conclude
)
