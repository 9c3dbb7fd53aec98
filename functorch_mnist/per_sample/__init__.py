"""Per-sample gradients in factored form: norms, sums, products and moments at about the cost of one training step.

The gradient of one example with respect to a matrix W is a sum of outer products, `Σ_t g_t a_tᵀ`: the op's input times
the cotangent of its output. Nearly everything one wants of it follows from the pairs, so it is never formed.

    layout.py        how a parameter is read by an op: as matrices, and through views
    terms.py         the sample gradients of one parameter, in factored form
    lookups.py       those of a table of which rows are taken
    uses.py          those of a parameter that is used several times
    weights.py       what is made of parameters, and the way back to them
    forms.py         how an op's inputs and its output's cotangent become a term
    calls.py         the same for any op, by its own vector-Jacobian product
    rules.py         what each op says about its weights; where a new op is added
    recurrence.py    recurrent layers, with one tap on all their steps
    vocabulary.py    the output layer of a large vocabulary, in blocks of words
    kernels.py       ops that run on the whole batch
    following.py     which ops of a loss use which parameter
    mistakes.py      what a loss that torch refuses is likely to have wrong
    capture.py       from a loss to terms: the survey, and the one backward pass
    strategies.py    which way inner products are taken
    eigen.py         the eigenvectors of Kronecker factors, and second moments along them
    groups.py        whose an example is: the rows of a group
    together.py      quantities of the summed gradients of groups, of one parameter
    planning.py          the plan: all of this as a table that can be changed
    algebra.py      the terms of all parameters, and the algebra on them
    passes.py        the backward pass of a batch or of its chunks, and what is made of it
    measured.py      the file of times that were measured
    tuning.py        the plan with the ways that are fastest on this machine
    programs.py      the ops that a function ran, to run again without what led to them
    opaque.py        functions that the compiler calls and does not follow
    prepared.py      a loss whose survey, strategies and ops are kept
    chunked.py       chunk after chunk; compiled, a loop
    quantities.py    what users call: norms, clipped sums, products, moments; masks and chunks
"""

from .algebra import Factored
from .eigen import Eigenbasis, eigenbasis
from .planning import Plan, plan
from .prepared import Prepared, prepare
from .quantities import (
    ClippedSum,
    GradAndDot,
    GradAndNorms,
    clipped_sum,
    dot,
    factored,
    grad_and_dot,
    grad_and_norms,
    grads,
    gram,
    kronecker,
    leaf_norms,
    norms,
    second_moment,
    weighted_sum,
)
from .rules import Entry, matrix, rule, shift
from .terms import Kronecker
from .tuning import tune

__all__ = [
    "ClippedSum",
    "Eigenbasis",
    "Entry",
    "Factored",
    "GradAndDot",
    "GradAndNorms",
    "Kronecker",
    "Plan",
    "Prepared",
    "clipped_sum",
    "dot",
    "eigenbasis",
    "factored",
    "grad_and_dot",
    "grad_and_norms",
    "grads",
    "gram",
    "kronecker",
    "leaf_norms",
    "matrix",
    "norms",
    "plan",
    "prepare",
    "rule",
    "second_moment",
    "shift",
    "tune",
    "weighted_sum",
]


def __dir__() -> list[str]:
    return __all__
