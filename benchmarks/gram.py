"""Inner products of many gradients, and what attribution makes of them: from the factors, by plain torch, by others.

Tutorial CNN without dropout, float32. The first arm of a case is plain torch, to which ratios are; others' arms are in
`attribution_peers`, and one whose package is missing is a row that says so.

Gram matrix: of all pairs. The reference holds every sample gradient and multiplies them with each other, as influence
by dot products and empirical tangent kernels are usually taken; TorchJD's engine does so layer by layer.

TracIn: at one checkpoint, of examples trained on and others. The reference holds every sample gradient, and so does
dattri, without a projection. Arms agree on the scores of each example, relative to their norm.

TRAK: of the log-odds. The reference is exact, from the products of all gradients, and so is the arm of factored Gram
matrices. Projections are random and differ, so what is compared is an arm's direction with the exact one: one less the
cosine of a test example's scores, the mean of all, at most `PROJECTED`. Features projected from both sides are further
from the exact scores than as many by a dense projection, so sizes are those at which ours are as near as dattri's.

Kronecker factors: of the empirical Fisher information, without a decomposition. The reference is hooks on the module;
kronfluence's covariance matrices are compared without the bias's row and column. All are held against hooks in float64,
each factor relative to its norm.
"""

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch

from . import attribution as ours
from . import attribution_peers as peers
from .definitions import difference
from .measure import Arm, Case, Question, Setup
from .problems import Problem, cnn
from .quantities import dense, factored, quantity

EXAMPLES, CHUNK = 1000, 250
TRACIN, TRAK = (150, 150), (200, 50)
"""How many examples are trained on, and how many tested on: dattri takes tens of milliseconds for each."""
KRONECKER = 500
"""Examples of Kronecker factors."""
FEATURES, DENSE_FEATURES = 1024, 128
"""Of projections: of a parameter at most, from both sides; and of all parameters."""
TOLERANCE = 1e-4
"""Of inner products of a million numbers in float32."""
PROJECTED = 0.2
"""Of projections."""
SUMMED = 1e-2
"""Of sums of 338,000 products in float32, most of them equal, as of the first layer's inputs."""

SETTINGS = {"model": "cnn without dropout"}
ROUNDS = 3


def cases(setup: Setup) -> Iterator[Case]:
    """All pairs of some examples, TracIn, TRAK, and Kronecker factors."""
    divisor = 10 if setup.quick else 1
    examples = EXAMPLES // divisor
    chunk = examples // (EXAMPLES // CHUNK)
    yield gram_case(cnn(examples, setup.device), chunk)
    for count, tests, make in ((*TRACIN, tracin_case), (*TRAK, trak_case)):
        count, tests = max(20, count // divisor), max(20, tests // divisor)
        yield make(cnn(count + tests, setup.device), count, min(chunk, count))
    yield kronecker_case(cnn(KRONECKER // divisor, setup.device), chunk)


def gram_case(problem: Problem, chunk: int) -> Case:
    """All pairs of the problem's examples."""
    way, examples = partial(factored, problem, chunk_size=chunk), len(problem.labels)
    return Case(
        f"{examples} x {examples}",
        [
            Arm("Jacobian contraction", partial(quantity, partial(dense, problem), "gram", compile=False)),
            Arm("factored, eager", partial(quantity, way, "gram", compile=False), TOLERANCE),
            Arm("factored, compiled", partial(quantity, way, "gram", compile=True), TOLERANCE),
            Arm("TorchJD, Gramian engine", partial(peers.torchjd_gram, problem), TOLERANCE),
        ],
        difference,
        ROUNDS,
        lead=0,
        settings={**SETTINGS, "examples": examples, "chunk_size": chunk},
        memory=True,
    )


def tracin_case(problem: Problem, count: int, chunk: int) -> Case:
    """TracIn of the problem's first examples on its others."""
    tests = len(problem.labels) - count
    way = partial(ours.factored_tracin, problem, count, chunk_size=chunk)
    return Case(
        f"TracIn, {count} x {tests}",
        [
            Arm("Jacobian contraction", partial(ours.dense_tracin, problem, count)),
            Arm("factored, eager", partial(way, compile=False), TOLERANCE),
            Arm("factored, compiled", partial(way, compile=True), TOLERANCE),
            Arm("dattri, TracIn", partial(peers.dattri_tracin, problem, count, batch_size=tests), TOLERANCE),
        ],
        ours.scores_difference,
        ROUNDS,
        warmups=0,
        lead=0,
        settings={**SETTINGS, "train": count, "test": tests, "chunk_size": chunk},
    )


def trak_case(problem: Problem, count: int, chunk: int) -> Case:
    """TRAK of the problem's first examples on its others."""
    tests = len(problem.labels) - count
    exact = partial(ours.factored_exact_trak, problem, count, chunk_size=chunk)
    projected = partial(ours.factored_trak, problem, count, size=FEATURES, chunk_size=chunk)
    theirs = partial(peers.dattri_trak, problem, count, size=DENSE_FEATURES, batch_size=tests)
    return Case(
        f"TRAK, {count} x {tests}",
        [
            Arm("exact, Jacobian contraction", partial(ours.exact_trak, problem, count)),
            Arm("exact, factored, eager", exact, TOLERANCE),
            Arm("projected, factored, eager", partial(projected, compile=False), PROJECTED),
            Arm("projected, factored, compiled", partial(projected, compile=True), PROJECTED),
            Arm("projected, dattri, TRAK", theirs, PROJECTED),
        ],
        ours.directions_difference,
        ROUNDS,
        warmups=0,
        lead=0,
        settings={
            **SETTINGS,
            "train": count,
            "test": tests,
            "chunk_size": chunk,
            "damping": ours.DAMPING,
            "features_of_a_parameter": FEATURES,
            "dense_features": DENSE_FEATURES,
        },
    )


def kronecker_case(problem: Problem, chunk: int) -> Case:
    """The Kronecker factors of all layers' weights."""
    examples = len(problem.labels)

    @cache
    def expected() -> Any:
        work = ours.hooked_kronecker(problem, torch.float64)
        work.call()
        return work.outputs()

    summed = partial(ours.factored_kronecker, problem, chunk_size=chunk)
    makes = {
        "hooks": partial(ours.hooked_kronecker, problem),
        "factored, eager": partial(summed, compile=False),
        "factored, compiled": partial(summed, compile=True),
        "factored, a statistic in float64, eager": partial(ours.folded_kronecker, problem, chunk_size=chunk),
        "kronfluence, covariance matrices": partial(peers.kronfluence_factors, problem, batch_size=chunk),
    }
    return Case(
        f"Kronecker factors, {examples}",
        [Arm(name, make, SUMMED, expected=expected) for name, make in makes.items()],
        ours.factors_difference,
        ROUNDS,
        warmups=0,
        lead=0,
        settings={**SETTINGS, "examples": examples, "chunk_size": chunk},
    )


QUESTION = Question(
    "gram", "inner products of many gradients, TracIn, TRAK and Kronecker factors, by plain torch and by others", cases
)
