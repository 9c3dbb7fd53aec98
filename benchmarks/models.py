"""What a step costs on other networks: a linear stack, a residual network and a vision transformer besides the CNN.

For each network ordinary steps, as a module and functional, clipped ones, and the norms of the sample gradients. The
clipped updates and the norms are compared with their definitions, a loop over examples. The clipping norm lies among
the examples' norms, so that some are clipped and others are not.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch

from . import limits, problems, report
from .definitions import Definitions
from .measure import Arm, Case, Comparison, Question, Setup, Work
from .problems import Problem, precision
from .quantities import clipped_step, dense, factored, quantity
from .steps import functional_step, module_step, relative_difference

TOLERANCES = {torch.float32: 3e-4, torch.bfloat16: 5e-2}
"""Or, in float32, a few times what rounding makes of the module's own gradient, where that is more."""
FEW = 2
MOST_BYTES = 4 * 2**30
"""Of dense sample gradients: an arm that would form more is left out."""


class Network(NamedTuple):
    """A network, as it is measured."""

    problem: Callable[[int, str], Problem]
    """Of a batch size and a device."""
    batch_size: int
    max_norm: float
    rounds: int
    precisions: tuple[torch.dtype, ...] = (torch.float32,)
    """Where a step takes a minute to compile, float32 alone."""


NETWORKS = {
    "cnn": Network(problems.cnn, 64, 11.0, 30, tuple(TOLERANCES)),
    "mlp": Network(problems.mlp, 64, 6.0, 60, tuple(TOLERANCES)),
    "resnet18": Network(problems.resnet18, 16, 66.0, 5),
    "vit": Network(problems.vit, 16, 15.9, 10),
}


def arms(problem: Problem, max_norm: float) -> list[Arm]:
    """Ordinary steps, clipped ones and the norms."""
    definitions = Definitions(problem, max_norm)
    full, half = torch.float32, torch.bfloat16
    tolerances = {**TOLERANCES, full: max(TOLERANCES[full], FEW * problem.rounding())}
    found = []
    for compile, form in ((True, "compiled"), (False, "eager")):
        make = partial(module_step, problem, compile=compile)
        found.append(Arm(f"{form} nn.Module, float32", make, tolerances[full], baseline=True))
    for dtype, compile, form in ((full, True, "compiled"), (full, False, "eager"), (half, True, "compiled")):
        name, make = precision(dtype), partial(functional_step, problem, compile=compile, dtype=dtype)
        found.append(Arm(f"functional, {form}, {name}", make, tolerances[dtype], name))
    ours = {dtype: partial(factored, problem, dtype=dtype, max_norm=max_norm, chunk_size=None) for dtype in tolerances}
    kept = partial(factored, problem, max_norm=max_norm, chunk_size=None, prepared=True)
    works: list[tuple[str, Callable[[], Work], torch.dtype, str]] = [
        ("clipped, compiled", partial(clipped_step, ours[full], compile=True), full, "clipped_step"),
        ("clipped, compiled", partial(clipped_step, ours[half], compile=True), half, "clipped_step"),
        ("norms, compiled", partial(quantity, ours[full], "norms", compile=True), full, "norms"),
        ("clipped, prepared, eager", partial(clipped_step, kept, compile=False), full, "clipped_step"),
        ("norms, prepared, eager", partial(quantity, kept, "norms", compile=False), full, "norms"),
    ]
    if len(problem.labels) * sum(p.nbytes for p in problem.params.values()) <= MOST_BYTES:
        others = partial(clipped_step, partial(dense, problem, max_norm=max_norm), compile=False)
        works.append(("clipped, vmap(grad), eager", others, full, "clipped_step"))
    for work, call, dtype, defined in works:
        name, expected = precision(dtype), partial(getattr, definitions, defined)
        found.append(Arm(f"{work}, {name}", call, tolerances[dtype], name, expected=expected))
    return found


def cases(setup: Setup) -> Iterator[Case]:
    """A case for each network."""
    for name in ("mlp",) if setup.quick else NETWORKS:
        network = NETWORKS[name]
        problem = network.problem(network.batch_size, setup.device)
        costs = {precision(dtype): limits.of_step(problem, dtype) for dtype in network.precisions}
        yield Case(
            f"{name}, B={network.batch_size}",
            [arm for arm in arms(problem, network.max_norm) if arm.precision in costs],
            relative_difference,
            10 if setup.quick else network.rounds,
            warmups=2,
            settings={"model": name, "batch_size": network.batch_size, "max_norm": network.max_norm},
            costs=costs,
        )


def conclude(comparisons: Sequence[Comparison]) -> str:
    """Each arm's ratio, a network a column; a dash where it was not measured."""
    columns = {one.case: {timing.name: one.ratio(timing) for timing in one.timings} for one in comparisons}
    return report.across("over the fastest nn.Module, float32", columns, 2)


QUESTION = Question(
    "models", "ordinary and clipped steps of other networks, functional against nn.Module", cases, conclude
)
