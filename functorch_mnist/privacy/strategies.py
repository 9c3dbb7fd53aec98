"""Strategies of correlated noise: BandMF, BISR, λ-CGD and banded Toeplitz.

| strategy | C | past draws | account |
|---|---|---|---|
| `banded` | block diagonal of b bands, of the least error | b - 1 | amplified by sampling |
| `bisr` | C⁻¹: the first b coefficients of √(1 - x) | b - 1 | Gaussian |
| `lambda_cgd` | C⁻¹: 1 - λ x | 1 | Gaussian |
| `banded_toeplitz` | b bands, constant along diagonals, of the least error | all | amplified by sampling |

The error is that of prefix sums, A = all ones below the diagonal: the mean over n steps of the squared norms of the
rows of A C⁻¹, where no column of C is longer than 1.

A run cannot regenerate the noise of a banded Toeplitz C from a few past draws, because its inverse is not banded: over
1,000 steps, the rest after k draws falls below half a unit in the last place of float32 noise at k = 149, 189, 282 and
441 for 2, 4, 8 and 16 bands, and any truncation leaves a C that is not banded, without an account. No Toeplitz C but a
multiple of the identity has both bands and a banded inverse. A block diagonal C has both exactly, at a small cost: its
root mean square error over 1,000 steps is 2, 3, 5 and 7 % above that of the best Toeplitz C.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .correlation import BlockDiagonal, Toeplitz, inverse, inverse_block

_DECIMALS = 5
"""Decimals of an optimised strategy: coarser than rounding differences, so that all machines draw the same noise."""


def banded(bands: int, steps: int) -> BlockDiagonal:
    """BandMF: the block diagonal strategy of the least mean error, with b - 1 past draws.

    Args:
        bands: b, at least 1: the length of a block.
        steps: n, at least b: the number of steps for which the error is least. More or fewer are as private.

    Returns:
        The strategy, with columns of norm 1.

    Raises:
        ValueError: a number is out of its range.

    Guarantees: columns of norm 1 and the least error of all block diagonal strategies with such columns, both within
        1e-4. The error is convex in CᵀC, so there is one least.

    Example:
        >>> round(float(banded(8, 1000).errors(1000).mean()) ** 0.5, 1)  # without correlation 22.4
        8.8

    Reference: Choquette-Choo et al., "(Amplified) banded matrix factorization: a unified approach to private training",
        NeurIPS 2023, https://arxiv.org/abs/2306.08153, section 4.
    """
    _check("banded", bands, steps)
    full, rest = divmod(steps, bands)
    place = torch.arange(bands)
    counts = full + (place < rest).double()  # of steps at each position in a block
    before = bands * full * (full - 1) / 2 + rest * full  # whole blocks before a step, over all steps
    below = torch.ones(bands, bands).tril().bool()

    def block(entries: Tensor) -> Tensor:
        c = torch.zeros(bands, bands, dtype=torch.float64).masked_scatter(below, entries)
        return c / c.square().sum(0).sqrt()

    def error(entries: Tensor) -> Tensor:
        within = inverse_block(block(entries)).cumsum(0).square().sum(1)
        return (counts @ within + before * within[-1]) / steps

    start = _square_root(bands)[(place[:, None] - place).clamp(min=0)][below]
    inverse_rows = inverse_block(block(_least(error, start))).tolist()
    rows = [[round(number, _DECIMALS) for number in row[: i + 1]] for i, row in enumerate(inverse_rows)]
    return BlockDiagonal(tuple(tuple(torch.tensor(row, dtype=torch.float32).tolist()) for row in rows))


def bisr(bands: int) -> Toeplitz:
    """BISR, the banded inverse square root: with all bands, C C = A.

    Args:
        bands: b, of C⁻¹, at least 1: the number of past draws plus 1.

    Returns:
        The strategy: C⁻¹ has the first b coefficients of √(1 - x).

    Raises:
        ValueError: `bands` is below 1.

    Example:
        >>> bisr(4).noise
        (1.0, -0.5, -0.125, -0.0625)

    Reference: Kalinin, McKenna, Upadhyay, Lampert, "Back to square roots: an optimal bound on the matrix factorization
        error for multi-epoch differentially private SGD", ICLR 2026, https://arxiv.org/abs/2505.12128.
    """
    _check("bisr", bands, bands)
    c = _square_root(bands)  # C⁻¹ = A⁻¹ C, and A⁻¹ takes differences
    return Toeplitz(tuple(torch.cat([c[:1], c.diff()]).float().tolist()))


def lambda_cgd(lam: float) -> Toeplitz:
    """DP-λCGD: the noise z_t - λ z_{t-1}, with one past draw.

    Args:
        lam: λ in [0, 1), rounded to float32: the fraction of the last draw that is subtracted. At 0 noise is
            independent, as in DP-SGD.

    Returns:
        The strategy.

    Raises:
        ValueError: λ is out of its range.

    Guarantees: C has the coefficients λᵏ.

    Example:
        >>> lambda_cgd(0.5).noise
        (1.0, -0.5)

    Reference: Kalinin, McKenna, Pagh, Lampert, "DP-λCGD: efficient noise correlation for differentially private model
        training", ICML 2026, https://arxiv.org/abs/2601.22334.
    """
    rounded = float(torch.tensor(lam, dtype=torch.float32))
    if not 0 <= rounded < 1:
        raise ValueError(f"lambda_cgd: λ must be at least 0 and below 1. Found {lam}.")
    return Toeplitz((1.0, -rounded) if rounded else (1.0,))


def banded_toeplitz(bands: int, steps: int) -> Toeplitz:
    """The banded Toeplitz strategy of the least mean error, ‖c‖ = 1: the baseline of `banded`.

    Args:
        bands: b, of C, at least 1.
        steps: n, at least b.

    Returns:
        The strategy, with all n coefficients of C⁻¹, which is not banded.

    Raises:
        ValueError: a number is out of its range.

    Example:
        >>> banded_toeplitz(2, 1000).coefficients(2).round(decimals=4)
        tensor([0.7502, 0.6613], dtype=torch.float64)

    Reference: McKenna, "Scaling up the banded matrix factorization mechanism for differentially private ML", ICLR
        2025, https://arxiv.org/abs/2405.15913.
    """
    _check("banded_toeplitz", bands, steps)
    sums = (
        torch.arange(steps, 0, -1, dtype=torch.float64) / steps
    )  # the fraction of all prefixes that a coefficient is in

    def coefficients(entries: Tensor) -> Tensor:
        """Those of all reflections in (-1, 1): of each C whose inverse falls to 0, and of no other."""
        c = entries.new_ones(1)
        for reflection in entries.tanh():
            c = torch.cat([c, c.new_zeros(1)]) + reflection * torch.cat([c.new_zeros(1), c.flip(0)])
        return c

    def error(entries: Tensor) -> Tensor:
        c = coefficients(entries)
        return c @ c * (sums @ inverse(c, steps).cumsum(0).square())

    c = coefficients(_least(error, torch.full((bands - 1,), 0.3, dtype=torch.float64)))
    return Toeplitz(tuple(inverse(c / c.norm(), steps).tolist()))


def _square_root(count: int) -> Tensor:
    """The first coefficients of the square root of A, 1 / √(1 - x): (count,) float64."""
    k = torch.arange(1, count, dtype=torch.float64)
    return torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - 0.5 / k, 0)])


def _least(error: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """The minimiser of a positive error, by L-BFGS from a start."""
    if not len(start):
        return start
    x = start.clone().requires_grad_()
    search = torch.optim.LBFGS(
        [x], max_iter=1000, tolerance_grad=1e-12, tolerance_change=1e-15, history_size=50, line_search_fn="strong_wolfe"
    )

    def evaluated() -> Tensor:
        search.zero_grad()
        value = error(x).log()
        value.backward()
        return value

    search.step(evaluated)
    return x.detach()


def _check(where: str, bands: int, steps: int) -> None:
    if not 1 <= bands <= steps:
        raise ValueError(f"{where}: bands must be at least 1 and at most the steps. Found {bands} and {steps}.")
