"""Projections of per-sample gradients, computed from their factors, and TRAK.

A parameter is read as a matrix (H, D), its first axis by the others. Its gradient `Σ_t g_t a_tᵀ` is projected from both
sides,

    L (Σ_t g_t a_tᵀ) Rᵀ = Σ_t (L g_t) (R a_t)ᵀ,

so only the factors are multiplied by random matrices, and a convolution's input is projected by convolving it. With
independent normal entries of variances 1 / h and 1 / d in L (h, H) and R (d, D), inner products of projections are
those of gradients on average. TRAK is the influence function of a linear model on such features:

    τ_ij = φ'_jᵀ (Φᵀ Φ + λ)⁻¹ φ_i (1 - p_i)

Reference: Park et al., "TRAK: attributing model behavior at scale", ICML 2023, equations 13 to 17. Projections from
both sides: Choe et al., "What is your data worth to GPT?", 2024, section 3.1.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import batch as batches
from .. import random, tree
from ..arguments import check_params, shown
from ..distributed import SINGLE_PROCESS, World, map_rows
from ..losses.labels import check_labels, own
from ..per_sample import Plan, factored
from ..per_sample.eigen import leading_eigenvectors
from ..tree import Tree
from .solve import LEAST, finite, solve


class Projection(NamedTuple):
    """A linear map from a model's gradients to features, one pair of matrices per parameter: a pytree."""

    maps: list[tuple[Tensor, Tensor]]
    """`(L (h, H), R (d, D))` of each parameter, in the order of `tree.leaves`."""

    @property
    def size(self) -> int:
        """F, the number of features of an example."""
        return sum([len(left) * len(right) for left, right in self.maps])


def projection(params: Tree, *, key: Tensor, size: int) -> Projection:
    """A random projection of gradients, with independent normal entries (Johnson-Lindenstrauss).

    Args:
        params: a pytree of float tensors.
        key: (2,), of the entries.
        size: features per parameter at most, at least 1. A parameter of no more entries is kept as it is.

    Returns:
        `L (h, H)` and `R (d, D)` of each parameter, h d ≤ size.

    Raises:
        ValueError: the size is below 1.
        TypeError: the parameters are a module.

    Guarantees: a function of the key and the shapes alone. Inner products of projections have those of gradients for
        their expectation.

    Example:
        >>> projection({"w": torch.zeros(100, 50), "b": torch.zeros(4)}, key=random.key(0), size=64).size
        68

    Reference: Johnson, Lindenstrauss, "Extensions of Lipschitz mappings into a Hilbert space", 1984; from both sides of
        a matrix: Choe et al., "What is your data worth to GPT?", 2024, section 3.1.
    """
    check_params("projection", params)
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"projection: size must be a whole number, at least 1. Found {size}.")
    maps = []
    leaves = tree.leaves(params)
    for leaf, leaf_key in zip(leaves, random.split(key, max(1, len(leaves))), strict=False):
        rows = leaf.shape[0] if leaf.dim() else 1
        columns = leaf.numel() // max(1, rows)
        # Both sides are shortened alike, unless one is shorter than the square root.
        h = min(rows, max(math.isqrt(size), size // max(1, columns)))
        d = min(columns, max(1, size // max(1, h)))
        left_key, right_key = random.split(leaf_key)
        maps.append((_map(left_key, h, rows, leaf), _map(right_key, d, columns, leaf)))
    return Projection(maps)


def principal_projection(
    loss_fn: Callable[..., Tensor],
    params: Tree,
    *batch: Tensor,
    size: int,
    mask: Tensor | None = None,
    chunk_size: int | None = None,
    plan: Plan | None = None,
) -> Projection:
    """The projection that keeps most of the gradients of some examples: their principal directions on both sides.

    Of a parameter as a matrix (H, D), L and R are the eigenvectors of `Σ_i ∇_i ∇_iᵀ / |∇_i|²` and of
    `Σ_i ∇_iᵀ ∇_i / |∇_i|²` with the largest eigenvalues, so that each example has the same weight. h and d are chosen
    so that most of the trace is kept.

    Args:
        loss_fn: `loss_fn(params, *example) -> ()`, pure.
        params: a pytree of float tensors.
        batch: tensors (N, …): a few thousand examples suffice.
        size: features of an example over all parameters, at least one per parameter. Those of an outer product count as
            `attribution.store` keeps them, h + d.
        mask: (N,) bool; an example with False is left out.
        chunk_size: examples taken at a time, at least 1; by default all.
        plan: how `per_sample` computes each parameter; by default the cheapest way.

    Returns:
        `L (h, H)` and `R (d, D)` of each parameter, with orthonormal rows.

    Raises:
        ValueError: the size is too small, or the batch does not fit.

    Cost: one backward pass, and N D² for a side of D.

    Reference: higher-order singular value decomposition: De Lathauwer et al., SIAM J. Matrix Anal. Appl. 21, 2000,
        section 4. Principal directions for attribution: Choe et al., "What is your data worth to GPT?", 2024, section
        3.1.
    """
    count = len(tree.leaves(params))
    if not isinstance(size, int) or size < count:
        raise ValueError(f"principal_projection: size must be at least {count}, one of each parameter. Found {size}.")
    sums: list[tuple[Tensor, Tensor]] = []
    paired: list[bool] = []
    for chunk in batches.chunks("attribution.principal_projection", batch, mask, chunk_size):
        part = factored(loss_fn, params, *chunk.batch, mask=chunk.mask, plan=plan).wide()
        norms = part.norms()
        sides = part.sides(torch.where(norms > 0, 1 / norms, 0.0))
        sums = [(a + c, b + d) for (a, b), (c, d) in zip(sums, sides, strict=True)] if sums else sides
        ones = [(torch.ones_like(a[:1]), torch.ones_like(b[:1])) for a, b in sides]
        paired = [pair is not None for pair in part.pairs(ones)]
    sizes = [(len(left), len(right), pair) for (left, right), pair in zip(sums, paired, strict=True)]
    maps = []
    for (left, right), pair, share in zip(sums, paired, _shares(sizes, size), strict=True):
        (held, u), (kept, v) = _spectrum(left, share), _spectrum(right, share)
        h, d = _sizes(held, kept, share, pair=pair)
        maps.append((u[:, :h].T.contiguous(), v[:, :d].T.contiguous()))
    return Projection(maps)


def _spectrum(side: Tensor, rank: int) -> tuple[list[float], Tensor]:
    """The fraction of the trace that the first 1, …, R eigenvectors hold, and the eigenvectors, (D, R)."""
    vectors = leading_eigenvectors(side[None], min(rank, len(side)))[0]
    values = ((side @ vectors) * vectors).sum(0).clamp(min=0)
    total = side.diagonal().sum()
    return (values.cumsum(0) / torch.where(total > 0, total, 1.0)).tolist(), vectors


def _shares(sizes: Sequence[tuple[int, int, bool]], total: int) -> list[int]:
    """The number of features of each parameter: equal, but for those that need fewer; `total` in all at most."""
    most = [h + d if pair and h + d < h * d else h * d for h, d, pair in sizes]
    shares = [0] * len(most)
    left = total
    for count, i in enumerate(sorted(range(len(most)), key=most.__getitem__)):
        shares[i] = min(most[i], left // (len(most) - count))
        left -= shares[i]
    return shares


def _sizes(held: list[float], kept: list[float], share: int, *, pair: bool) -> tuple[int, int]:
    """h and d of at most `share` features, with the largest product of the fractions of the trace that they hold."""
    best, found = -1.0, (1, 1)
    for h in range(1, min(len(held), share) + 1):
        for d in {share // h, share - h if pair else 0}:
            d = min(d, len(kept))
            if d >= 1 and held[h - 1] * kept[d - 1] > best:
                best, found = held[h - 1] * kept[d - 1], (h, d)
    return found


def _map(key: Tensor, small: int, large: int, like: Tensor) -> Tensor:
    """(small, large): random entries, or the identity where the sizes are equal."""
    dtype = tree.wide(like).dtype
    if small == large:
        return torch.eye(large, dtype=dtype, device=like.device)
    entries: Tensor = random.normal(key, (small, large)).to(device=like.device, dtype=dtype) / small**0.5
    return entries


def features(
    loss_fn: Callable[..., Tensor],
    params: Tree,
    *batch: Tensor,
    projection: Projection,
    mask: Tensor | None = None,
    chunk_size: int | None = None,
    plan: Plan | None = None,
    world: World = SINGLE_PROCESS,
) -> Tensor:
    """The projected gradients of each example: the features of TRAK.

    Args:
        loss_fn: `loss_fn(params, *example) -> ()`, pure; for TRAK the log-odds of the label, see `log_odds`.
        params: a pytree of float tensors.
        batch: tensors (N, …).
        projection: of these parameters, from `projection` or `principal_projection`.
        mask: (N,) bool; an example with False, whatever it holds, has features of zero.
        chunk_size: examples taken at a time, at least 1; by default all.
        plan: how `per_sample` computes each parameter; by default the cheapest way.
        world: the processes, all with the same examples, which divide the chunks between them.

    Returns:
        (N, F): under a random projection their inner products are, in expectation, those of the gradients.

    Raises:
        TypeError: `projection` is no `Projection`, or the parameters are a module.
        ValueError: the batch, the mask, the chunk size or the plan does not fit.

    Cost: one backward pass, and F numbers per example.

    Example:
        >>> params, x = torch.zeros(2), torch.eye(2)
        >>> features(lambda w, x: w @ x, params, x, projection=projection(params, key=random.key(0), size=2))
        tensor([[1., 0.],
                [0., 1.]])

    Reference: Park et al., "TRAK: attributing model behavior at scale", ICML 2023, section 3.
    """

    def of(*batch: Tensor, mask: Tensor | None = None) -> Tensor:
        rows = []
        for chunk in batches.chunks("attribution.features", batch, mask, chunk_size):
            part = factored(loss_fn, params, *chunk.batch, mask=chunk.mask, plan=plan)
            columns = [projected.flatten(1) for projected in part.project(projection.maps)]
            rows.append(chunk.unpadded(torch.cat(columns, 1)))
        return torch.cat(rows)

    check_params("attribution.features", params)
    if not isinstance(projection, Projection):
        raise TypeError(
            f"attribution.features: projection must be a Projection. Found {shown(projection)}. "
            "Make it with attribution.projection(params, key=…, size=…)."
        )
    batches.size_of_chunks("attribution.features", batch, mask, chunk_size)
    return map_rows(world, of, *batch, mask=mask, unit=chunk_size)


def log_odds(outputs: Tensor, labels: Tensor) -> Tensor:
    """`log(p / (1 - p))` of the label's probability p: what TRAK differentiates in place of the loss.

    Args:
        outputs: (..., K) logits or log-probabilities, K at least 2.
        labels: (...) integers in [0, K).

    Returns:
        (...), float32 or wider.

    Raises:
        ValueError: shapes do not agree, a label is out of range, or K is below 2.
        TypeError: the labels are not integers.
        RuntimeError: compiled or on a GPU, a label is out of range.

    Example:
        >>> log_odds(torch.zeros(2), torch.tensor(0))
        tensor(0.)

    Reference: Park et al., "TRAK: attributing model behavior at scale", ICML 2023, section 3.
    """
    labels = check_labels("log_odds", outputs, labels)
    if outputs.shape[-1] < 2:
        raise ValueError(f"log_odds: the odds of a label need at least two classes. Found {outputs.shape[-1]}.")
    wide = tree.wide(outputs)
    others = wide.masked_fill(own(labels, outputs.shape[-1]), -torch.inf).logsumexp(-1)
    return wide.gather(-1, labels[..., None].long()).squeeze(-1) - others


def trak(train: Tensor, test: Tensor, probabilities: Tensor, *, damping: float | None = None) -> Tensor:
    """TRAK of each training on each test example, of one model.

    It is `τ_ij = φ'_jᵀ (Φᵀ Φ + λ)⁻¹ φ_i (1 - p_i)`. Gradients of log-odds are linearly dependent: those by the last
    bias add up to zero over the classes. So ΦᵀΦ of a plain classifier is singular, and a small damping approximates its
    pseudo-inverse, up to the ratio of λ to the nonzero eigenvalues.

    Args:
        train, test: (N, F) and (M, F), `features` of the log-odds of training and test examples.
        probabilities: (N,), the model's probability p_i of each training example's label.
        damping: λ, at least 0; by default a millionth of the mean eigenvalue of ΦᵀΦ, for any N.

    Returns:
        (N, M) float64: above zero where training on i lowers the loss of j. Average over several models, trained on
        subsets of the data, for the method of the reference.

    Raises:
        ValueError: shapes do not fit, a number is not finite, the damping is below 0, or it is so small that the
            rounding of a zero eigenvalue would be divided by. Compiled, the last gives NaN instead.

    Example:
        >>> trak(torch.eye(2), torch.eye(2), torch.tensor([0.5, 0.9]), damping=0.0).round(decimals=6)
        tensor([[0.5000, 0.0000],
                [0.0000, 0.1000]], dtype=torch.float64)

    Reference: Park, Georgiev, Ilyas, Leclerc, Madry, "TRAK: attributing model behavior at scale", ICML 2023, equations
        13 to 17.
    """
    if train.dim() != 2 or test.shape[1:] != train.shape[1:] or probabilities.shape != train.shape[:1]:
        raise ValueError(
            f"trak: features must be (N, F) and (M, F), probabilities (N,). "
            f"Found {tuple(train.shape)}, {tuple(test.shape)}, {tuple(probabilities.shape)}."
        )
    if damping is not None and not 0 <= damping < math.inf:
        raise ValueError(f"trak: damping must be at least 0 and finite. Found {damping}.")
    if damping == 0 and len(train) < train.shape[1]:
        raise ValueError(
            f"trak: fewer examples than features need a damping above 0. Found {len(train)} and {train.shape[1]}. "
            "Leave damping out?"
        )
    finite("trak", train, test, probabilities)
    least = LEAST if damping is None else max(LEAST, (_ROUNDED * torch.finfo(train.dtype).eps) ** 2)
    train, test = train.double(), test.double()
    moment = train.T @ train
    mean = moment.trace() / max(1, len(moment))
    small = torch.where(mean > 0, _MEAN * mean, 1.0) if damping is None else damping
    influence: Tensor = train @ solve("trak", moment, test.T, damping=small, least=least)
    return influence * (1 - probabilities.double())[:, None]


_MEAN = 1e-6
"""Of the mean eigenvalue. What float32 leaves of a zero eigenvalue is 1e-14 of it, far below."""
_ROUNDED = 64
"""Units in the last place by which a feature may be off. Eigenvalues of the moment are squares."""
