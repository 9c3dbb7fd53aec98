"""Optimizers: pairs of pure functions, `init(params) -> state` and `update(params, state, grads) -> (params, state)`.

A learning rate is a number, a 0-d tensor or a schedule, a function of the 0-d count of updates made so far; the other
hyperparameters are numbers or 0-d tensors. All of it is differentiable: `torch.func.grad` goes through any number of
updates, also by the tensors, and `torch.func.vmap` makes many runs that differ in them.
"""

from .adaptive import AdamState as AdamState
from .adaptive import adam as adam
from .adaptive import adamw as adamw
from .averaging import Averaged as Averaged
from .averaging import exponential_moving_average as exponential_moving_average
from .averaging import stochastic_weight_averaging as stochastic_weight_averaging
from .clipping import clip_by_global_norm as clip_by_global_norm
from .momentum import SGDState as SGDState
from .momentum import sgd as sgd
from .optimizer import Optimizer as Optimizer
from .schedules import Schedule as Schedule
from .schedules import constant as constant
from .schedules import cosine as cosine
from .schedules import one_cycle as one_cycle
from .schedules import step_decay as step_decay
