"""Influence functions: the change of a test loss when a training example is weighted up and the model settles anew.

    ⟨∇'_j, (F + λ)⁻¹ ∇_i⟩,    F = (1 / N) Σ_i ∇_i ∇_iᵀ

in two ways. Exactly: F has rank N, and with K = J Jᵀ the Gram matrix of the training gradients

    J' (F + λ)⁻¹ Jᵀ = N J' Jᵀ (K + N λ)⁻¹

so no gradient is formed, for any model, and some thousands of examples. Or with each parameter's block of F taken as a
Kronecker product A ⊗ G of its factors, for a direction like `params`, such as one test gradient, and any number of
examples: `per_sample.dot` with the solution gives the influences.

Reference: Koh and Liang, "Understanding black-box predictions via influence functions", ICML 2017. Kronecker-factored:
Grosse et al., "Studying large language model generalization with influence functions", 2023, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import native, tree
from ..per_sample import Kronecker
from ..tree import Tree
from .solve import LEAST, finite, rounding, solve


@dataclass(frozen=True)
class Curvature:
    """A damped inverse of the Fisher information, ready to be applied."""

    blocks: dict[str, Block]
    """Of each parameter that has Kronecker factors, by its path."""
    diagonal: Tree
    """Like `params`: for the other parameters."""

    def solve(self, vector: Tree, *, damping: float) -> Tree:
        """`(F + λ)⁻¹ v`: a tree like `params`.

        Args:
            vector: v, a tree like `params`.
            damping: λ, above 0.

        Raises:
            ValueError: shapes do not fit, the damping is not above 0 and finite, or so small a part of a block's
                largest eigenvalue that rounding would be divided by it, or the vector is not finite.
        """
        if not 0 < damping < math.inf:
            raise ValueError(f"solve: damping must be above 0 and finite. Found {damping}.")
        shapes = [[tuple(leaf.shape) for leaf in tree.leaves(t)] for t in (self.diagonal, vector)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"solve: the vector must have the shapes {shapes[0]}. Found {shapes[1]}.")
        finite("solve", *tree.leaves(vector))
        for path, known in self.blocks.items():
            values = native.numbers(known.values)
            if values is not None and values.numel() and damping < LEAST * float(values.amax()):
                raise ValueError(
                    f"solve: damping must be at least {LEAST} of a block's largest eigenvalue. "
                    f"Found {damping}, and {float(values.amax()):.3g} of {path}."
                )
        solved = []
        leaves, diagonals = tree.leaves(vector), tree.leaves(tree.map(lambda _, d: d, vector, self.diagonal))
        for path, v, diagonal in zip(tree.paths(vector), leaves, diagonals, strict=True):
            block = self.blocks.get(path)
            wide = v.to(diagonal.dtype)
            found = wide / (diagonal + damping) if block is None else block.solve(wide, damping)
            solved.append(found.to(v.dtype))
        return tree.unflatten(vector, solved)


@dataclass(frozen=True)
class Block:
    """The block of one parameter, by its eigenvectors."""

    factors: Kronecker
    inputs: Tensor
    """(G, D, D): columns are eigenvectors of the inputs' factor; (G, D) ones where that is diagonal."""
    cotangents: Tensor
    """(G, H, H)."""
    values: Tensor
    """(G, H, D): eigenvalues of the block."""

    def solve(self, v: Tensor, damping: float) -> Tensor:
        """`(A ⊗ G + λ)⁻¹ v`, shaped as the parameter."""
        rotated = self.cotangents.transpose(-2, -1) @ self._by_inputs(self.factors.matrices(v), transpose=False)
        return self.factors.parameter(
            self._by_inputs(self.cotangents @ (rotated / (self.values + damping)), transpose=True)
        )

    def _by_inputs(self, m: Tensor, *, transpose: bool) -> Tensor:
        if self.factors.diagonal:
            return m
        return m @ (self.inputs.transpose(-2, -1) if transpose else self.inputs)


def curvature(factors: Mapping[str, Kronecker], diagonal: Tree) -> Curvature:
    """The Kronecker-factored Fisher information, ready to be applied.

    Args:
        factors: by the path of a parameter, from `statistics.fisher_kronecker` or `KroneckerFactors.mean`.
        diagonal: like `params`, from `statistics.fisher_diagonal` or `Moments.fisher`. It stands for parameters
            without factors, and sets the scale of a block, whose trace is the diagonal's sum: with several positions
            the factors alone would be too large by their number.

    Raises:
        ValueError: a number is not finite.

    Cost: an eigendecomposition of each factor, D³ and H³.
    """
    finite("curvature", *tree.leaves(diagonal), *[x for pair in factors.values() for x in tree.leaves(pair)])
    blocks = {}
    for path, leaf in zip(tree.paths(diagonal), tree.leaves(diagonal), strict=True):
        if path not in factors:
            continue
        pair = factors[path]
        outputs, cotangents = torch.linalg.eigh(pair.cotangents)
        if pair.diagonal:
            inputs, vectors = pair.inputs[None], torch.ones_like(pair.inputs)[None]
        else:
            inputs, vectors = torch.linalg.eigh(pair.inputs)
        values = outputs.clamp(min=0)[:, :, None] * inputs.clamp(min=0)[:, None, :]
        trace = values.sum()
        values = values * torch.where(trace > 0, leaf.sum() / trace, 0.0)
        blocks[path] = Block(pair, vectors, cotangents, values)
    return Curvature(blocks, diagonal)


def fisher_influence(gram: Tensor, cross: Tensor, *, damping: float) -> Tensor:
    """Influence functions with the damped empirical Fisher information, exactly.

    Args:
        gram: (N, N), of the training gradients: `per_sample.gram(loss_fn, params, train)`.
        cross: (N, M), of training and test gradients: `per_sample.gram(loss_fn, params, train, test)`.
        damping: λ, above 0.

    Returns:
        (N, M), in float64: above zero where the training example helps.

    Raises:
        ValueError: shapes do not fit, `gram` is not symmetric, a number is not finite, the damping is not above 0, or
            it is so small that rounding of `gram` would be divided by. Compiled, the last gives NaN instead.
    """
    count = len(gram)
    if gram.shape != (count, count) or cross.dim() != 2 or len(cross) != count or not 0 < damping < math.inf:
        raise ValueError(
            f"fisher_influence: gram (N, N), cross (N, M), damping above 0. "
            f"Found {tuple(gram.shape)}, {tuple(cross.shape)}, {damping}."
        )
    return count * solve("fisher_influence", gram, cross, damping=count * damping, least=rounding(gram))
