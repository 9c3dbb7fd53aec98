"""An ordinary training step, as a module takes it and as this library does: SGD with momentum on the mean loss."""

from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from functorch_mnist import data, losses, models, optim, per_sample, random, train, tree
from functorch_mnist.commands.build import VALUE_DRAW, VALUE_RENEWED, VALUE_SMOOTHING

from .measure import Work
from .problems import Problem, start

LR, MOMENTUM = 0.01, 0.9
Form: TypeAlias = Literal["plain", "foreach", "fused"]
"""How `torch.optim.SGD` goes over the parameters."""


def module_step(
    problem: Problem,
    *,
    compile: bool,
    dtype: torch.dtype = torch.float32,
    sgd: Form = "plain",
) -> Work:
    """A step of `nn.Module` and `torch.optim.SGD`: in bfloat16 by autocast."""
    net, x, labels = problem.loaded(), problem.x, problem.labels
    form = {"foreach": sgd == "foreach", "fused": sgd == "fused"}
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=MOMENTUM, **form)
    forward = torch.compile(net, dynamic=False) if compile else net

    def call() -> None:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(forward(x), labels)
        loss.backward()
        optimizer.step()

    weights = dict(net.named_parameters())
    return Work(
        call,
        lambda: {name: p.detach() - problem.params[name] for name, p in weights.items()},
        start(weights.values(), (x, labels), dtype),
        optimizer.zero_grad,
    )


def functional_step(problem: Problem, *, compile: bool, dtype: torch.dtype = torch.float32) -> Work:
    """A step of this library, on examples as they are stored."""
    apply = train.in_precision(problem.apply, dtype)

    def losses_fn(params: models.Params, stored: Tensor, labels: Tensor) -> Tensor:
        return losses.cross_entropy(apply(params, problem.prepare(stored)), labels)

    optimizer = optim.sgd(LR, momentum=MOMENTUM)
    step = train.make_step(train.batch_gradient(losses_fn), optimizer)
    step = train.compiled(step) if compile else step
    state = train.init_state(problem.params, optimizer, random.key(0))

    def call() -> None:
        nonlocal state
        state, _ = step(state, problem.stored, problem.labels)

    return Work(
        call,
        lambda: tree.map(torch.sub, state.params, problem.params),
        start(state.params.values(), (problem.x, problem.labels), dtype),
    )


def watched_steps(problem: Problem, *, compile: bool, count: int, watched: int) -> Work:
    """`count` steps of this library, of which the first ones also say what sample gradients are like.

    Args:
        problem: what is trained.
        compile: whether the steps are compiled.
        count: steps in a call.
        watched: how many of them are watched.
    """

    def losses_fn(params: models.Params, stored: Tensor, labels: Tensor) -> Tensor:
        return losses.cross_entropy(problem.apply(params, problem.prepare(stored)), labels)

    optimizer = optim.sgd(LR, momentum=MOMENTUM)
    loss_fn = per_sample.prepare(losses_fn, problem.params, problem.stored[0], problem.labels[0])  # as `train` does
    plain, watching = (
        train.make_step(estimator, optimizer)
        for estimator in (train.batch_gradient(losses_fn), train.gradient_with_noise(loss_fn))
    )
    if compile:
        plain, watching = train.compiled(plain), train.compiled(watching)
    state = train.init_state(problem.params, optimizer, random.key(0))

    def call() -> None:
        nonlocal state
        for number in range(count):
            state, _ = (watching if number < watched else plain)(state, problem.stored, problem.labels)

    return Work(
        call,
        lambda: tree.map(torch.sub, state.params, problem.params),
        start(state.params.values(), (problem.x, problem.labels), torch.float32),
    )


def valued_steps(problem: Problem, *, compile: bool) -> Work:
    """Steps that say what their examples are worth to MNIST's test images, as `train --watch value` makes them.

    A call is all steps from one renewal of the validation gradient to the next.
    """

    def losses_fn(params: models.Params, stored: Tensor, labels: Tensor) -> Tensor:
        return losses.cross_entropy(problem.apply(params, problem.prepare(stored)), labels)

    optimizer, test = optim.sgd(LR, momentum=MOMENTUM), data.load("mnist").test
    loss_fn = per_sample.prepare(losses_fn, problem.params, problem.stored[0], problem.labels[0])
    validation = [rows[:1000].to(problem.labels.device) for rows in test]
    renewing, keeping = (
        train.gradient_with_data_values(
            loss_fn,
            validation,
            validation_loss=losses_fn,
            validation_batch=VALUE_DRAW,
            ema_decay=VALUE_SMOOTHING,
            refresh=renew,
        )
        for renew in (True, False)
    )
    first, rest = (train.make_step(estimator, optimizer) for estimator in (renewing, keeping))
    if compile:
        first, rest = train.compiled(first), train.compiled(rest)
    state = train.init_state(problem.params, optimizer, random.key(0), renewing)

    def call() -> None:
        nonlocal state
        for number in range(VALUE_RENEWED):
            state, _ = (rest if number else first)(state, problem.stored, problem.labels)

    return Work(
        call,
        lambda: tree.map(torch.sub, state.params, problem.params),
        start(state.params.values(), (problem.x, problem.labels), torch.float32),
    )


def relative_difference(update: tree.Tree, expected: tree.Tree) -> float:
    """How far a tree of tensors is from the expected one, relative to its norm."""
    return float(tree.norm(tree.map(torch.sub, update, expected)) / tree.norm(expected))
