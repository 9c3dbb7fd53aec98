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

from . import vocabulary as vocabulary
from .algebra import Factored as Factored
from .eigen import Eigenbasis as Eigenbasis
from .eigen import eigenbasis as eigenbasis
from .planning import Plan as Plan
from .planning import plan as plan
from .prepared import Prepared as Prepared
from .prepared import prepare as prepare
from .quantities import ClippedSum as ClippedSum
from .quantities import GradAndDot as GradAndDot
from .quantities import GradAndNorms as GradAndNorms
from .quantities import clipped_sum as clipped_sum
from .quantities import dot as dot
from .quantities import factored as factored
from .quantities import grad_and_dot as grad_and_dot
from .quantities import grad_and_norms as grad_and_norms
from .quantities import grads as grads
from .quantities import gram as gram
from .quantities import kronecker as kronecker
from .quantities import leaf_norms as leaf_norms
from .quantities import norms as norms
from .quantities import second_moment as second_moment
from .quantities import weighted_sum as weighted_sum
from .rules import Entry as Entry
from .rules import matrix as matrix
from .rules import rule as rule
from .rules import shift as shift
from .terms import Kronecker as Kronecker
from .tuning import tune as tune
