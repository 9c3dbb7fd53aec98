"""`plan`: how a model's per-sample gradients are taken."""

from typing import cast

import torch
from torch import Tensor

from .. import allocator, per_sample, random
from ..models import Params
from ..options import Plan, UsageError
from ..per_sample import measured
from ..per_sample.planning import Way
from . import build
from .faults import refusing, saying_warnings


def plan(options: Plan) -> int:
    """Prints the plan as a table."""
    made = build.classifier(build.Origin(options.training, (0.0, 1.0), 1, 10, (1,) * 10))  # no image changes the plan

    def loss_fn(params: Params, image: Tensor, label: Tensor) -> Tensor:
        return made.loss(made.outputs(params, image), label)

    example = torch.zeros(1, 28, 28, dtype=torch.uint8), torch.tensor(0)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with refusing(RuntimeError, "The model must fit in memory. Found: "):
        params = made.init(random.key(0))
        if options.tune:
            allocator.keep_freed_memory()  # as `train` does
            batch = [torch.stack([x] * options.batch_size) for x in example]
            with saying_warnings():
                planned = per_sample.tune(loss_fn, params, *batch, compile=options.compile == "on")
        else:
            planned = per_sample.plan(loss_fn, params, *example, batch_size=options.batch_size)
    for wish in options.override:
        name, equals, way = wish.partition("=")
        if not equals:
            raise UsageError(f"--override must be NAME=WAY. Found {wish!r}.")
        with refusing(ValueError):
            planned = planned.override(name, cast(Way, way))
    print(planned)
    if options.tune:
        print(f"Kept in {measured.default_file()}.")
    return 0
