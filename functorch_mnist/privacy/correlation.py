"""Correlated noise (DP-FTRL, DP-MF): the matrix mechanism, with past draws regenerated from their keys.

With a lower triangular C, the strategy, and z_t a standard normal vector that only the key of step t determines:

    the noise of step t       Σ_{k<K} r_{t,k} z_{t-k},   r the rows of C⁻¹, from the diagonal back
    so all steps release      G + C⁻¹ Z = C⁻¹ (C G + Z),   which is as private as C G + Z

C increases the sensitivity to an example; in exchange later steps subtract a part of the noise of earlier ones, so the
sums of gradients that training accumulates carry less noise. Independent noise is C = 1. Where C⁻¹ has K bands, a step
needs K - 1 past draws, and a draw is a function of its key: a run stores no noise, and resumes from any step with the
same noise, bit for bit.

The account of n steps with draws of standard deviation σ, in units of the clipping norm, is one of two:

    an example participates every `min_separation` steps, such as once per epoch of a fixed order:
        one Gaussian mechanism of μ = sensitivity / σ, for any C without negative entries
    C has b bands, and step t takes each example of the group t mod b of b groups independently with probability p:
        ⌈n / b⌉ steps of DP-SGD of sampling rate p and noise multiplier σ / κ, κ the largest column norm of C

Reference: Denisov et al., "Improved differential privacy for SGD via optimal private linear operators on adaptive
streams", NeurIPS 2022, theorem 2.1 (gradients may depend on what was released); Choquette-Choo et al., "(Amplified)
banded matrix factorization: a unified approach to private training", NeurIPS 2023, https://arxiv.org/abs/2306.08153,
theorem 4 (the groups).
"""

import math
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from .. import random


@dataclass(frozen=True)
class Toeplitz:
    """A Toeplitz strategy: C and C⁻¹ are constant along diagonals, the same for all steps.

    Raises:
        ValueError: a number is not finite, or the first is not above 0.
    """

    noise: tuple[float, ...]
    """(K,): r, the coefficients of C⁻¹, the first above 0. For a run they must be exact in float32."""

    def __post_init__(self) -> None:
        if not self.noise or not all(map(math.isfinite, self.noise)) or self.noise[0] <= 0:
            raise ValueError(f"Toeplitz: noise must have finite numbers, the first above 0. Found {self.noise!r:.99}.")

    def coefficients(self, steps: int) -> Tensor:
        """The coefficients of C.

        Args:
            steps: n, at least 1.

        Returns:
            (n,) float64, exact to about 1e-15 of the first.

        Example:
            >>> Toeplitz((1.0, -0.5)).coefficients(4)
            tensor([1.0000, 0.5000, 0.2500, 0.1250], dtype=torch.float64)
        """
        return inverse(torch.tensor(self.noise, dtype=torch.float64), steps)

    def sensitivity(self, steps: int, *, min_separation: int = 1, participations: int | None = None) -> float:
        """The sensitivity of C G to one example: the largest Euclidean norm, over the clipping norm.

        Args:
            steps: n, at least 1.
            min_separation: the fewest steps between two participations of an example, at least 1.
            participations: the most participations of an example, at least 1; by default as the separation allows.

        Returns:
            The sensitivity, in clipping norms.

        Raises:
            ValueError: a number is out of its range; a coefficient of C is negative, or above the one before it.

        Guarantees: exact, for gradients of any dimension.

        Cost: O(n log n), and memory for n numbers.

        Example:
            >>> round(Toeplitz((1.0,)).sensitivity(100, min_separation=25), 6)
            2.0

        Reference: Kalinin, Lampert, "Banded square root matrix factorization for differentially private model
            training", NeurIPS 2024, https://arxiv.org/abs/2405.13763, theorem 2.
        """
        most = _participations("Toeplitz.sensitivity", steps, min_separation, participations)
        c = self.coefficients(steps)
        if c.min() < -_EXACT * c[0] or (c[1:] - c[:-1] > _EXACT * c[0]).any():
            raise ValueError(
                f"Toeplitz.sensitivity: the coefficients of C must fall and be at least 0. Found {c[:8].tolist()} …"
            )
        # The worst pattern starts at step 0: column 0 plus those a separation apart, as rows of one separation each.
        rows = torch.cat([c, c.new_zeros(-steps % min_separation)]).view(-1, min_separation).cumsum(0)
        rows[most:] = rows[most:] - rows[:-most]
        return float(rows.flatten()[:steps].norm())

    def errors(self, steps: int) -> Tensor:
        """The variance of the noise in prefix sums of gradients, per coordinate, for σ = 1.

        Args:
            steps: n, at least 1.

        Returns:
            (n,) float64: in the sum of the first 1, …, n gradients.

        Example:
            >>> Toeplitz((1.0, -0.5)).errors(3)
            tensor([1.0000, 1.2500, 1.5000], dtype=torch.float64)
        """
        r = torch.zeros(steps, dtype=torch.float64)
        r[: len(self.noise)] = torch.tensor(self.noise[:steps], dtype=torch.float64)
        return r.cumsum(0).square().cumsum(0)

    def weights(self, step: int | Tensor) -> Tensor:
        """The weights r_{t,k} of the draws at steps t, t - 1, ….

        Args:
            step: t, from 0, an int or a 0-d tensor.

        Returns:
            (K,) float32; 0 before step 0.

        Example:
            >>> Toeplitz((1.0, -0.5)).weights(0)
            tensor([1., 0.])
        """
        r = torch.tensor(self.noise, dtype=torch.float32, device=_device(step))
        return torch.where(torch.arange(len(self.noise), device=r.device) <= step, r, 0.0)


@dataclass(frozen=True)
class BlockDiagonal:
    """A strategy that restarts every b steps: C is block diagonal, so both C and C⁻¹ have b bands.

    Raises:
        ValueError: the rows are not of 1, 2, …, b finite numbers with a diagonal above 0.
    """

    noise: tuple[tuple[float, ...], ...]
    """b rows of 1, …, b numbers: C⁻¹ within a block, lower triangular, with a diagonal above 0, exact in float32."""

    def __post_init__(self) -> None:
        lengths = [len(row) for row in self.noise]
        if not lengths or lengths != list(range(1, len(lengths) + 1)):
            raise ValueError(f"BlockDiagonal: noise must have rows of 1, 2, …, b numbers. Found {lengths}.")
        if not all(all(map(math.isfinite, row)) and row[-1] > 0 for row in self.noise):
            raise ValueError(f"BlockDiagonal: noise must be finite, with a diagonal above 0. Found {self.noise!r:.99}.")

    @property
    def bands(self) -> int:
        """b, the length of a block."""
        return len(self.noise)

    def block(self) -> Tensor:
        """C within a block: (b, b) float64.

        Example:
            >>> BlockDiagonal(((2.0,), (-1.0, 1.0))).block()
            tensor([[0.5000, 0.0000],
                    [0.5000, 1.0000]], dtype=torch.float64)
        """
        return inverse_block(self._inverse())

    def sensitivity(self, steps: int, *, min_separation: int | None = None, participations: int | None = None) -> float:
        """A bound on the sensitivity of C G to one example: in the Euclidean norm, over the clipping norm.

        For one participation it is κ, the largest column norm of C.

        Args:
            steps: n, at least 1.
            min_separation: the fewest steps between two participations of an example, at least b; by default b.
            participations: the most participations of an example, at least 1; by default as the separation allows.

        Returns:
            The sensitivity, in clipping norms.

        Raises:
            ValueError: a number is out of its range, or the separation is below b, where columns are not orthogonal.

        Example:
            >>> BlockDiagonal(((2.0,), (-1.0, 1.0))).sensitivity(100, participations=4)
            2.0
        """
        separation = self.bands if min_separation is None else min_separation
        most = _participations("BlockDiagonal.sensitivity", steps, separation, participations)
        if separation < self.bands:
            raise ValueError(
                f"BlockDiagonal.sensitivity: min_separation must be at least the {self.bands} bands. "
                f"Found {separation}. Fewer bands?"
            )
        return math.sqrt(most) * float(self.block().norm(dim=0).max())

    def errors(self, steps: int) -> Tensor:
        """The variance of the noise in prefix sums of gradients, per coordinate, for σ = 1.

        Args:
            steps: n, at least 1.

        Returns:
            (n,) float64: in the sum of the first 1, …, n gradients.

        Example:
            >>> BlockDiagonal(((2.0,), (-1.0, 1.0))).errors(4)
            tensor([4., 2., 6., 4.], dtype=torch.float64)
        """
        within = self._inverse().cumsum(0).square().sum(1)
        step = torch.arange(steps)
        return within[step % self.bands] + step // self.bands * within[-1]

    def weights(self, step: int | Tensor) -> Tensor:
        """The weights r_{t,k} of the draws at steps t, t - 1, ….

        Args:
            step: t, from 0, an int or a 0-d tensor.

        Returns:
            (b,) float32; 0 before the block of step t.

        Example:
            >>> BlockDiagonal(((2.0,), (-1.0, 1.0))).weights(3)
            tensor([ 1., -1.])
        """
        rows = [[*reversed(row), *[0.0] * (self.bands - len(row))] for row in self.noise]
        place = torch.as_tensor(step, device=_device(step)) % self.bands
        return torch.tensor(rows, dtype=torch.float32, device=place.device).index_select(0, place.reshape(1))[0]

    def _inverse(self) -> Tensor:
        """C⁻¹ within a block: (b, b) float64."""
        rows = [[*row, *[0.0] * (self.bands - len(row))] for row in self.noise]
        return torch.tensor(rows, dtype=torch.float64)


Strategy: TypeAlias = Toeplitz | BlockDiagonal
"""The matrix C of correlated noise."""
"""The strategy matrix of correlated noise."""

_EXACT = 1e-12
"""A bound on the relative error of the inverse of a series."""


def noise_draws(strategy: Strategy, key: Tensor, step: int | Tensor) -> tuple[Tensor, Tensor]:
    """The keys and weights of the draws whose weighted sum, `random.box_muller_sum`, is the noise of a step.

    Args:
        strategy: C.
        key: (2,), the root of the noise of all steps, and of nothing else.
        step: t, from 0, an int or a 0-d tensor.

    Returns:
        The keys (K, 2) of the draws at steps t, t - 1, …, which are the root with the step folded in, and their weights
        (K,) float32. Before step 0 the weights are 0.

    Guarantees: a function of the key and the step alone. The first key is `random.fold_in(key, step)`.

    Example:
        >>> keys, weights = noise_draws(Toeplitz((1.0, -0.5)), random.key(0), 7)
        >>> random.box_muller_sum(keys, weights, (2,))
        tensor([0.7208, 1.7424])

    Reference: Denisov et al., "Improved differential privacy for SGD via optimal private linear operators on adaptive
        streams", NeurIPS 2022, theorem 2.1.
    """
    step = torch.as_tensor(step, device=key.device)
    weights = strategy.weights(step)
    return random.fold_in(key, step - torch.arange(len(weights), device=key.device)), weights


def inverse(coefficients: Tensor, steps: int) -> Tensor:
    """The first coefficients of the inverse of a lower triangular Toeplitz matrix, which has the inverse power series.

    Args:
        coefficients: (k,) float64, the first not 0; those that follow are 0.
        steps: how many, at least 1.

    Returns:
        (steps,) float64.

    Guarantees: can be differentiated.

    Cost: O(n log n): Newton's iteration x ← x (2 - a x), which doubles the number of right coefficients.

    Example:
        >>> inverse(torch.tensor([1.0, -1.0], dtype=torch.float64), 4)
        tensor([1., 1., 1., 1.], dtype=torch.float64)
    """
    x, known = 1 / coefficients[:1], 1
    while known < steps:
        known = min(2 * known, steps)
        error = _product(coefficients[:known], x, known)
        x = 2 * torch.cat([x, x.new_zeros(known - len(x))]) - _product(error, x, known)
    return x


def inverse_block(block: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix (b, b)."""
    found: Tensor = torch.linalg.solve_triangular(block, torch.eye(len(block), dtype=block.dtype), upper=False)
    return found


def _product(a: Tensor, b: Tensor, count: int) -> Tensor:
    """The first coefficients of the product of two series."""
    length = max(count, len(a) + len(b) - 1)
    found: Tensor = torch.fft.irfft(torch.fft.rfft(a, length) * torch.fft.rfft(b, length), length)
    return found[:count]


def _participations(where: str, steps: int, min_separation: int, participations: int | None) -> int:
    """The most participations that n steps have room for, and that are allowed."""
    if min(steps, min_separation, 1 if participations is None else participations) < 1:
        raise ValueError(
            f"{where}: steps, min_separation and participations must be at least 1. "
            f"Found {steps}, {min_separation} and {participations}."
        )
    room = -(-steps // min_separation)
    return room if participations is None else min(room, participations)


def _device(step: int | Tensor) -> torch.device | None:
    return step.device if isinstance(step, Tensor) else None
