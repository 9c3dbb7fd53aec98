"""Optimizers: pairs of pure functions, `init(params) -> state` and `update(params, state, grads) -> (params, state)`.

A learning rate is a number, a 0-d tensor or a schedule, a function of the 0-d count of updates made so far; the other
hyperparameters are numbers or 0-d tensors. All of it is differentiable: `torch.func.grad` goes through any number of
updates, also by the tensors, and `torch.func.vmap` makes many runs that differ in them.
"""

from .adaptive import AdamState, adam, adamw
from .averaging import Averaged, exponential_moving_average, stochastic_weight_averaging
from .clipping import clip_by_global_norm
from .momentum import SGDState, sgd
from .optimizer import Optimizer
from .schedules import Schedule, constant, cosine, one_cycle, step_decay

__all__ = [
    "AdamState",
    "Averaged",
    "Optimizer",
    "SGDState",
    "Schedule",
    "adam",
    "adamw",
    "clip_by_global_norm",
    "constant",
    "cosine",
    "exponential_moving_average",
    "one_cycle",
    "sgd",
    "step_decay",
    "stochastic_weight_averaging",
]


def __dir__() -> list[str]:
    return __all__
