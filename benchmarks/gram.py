"""The Gram matrix of many examples: from the factors, against the contraction of their Jacobian.

Tutorial CNN without dropout, float32. The reference holds every sample gradient and multiplies them with each other, as
influence by dot products and empirical tangent kernels are usually taken.
"""

from collections.abc import Iterator
from functools import partial

from .definitions import difference
from .measure import Arm, Case, Question, Setup
from .problems import cnn
from .quantities import dense, factored, quantity

EXAMPLES, CHUNK = 1000, 250
TOLERANCE = 1e-4
"""Of inner products of a million numbers in float32."""


def cases(setup: Setup) -> Iterator[Case]:
    """All pairs of some examples."""
    examples = EXAMPLES // 10 if setup.quick else EXAMPLES
    problem = cnn(examples, setup.device)
    ours = partial(factored, problem, chunk_size=examples // (EXAMPLES // CHUNK))
    yield Case(
        f"{examples} x {examples}",
        [
            Arm("Jacobian contraction", partial(quantity, partial(dense, problem), "gram", compile=False)),
            Arm("factored, eager", partial(quantity, ours, "gram", compile=False), TOLERANCE),
            Arm("factored, compiled", partial(quantity, ours, "gram", compile=True), TOLERANCE),
        ],
        difference,
        3,
        settings={"model": "cnn without dropout", "examples": examples, "chunk_size": examples // (EXAMPLES // CHUNK)},
        memory=True,
    )


QUESTION = Question("gram", "inner products of all pairs of many gradients, against contracting the Jacobian", cases)
