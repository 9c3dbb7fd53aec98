"""What is done with a module and a batch: its own pass, and this library's sums and norms of sample gradients.

All start from the same weights. What they must be is defined here too: a loop over examples in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from functorch_mnist import models, per_sample, train, tree

from . import peers
from .measure import Work
from .problems import start
from .quantities import norms_of
from .recipes import Recipe, Sizes

TOLERANCE = 1e-4
"""Of quantities in float32, against float64."""


@dataclass(frozen=True)
class Subject:
    """A network and a batch, made when the first arm needs them."""

    recipe: Recipe
    sizes: Sizes
    device: str

    @cached_property
    def module(self) -> nn.Module:
        """Arms take copies of it."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.recipe.module(self.sizes).eval().to(self.device)

    @cached_property
    def batch(self) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs by name, and targets."""
        inputs, targets = self.recipe.batch(self.sizes)
        return {name: x.to(self.device) for name, x in inputs.items()}, targets.to(self.device)

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """The mean loss, of an example or of a batch."""
        return self.recipe.loss(self.recipe.logits(outputs), targets)

    def work(
        self, call: Callable[[], Any], weights: Sequence[Tensor], read: Callable[[Any], Any] | None = None
    ) -> Work:
        """What starts from these weights and is computed again by each call; `read` gives the outputs of a call."""
        inputs, targets = self.batch
        found: list[Any] = []

        def keep() -> None:
            found[:] = [call()]

        def outputs() -> Any:
            return found[0] if read is None else read(found[0])

        return Work(keep, outputs, start(weights, (*inputs.values(), targets), torch.float32), found.clear)

    def named(self, grads: Sequence[Tensor]) -> models.Params:
        """Gradients by the names of their parameters."""
        return dict(zip([name for name, _ in self.module.named_parameters()], grads, strict=True))

    @cached_property
    def clipped_sum(self) -> models.Params:
        """The definition."""
        total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in self.module.named_parameters()}
        for grads in self._sample_grads():
            factor = (self.recipe.max_norm / tree.norm(grads)).clamp(max=1)
            total = {name: total[name] + factor * g for name, g in grads.items()}
        return {name: g.float() for name, g in total.items()}

    @cached_property
    def norms(self) -> Tensor:
        """(B,): the definition."""
        return torch.stack([tree.norm(grads) for grads in self._sample_grads()]).float()

    def _sample_grads(self) -> Iterator[models.Params]:
        """Gradients of one example after another, in float64, by the module."""
        module = copy.deepcopy(self.module).double()
        weights = list(module.parameters())
        inputs, targets = self.batch
        for i in range(len(targets)):
            example = {name: x[i : i + 1] for name, x in inputs.items()}
            example = {name: x.double() if x.is_floating_point() else x for name, x in example.items()}
            yield self.named(torch.autograd.grad(self.loss(module(**example), targets[i : i + 1]), weights))


def ordinary(subject: Subject, *, compile: bool = False, as_loop: bool = False) -> Work:
    """The module's own pass: the gradient of the mean loss."""
    module, (inputs, targets) = copy.deepcopy(subject.module), subject.batch
    if as_loop and subject.recipe.as_loop is not None:
        module = subject.recipe.as_loop(subject.sizes).to(subject.device)
        models.load_into(module, dict(zip(dict(module.named_parameters()), subject.module.parameters(), strict=True)))
    weights = list(module.parameters())

    def loss(inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        return subject.loss(module(**inputs), targets)

    run = train.compiled(loss) if compile else loss
    return subject.work(lambda: torch.autograd.grad(run(inputs, targets), weights), weights, subject.named)


def stepped(subject: Subject) -> Work:
    """The module's whole step: its own pass, and SGD with momentum, at a rate that leaves the weights as they are."""
    module, (inputs, targets) = copy.deepcopy(subject.module), subject.batch
    weights = list(module.parameters())
    optimizer = torch.optim.SGD(weights, lr=0.0, momentum=0.9)

    def step() -> list[Tensor]:
        optimizer.zero_grad()
        subject.loss(module(**inputs), targets).backward()
        optimizer.step()
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in weights]

    return subject.work(step, weights, subject.named)


def clipped(subject: Subject, *, compile: bool = False, prepared: bool = False) -> Work:
    """The clipped sum by this library."""
    loss_fn, params, batch = _functional(subject, prepared=prepared)

    def clipped_sum(params: models.Params, *batch: Tensor) -> Any:
        return per_sample.clipped_sum(loss_fn, params, *batch, max_norm=subject.recipe.max_norm).grads

    run = train.compiled(clipped_sum) if compile else clipped_sum
    return subject.work(_settled(run, params, batch, prepared=prepared), list(params.values()))


def clipped_by_opacus(subject: Subject, *, mode: Literal["hooks", "ghost"]) -> Work:
    """The clipped sum by Opacus."""
    module, (inputs, targets) = copy.deepcopy(subject.module), subject.batch
    weights = list(module.parameters())
    call = peers.opacus_clipped_sum(
        module, inputs, targets, subject.recipe.logits, mode=mode, max_norm=subject.recipe.max_norm
    )
    return subject.work(call, weights, subject.named)


def norms(subject: Subject, *, prepared: bool = False) -> Work:
    """The norms by this library."""
    loss_fn, params, batch = _functional(subject, prepared=prepared)

    def run(params: models.Params, *batch: Tensor) -> Tensor:
        return per_sample.norms(loss_fn, params, *batch)

    return subject.work(_settled(run, params, batch, prepared=prepared), list(params.values()))


def dense_norms(subject: Subject) -> Work:
    """The norms of sample gradients that are formed."""
    loss_fn, params, batch = _functional(subject, prepared=False)
    return subject.work(lambda: norms_of(per_sample.grads(loss_fn, params, *batch).values()), list(params.values()))


def _functional(subject: Subject, *, prepared: bool) -> tuple[Callable[..., Tensor], models.Params, tuple[Tensor, ...]]:
    """The loss of one example, the parameters and the batch."""
    (inputs, targets), names = subject.batch, list(subject.batch[0])
    shapes = {name: x.dim() - 1 for name, x in inputs.items()}
    params, model = models.from_module(subject.module, example_ndim=shapes)

    def loss_fn(params: models.Params, *example: Tensor) -> Tensor:
        *values, target = example
        return subject.loss(model.apply(params, **dict(zip(names, values, strict=True))), target)

    batch = (*inputs.values(), targets)
    return per_sample.prepare(loss_fn, params, *[x[0] for x in batch]) if prepared else loss_fn, params, batch


def _settled(
    run: Callable[..., Any], params: models.Params, batch: tuple[Tensor, ...], *, prepared: bool
) -> Callable[[], Any]:
    """A call of `run`. Of a prepared loss the first makes three: what is compared comes of the ops that are timed."""
    ahead = [2 if prepared else 0]

    def call() -> Any:
        while ahead[0]:
            ahead[0] -= 1
            run(params, *batch)
        return run(params, *batch)

    return call
