"""Training: a step is an estimator of the gradient, then an optimizer; `fit` runs it over epochs, `evaluate` counts.

    estimator(params, *batch, mask) -> (grads, aux)                 sums over examples
    step(state, *batch, mask, divisor) -> (state, aux)              one division, then the optimizer
    fit(step, state, examples, …) -> state

The files, in the order of reading: `step`, `watch`, `value`, `draws`, `fit`, `private`, `canaries`, `evaluate`, `forms`
(precision and compilation).
"""

from .canaries import CanaryParams as CanaryParams
from .canaries import CanaryRun as CanaryRun
from .canaries import CanaryState as CanaryState
from .canaries import plant_canaries as plant_canaries
from .draws import Draws as Draws
from .draws import Order as Order
from .draws import epoch_draws as epoch_draws
from .evaluation import Evaluation as Evaluation
from .evaluation import evaluate as evaluate
from .evaluation import predictions as predictions
from .fitting import Progress as Progress
from .fitting import Watch as Watch
from .fitting import fit as fit
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
from .value import gradient_with_data_values as gradient_with_data_values
from .watch import gradient_with_noise as gradient_with_noise
