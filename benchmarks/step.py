"""What one training step costs: functional against eager and compiled `nn.Module`, tutorial CNN without dropout.

All arms start from the same weights and take the same batch. The functional step includes casting and normalising.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from . import limits
from .measure import Arm, Axis, Case, Comparison, Question, Setup
from .problems import Problem, cnn, precision
from .steps import Form, functional_step, module_step, relative_difference

BATCH_SIZES = {16: 50, 32: 50, 64: 50, 128: 30, 256: 16, 512: 9, 1024: 6}
"""And the rounds at each."""
SGD: dict[Form, str] = {"plain": "", "foreach": ", foreach SGD", "fused": ", fused SGD"}
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""For 64 examples or more. The examples' own rounding averages out: fewer have an error in proportion to 1/√B."""


def step_arms(problem: Problem) -> list[Arm]:
    """All ways of an ordinary step."""
    arms = []
    for dtype, tolerance in TOLERANCES.items():
        name, tolerance = precision(dtype), tolerance * max(1.0, 64 / len(problem.labels)) ** 0.5
        for compile, form in ((True, "compiled"), (False, "eager")):
            for sgd, kind in SGD.items():
                if kind and dtype != torch.float32:
                    continue  # the optimizer's work is float32 all the same
                make = partial(module_step, problem, compile=compile, dtype=dtype, sgd=sgd)
                base = dtype == torch.float32
                arms.append(Arm(f"{form} nn.Module{kind}, {name}", make, tolerance, name, baseline=base))
        for compile, form in ((False, "eager"), (True, "compiled")):
            work = partial(functional_step, problem, compile=compile, dtype=dtype)
            arms.append(Arm(f"functional, {form}, {name}", work, tolerance, name))
    return arms


def cases(setup: Setup) -> Iterator[Case]:
    """A case for each batch size."""
    for batch_size, rounds in {64: 10}.items() if setup.quick else BATCH_SIZES.items():
        problem = cnn(batch_size, setup.device)
        yield Case(
            f"B={batch_size}",
            step_arms(problem),
            relative_difference,
            rounds,
            warmups=5,
            settings={"model": "cnn without dropout", "batch_size": batch_size},
            costs={precision(dtype): limits.of_step(problem, dtype) for dtype in TOLERANCES},
            axis=Axis("B", batch_size),
            memory=batch_size == 64,
        )


def conclude(comparisons: Sequence[Comparison]) -> str:
    """The functional, compiled step over the fastest module's, by batch size and precision."""
    lines = [
        "| | fastest module, float32 | functional, float32, over it | functional, bfloat16, over it "
        "| over the fastest bfloat16 module |",
        "|---|---|---:|---:|---:|",
    ]
    for comparison in comparisons:
        best = comparison.reference
        ours = {t.precision: t for t in comparison.timings if t.name.startswith("functional, compiled")}
        modules = [t.median for t in comparison.timings if "nn.Module" in t.name and t.precision == "bfloat16"]
        if len(ours) == 2 and modules:
            ratios = [comparison.ratio(ours["float32"]), comparison.ratio(ours["bfloat16"])]
            ratios.append(ours["bfloat16"].median / min(modules))
            cells = " | ".join(f"{ratio:.2f}" for ratio in ratios)
            lines.append(f"| {comparison.case} | {best.name.removesuffix(', float32')} | {cells} |")
    return "\n".join(lines)


QUESTION = Question(
    "step", "an ordinary training step: functional against eager and compiled nn.Module", cases, conclude
)
