"""Which training examples matter: scores of each, influence of each on others, and the ground truth to grade both by.

A score says how a training example stands to the model. An influence says what a training example does to a test
example, and has one sign everywhere: above zero, training on it lowers the test example's loss.

    scoring.py         loss, EL2N, GraNd and margin; over checkpoints self-influence and forgetting
    influence.py      gradient dot and cosine, TracIn; sums over groups of examples
    projections.py       projections of sample gradients from their factors, random or principal, and TRAK
    kronecker.py      influence functions: the damped Fisher information, exact by the Gram matrix or
                      Kronecker-factored, with eigenvalues corrected
    store/            gradients under a projection on disk, built once and asked again and again
    kernel.py         the empirical neural tangent kernel, and regression with it
    solve.py          solves with Gram matrices and moments, refused where singular
    truth.py          leave-one-out retraining, and the derivative of a whole training run by an example's weight
    grading.py        planted label noise, AUC, rank correlation
    datamodeling.py   the linear datamodeling score: retraining on parts of the data
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
