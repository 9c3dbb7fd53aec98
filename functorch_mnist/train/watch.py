"""The estimator of the plain gradient that also says what the gradients of single examples are like."""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import per_sample, statistics, tree
from ..batch import check
from ..tree import Tree
from .step import Estimator


def watching(loss_fn: Callable[..., Tensor]) -> Estimator:
    """The estimator of the plain gradient, with the norms of the sample gradients and the noise of the batch.

    Args:
        loss_fn: `loss_fn(params, *example) -> ()`, pure.

    Returns:
        The estimator. Its gradient is that of `gradient(loss_fn)`, up to rounding. Its aux holds, besides `"loss"`:
        `"count"`, how many examples count; `"norms"` (B,), |∇_i|, zero where masked; `"trace"` and `"square_norm"`,
        0-d, the unbiased estimates of `statistics.of_batch`, NaN for fewer than two examples: for the noise scale,
        average each over steps with `statistics.averaged`.

    Cost: one backward pass.
    """

    def estimate(params: Tree, *batch: Tensor, mask: Tensor | None) -> tuple[Tree, dict[str, Tensor]]:
        if check("watching", batch, mask) == 0:
            nothing = torch.zeros(0, device=batch[0].device)
            return tree.zeros_like(params), _aux(nothing, nothing, tree.zeros_like(params), mask)
        grads, norms, losses = per_sample.grad_and_norms(loss_fn, params, *batch, mask=mask)
        return grads, _aux(losses, norms, grads, mask)

    return Estimator(estimate)


def _aux(losses: Tensor, norms: Tensor, grads: Tree, mask: Tensor | None) -> dict[str, Tensor]:
    trace, square_norm = statistics.of_batch(norms, grads, mask)
    count = torch.ones_like(norms).sum() if mask is None else mask.sum()
    return {"loss": tree.wide(losses).sum(), "count": count, "norms": norms, "trace": trace, "square_norm": square_norm}
