"""What correlated noise adds to a private step: past noise generated again from its keys.

Tutorial CNN without dropout, float32, compiled. All arms take the same batches, in a fixed order, from 60,000 images,
clip and add noise; they differ in the number of draws that a step's noise is the sum of. As in `private`, the same step
without noise, on one batch, is first held against the definition of a clipped one.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from functorch_mnist import privacy

from . import report
from .definitions import Definitions
from .measure import Arm, Case, Comparison, Question, Setup
from .private import NOISE, Count, Made, case_of, private_steps
from .problems import cnn
from .step import TOLERANCES

BATCH_SIZES = {512: 20}
"""And the rounds at each."""


def fixed_order(batch_size: int, examples: int, *, noise: tuple[str, float]) -> privacy.Mechanism:
    """Batches in a fixed order."""
    kind, parameter = noise
    steps = round(examples / batch_size)
    return privacy.FixedOrder(steps, NOISE, "bisr" if kind == "bisr" else "cgd", parameter)


DRAWS: dict[str, Made] = {
    "independent noise": partial(fixed_order, noise=("cgd", 0.0)),
    "one past draw, λ-CGD": partial(fixed_order, noise=("cgd", 0.9)),
    "eight past draws, BISR": partial(fixed_order, noise=("bisr", 9)),
}


def cases(setup: Setup) -> Iterator[Case]:
    """A case for each batch size."""
    for batch_size, rounds in {256: 2}.items() if setup.quick else BATCH_SIZES.items():
        problem, count = cnn(batch_size, setup.device), Count()
        expected = partial(getattr, Definitions(problem), "clipped_step")
        arms = [
            Arm(
                name,
                partial(private_steps, problem, count, setup.device, made),
                TOLERANCES[torch.float32],
                baseline=name == "independent noise",
                expected=expected,
            )
            for name, made in DRAWS.items()
        ]
        yield case_of(batch_size, arms, rounds, count)


def conclude(comparisons: Sequence[Comparison]) -> str:
    """What past draws cost."""
    rows = [(f"{one.case}, {timing.name}", one, timing) for one in comparisons for timing in one.timings[1:]]
    return report.ratios("case", "over independent noise", rows)


QUESTION = Question("noise", "noise that is correlated over steps, in a private step", cases, conclude)
