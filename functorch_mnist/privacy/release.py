"""What a private step computes and what it lets out.

    sums of a chunk     G = Σ_i s_i ∇_i,    V = Σ_i votes_i      one backward pass; added up over the chunks of a draw
    released, once      (G + σ_Δ C z) / n,  (V + σ_b z') / n     z, z' standard normal, n the expected batch

The divisor n is that of the sampling, q N, however many examples were drawn: the realised number would tell of one.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import random, tree
from ..arguments import check_params, shown
from ..batch import blanked, check, masked
from ..per_sample import factored
from ..per_sample.groups import checked, leads, summed
from ..tree import Tree
from .clipping import Clipping, check_clipping


class Sums(NamedTuple):
    """Sums over the examples of a chunk: `tree.map(torch.add, a, b)` is those of two chunks."""

    grads: Tree
    """Σ s_i ∇_i, like the parameters, float32 or wider."""
    votes: Tensor
    """(V,): the sum of the clipping rule's votes."""
    seen: dict[str, Tensor]
    """0-d, and never private: the sum `"loss"`, and the numbers of examples that `"count"`, that were `"clipped"` and
    that were left out because their gradient was `"nonfinite"`."""


def clipped_sums(
    loss_fn: Callable[..., Tensor],
    params: Tree,
    *batch: Tensor,
    clipping: Clipping,
    clipping_state: Tree = (),
    mask: Tensor | None = None,
    group: Tensor | None = None,
) -> Sums:
    """The sums of a chunk's clipped gradients, and what the clipping rule adapts to.

    Args:
        loss_fn: `loss_fn(params, *example) -> ()`, pure.
        params: a pytree of float tensors.
        batch: tensors (B, …).
        clipping: the rule.
        clipping_state: the rule's.
        mask: (B,) bool.
        group: (B,) integers, any: whose each example is. What is clipped is then the sum of each one's gradients, all
            of whose examples have to be in this chunk, and votes and numbers are of groups.

    Raises:
        TypeError: `group` is no tensor of integers.
        ValueError: the batch, the mask, `group` or the rule's groups of parameters do not fit.

    Guarantees: no example, and with `group` no group of them, whatever it holds, moves `grads` by more than the rule's
        sensitivity, or `votes` by more than 1/2. One whose gradient or loss is not finite, or that is masked, moves
        nothing; a group with such a gradient or loss moves nothing as a whole.

    Reference: of groups, McMahan, Ramage, Talwar, Zhang, "Learning differentially private recurrent language models",
        ICLR 2018, section 3.

    Cost: one backward pass.
    """
    check_params("privacy.clipped_sums", params)
    check_clipping("privacy.clipped_sums", clipping)
    if check("privacy.clipped_sums", batch, mask) == 0:
        return zero_sums(params, clipping, batch[0].device)
    first = None if group is None else checked("privacy.clipped_sums", group, mask, len(batch[0]))
    found = factored(loss_fn, params, *blanked(batch, mask)).wide().built()
    norms = found.leaf_bounds(first)
    finite = torch.stack([norm.isfinite() for norm in tree.leaves(norms)]).all(0) & found.losses.isfinite()
    mask = torch.ones_like(finite) if mask is None else mask
    if first is None:
        once = mask
    else:
        finite = summed(first, (~finite).long()) == 0
        once = mask & leads(first)
    keep = finite & mask
    norms = tree.map(lambda norm: masked(norm, keep), norms)
    factors = clipping.factors(norms, clipping_state)
    scaled = torch.stack([factor < 1 for factor in tree.leaves(factors)]).any(0)
    grads = found.masked(keep).weighted_sum(tree.map(lambda factor: masked(factor, keep), factors))
    votes = masked(clipping.votes(norms, clipping_state), keep & once).sum(0)
    counts = {"count": once.sum(), "clipped": (scaled & keep & once).sum(), "nonfinite": (once & ~finite).sum()}
    return Sums(grads, votes, {"loss": masked(found.losses, keep).sum(), **counts})


def zero_sums(params: Tree, clipping: Clipping, device: torch.device | None = None) -> Sums:
    """The sums over no example."""
    none = tree.map(lambda w: torch.zeros_like(tree.wide(w)), params)
    votes = clipping.votes(tree.map(lambda w: w.new_zeros(1, dtype=torch.float32), params), clipping.init())[0] * 0
    counts = {name: torch.zeros((), dtype=torch.int64, device=device) for name in ("count", "clipped", "nonfinite")}
    return Sums(none, votes.to(device), {"loss": torch.zeros((), device=device), **counts})


def noisy_mean(
    params: Tree,
    sums: Sums,
    key: Tensor,
    *,
    clipping: Clipping,
    noise_multiplier: float | Tensor,
    expected: float | Tensor,
    clipping_state: Tree = (),
    weights: Tensor | None = None,
) -> tuple[Tree, Tree]:
    """The mean gradient and the clipping rule's next state, with Gaussian noise: all that a step lets out.

    Args:
        params: the parameters, whose dtypes the gradient has.
        sums: of all examples of the step.
        key: (2,), of this step's noise and of nothing else; with `weights` (K, 2), as `correlation.noise_draws` has it.
        clipping, clipping_state: the rule and its state.
        noise_multiplier: σ, at least 0: the deviation of all that is let out, over its sensitivity. 0 adds no noise.
            A 0-d tensor too, for a rule without votes.
        expected: n, the expected number of examples of a step, above 0, a number or a 0-d tensor.
        weights: (K,), of the draws that correlated noise adds up.

    Returns:
        The mean gradient, like the parameters, and the rule's state.

    Guarantees: without examples it is the noise alone.

    Cost: memory of the parameters.
    """
    check_clipping("privacy.noisy_mean", clipping)
    if not isinstance(sums, Sums):
        raise TypeError(
            f"privacy.noisy_mean: sums must be privacy.Sums. Found {shown(sums)}. "
            "Take them from privacy.clipped_sums, which also bounds their sensitivity."
        )
    if not isinstance(noise_multiplier, (int, float, Tensor)):
        raise TypeError(
            f"privacy.noisy_mean: noise_multiplier must be a number or a 0-d tensor. Found {shown(noise_multiplier)}. "
            "Pass mechanism.noise_multiplier?"
        )
    grads, votes = tree.leaves(sums.grads), sums.votes
    if isinstance(noise_multiplier, Tensor) or noise_multiplier:
        multiplier, votes_deviation = clipping.deviations(noise_multiplier)
        deviation = multiplier * clipping.sensitivity(clipping_state)
        sizes = [g.numel() for g in grads]
        shape = (sum(sizes) + len(votes),)
        drawn = random.box_muller(key, shape) if weights is None else random.box_muller_sum(key, weights, shape)
        *normals, last = drawn.split([*sizes, len(votes)])
        grads = [g + deviation * z.view(g.shape) for g, z in zip(grads, normals, strict=True)]
        votes = votes + votes_deviation * last
    mean = [(g / expected).to(w.dtype) for w, g in zip(tree.leaves(params), grads, strict=True)]
    return tree.unflatten(params, mean), clipping.adapt(clipping_state, votes / expected)
