"""`plan`: how a model's per-sample gradients are taken."""

from typing import cast

import torch
from torch import Tensor

from .. import per_sample, random
from ..models import Params
from ..options import Plan, UsageError
from ..per_sample.plan import Way
from . import build
from .faults import refusing


def plan(options: Plan) -> int:
    """Prints the plan as a table."""
    made = build.classifier(build.Origin(options.training, (0.0, 1.0), 1, 10, (1,) * 10))  # no image changes the plan

    def loss_fn(params: Params, image: Tensor, label: Tensor) -> Tensor:
        return made.loss(made.outputs(params, image), label)

    example = torch.zeros(1, 28, 28, dtype=torch.uint8), torch.tensor(0)
    with refusing(RuntimeError, "The model must fit in memory. Found: "):
        found = per_sample.plan(loss_fn, made.init(random.key(0)), *example, batch_size=options.batch_size)
    for wish in options.override:
        name, equals, way = wish.partition("=")
        if not equals:
            raise UsageError(f"--override must be NAME=WAY. Found {wish!r}.")
        with refusing(ValueError):
            found = found.override(name, cast(Way, way))
    print(found)
    return 0
