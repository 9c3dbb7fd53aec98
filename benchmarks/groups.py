"""Clipping the summed gradient of each user, against clipping the gradient of each example.

Tutorial CNN without dropout, float32, compiled steps of SGD with momentum. The reference clips examples. Examples
belong to users at random, so that users have different numbers of them. `clipped_sum` is the bare sum; a private step's
`clipped_sums` clip by bounds on rounding, count, and leave out what is not finite. Before they are timed, arms are held
against definitions in float64: the gradient of a user is that of the sum of their losses.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from functorch_mnist import losses, models, optim, per_sample, privacy, random, train, tree

from . import report
from .definitions import Definitions, difference
from .measure import Arm, Axis, Case, Comparison, Question, Setup, Work
from .problems import Problem, cnn, start
from .quantities import MAX_NORM
from .step import TOLERANCES
from .steps import LR, MOMENTUM

USERS = {512: 64, 256: 64}
"""By the batch size."""
ROUNDS = 7

Sums = Callable[..., Any]
"""`sums(loss_fn, params, *batch, group)`: of clipped gradients."""


def clipped_sum(loss_fn: Callable[..., Tensor], params: models.Params, *batch: Tensor, group: Tensor | None) -> Any:
    return per_sample.clipped_sum(loss_fn, params, *batch, max_norm=MAX_NORM, group=group).grads


def clipped_sums(loss_fn: Callable[..., Tensor], params: models.Params, *batch: Tensor, group: Tensor | None) -> Any:
    return privacy.clipped_sums(loss_fn, params, *batch, clipping=privacy.Flat(MAX_NORM), group=group).grads


SUMS: dict[str, Sums] = {"clipped_sum": clipped_sum, "private clipped_sums": clipped_sums}


def users(batch_size: int, count: int) -> Tensor:
    """(B,): whose an example is, by numbers in no order."""
    drawn = random.randint(random.key(3), (batch_size,), 0, count)
    return drawn * 7919 % 48213


def clipped_step(problem: Problem, sums: Sums, group: Tensor | None) -> Work:
    """A compiled step by clipped gradients, of examples or of users."""
    optimizer = optim.sgd(LR, momentum=MOMENTUM)

    def loss_fn(params: models.Params, stored: Tensor, label: Tensor) -> Tensor:
        return losses.cross_entropy(problem.apply(params, problem.prepare(stored)), label)

    def step(state: train.State, stored: Tensor, labels: Tensor, group: Tensor | None) -> train.State:
        total = sums(loss_fn, state.params, stored, labels, group=group)
        grads = tree.map(lambda g: g / len(labels), total)
        new, optimizer_state = optimizer.update(state.params, state.optimizer, grads)
        return train.State(new, optimizer_state, state.step + 1, state.key)

    run = train.compiled(step)
    state = train.init_state(problem.params, optimizer, random.key(1, device=problem.labels.device))

    def call() -> None:
        nonlocal state
        state = run(state, problem.stored, problem.labels, group)

    return Work(
        call,
        lambda: tree.map(torch.sub, state.params, problem.params),
        start(problem.params.values(), (problem.x, problem.labels), torch.float32),
    )


def defined(problem: Problem, group: Tensor) -> models.Params:
    """The first update by clipped gradients of users, rounded as an update is."""
    net, x = problem.loaded().double(), problem.x.double()
    weights = dict(net.named_parameters())
    total = tree.map(lambda p: torch.zeros_like(p, dtype=torch.float64), problem.params)
    for user in group.unique():
        loss = F.cross_entropy(net(x[group == user]), problem.labels[group == user], reduction="sum")
        grads = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
        factor = (MAX_NORM / tree.norm(grads)).clamp(max=1)
        total = tree.map(lambda t, g, factor=factor: t + factor * g, total, grads)
    count = len(problem.labels)
    stepped = tree.map(lambda p, t: torch.sub(p, (t / count).float(), alpha=LR), problem.params, total)
    return tree.map(torch.sub, stepped, problem.params)


def cases(setup: Setup) -> Iterator[Case]:
    """A case for each batch size and each kind of sums."""
    for batch_size, count in {256: 32}.items() if setup.quick else USERS.items():
        problem = cnn(batch_size, setup.device)
        group = users(batch_size, count).to(setup.device)
        sizes = group.unique(return_counts=True)[1]
        definitions, tolerance = Definitions(problem), TOLERANCES[torch.float32]
        for name, sums in SUMS.items():
            examples = Arm(
                "clipped by example",
                partial(clipped_step, problem, sums, None),
                tolerance,
                baseline=True,
                expected=partial(getattr, definitions, "clipped_step"),
            )
            by_user = Arm(
                "clipped by user",
                partial(clipped_step, problem, sums, group),
                tolerance,
                expected=partial(defined, problem, group),
            )
            yield Case(
                f"{name}, B={batch_size}, {len(sizes)} users",
                [examples, by_user],
                difference,
                2 if setup.quick else ROUNDS,
                settings={
                    "model": "cnn without dropout", "batch_size": batch_size, "users": len(sizes),
                    "most_examples_of_a_user": int(sizes.max()), "max_norm": MAX_NORM,
                },
                axis=Axis("B", batch_size),
            )  # fmt: skip


def conclude(comparisons: Sequence[Comparison]) -> str:
    """What clipping users costs over clipping examples."""
    rows = [(one.case, one, one.timings[-1]) for one in comparisons]
    return report.ratios("case", "by user, over by example", rows)


QUESTION = Question("groups", "a step that clips each user's summed gradient", cases, conclude)
