"""What arms must find: quantities of per-sample gradients by their definitions, a loop over examples in float64.

In float32 the convolutions of one example would be further from the definition than a batch's.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from functorch_mnist import models, tree

from .problems import Problem
from .quantities import MAX_NORM
from .steps import LR, module_step, relative_difference


class Definitions:
    """The quantities of a problem, each computed once, when it is first asked for."""

    def __init__(self, problem: Problem, max_norm: float = MAX_NORM) -> None:
        self._problem, self._max_norm = problem, max_norm

    @cached_property
    def ordinary_step(self) -> models.Params:
        """The first update of the eager module's ordinary step."""
        work = module_step(self._problem, compile=False)
        work.call()
        found: models.Params = work.outputs()
        return found

    @cached_property
    def clipped_step(self) -> models.Params:
        """The first update by clipped gradients, without noise, rounded as an update is."""
        params, batch_size = self._problem.params, len(self._problem.labels)
        total = tree.map(lambda p: torch.zeros_like(p, dtype=torch.float64), params)
        for grads in self._sample_grads():
            factor = (self._max_norm / tree.norm(grads)).clamp(max=1)
            total = tree.map(lambda t, g, factor=factor: t + factor * g, total, grads)
        stepped = tree.map(lambda p, t: torch.sub(p, (t / batch_size).float(), alpha=LR), params, total)
        return tree.map(torch.sub, stepped, params)

    @cached_property
    def norms(self) -> Tensor:
        """(B,): |∇_i|."""
        return torch.stack([tree.norm(grads) for grads in self._sample_grads()]).float()

    @cached_property
    def gram(self) -> Tensor:
        """(B, B): ⟨∇_i, ∇_j⟩."""
        size = sum(p.numel() for p in self._problem.params.values())
        rows = self._problem.labels.new_empty(len(self._problem.labels), size, dtype=torch.float32)
        for row, grads in zip(rows, self._sample_grads(), strict=True):
            row.copy_(tree.ravel(grads))
        return rows @ rows.T

    @cached_property
    def second_moment(self) -> models.Params:
        """Σ_i ∇_i², like the parameters."""
        total = tree.map(lambda p: torch.zeros_like(p, dtype=torch.float64), self._problem.params)
        for grads in self._sample_grads():
            total = tree.map(lambda t, g: t + g.square(), total, grads)
        return tree.map(torch.Tensor.float, total)

    def _sample_grads(self) -> Iterator[models.Params]:
        """∇_i in float64, one example after another."""
        net, x = self._problem.loaded().double(), self._problem.x
        weights = dict(net.named_parameters())
        for example, label in zip(x.double() if x.is_floating_point() else x, self._problem.labels, strict=True):
            loss = F.cross_entropy(net(example[None]), label[None])
            yield dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))


def difference(found: Any, expected: Any) -> float:
    """How far an update, norms or moments are from the expected ones, relative to their norm.

    Of a Gram matrix it is the root mean square of its entries' errors in units of |∇_i| |∇_j|, so of the cosines: an
    entry's rounding is in proportion to the two norms, not to the entry, which may be near zero; and errors between
    small gradients do not vanish next to large ones.
    """
    if isinstance(expected, Tensor) and expected.ndim == 2:
        norms = expected.diagonal().sqrt()
        return float(((found - expected) / torch.outer(norms, norms)).square().mean().sqrt())
    return relative_difference(found, expected)
