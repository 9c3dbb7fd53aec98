"""Training steps by SGD with momentum: ordinary ones and clipped ones, as a module takes them and as this library does.

With ∇_i the gradient of example i's loss, a step follows Σ_i ∇_i / B, or Σ_i min(1, C / |∇_i|) ∇_i / B if clipped.
"""

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, vmap

from functorch_mnist import losses, models, optim, per_sample, random, train, tree

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
    return _step(problem, train.batch_gradient(_loss(problem, dtype)), compile=compile, dtype=dtype)


def clipped_step(
    problem: Problem,
    *,
    compile: bool,
    dtype: torch.dtype = torch.float32,
    max_norm: float = 1.0,
    chunk_size: int | None = None,
) -> Work:
    """A clipped step of this library, on examples as they are stored; without noise."""
    loss_fn = _loss(problem, dtype)

    def clipped(params: models.Params, *batch: Tensor, mask: Tensor | None) -> tuple[models.Params, dict[str, Tensor]]:
        found = per_sample.clipped_sum(loss_fn, params, *batch, max_norm=max_norm, mask=mask, chunk_size=chunk_size)
        return found.grads, {"loss": found.losses.sum()}

    return _step(problem, train.Estimator(clipped), compile=compile, dtype=dtype)


def norms(problem: Problem, *, compile: bool) -> Work:
    """|∇_i| by this library, without a step."""
    loss_fn = _loss(problem, torch.float32)

    def found(params: models.Params, *batch: Tensor) -> Tensor:
        return per_sample.norms(loss_fn, params, *batch)

    run = train.compiled(found) if compile else found
    last: list[Tensor] = []

    def call() -> None:
        last[:] = [run(problem.params, problem.stored, problem.labels)]

    origin = start(problem.params.values(), (problem.x, problem.labels), torch.float32)
    return Work(call, lambda: last[0], origin, last.clear)


def dense_clipped_step(problem: Problem, *, max_norm: float) -> Work:
    """A clipped step by `vmap(grad)` of the module, not compiled: all ∇_i are formed."""
    module, optimizer, x, labels = problem.loaded(), optim.sgd(LR, momentum=MOMENTUM), problem.x, problem.labels

    def loss_fn(params: models.Params, x: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(module, params, (x[None],)), label[None])

    params, state = problem.params, optimizer.init(problem.params)

    def call() -> None:
        nonlocal params, state
        rows = vmap(grad(loss_fn), in_dims=(None, 0, 0))(params, x, labels)
        sizes = torch.stack([g.flatten(1).norm(dim=1) for g in rows.values()]).norm(dim=0)
        factors = (max_norm / sizes).clamp(max=1)
        grads = {name: torch.tensordot(factors, g, 1) / len(x) for name, g in rows.items()}
        params, state = optimizer.update(params, state, grads)

    return Work(
        call,
        lambda: tree.map(torch.sub, params, problem.params),
        start(params.values(), (x, labels), torch.float32),
    )


def clipped_update(problem: Problem, max_norm: float) -> tuple[models.Params, Tensor]:
    """What the first clipped step adds to the parameters, and the norms: by definition, one by one and in float64.

    In float32 the convolutions of one example are further from it than a batch's.
    """
    net, sizes = problem.loaded().double(), []
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in problem.params.items()}
    for x, label in zip(problem.x, problem.labels, strict=True):
        example = x[None].double() if x.is_floating_point() else x[None]
        gradient = torch.autograd.grad(F.cross_entropy(net(example), label[None]), list(net.parameters()))
        sizes.append(tree.norm(gradient))
        factor = (max_norm / sizes[-1]).clamp(max=1)
        total = {name: t + factor * g for (name, t), g in zip(total.items(), gradient, strict=True)}
    stepped = {name: p - LR * (total[name] / len(sizes)).float() for name, p in problem.params.items()}
    return tree.map(torch.sub, stepped, problem.params), torch.stack(sizes).float()  # rounded as an update is


def _loss(problem: Problem, dtype: torch.dtype) -> Callable[..., Tensor]:
    """The losses of examples as they are stored: of one, or of any leading axes."""
    apply = train.in_precision(problem.apply, dtype)

    def loss_fn(params: models.Params, stored: Tensor, labels: Tensor) -> Tensor:
        return losses.cross_entropy(apply(params, problem.prepare(stored)), labels)

    return loss_fn


def _step(problem: Problem, estimator: train.Estimator, *, compile: bool, dtype: torch.dtype) -> Work:
    """This library's step by an estimator of the gradient."""
    optimizer = optim.sgd(LR, momentum=MOMENTUM)
    step = train.make_step(estimator, optimizer)
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


def relative_difference(update: tree.Tree, expected: tree.Tree) -> float:
    """How far a tree of tensors is from the expected one, relative to its norm."""
    return float(tree.norm(tree.map(torch.sub, update, expected)) / tree.norm(expected))
