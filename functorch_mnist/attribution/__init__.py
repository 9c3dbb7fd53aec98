"""Training data attribution: scores of examples, influence of training on test examples, and their ground truth.

A score is a number per training example, such as EL2N, GraNd or forgetting events. An influence is a number per pair of
a training and a test example (TracIn, TRAK, influence functions, EK-FAC). Its sign is the same everywhere: above zero,
training on the one lowers the loss of the other.

    scoring.py        loss, EL2N, GraNd and margin; over checkpoints self-influence and forgetting events
    influence.py      gradient dot and cosine, TracIn (TracInCP); sums over groups of examples
    projections.py    projections of per-sample gradients from their factors, random or principal, and TRAK
    kronecker.py      influence functions: the damped Fisher information, exact by the Gram matrix or
                      Kronecker-factored, K-FAC or EK-FAC
    store/            projected gradients on disk, computed once and queried many times
    kernel.py         the empirical neural tangent kernel, and regression with it
    solve.py          solves with Gram matrices and moments, refused where singular
    truth.py          leave-one-out retraining, and the derivative of a whole training run by an example's weight
    grading.py        synthetic label noise, AUC, recall, rank correlation
    datamodeling.py   the linear datamodeling score (LDS): retraining on subsets of the data
"""

from . import store
from .datamodeling import Interval, datamodeling_interval, linear_datamodeling_score, subsets
from .grading import auc, label_noise, rank_correlation, ranks, recall_at
from .influence import gradient_cosine, group_sums, tracin
from .kernel import kernel_regression, tangent_kernel
from .kronecker import Curvature, corrected_curvature, curvature, fisher_curvature, fisher_influence
from .projections import Projection, features, log_odds, principal_projection, projection, trak
from .scoring import OutputScores, Scores, forgetting_events, output_scores, scores, self_influence
from .truth import Run, leave_one_out, retrained, trained, unrolled

__all__ = [
    "Curvature",
    "Interval",
    "OutputScores",
    "Projection",
    "Run",
    "Scores",
    "auc",
    "corrected_curvature",
    "curvature",
    "datamodeling_interval",
    "features",
    "fisher_curvature",
    "fisher_influence",
    "forgetting_events",
    "gradient_cosine",
    "group_sums",
    "kernel_regression",
    "label_noise",
    "leave_one_out",
    "linear_datamodeling_score",
    "log_odds",
    "output_scores",
    "principal_projection",
    "projection",
    "rank_correlation",
    "ranks",
    "recall_at",
    "retrained",
    "scores",
    "self_influence",
    "store",
    "subsets",
    "tangent_kernel",
    "tracin",
    "trained",
    "trak",
    "unrolled",
]


def __dir__() -> list[str]:
    return __all__
