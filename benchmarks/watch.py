"""What it costs to watch sample gradients while training: their norms and the noise of the batch, or their values.

Tutorial CNN without dropout, B = 64, float32. The reference is this library's ordinary step, in the same form.
"""

from collections.abc import Iterator, Sequence
from functools import partial

from functorch_mnist.commands.build import VALUE_DRAW, VALUE_RENEWED, VALUE_SMOOTHING

from . import report
from .measure import Arm, Case, Comparison, Question, Setup
from .problems import cnn
from .steps import relative_difference, valued_steps, watched_steps

BATCH_SIZE = 64
TOLERANCE = 1e-3
"""Of the update after some steps in float32."""


def cases(setup: Setup) -> Iterator[Case]:
    """Watched at every step and at every tenth, and valued at every step, compiled and eager."""
    problem = cnn(BATCH_SIZE, setup.device)
    for form in ("compiled", "eager"):
        for name, count in (("every step", 1), ("every tenth step", 10)):
            steps = partial(watched_steps, problem, compile=form == "compiled", count=count)
            yield Case(
                f"{name}, {form}",
                [
                    Arm("ordinary steps", partial(steps, watched=0), baseline=True),
                    Arm(f"watched at {name}", partial(steps, watched=1), TOLERANCE),
                ],
                relative_difference,
                (5 if setup.quick else 60) // (1 if count == 1 or setup.quick else 4),
                warmups=3,
                settings={"model": "cnn without dropout", "batch_size": BATCH_SIZE, "steps_in_a_call": count},
            )
        steps = partial(watched_steps, problem, compile=form == "compiled", count=VALUE_RENEWED)
        yield Case(
            f"value, {form}",
            [
                Arm("ordinary steps", partial(steps, watched=0), baseline=True),
                Arm("valued at every step", partial(valued_steps, problem, compile=form == "compiled"), TOLERANCE),
            ],
            relative_difference,
            3 if setup.quick else 20,
            warmups=3,
            settings={
                "model": "cnn without dropout", "batch_size": BATCH_SIZE, "draw": VALUE_DRAW,
                "smoothing": VALUE_SMOOTHING, "steps_in_a_call": VALUE_RENEWED,
            },
        )  # fmt: skip


def conclude(comparisons: Sequence[Comparison]) -> str:
    """What watching costs, over the ordinary steps of the same form."""
    rows = [(one.case, one, timing) for one in comparisons for timing in one.timings[1:]]
    return report.ratios("watched at", "over ordinary steps", rows, digits=2)


QUESTION = Question(
    "watch",
    "what train --watch adds to a step: norms and noise, at every step and every tenth, or values",
    cases,
    conclude,
)
