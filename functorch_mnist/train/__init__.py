"""Training: a step is an estimator of the gradient, then an optimizer; `fit` runs it over epochs, `evaluate` counts.

    estimator(params, *batch, mask) -> (grads, aux)                 sums over examples
    step(state, *batch, mask, divisor) -> (state, aux)              one division, then the optimizer
    fit(step, state, examples, …) -> state

The files, in the order of reading: `step`, `watch`, `value`, `draws`, `fit`, `private`, `canaries`, `evaluate`, `forms`
(precision and compilation).
"""

from .canaries import Beside as Beside
from .canaries import Planted as Planted
from .canaries import Scored as Scored
from .canaries import plant as plant
from .draws import Draws as Draws
from .draws import Order as Order
from .draws import epoch_draws as epoch_draws
from .evaluate import Evaluation as Evaluation
from .evaluate import evaluate as evaluate
from .evaluate import predictions as predictions
from .fit import Progress as Progress
from .fit import Watch as Watch
from .fit import fit as fit
from .forms import compiled as compiled
from .forms import in_precision as in_precision
from .private import PrivateStep as PrivateStep
from .private import fit_private as fit_private
from .private import init_private_state as init_private_state
from .private import make_private_step as make_private_step
from .step import Estimator as Estimator
from .step import Shared as Shared
from .step import State as State
from .step import Step as Step
from .step import batch_gradient as batch_gradient
from .step import gradient as gradient
from .step import init_state as init_state
from .step import make_step as make_step
from .value import data_values as data_values
from .value import valuing as valuing
from .watch import watching as watching
