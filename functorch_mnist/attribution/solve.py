"""Solves with symmetric positive semidefinite matrices, in float64, that refuse what has no answer.

    X = (M + λ)⁻¹ B

by the Cholesky factorisation. An eigenvalue of M that is small relative to the largest is the rounding of a zero, and
can be below zero. A λ below it leaves a solution in which this rounding is divided by itself: it looks ordinary, and is
noise. So the smallest and the largest eigenvalue of M + λ are estimated, by a few steps of the power method on its
inverse and on itself, which cost N² each, besides the N³ of the factorisation.

Eagerly a nearly singular matrix raises. Compiled, where no value can be read, the solution is NaN.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import native, tree

LEAST = 1e-12
"""The least ratio of an eigenvalue to the largest: of the 16 digits of float64, 4 are left."""
_ULPS = 8
"""Independent errors of u in each number move an eigenvalue by 2 u of the largest, whatever N is."""
_STEPS = 8
_STARTS = 4
_EVEN = 1e-3
"""The asymmetry that a matrix may have, relative to its largest entry: far more than float32's rounding."""


def solve(
    where: str, matrix: Tensor, right: Tensor, *, damping: float | Tensor, least: float, name: str = "damping"
) -> Tensor:
    """`(M + λ)⁻¹ B`: (N, M) in float64; when compiled, NaN in place of an error.

    Args:
        where: the function that an error names.
        matrix: M (N, N), symmetric positive semidefinite.
        right: B (N, M).
        damping: λ, at least 0.
        least: the least ratio of the smallest to the largest eigenvalue of M + λ.
        name: what the function calls λ.

    Raises:
        ValueError: a number is not finite, M is not symmetric, or M + λ is singular, or nearly so, or indefinite.
    """
    matrix, right = matrix.double(), right.double()
    finite(where, matrix, right)
    if not len(matrix):
        return right
    even = (matrix + matrix.T) / 2
    damped = even + damping * torch.eye(len(even), dtype=even.dtype, device=even.device)
    factor, failed = torch.linalg.cholesky_ex(damped)
    shown = damped.detach(), factor.detach()
    largest = _largest(lambda x: shown[0] @ x, shown[0])
    smallest = 1 / _largest(lambda x: torch.cholesky_solve(x, shown[1]), shown[1])
    symmetric = (matrix - even).abs().amax() <= _EVEN * even.abs().amax()
    definite = (failed == 0) & (smallest >= least * largest) & (2 * smallest >= damping)
    looked = [native.numbers(x) for x in (symmetric, definite, failed, smallest, largest)]
    if looked[0] is not None and not looked[0].all():
        raise ValueError(f"{where}: the matrix must be symmetric. Found one that is not. Are its two batches one?")
    if looked[1] is not None and not looked[1].all():
        raise ValueError(_refusal(where, name, damping, looked))
    solution: Tensor = torch.where(symmetric & definite, torch.cholesky_solve(right, factor), torch.nan)
    return solution


def rounding(matrix: Tensor) -> float:
    """How far rounding of a matrix's entries may move an eigenvalue, relative to the largest, with a margin."""
    return max(LEAST, _ULPS * torch.finfo(tree.wide(matrix).dtype).eps)


def finite(where: str, *values: Tensor) -> None:
    """Refuses what is not finite, where values can be read: not when compiled."""
    for value in values:
        looked = native.numbers(value)
        if looked is not None and not looked.isfinite().all():
            raise ValueError(f"{where}: numbers must be finite. Found NaN or infinity.")


def _largest(apply: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """The largest eigenvalue of a symmetric positive definite matrix, from below: 0-d."""
    places = torch.arange(1, _STARTS * len(like) + 1, dtype=like.dtype, device=like.device)
    x = places.square().cos().view(len(like), _STARTS)  # no matrix of use has all four between its eigenvectors
    size = x.new_ones(_STARTS)
    x = x / torch.linalg.vector_norm(x, dim=0)
    for _ in range(_STEPS):
        x = apply(x)
        size = torch.linalg.vector_norm(x, dim=0)
        x = x / size
    return size.amax()


def _refusal(where: str, name: str, damping: float | Tensor, looked: Sequence[Tensor | None]) -> str:
    failed, smallest, largest = looked[2:]
    known = native.numbers(damping) if isinstance(damping, Tensor) else torch.tensor(float(damping))
    given = "" if known is None else f" of {float(known.amax()):.3g}"
    if failed is None or smallest is None or largest is None or failed.any():
        found = "an eigenvalue that is not above 0"
    else:
        found = f"eigenvalues from {float(smallest.amin()):.1e} to {float(largest.amax()):.1e}"
    return (
        f"{where}: the matrix must be positive definite beyond its rounding. Found {found}, with a {name}{given}. "
        f"Take a larger {name}."
    )
