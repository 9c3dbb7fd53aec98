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

from . import store as store
from .datamodeling import Interval as Interval
from .datamodeling import datamodeling_interval as datamodeling_interval
from .datamodeling import linear_datamodeling_score as linear_datamodeling_score
from .datamodeling import subsets as subsets
from .grading import auc as auc
from .grading import label_noise as label_noise
from .grading import rank_correlation as rank_correlation
from .grading import ranks as ranks
from .grading import recall_at as recall_at
from .influence import gradient_cosine as gradient_cosine
from .influence import group_sums as group_sums
from .influence import tracin as tracin
from .kernel import kernel_regression as kernel_regression
from .kernel import tangent_kernel as tangent_kernel
from .kronecker import Curvature as Curvature
from .kronecker import corrected_curvature as corrected_curvature
from .kronecker import curvature as curvature
from .kronecker import fisher_curvature as fisher_curvature
from .kronecker import fisher_influence as fisher_influence
from .projections import Projection as Projection
from .projections import features as features
from .projections import log_odds as log_odds
from .projections import principal_projection as principal_projection
from .projections import projection as projection
from .projections import trak as trak
from .scoring import OutputScores as OutputScores
from .scoring import Scores as Scores
from .scoring import forgetting_events as forgetting_events
from .scoring import output_scores as output_scores
from .scoring import scores as scores
from .scoring import self_influence as self_influence
from .truth import Run as Run
from .truth import leave_one_out as leave_one_out
from .truth import retrained as retrained
from .truth import trained as trained
from .truth import unrolled as unrolled
