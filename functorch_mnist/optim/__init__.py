"""Optimizers: pairs of pure functions, `init(params) -> state` and `update(params, state, grads) -> (params, state)`.

A learning rate is a number, a 0-d tensor or a schedule, a function of the 0-d count of updates made so far; the other
hyperparameters are numbers or 0-d tensors. All of it is differentiable: `torch.func.grad` goes through any number of
updates, also by the tensors, and `torch.func.vmap` makes many runs that differ in them.
"""

from .adam import AdamState as AdamState
from .adam import adam as adam
from .adam import adamw as adamw
from .averaging import Averaged as Averaged
from .averaging import averaging as averaging
from .averaging import stochastic_weight_averaging as stochastic_weight_averaging
from .clipping import clip_by_global_norm as clip_by_global_norm
from .optimizer import Optimizer as Optimizer
from .schedules import Schedule as Schedule
from .schedules import constant as constant
from .schedules import cosine as cosine
from .schedules import one_cycle as one_cycle
from .schedules import step_decay as step_decay
from .sgd import SGDState as SGDState
from .sgd import sgd as sgd
