"""What a fold can take of sample gradients. With ∇_i the gradient of example i, of N, and G = (1 / N) Σ_i ∇_i:

Norms               how |∇_i| is distributed, whole and of each parameter
Moments             Σ ∇_i and Σ ∇_i², elementwise: mean, variance, signal-to-noise ratio, diagonal empirical Fisher
Alignment           how the cosine of ∇_i with a direction, such as G, is distributed
KroneckerFactors    Σ Σ_t a aᵀ and Σ Σ_t g gᵀ
Eigenvalues         Σ (Uᵀ ∇_i V)², elementwise, along eigenvectors of the Kronecker factors
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import batch as batches
from .. import tree
from ..per_sample import Eigenbasis, Factored, Kronecker, Plan, factored
from ..per_sample.squares import power
from ..tree import Tree
from .distribution import Distribution
from .folds import Gradients, Sums, wide_sums


@tree.register
@dataclass(frozen=True)
class Norms(Sums):
    """The distribution of the norms of per-sample gradients: `fold(…, of=Norms.of)`.

    GraNd is the norm itself, see `per_sample.norms` and `attribution.scores`.

    Example:
        >>> from functorch_mnist.statistics import fold
        >>> fold(lambda w, x: w * x, torch.tensor(0.0), torch.tensor([1.0, 3.0]), of=Norms.of).whole.maximum
        tensor(3., dtype=torch.float64)
    """

    whole: Distribution
    """Of |∇_i|."""
    leaves: dict[str, Distribution]
    """Of the norm of each parameter's part, by its path."""

    @classmethod
    def of(cls, gradients: Gradients) -> Norms:
        """The distribution over some examples."""
        paths = tree.paths(gradients.factored.params)
        leaves = {
            path: Distribution.of(squares.sqrt(), gradients.keep)
            for path, squares in zip(paths, gradients.square_norms, strict=True)
        }
        return cls(Distribution.of(gradients.norms, gradients.keep), leaves)

    def merge(self, other: Norms) -> Norms:
        if self.leaves.keys() != other.leaves.keys():
            raise ValueError(f"merge: two of the same parameters. Found {list(self.leaves)} and {list(other.leaves)}.")
        leaves = {path: mine.merge(other.leaves[path]) for path, mine in self.leaves.items()}
        return Norms(self.whole.merge(other.whole), leaves)


@tree.register
@dataclass(frozen=True)
class Moments(Sums):
    """The first two moments of per-sample gradients, elementwise: `fold(…, of=Moments.of)`.

    Properties are trees like `params`, in float64.
    """

    count: Tensor
    """0-d float64: N."""
    total: Tree
    """Σ ∇_i."""
    squares: Tree
    """Σ ∇_i²."""

    @classmethod
    def of(cls, gradients: Gradients) -> Moments:
        """The sums over some examples."""
        return cls(gradients.count, wide_sums(gradients.total), wide_sums(gradients.factored.second_moment()))

    @property
    def mean(self) -> Tree:
        """The mean gradient G, like `params`; NaN without an example."""
        return tree.map(lambda total: total / self.count, self.total)

    @property
    def variance(self) -> Tree:
        """The variance `Σ (∇_i - G)² / (N - 1)`, like `params`, unbiased; NaN for fewer than two examples."""

        def one(total: Tensor, squares: Tensor) -> Tensor:
            variance = (squares - total.square() / self.count).clamp(min=0) / (self.count - 1)
            return torch.where(self.count > 1, variance, torch.nan)

        return tree.map(one, self.total, self.squares)

    @property
    def signal_to_noise(self) -> Tree:
        """The gradient signal-to-noise ratio (GSNR) `G² / variance`, like `params`.

        0 where the mean is 0, infinite where only the variance is 0.

        Reference: Liu et al., "Understanding why neural networks generalize well through GSNR of parameters", ICLR
            2020, equation 1.
        """

        def one(mean: Tensor, variance: Tensor) -> Tensor:
            return torch.where(mean == 0, 0.0, mean.square() / variance)

        return tree.map(one, self.mean, self.variance)

    @property
    def fisher(self) -> Tree:
        """The diagonal of the empirical Fisher information, `Σ ∇_i² / N`, like `params`.

        It takes the labels of the data, for a loss that is a negative log-likelihood; `fisher_diagonal` takes the
        model's.

        Reference: Kunstner et al., "Limitations of the empirical Fisher approximation", NeurIPS 2019.
        """
        return tree.map(lambda squares: squares / self.count, self.squares)


@tree.register
@dataclass(frozen=True)
class Alignment(Sums):
    """The distribution of the cosines of per-sample gradients with a direction.

    `fold(…, of=partial(Alignment.of, direction=direction))`. An example without a gradient has the cosine 0.
    """

    cosines: Distribution
    """Of ⟨∇_i, v⟩ / (|∇_i| |v|)."""

    @classmethod
    def of(cls, gradients: Gradients, *, direction: Tree) -> Alignment:
        """The distribution over some examples.

        Args:
            gradients: of the examples.
            direction: v, a tree like `params`, such as a mean gradient.
        """
        found = _cosines(gradients.factored, gradients.norms, direction)
        return cls(Distribution.of(found, gradients.keep))

    def merge(self, other: Alignment) -> Alignment:
        return Alignment(self.cosines.merge(other.cosines))


@tree.register
@dataclass(frozen=True)
class KroneckerFactors(Sums):
    """The Kronecker factors of the per-sample gradients' second moment: `fold(…, of=KroneckerFactors.of)`.

    Reference: Martens, Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature", ICML 2015.
    """

    count: Tensor
    """0-d float64: N."""
    sums: dict[str, Kronecker]
    """Of each parameter that has them, by its path: sums over examples and positions, in float64."""

    @classmethod
    def of(cls, gradients: Gradients) -> KroneckerFactors:
        """The sums over some examples."""
        return cls(gradients.count, wide_sums(gradients.factors.kronecker(gradients.keep)))

    @property
    def mean(self) -> dict[str, Kronecker]:
        """The factors per example, by path, in float64."""
        return tree.map(lambda factor: factor / self.count, self.sums)


@tree.register
@dataclass(frozen=True)
class Eigenvalues(Sums):
    """Second moments of per-sample gradients along the eigenvectors of Kronecker factors: EK-FAC's eigenvalues.

    `fold(…, of=partial(Eigenvalues.of, bases=bases))`.

    Reference: George et al., "Fast approximate natural gradient descent in a Kronecker-factored eigenbasis", NeurIPS
        2018, equation 7.
    """

    count: Tensor
    """0-d float64: N."""
    sums: dict[str, Tensor]
    """`Σ_i (Uᵀ ∇_i V)²` of each parameter that has a basis, by its path, of the others `Σ_i ∇_i²`, in float64."""

    @classmethod
    def of(cls, gradients: Gradients, *, bases: Mapping[str, Eigenbasis]) -> Eigenvalues:
        """The sums over some examples.

        Args:
            gradients: of the examples.
            bases: by the path of a parameter, `per_sample.eigenbasis` of its Kronecker factors.
        """
        return cls(gradients.count, wide_sums(gradients.factors.eigenvalues(bases)))

    @property
    def mean(self) -> dict[str, Tensor]:
        """The second moments per example, by path, in float64."""
        return {path: sums / self.count for path, sums in self.sums.items()}


def cosines(
    loss_fn: Callable[..., Tensor],
    params: Tree,
    *batch: Tensor,
    direction: Tree,
    mask: Tensor | None = None,
    chunk_size: int | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """The cosine of each per-sample gradient with a direction, such as the mean gradient.

    Args:
        loss_fn: `loss_fn(params, *example) -> ()`, pure.
        params: a pytree of float tensors.
        batch: tensors (B, …).
        direction: v, a tree like `params`.
        mask: (B,) bool; an example with False, whatever it holds, has the cosine 0.
        chunk_size: examples taken at a time, at least 1; by default all.
        plan: how `per_sample` computes each parameter; by default the cheapest way.

    Returns:
        (B,) in [-1, 1], float32 or wider: ⟨∇_i, v⟩ / (|∇_i| |v|), 0 where either is zero.

    Raises:
        ValueError: the batch, the mask, the direction, the chunk size or the plan does not fit.
        TypeError: a parameter is no float tensor.

    Cost: one backward pass.

    Example:
        >>> cosines(lambda w, x: w @ x, torch.zeros(2), torch.eye(2), direction=torch.tensor([3.0, 4.0]))
        tensor([0.6000, 0.8000])
    """
    found = []
    for chunk in batches.chunks("statistics.cosines", batch, mask, chunk_size):
        part = factored(loss_fn, params, *chunk.batch, mask=chunk.mask, plan=plan)
        found.append(chunk.unpadded(_cosines(part, part.norms(), direction)))
    return torch.cat(found)


def _cosines(part: Factored, sizes: Tensor, direction: Tree) -> Tensor:
    """Of gradients of these sizes (B,): by a direction at a scale at which inner products are in range."""
    length = tree.norm(direction)
    c = power(length, 0)
    products = part.dot(tree.map(lambda v: tree.wide(v) * c.to(tree.wide(v).dtype), direction))
    lengths = sizes.double() * (length.double() * c.double())
    found = torch.where(lengths == 0, 0.0, products / lengths)  # a NaN stays one
    return found.to(products.dtype)
