"""What clipping costs on modules as they are: the clipped sum over the module's own forward and backward pass.

A BERT and a GPT-2 of transformers and an LSTM go through `models.from_module` unchanged. The reference is the gradient
of the mean loss of the batch, by the module's own kernels; the LSTM is compared with the same network as a loop over
positions too. Clipped sums are compared with their definition, a loop over examples in float64, ordinary gradients with
the eager module's. Opacus clips the same module where it can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from . import recipes, report
from .measure import Arm, Case, Comparison, Question, Setup, Work
from .recipes import Lstm, LstmLoop, Recipe, Sizes
from .steps import relative_difference
from .subjects import TOLERANCE, Subject, clipped, clipped_by_opacus, ordinary

ROUNDS = 15
QUICK = {"batch": 4, "positions": 16, "layers": 2, "width": 64, "tokens": 100}
TRANSFORMER, RECURRENT = Sizes(16, 128, 6, 256, 4), Sizes(16, 64, 2, 256)


def arms(subject: Subject, *, compile: bool) -> list[Arm]:
    """The module's own pass first, then clipped sums."""
    form = "compiled" if compile else "eager"
    found = [Arm(f"ordinary, {form} module", partial(ordinary, subject, compile=compile), TOLERANCE)]
    if subject.recipe.as_loop is not None:
        found.append(Arm(LOOP, partial(ordinary, subject, as_loop=True), TOLERANCE))
    ways: dict[str, Callable[[], Work]] = {f"clipped, {form}": partial(clipped, subject, compile=compile)}
    if not compile:
        ways["clipped, Opacus, hooks"] = partial(clipped_by_opacus, subject, mode="hooks")
        ways["clipped, Opacus, ghost clipping"] = partial(clipped_by_opacus, subject, mode="ghost")
    expected = partial(getattr, subject, "clipped_sum")
    return found + [Arm(name, make, TOLERANCE, expected=expected) for name, make in ways.items()]


LOOP = "ordinary, as a loop over positions"


def cases(setup: Setup) -> Iterator[Case]:
    """A case for each network, and one more where it is compiled."""
    for compile in (False, True):
        for recipe in RECIPES:
            if compile and (setup.quick or not recipe.compiles):
                continue
            sizes = recipe.sizes._replace(**QUICK) if setup.quick else recipe.sizes
            yield Case(
                f"{recipe.name}, {'compiled' if compile else 'eager'}",
                arms(Subject(recipe, sizes, setup.device), compile=compile),
                relative_difference,
                5 if setup.quick else ROUNDS,
                warmups=2,
                settings={"model": recipe.name, **sizes._asdict(), "max_norm": recipe.max_norm},
            )


def conclude(comparisons: Sequence[Comparison]) -> str:
    """Each clipped sum over the ordinary pass, with its interval, or why there is none."""
    lines = ["| module | clipped sum | over the module's own pass | over the loop |", "|---|---|---:|---:|"]
    for one in comparisons:
        for timing in one.timings:
            if timing.name.startswith("clipped"):
                cells = [_over(one, timing.name, name) for name in (one.timings[0].name, LOOP)]
                lines.append(f"| {one.case} | {timing.name} | " + " | ".join(cells) + " |")
        for missing in one.missing:
            lines.append(f"| {one.case} | {report.without_time(missing)} | - | - |")
    return "\n".join(lines)


def _over(comparison: Comparison, name: str, base: str) -> str:
    """An arm's ratio to another, with its interval; a dash where that was not timed."""
    against = replace(comparison, timings=[replace(t, baseline=t.name == base) for t in comparison.timings])
    if not any(timing.baseline for timing in against.timings):
        return "-"
    timing = next(timing for timing in against.timings if timing.name == name)
    return report.ratio(against, timing)


RECIPES = (
    Recipe("LSTM", Lstm, recipes.vectors, recipes.itself, RECURRENT, 1.39, compiles=False, as_loop=LstmLoop),
    Recipe("BERT", recipes.bert, recipes.texts, recipes.of_output, TRANSFORMER, 7.9),
    Recipe("BERT, padded", recipes.bert, recipes.padded_texts, recipes.of_output, TRANSFORMER, 7.9),
    Recipe("GPT-2", recipes.gpt2, recipes.next_tokens, recipes.but_the_last, TRANSFORMER, 7.9),
)

QUESTION = Question("modules", "clipped sums of BERT, GPT-2 and an LSTM over the modules' own passes", cases, conclude)
