"""What a step costs on other networks: a linear stack, a residual network and a vision transformer beside the CNN.

For each network ordinary steps, as a module and functional, clipped ones, and the norms of the sample gradients. The
clipped updates and the norms are compared with their definitions, a loop over examples. The clipping norm lies among
the examples' norms, so that some are clipped and others are not.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import NamedTuple

import torch

from . import limits, problems, steps
from .measure import Arm, Case, Question, Setup
from .problems import Problem, precision

TOLERANCES = {torch.float32: 3e-4, torch.bfloat16: 0.15}
"""For the deepest: a residual network's update is 0.08 off in bfloat16, a compiled module's 1e-4 off an eager one's."""
MOST_BYTES = 4 * 2**30
"""Of dense sample gradients: an arm that would form more is left out."""


class Network(NamedTuple):
    """A network, as it is measured."""

    problem: Callable[[int, str], Problem]
    """Of a batch size and a device."""
    batch_size: int
    max_norm: float
    rounds: int


NETWORKS = {
    "cnn": Network(problems.cnn, 64, 11.0, 30),
    "mlp": Network(problems.mlp, 64, 6.0, 60),
    "resnet18": Network(problems.resnet18, 16, 66.0, 6),
    "vit": Network(problems.vit, 16, 15.9, 10),
}


def arms(problem: Problem, max_norm: float) -> list[Arm]:
    """Ordinary steps, clipped ones and the norms."""
    definition = cache(partial(steps.clipped_update, problem, max_norm))
    full, half = torch.float32, torch.bfloat16
    found = []
    for compile, form in ((True, "compiled"), (False, "eager")):
        make = partial(steps.module_step, problem, compile=compile)
        found.append(Arm(f"{form} nn.Module, float32", make, TOLERANCES[full], baseline=True))
    for dtype, compile, form in ((full, True, "compiled"), (full, False, "eager"), (half, True, "compiled")):
        name, make = precision(dtype), partial(steps.functional_step, problem, compile=compile, dtype=dtype)
        found.append(Arm(f"functional, {form}, {name}", make, TOLERANCES[dtype], name))
    works = [
        ("clipped, compiled", partial(steps.clipped_step, problem, compile=True, max_norm=max_norm), full, 0),
        (
            "clipped, compiled",
            partial(steps.clipped_step, problem, compile=True, max_norm=max_norm, dtype=half),
            half,
            0,
        ),
        ("norms, compiled", partial(steps.norms, problem, compile=True), full, 1),
    ]
    if len(problem.labels) * sum(p.nbytes for p in problem.params.values()) <= MOST_BYTES:
        dense = partial(steps.dense_clipped_step, problem, max_norm=max_norm)
        works.append(("clipped, vmap(grad), eager", dense, full, 0))
    for work, make, dtype, part in works:
        name, expected = precision(dtype), partial(lambda part: definition()[part], part)
        found.append(Arm(f"{work}, {name}", make, TOLERANCES[dtype], name, expected=expected))
    return found


def cases(setup: Setup) -> Iterator[Case]:
    """A case for each network."""
    for name in ("mlp",) if setup.quick else NETWORKS:
        make, batch_size, max_norm, rounds = NETWORKS[name]
        problem = make(batch_size, setup.device)
        yield Case(
            f"{name}, B={batch_size}",
            arms(problem, max_norm),
            steps.relative_difference,
            10 if setup.quick else rounds,
            warmups=2,
            settings={"model": name, "batch_size": batch_size, "max_norm": max_norm},
            costs={precision(dtype): limits.of_step(problem, dtype) for dtype in TOLERANCES},
            memory=True,
        )


QUESTION = Question("models", "ordinary and clipped steps of other networks, functional against nn.Module", cases)
