"""Training: a step is an estimator of the gradient, then an optimizer; `fit` runs it over epochs, `evaluate` counts.

    estimator(params, *batch, mask) -> (grads, aux)                 sums over examples
    step(state, *batch, mask, divisor) -> (state, aux)              one division, then the optimizer
    fit(step, state, examples, …) -> state

The files, in the order of reading: `step`, `watch` (gradient noise), `value` (data Shapley), `draws`, `fitting`,
`private` (DP-SGD), `canaries` (one-run auditing), `evaluation`, `forms` (precision and compilation).
"""

from .canaries import CanaryParams, CanaryRun, CanaryState, plant_canaries
from .draws import Draws, Order, epoch_draws
from .evaluation import Evaluation, evaluate, predictions
from .fitting import Progress, Watch, fit
from .forms import compiled, in_precision
from .private import PrivateStep, fit_private, init_private_state, make_private_step
from .step import Estimator, Shared, State, Step, batch_gradient, gradient, init_state, make_step
from .value import data_values, gradient_with_data_values
from .watch import gradient_with_noise

__all__ = [
    "CanaryParams",
    "CanaryRun",
    "CanaryState",
    "Draws",
    "Estimator",
    "Evaluation",
    "Order",
    "PrivateStep",
    "Progress",
    "Shared",
    "State",
    "Step",
    "Watch",
    "batch_gradient",
    "compiled",
    "data_values",
    "epoch_draws",
    "evaluate",
    "fit",
    "fit_private",
    "gradient",
    "gradient_with_data_values",
    "gradient_with_noise",
    "in_precision",
    "init_private_state",
    "init_state",
    "make_private_step",
    "make_step",
    "plant_canaries",
    "predictions",
]


def __dir__() -> list[str]:
    return __all__
