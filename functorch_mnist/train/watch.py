"""The estimator of the ordinary gradient with per-sample gradient norms and the noise of the batch."""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import per_sample, statistics, tree
from ..batch import check
from ..tree import Tree
from .step import Estimator, check_loss


def gradient_with_noise(loss_fn: Callable[..., Tensor]) -> Estimator:
    """The estimator of the ordinary gradient, with per-sample norms and the gradient noise of the batch.

    Args:
        loss_fn: `loss_fn(params, *example) -> ()`, pure. In `fit` the last tensor of an example is its key (2,).

    Returns:
        The estimator. Its gradient is that of `gradient(loss_fn)`, up to rounding. Its aux holds, besides `"loss"`:
        `"count"`, the number of examples that count; `"norms"` (B,), |∇_i|, zero where masked; `"keep"` (B,) bool, the
        mask; `"trace"` and `"square_norm"`, 0-d, tr Σ and |E ∇|² as of `statistics.batch_noise`, NaN for fewer than two
        examples: for the gradient noise scale, average both over steps with `statistics.mean_noise_scale`.

    Raises:
        ValueError, TypeError: from the estimator, as from that of `gradient`.

    Cost: one backward pass.

    Example:
        >>> _, aux = gradient_with_noise(lambda w, x: w * x)(torch.tensor(0.0), torch.tensor([1.0, 3.0]))
        >>> aux["norms"], aux["trace"]
        (tensor([1., 3.]), tensor(2., dtype=torch.float64))

    Reference: McCandlish et al., "An empirical model of large-batch training", 2018, appendix A.1.
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
