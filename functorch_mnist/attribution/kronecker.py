"""Influence functions: the change of a test loss when a training example is upweighted and the model is retrained.

    ⟨∇'_j, (F + λ)⁻¹ ∇_i⟩,    F = (1 / N) Σ_i ∇_i ∇_iᵀ

in two ways. Exactly, for a few thousand examples: F has rank N, and with K = J Jᵀ the Gram matrix of the training
gradients

    J' (F + λ)⁻¹ Jᵀ = N J' Jᵀ (K + N λ)⁻¹

so no gradient is formed, for any model. Or, for any number of examples, with each parameter's block of F approximated
in the eigenbasis of its Kronecker factors, U and V of G and A,

    F ≈ (U ⊗ V) diag(Λ) (U ⊗ V)ᵀ

which is inverted for a direction like `params`, such as a test gradient: `per_sample.dot` with the solution gives the
influences. Λ is the product of eigenvalues (K-FAC), or the second moment of the gradients along the eigenvectors
(EK-FAC). The bias of an op is one more column of its weight.

Reference: Koh and Liang, "Understanding black-box predictions via influence functions", ICML 2017. Kronecker-factored,
with corrected eigenvalues: Grosse et al., "Studying large language model generalization with influence functions",
2023, section 3; George et al., "Fast approximate natural gradient descent in a Kronecker-factored eigenbasis", NeurIPS
2018.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import native, statistics, tree
from ..per_sample import Eigenbasis, Kronecker, Plan, eigenbasis
from ..tree import Tree
from .solve import LEAST, finite, rounding, solve

T = TypeVar("T")


@dataclass(frozen=True)
class Block:
    """The block of one parameter and its bias."""

    basis: Eigenbasis
    values: Tensor
    """(G, S, R): the eigenvalues; each side is one longer where not all eigenvectors are kept, see `Eigenbasis`."""

    @property
    def trace(self) -> Tensor:
        """0-d: the sum of all eigenvalues."""
        values = self.values
        for axis, vectors in ((1, self.basis.outputs), (2, self.basis.inputs)):
            left = 0 if isinstance(vectors, tuple) else vectors.shape[1] - vectors.shape[2]
            if left:
                times = values.new_ones(values.shape[axis])
                times[-1] = left
                values = values * (times[:, None] if axis == 1 else times)
        return values.sum()

    def solve(self, v: Tensor, bias: Tensor | None, damping: float) -> tuple[Tensor, Tensor | None]:
        """`(F + λ)⁻¹ v` of the weight and of the bias, (*lead, *w) as they are."""
        parts = self.basis.split(self.basis.matrices(v, bias))
        damped, (s, r) = self.values + damping, parts.kept.shape[-2:]
        solved = parts._replace(
            kept=parts.kept / damped[:, :s, :r],
            outputs=None if parts.outputs is None else parts.outputs / damped[:, -1:, :r],
            inputs=None if parts.inputs is None else parts.inputs / damped[:, :s, -1:],
            both=None if parts.both is None else parts.both / damped[:, -1:, -1:],
        )
        return self.basis.parameters(self.basis.joined(solved), bias)


@dataclass(frozen=True)
class Curvature:
    """The Fisher information, block by block (K-FAC or EK-FAC), for damped inverses."""

    blocks: dict[str, Block]
    """The block of each parameter that has Kronecker factors, with its bias, by the parameter's path."""
    diagonal: dict[str, Tensor]
    """The diagonal of the other parameters, by path."""

    @property
    def trace(self) -> float:
        """The sum of all eigenvalues; its mean over parameters is a scale for the damping."""
        parts = [block.trace for block in self.blocks.values()] + [d.sum() for d in self.diagonal.values()]
        return float(torch.stack(parts).sum())

    def solve(self, vector: Tree, *, damping: float) -> Tree:
        """The damped inverse Fisher-vector product `(F + λ)⁻¹ v`.

        Args:
            vector: v, a tree like `params`, or several: leaves (*lead, *w).
            damping: λ, above 0.

        Returns:
            A tree like `vector`.

        Raises:
            ValueError: v is not like `params` or not finite, the damping is not above 0 and finite, or so small
                relative to a block's largest eigenvalue that rounding would be divided by it.
        """
        if not 0 < damping < math.inf:
            raise ValueError(f"solve: damping must be above 0 and finite. Found {damping}.")
        given = dict(zip(tree.paths(vector), tree.leaves(vector), strict=True))
        self._check(given)
        finite("solve", *given.values())
        for path, block in self.blocks.items():
            values = native.numbers(block.values)
            if values is not None and values.numel() and damping < LEAST * float(values.amax()):
                raise ValueError(
                    f"solve: damping must be at least {LEAST} of a block's largest eigenvalue. "
                    f"Found {damping}, and {float(values.amax()):.3g} of {path}."
                )
        solved = {path: (v.to(d.dtype) / (d + damping)) for path, d in self.diagonal.items() for v in [given[path]]}
        for path, block in self.blocks.items():
            bias = block.basis.bias
            wide = [None if name is None else given[name].to(block.values.dtype) for name in (path, bias)]
            weight, shift = wide
            assert weight is not None
            solved[path], other = block.solve(weight, shift, damping)
            if bias is not None and other is not None:
                solved[bias] = other
        return tree.unflatten(vector, [solved[path].to(v.dtype) for path, v in given.items()])

    def _check(self, given: Mapping[str, Tensor]) -> None:
        """Refuses a vector that is not like the parameters."""
        shapes = {path: tuple(d.shape) for path, d in self.diagonal.items()}
        for path, block in self.blocks.items():
            shapes[path] = block.basis.shape
            if block.basis.bias is not None:
                shapes[block.basis.bias] = (block.basis.outputs.shape[0] * block.basis.outputs.shape[1],)
        found = {path: tuple(v.shape) for path, v in given.items()}
        same = found.keys() == shapes.keys()
        leads = {found[path][: len(found[path]) - len(shape)] for path, shape in shapes.items()} if same else set()
        if not same or len(leads) != 1 or any(found[p][len(found[p]) - len(s) :] != s for p, s in shapes.items()):
            raise ValueError(f"solve: the vector must have the shapes {shapes}, after leading axes. Found {found}.")


def fisher_curvature(
    outputs_fn: Callable[..., Tensor],
    params: Tree,
    *inputs: Tensor,
    corrected: bool = True,
    rank: int | None = None,
    key: Tensor | None = None,
    draws: int = 1,
    mask: Tensor | None = None,
    chunk_size: int | None = None,
    plan: Plan | None = None,
) -> Curvature:
    """The Fisher information of a classifier by EK-FAC, or by K-FAC, for influence functions.

    Args:
        outputs_fn: `outputs_fn(params, *input) -> (K,)`, of one example, whose softmax are the probabilities.
        params: a pytree of float tensors.
        inputs: tensors (N, …), at least one example.
        corrected: eigenvalues are second moments along the eigenvectors (EK-FAC); else the products of the factors'
            eigenvalues (K-FAC).
        rank: R, eigenvectors of each factor that are kept, those of the largest eigenvalues; by default all. The others
            are given one eigenvalue, their mean.
        key, draws, mask, chunk_size, plan: as in `statistics.fisher_diagonal`.

    Returns:
        The curvature, whose `solve` applies the damped inverse.

    Raises:
        ValueError, TypeError: as in `statistics.fisher_diagonal`.

    Cost: two forward and backward passes per class, or per draw with a key. An eigendecomposition of each factor, D³;
        with a rank R, about D² R.

    Example:
        >>> curvature = fisher_curvature(lambda w, x: w @ x, torch.zeros(2, 1), torch.ones(4, 1))
        >>> curvature.solve(torch.tensor([[1.0], [-1.0]]), damping=0.5)
        tensor([[ 1.0000],
                [-1.0000]])

    Reference: EK-FAC influence functions: Grosse et al., "Studying large language model generalization with influence
        functions", 2023, section 3; George et al., "Fast approximate natural gradient descent in a Kronecker-factored
        eigenbasis", NeurIPS 2018. K-FAC: Martens, Grosse, ICML 2015.
    """

    def fisher(of: Callable[..., T], **more: Any) -> T:
        options = {"key": key, "draws": draws, "mask": mask, "chunk_size": chunk_size, "plan": plan}
        return of(outputs_fn, params, *inputs, **options, **more)

    factors = fisher(statistics.fisher_kronecker)
    if not corrected:
        return curvature(factors, fisher(statistics.fisher_diagonal), rank=rank)
    bases = {path: eigenbasis(pair, rank=rank) for path, pair in factors.items()}
    return corrected_curvature(bases, fisher(statistics.fisher_eigenvalues, bases=bases))


def curvature(factors: Mapping[str, Kronecker], diagonal: Tree, *, rank: int | None = None) -> Curvature:
    """The Kronecker-factored second moment of gradients (K-FAC), such as the empirical Fisher information.

    Args:
        factors: by the path of a parameter, from `statistics.fisher_kronecker` or `KroneckerFactors.mean`.
        diagonal: like `params`, from `statistics.fisher_diagonal` or `Moments.fisher`. It is used as it is for
            parameters without factors, and sets the scale of a block, whose trace is the diagonal's sum: with T
            positions the product of the factors alone would be too large by T.
        rank: as in `fisher_curvature`.

    Returns:
        The curvature, whose `solve` applies the damped inverse.

    Raises:
        ValueError: a number is not finite.

    Cost: an eigendecomposition of each factor, D³ and H³; with a rank R, about D² R and H² R.

    Reference: Martens, Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature", ICML 2015.
    """
    finite("curvature", *tree.leaves(diagonal), *[x for pair in factors.values() for x in tree.leaves(pair)])
    leaves = dict(zip(tree.paths(diagonal), tree.leaves(diagonal), strict=True))
    blocks = {}
    for path, pair in factors.items():
        basis = eigenbasis(pair, rank=rank)
        values = basis.products(pair)
        total = leaves[path].sum() + (0 if basis.bias is None else leaves[basis.bias].sum())
        block = Block(basis, values)
        blocks[path] = Block(basis, values * torch.where(block.trace > 0, total / block.trace, 0.0))
    within = blocks.keys() | {block.basis.bias for block in blocks.values()}
    return Curvature(blocks, {path: leaf for path, leaf in leaves.items() if path not in within})


def corrected_curvature(bases: Mapping[str, Eigenbasis], values: Mapping[str, Tensor]) -> Curvature:
    """The second moment of gradients with corrected eigenvalues in its Kronecker factors' eigenbases (EK-FAC).

    Args:
        bases: by the path of a parameter, `per_sample.eigenbasis` of its factors.
        values: by path, from `statistics.fisher_eigenvalues` or `Eigenvalues.mean`, with these bases.

    Returns:
        The curvature, whose `solve` applies the damped inverse.

    Raises:
        ValueError: a number is not finite.

    Reference: George, Laurent, Bouthillier, Ballas, Vincent, "Fast approximate natural gradient descent in a
        Kronecker-factored eigenbasis", NeurIPS 2018.
    """
    finite("corrected_curvature", *values.values())
    blocks = {path: Block(basis, values[path]) for path, basis in bases.items()}
    return Curvature(blocks, {path: d for path, d in values.items() if path not in bases})


def fisher_influence(gram: Tensor, cross: Tensor, *, damping: float) -> Tensor:
    """Influence functions with the damped empirical Fisher information, exactly, by the Gram matrix.

    Args:
        gram: (N, N), of the training gradients: `per_sample.gram(loss_fn, params, train)`.
        cross: (N, M), of training and test gradients: `per_sample.gram(loss_fn, params, train, test)`.
        damping: λ, above 0.

    Returns:
        (N, M) float64: ⟨∇'_j, (F + λ)⁻¹ ∇_i⟩; above zero where training on i lowers the loss of j.

    Raises:
        ValueError: shapes do not fit, `gram` is not symmetric, a number is not finite, the damping is not above 0, or
            it is so small that rounding of `gram` would be divided by. Compiled, the last gives NaN instead.

    Cost: N³ + N² M.

    Example:
        >>> fisher_influence(torch.eye(2), torch.eye(2), damping=0.5).round(decimals=6)  # ∇_i = e_i, F = 1 / 2
        tensor([[1., 0.],
                [0., 1.]], dtype=torch.float64)

    Reference: Koh, Liang, "Understanding black-box predictions via influence functions", ICML 2017, with the Fisher
        information in place of the Hessian.
    """
    count = len(gram)
    if gram.shape != (count, count) or cross.dim() != 2 or len(cross) != count or not 0 < damping < math.inf:
        raise ValueError(
            f"fisher_influence: gram (N, N), cross (N, M), damping above 0. "
            f"Found {tuple(gram.shape)}, {tuple(cross.shape)}, {damping}."
        )
    return count * solve("fisher_influence", gram, cross, damping=count * damping, least=rounding(gram))
