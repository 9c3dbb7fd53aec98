"""Quantities of per-sample gradients in two ways: factored, as this library has them, and dense, by `vmap(grad)`.

With ∇_i the gradient of example i these are the clipped sum Σ_i min(1, max_norm / |∇_i|) ∇_i, the norms |∇_i|, the Gram
matrix ⟨∇_i, ∇_j⟩ and the second moment Σ_i ∇_i². A clipped step divides the clipped sum, with noise or without, by B
and takes a step of SGD with momentum.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, vmap

from functorch_mnist import losses, models, optim, per_sample, random, train, tree

from .measure import Start, Work
from .problems import Problem, start
from .steps import LR, MOMENTUM

MAX_NORM, NOISE = 1.0, 0.5
CHUNK = 256
"""How many examples this library takes at a time, at most."""

Name: TypeAlias = Literal["norms", "gram", "second_moment"]
"""A quantity that is not a step."""
Quantity: TypeAlias = Callable[[models.Params, Tensor, Tensor], Any]
"""Of parameters, examples and labels."""


class Deviation:
    """The deviation of the noise: none until the arms have been compared."""

    def __init__(self) -> None:
        self._value = 0.0

    def __call__(self) -> float:
        return self._value

    def turn_on(self) -> None:
        self._value = NOISE

    def turn_off(self) -> None:
        self._value = 0.0


@dataclass(frozen=True)
class Way:
    """One way to take the quantities, and what it starts from."""

    params: models.Params
    batch: tuple[Tensor, Tensor]
    """Examples and labels."""
    start: Start
    clipped_sum: Quantity
    norms: Quantity
    gram: Quantity
    second_moment: Quantity
    normals: Callable[[Tensor, models.Params], models.Params]
    """`normals(key, like)`: a tree of normal numbers; the key is of one step."""


def factored(
    problem: Problem,
    *,
    dtype: torch.dtype = torch.float32,
    max_norm: float = MAX_NORM,
    chunk_size: int | None = CHUNK,
    prepared: bool = False,
) -> Way:
    """This library's way, on examples as they are stored; with a prepared loss, if it is asked for."""
    apply = train.in_precision(problem.apply, dtype)

    def of_example(params: models.Params, stored: Tensor, label: Tensor) -> Tensor:
        return losses.cross_entropy(apply(params, problem.prepare(stored)), label)

    loss_fn: Callable[..., Tensor] = of_example
    if prepared:
        loss_fn = per_sample.prepare(of_example, problem.params, problem.stored[0], problem.labels[0])

    def clipped_sum(params: models.Params, stored: Tensor, labels: Tensor) -> Any:
        return per_sample.clipped_sum(loss_fn, params, stored, labels, max_norm=max_norm, chunk_size=chunk_size).grads

    def gram(params: models.Params, stored: Tensor, labels: Tensor) -> Tensor:
        return per_sample.gram(loss_fn, params, (stored, labels), chunk_size=chunk_size)

    def normals(key: Tensor, like: models.Params) -> models.Params:
        keys = random.split(key, len(like)).unbind()
        return {name: random.box_muller(k, p.shape) for k, (name, p) in zip(keys, like.items(), strict=True)}

    return Way(
        problem.params,
        (problem.stored, problem.labels),
        start(problem.params.values(), (problem.x, problem.labels), dtype),
        clipped_sum,
        partial(per_sample.norms, loss_fn, chunk_size=chunk_size),
        gram,
        partial(per_sample.second_moment, loss_fn, chunk_size=chunk_size),
        normals,
    )


def dense(problem: Problem, *, max_norm: float = MAX_NORM) -> Way:
    """The way of torch's tutorial: every sample gradient of the module, by `vmap(grad)`."""
    net, batch = problem.loaded(), (problem.x, problem.labels)
    params = {name: p.detach() for name, p in net.named_parameters()}

    def loss_fn(params: models.Params, image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, params, (image[None],)), label[None])

    sample_grads = vmap(grad(loss_fn), in_dims=(None, 0, 0))

    def clipped_sum(*arguments: Any) -> models.Params:
        rows = sample_grads(*arguments)
        factors = (max_norm / norms_of(rows.values())).clamp(max=1)
        return {name: torch.tensordot(factors, g, 1) for name, g in rows.items()}

    def normals(_: Tensor, like: models.Params) -> models.Params:  # torch's generator has a state instead of keys
        return tree.map(torch.randn_like, like)

    return Way(
        params,
        batch,
        start(params.values(), batch, torch.float32),
        clipped_sum,
        lambda *arguments: norms_of(sample_grads(*arguments).values()),
        lambda *arguments: gram_of(sample_grads(*arguments).values()),
        lambda *arguments: {name: g.square().sum(0) for name, g in sample_grads(*arguments).items()},
        normals,
    )


def norms_of(rows: Iterable[Tensor]) -> Tensor:
    """(B,): the norms of sample gradients, from each parameter's (B, …)."""
    parts = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in rows])
    found: Tensor = torch.linalg.vector_norm(parts, dim=0)
    return found


def gram_of(rows: Iterable[Tensor]) -> Tensor:
    """(B, B): the inner products of sample gradients, from each parameter's (B, …)."""
    return torch.stack([g.flatten(1) @ g.flatten(1).T for g in rows]).sum(0)


def quantity(make: Callable[[], Way], name: Name, *, compile: bool) -> Work:
    """A quantity, computed from the initial weights by each call."""
    way = make()
    fn: Quantity = getattr(way, name)
    run = train.compiled(fn) if compile else fn
    found: list[Any] = []

    def call() -> None:
        found[:] = [run(way.params, *way.batch)]

    return Work(call, lambda: found[0], way.start, found.clear)


def clipped_step(make: Callable[[], Way], noise: Deviation | None = None, *, compile: bool) -> Work:
    """A clipped step of SGD with momentum, with noise if there is a deviation."""
    way, optimizer = make(), optim.sgd(LR, momentum=MOMENTUM)

    def step(state: train.State, x: Tensor, labels: Tensor, deviation: Tensor | None) -> train.State:
        sums = way.clipped_sum(state.params, x, labels)
        if deviation is not None:
            normals = way.normals(random.fold_in(state.key, state.step), sums)
            sums = tree.map(lambda g, z: g + deviation * z, sums, normals)
        grads = tree.map(lambda g: g / len(labels), sums)
        new, optimizer_state = optimizer.update(state.params, state.optimizer, grads)
        return train.State(new, optimizer_state, state.step + 1, state.key)

    run = train.compiled(step) if compile else step
    device = way.batch[1].device
    state = train.init_state(way.params, optimizer, random.key(1, device=device))

    def call() -> None:
        nonlocal state
        state = run(state, *way.batch, None if noise is None else torch.tensor(noise(), device=device))

    return Work(call, lambda: tree.map(torch.sub, state.params, way.params), way.start)
