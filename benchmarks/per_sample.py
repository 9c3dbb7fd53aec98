"""What per-sample quantities cost: clipped noisy SGD steps, norms, Gram matrices and second moments.

Tutorial CNN without dropout. The reference is the ordinary training step of the compiled `nn.Module`. This library's
factored way is compared with `vmap(grad)` of the module and with other packages. Every quantity is compared with its
definition, a loop over examples; a clipped step without noise, with which it is then timed.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from . import limits, peers, report
from .definitions import Definitions, difference
from .measure import Arm, Case, Comparison, Question, Setup, Work
from .problems import Problem, cnn, precision
from .quantities import CHUNK, MAX_NORM, NOISE, Deviation, Name, clipped_step, dense, factored, quantity
from .step import TOLERANCES
from .steps import functional_step, module_step

BATCH_SIZES = {64: 30, 512: 7}
"""Of clipped steps, and the rounds at each; the other quantities take the first."""
QUANTITIES: dict[str, Name] = {"norms": "norms", "gram": "gram", "second moment": "second_moment"}

Make = Callable[[], Work]


def ordinary_arms(problem: Problem, definitions: Definitions) -> list[Arm]:
    """The reference first: the compiled module's ordinary step, held against the eager one's update."""
    module = partial(module_step, problem, compile=True)
    arms = [arm("ordinary step, compiled nn.Module, float32", module, definitions, "ordinary_step")]
    for dtype in TOLERANCES:
        make = partial(functional_step, problem, compile=True, dtype=dtype)
        name = f"ordinary step, functional, compiled, {precision(dtype)}"
        arms.append(arm(name, make, definitions, "ordinary_step", dtype))
    return arms


def factored_arms(problem: Problem, definitions: Definitions, noise: Deviation) -> list[Arm]:
    """A clipped, noisy step as this library takes it."""
    arms = []
    for dtype in TOLERANCES:
        way = partial(factored, problem, dtype=dtype)
        for compile, form in ((True, "compiled"), (False, "eager")):
            make = partial(clipped_step, way, noise, compile=compile)
            name = f"factored, {form}, {precision(dtype)}"
            arms.append(arm(name, make, definitions, "clipped_step", dtype))
    return arms


def others_arms(problem: Problem, definitions: Definitions, noise: Deviation) -> list[Arm]:
    """A clipped, noisy step as others take it."""
    opacus = partial(peers.opacus_step, problem, noise)
    others: dict[str, Make] = {
        "vmap(grad), eager": partial(clipped_step, partial(dense, problem), noise, compile=False),
        "vmap(grad), compiled": partial(clipped_step, partial(dense, problem), noise, compile=True),
        "Opacus, hooks": partial(opacus, mode="hooks"),
        "Opacus, functorch": partial(opacus, mode="functorch"),
        "Opacus, ExpandedWeights": partial(opacus, mode="ew"),
        "Opacus, ghost clipping": partial(opacus, mode="ghost"),
        "JAX, jit(vmap(grad))": partial(peers.jax_step, problem, noise),
        "jax-privacy, clipped_grad": partial(peers.jax_privacy_step, problem, noise),
    }
    return [arm(name, make, definitions, "clipped_step") for name, make in others.items()]


def quantity_arms(problem: Problem, definitions: Definitions, name: Name) -> list[Arm]:
    """All ways of another quantity."""
    arms = []
    for dtype in TOLERANCES:
        make = partial(quantity, partial(factored, problem, dtype=dtype), name, compile=True)
        arms.append(arm(f"factored, compiled, {precision(dtype)}", make, definitions, name, dtype))
    others: dict[str, Make] = {
        "vmap(grad), eager": partial(quantity, partial(dense, problem), name, compile=False),
        "vmap(grad), compiled": partial(quantity, partial(dense, problem), name, compile=True),
    }
    if name == "norms":
        others["Opacus, hooks"] = partial(peers.opacus_norms, problem, mode="hooks")
        others["Opacus, ghost clipping"] = partial(peers.opacus_norms, problem, mode="ghost")
    others[f"BackPACK, {peers.BACKPACK[name].name}"] = partial(peers.backpack, problem, name)
    others["JAX, jit(vmap(grad))"] = partial(peers.jax, problem, name)
    return arms + [arm(form, make, definitions, name) for form, make in others.items()]


def arm(name: str, make: Make, definitions: Definitions, quantity: str, dtype: torch.dtype = torch.float32) -> Arm:
    """An arm that must find a quantity as it is defined."""
    return Arm(name, make, TOLERANCES[dtype], precision(dtype), expected=partial(getattr, definitions, quantity))


def settings(batch_size: int) -> dict[str, object]:
    """What the numbers depend on."""
    sizes = {"batch_size": batch_size, "chunk_size": CHUNK}
    return {"model": "cnn without dropout", **sizes, "max_norm": MAX_NORM, "noise": NOISE}


def cases(setup: Setup) -> Iterator[Case]:
    """Clipped steps at each batch size, once without the others' packages in the process; then the other quantities."""
    for batch_size, rounds in BATCH_SIZES.items():
        if setup.quick and batch_size != min(BATCH_SIZES):
            continue
        problem, noise = cnn(batch_size, setup.device), Deviation()
        definitions = Definitions(problem)
        ours = [*ordinary_arms(problem, definitions), *factored_arms(problem, definitions, noise)]
        case = Case(
            f"clipped alone, B={batch_size}",
            ours,
            difference,
            5 if setup.quick else rounds,
            warmups=3,
            settings=settings(batch_size),
            costs={precision(dtype): limits.of_step(problem, dtype) for dtype in TOLERANCES},
            compared=noise.turn_on,
        )
        if not setup.quick:
            yield case
        noise.turn_off()
        arms = [*ours, *others_arms(problem, definitions, noise)]
        yield replace(case, name=f"clipped, B={batch_size}", arms=arms, memory=True)
    batch_size = min(BATCH_SIZES)
    problem = cnn(batch_size, setup.device)
    definitions = Definitions(problem)
    costs = {precision(dtype): limits.of_step(problem, dtype) for dtype in TOLERANCES}
    for name, attribute in QUANTITIES.items():
        if setup.quick and name != "norms":
            continue
        yield Case(
            f"{name}, B={batch_size}",
            [*ordinary_arms(problem, definitions), *quantity_arms(problem, definitions, attribute)],
            difference,
            5 if setup.quick else BATCH_SIZES[batch_size],
            warmups=3,
            settings=settings(batch_size),
            costs=costs,
        )


def conclude(comparisons: Sequence[Comparison]) -> str:
    """How many times as long as this library's each other way takes, both in float32; a dash where it has no time."""
    ours = "factored, compiled, float32"
    columns = {}
    for comparison in comparisons:
        medians = {timing.name: timing.median for timing in comparison.timings}
        others = {
            name: m / medians[ours] for name, m in medians.items() if not name.startswith(("factored", "ordinary"))
        }
        if others:
            columns[comparison.case] = others
    return report.across(f"times as long as {ours}", columns, 1) if columns else ""


QUESTION = Question(
    "per_sample", "per-sample gradients: clipped steps, norms, Gram matrices, second moments", cases, conclude
)
