"""Optimizers: pairs of pure functions, `init(params) -> state` and `update(params, state, grads) -> (params, state)`.

A learning rate is a number, a 0-d tensor or a schedule, a function of the 0-d count of updates made so far. All of it
is differentiable: `torch.func.grad` goes through any number of updates.
"""

from .averaging import Averaged as Averaged
from .averaging import averaging as averaging
from .clipping import clip_by_global_norm as clip_by_global_norm
from .optimizer import Optimizer as Optimizer
from .schedules import Schedule as Schedule
from .schedules import constant as constant
from .schedules import cosine as cosine
from .schedules import one_cycle as one_cycle
from .schedules import step_decay as step_decay
from .sgd import SGDState as SGDState
from .sgd import sgd as sgd
