"""The estimator of the plain gradient that also says what the gradients of single examples are like."""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import per_sample, statistics, tree
from ..batch import check
from ..tree import Tree
from .step import Estimator, check_loss


def gradient_with_noise(loss_fn: Callable[..., Tensor]) -> Estimator:
    """The estimator of the plain gradient, with the norms of the sample gradients and the noise of the batch.

    Args:
        loss_fn: `loss_fn(params, *example) -> ()`, pure.

    Returns:
        The estimator. Its gradient is that of `gradient(loss_fn)`, up to rounding. Its aux holds, besides `"loss"`:
        `"count"`, how many examples count; `"norms"` (B,), |∇_i|, zero where masked; `"keep"` (B,) bool, the mask;
        `"trace"` and `"square_norm"`, 0-d, the unbiased estimates of `statistics.batch_noise`, NaN for fewer than two
        examples: for the noise scale, average each over steps with `statistics.mean_noise_scale`.

    Cost: one backward pass.
    """

    def estimate(params: Tree, *batch: Tensor, mask: Tensor | None) -> tuple[Tree, dict[str, Tensor]]:
        rows = check("gradient_with_noise", batch, mask)
        check_loss("gradient_with_noise", "loss_fn", loss_fn, batch)
        if rows == 0:
            nothing = torch.zeros(0, device=batch[0].device)
            return tree.zeros_like(params), _aux(nothing, nothing, mask)
        grads, norms, losses = per_sample.grad_and_norms(loss_fn, params, *batch, mask=mask)
        return grads, _aux(losses, norms, mask)

    def finish(grads: Tree, aux: dict[str, Tensor]) -> dict[str, Tensor]:
        trace, square_norm = statistics.batch_noise(aux["norms"], grads, aux["keep"])
        return {**aux, "trace": trace, "square_norm": square_norm}

    return Estimator(estimate, finish)


def _aux(losses: Tensor, norms: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    keep = torch.ones_like(norms, dtype=torch.bool) if mask is None else mask
    return {"loss": tree.wide(losses).sum(), "count": keep.sum(), "norms": norms, "keep": keep}
