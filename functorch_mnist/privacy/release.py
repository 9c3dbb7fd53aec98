"""What a private step computes and what it releases.

    sums of a chunk     G = Σ_i s_i ∇_i,    V = Σ_i votes_i      one backward pass; added up over the chunks of a draw
    released, once      (G + σ_Δ C z) / n,  (V + σ_b z') / n     z, z' standard normal, n the expected batch

The divisor n is the expected batch size q N, however many examples were drawn: the realised number would leak.
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
    """Sums over the examples of a chunk. Those of two chunks are added by `tree.map(torch.add, a, b)`."""

    grads: Tree
    """Σ s_i ∇_i, like the parameters, float32 or wider."""
    votes: Tensor
    """(V,): the sum of the clipping rule's votes; V is 0 for a rule that does not adapt."""
    seen: dict[str, Tensor]
    """0-d each, and never private: the sum of the losses `"loss"`, and the numbers of examples that count (`"count"`),
    that were clipped (`"clipped"`) and that were left out because their gradient is not finite (`"nonfinite"`)."""


def clipped_sums(
    loss_fn: Callable[..., Tensor],
    params: Tree,
    *batch: Tensor,
    clipping: Clipping,
    clipping_state: Tree = (),
    mask: Tensor | None = None,
    group: Tensor | None = None,
) -> Sums:
    """The sum of a chunk's clipped per-sample gradients, and the votes that an adaptive rule adapts to.

    The gradients themselves are never formed where a parameter has a rule: norms and the clipped sum follow from their
    factors, in one backward pass (ghost clipping, book-keeping).

    Args:
        loss_fn: `loss_fn(params, *example) -> ()`, pure.
        params: a pytree of float tensors.
        batch: tensors (B, …).
        clipping: the rule, such as `Flat(max_norm)`.
        clipping_state: the rule's state, for one that adapts.
        mask: (B,) bool; an example with False, whatever it holds, adds exactly nothing.
        group: (B,) integers: the user of each example. What is clipped is then the sum of each user's gradients; all
            examples of a user must be in this chunk, and votes and counts are those of users.

    Returns:
        The sums, `grads` like the parameters.

    Raises:
        TypeError: `group` is no tensor of integers, `clipping` no rule, or the parameters are a module.
        ValueError: the batch, the mask, `group`, the loss or the rule's groups of parameters do not fit.

    Guarantees: no example, and with `group` no user, whatever its data, moves `grads` by more than the rule's
        sensitivity, or `votes` by more than 1/2. An example whose gradient or loss is not finite, or that is masked,
        moves nothing; a user with such a gradient or loss moves nothing as a whole.

    Cost: one backward pass.

    Example:
        >>> from functorch_mnist.privacy import Flat
        >>> sums = clipped_sums(lambda w, x: w * x, torch.tensor(0.0), torch.tensor([0.5, 3.0]), clipping=Flat(1.0))
        >>> sums.grads, sums.seen["clipped"]
        (tensor(1.5000), tensor(1))

    Reference: Abadi et al., "Deep learning with differential privacy", CCS 2016, algorithm 1. Ghost clipping: Li,
        Tramèr, Liang, Hashimoto, "Large language models can be strong differentially private learners", ICLR 2022.
        Book-keeping: Bu, Wang, Zha, Karypis, "Differentially private optimization on large model at small cost", ICML
        2023. Users: McMahan, Ramage, Talwar, Zhang, "Learning differentially private recurrent language models", ICLR
        2018, section 3.
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
    """The sums over no example.

    Args:
        params: the parameters, whose shapes the sums have.
        clipping: the rule, whose number of votes they have.
        device: of the counts; by default the CPU.
    """
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
    """The Gaussian mechanism: the noisy mean gradient and the clipping rule's next state, all that a step releases.

    Args:
        params: the parameters, whose dtypes the gradient has.
        sums: of all examples of the step, from `clipped_sums`.
        key: (2,), of this step's noise and of nothing else; with `weights` (K, 2), as `noise_draws` gives them.
        clipping, clipping_state: the rule and its state.
        noise_multiplier: σ, at least 0: the standard deviation of the noise over the sensitivity of all that the step
            releases. 0 adds no noise. It may be a 0-d tensor, for a rule without votes.
        expected: n, the expected batch size q N, above 0, a number or a 0-d tensor.
        weights: (K,), of the draws that correlated noise sums; by default the noise is independent.

    Returns:
        `(grads, clipping_state)`: the mean gradient (Σ s_i ∇_i + noise) / n, like the parameters, and the rule's state.

    Raises:
        TypeError: `sums` is no `Sums`, or an argument is of a wrong kind.
        ValueError: an adaptive rule's count noise is too small for σ.

    Guarantees: without examples it is the noise alone.

    Cost: memory of the parameters.

    Example:
        >>> from functorch_mnist.privacy import Flat
        >>> w, clipping = torch.tensor(0.0), Flat(1.0)
        >>> sums = clipped_sums(lambda w, x: w * x, w, torch.tensor([0.5, 3.0]), clipping=clipping)
        >>> noisy_mean(w, sums, random.key(0), clipping=clipping, noise_multiplier=0.0, expected=2.0)[0]
        tensor(0.7500)

    Reference: Abadi et al., "Deep learning with differential privacy", CCS 2016, algorithm 1.
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
