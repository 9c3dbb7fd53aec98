"""The gradient noise scale: how many examples a batch needs until its gradient is more signal than noise.

    B_simple = tr Σ / |E ∇|²

with Σ the covariance of the gradients of single examples. Of N examples with gradients ∇_i and mean G

    tr Σ    estimated by  (Σ_i |∇_i|² - N |G|²) / (N - 1)
    |E ∇|²  estimated by  |G|² - tr Σ / N

both without bias. Error bars are those of the jackknife: the standard deviation of the estimates that leave one
example (or one step) out, times (N - 1) / √N.

Reference: McCandlish et al., "An empirical model of large-batch training", 2018, section 2.2 and appendix A.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial, reduce
from typing import NamedTuple

import torch
from torch import Tensor

from .. import batch as batches
from .. import tree
from ..distributed import SINGLE_PROCESS, World
from ..per_sample import Plan
from ..tree import Tree
from .folds import Gradients, Sums, fold, gradients, merge, wide_sums


@tree.register
@dataclass(frozen=True)
class Noise(Sums):
    """The sums that the gradient noise scale follows from: `fold(…, of=Noise.of)`. Properties are 0-d float64."""

    count: Tensor
    """0-d float64: N."""
    total: Tree
    """Σ ∇_i, in float64."""
    squares: Tensor
    """0-d float64: Σ |∇_i|²."""

    @classmethod
    def of(cls, gradients: Gradients) -> Noise:
        """The sums over some examples."""
        return cls(gradients.count, wide_sums(gradients.total), gradients.norms.square().sum())

    @property
    def square_of_sum(self) -> Tensor:
        """|Σ ∇_i|²."""
        return tree.dot(self.total, self.total)

    @property
    def trace(self) -> Tensor:
        """tr Σ, the trace of the covariance of ∇_i, unbiased; NaN for fewer than two examples."""
        return _estimates(self.count, self.square_of_sum, self.squares)[0]

    @property
    def square_norm(self) -> Tensor:
        """|E ∇|², unbiased, so that it can be below zero: `|G|² - tr Σ / N`. NaN for fewer than two examples."""
        return _estimates(self.count, self.square_of_sum, self.squares)[1]

    @property
    def scale(self) -> Tensor:
        """The simple noise scale `tr Σ / |E ∇|²`, in examples; `noise_scale` gives it with an error bar."""
        return self.trace / self.square_norm

    @property
    def diversity(self) -> Tensor:
        """The gradient diversity `Σ |∇_i|² / |Σ ∇_i|²`, at least 1 / N.

        Reference: Yin et al., "Gradient diversity: a key ingredient for scalable distributed learning", AISTATS 2018,
            definition 1.
        """
        return self.squares / self.square_of_sum


class NoiseScale(NamedTuple):
    """The gradient noise scale, its two parts, and their standard errors (jackknife)."""

    scale: float
    """B_simple, in examples; infinite where the estimate of |E ∇|² is not above zero."""
    error: float
    """Standard error of `scale`, in examples."""
    trace: float
    """tr Σ, the trace of the covariance of per-sample gradients."""
    trace_error: float
    """Standard error of `trace`."""
    square_norm: float
    """|E ∇|², the squared norm of the expected gradient; its unbiased estimate can be below zero."""
    square_norm_error: float
    """Standard error of `square_norm`."""
    samples: int
    """How many examples, or steps, it was estimated from."""

    def __str__(self) -> str:
        return f"{self.scale:.4g} ± {float(f'{self.error:.2g}'):g} examples"  # 240, not 2.4e+02


class Efficiency(NamedTuple):
    """What a batch size costs, relative to the two extremes.

    Reference: McCandlish et al., "An empirical model of large-batch training", 2018, equation 2.11.
    """

    steps: float
    """Steps to a given loss, over the minimum, that of very large batches: at least 1."""
    examples: float
    """Examples to a given loss, over the minimum, that of very small batches: at least 1."""


def efficiency(scale: float, batch_size: int) -> Efficiency:
    """What training with a batch size costs, for a noise scale.

    Batches well below the scale waste no example, batches well above it save no step; at the scale, the critical batch
    size, both take twice their minimum.

    Args:
        scale: the noise scale, in examples, at least 0; infinity is allowed.
        batch_size: B, at least 1.

    Returns:
        Steps 1 + scale / B and examples 1 + B / scale, in units of their minima.

    Raises:
        ValueError: the scale is below 0 or the batch size below 1.

    Reference: McCandlish et al., "An empirical model of large-batch training", 2018, equation 2.11.

    Example:
        >>> efficiency(900.0, 900)
        Efficiency(steps=2.0, examples=2.0)
    """
    if not scale >= 0 or batch_size < 1:
        raise ValueError(
            f"efficiency: scale must be at least 0, the batch size at least 1. Found {scale} and {batch_size}."
        )
    return Efficiency(1 + scale / batch_size, 1 + batch_size / scale if scale else math.inf)


def _estimates(count: Tensor, square_of_sum: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """The unbiased tr Σ and |E ∇|², from N, |Σ ∇_i|² and Σ |∇_i|²; NaN for N below 2."""
    trace = (squares - square_of_sum / count).clamp(min=0) / torch.where(count > 1, count - 1, math.nan)
    return trace, square_of_sum / count.square() - trace / count


def batch_noise(norms: Tensor, sums: Tree, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The unbiased tr Σ and |E ∇|² of one batch, from what a training step has.

    Args:
        norms: (B,), |∇_i| of the per-sample gradients, zero where masked.
        sums: Σ ∇_i, a tree like `params`.
        mask: (B,) bool; by default all examples count.

    Returns:
        `(trace, square_norm)`, 0-d float64 each; NaN for fewer than two examples. Average both over steps with
        `mean_noise_scale`.

    Raises:
        ValueError: the norms are not (B,), or the mask does not fit.

    Example:
        >>> batch_noise(torch.tensor([1.0, 3.0]), torch.tensor(4.0))
        (tensor(2., dtype=torch.float64), tensor(3., dtype=torch.float64))

    Reference: McCandlish et al., "An empirical model of large-batch training", 2018, appendix A.1.
    """
    batches.check("batch_noise", (norms,), mask)
    norms = norms if mask is None else batches.masked(norms, mask)
    count = torch.ones_like(norms).sum() if mask is None else mask.sum()
    return _estimates(count.double(), tree.norm(sums).double().square(), norms.double().square().sum())


def noise_scale(
    loss_fn: Callable[..., Tensor],
    params: Tree,
    *batch: Tensor,
    mask: Tensor | None = None,
    chunk_size: int | None = None,
    plan: Plan | None = None,
    world: World = SINGLE_PROCESS,
) -> NoiseScale:
    """The gradient noise scale at one point, from per-sample gradients.

    Args:
        loss_fn: `loss_fn(params, *example) -> ()`, pure.
        params: a pytree of float tensors.
        batch: tensors (N, …), with at least three examples that count.
        mask: (N,) bool; an example with False, whatever it holds, is left out.
        chunk_size: examples taken at a time, at least 1; by default all. Memory is that of one chunk.
        plan: how `per_sample` computes each parameter; by default the cheapest way.
        world: the processes, all with the same examples, which divide the chunks between them.

    Returns:
        B_simple = tr Σ / |E ∇|² in examples, with the standard error of the jackknife over examples.

    Raises:
        ValueError: fewer than three examples count, or the batch, the mask, the chunk size or the plan does not fit.
        TypeError: the parameters are a module or not float tensors.

    Cost: two backward passes over the data: one for the sum, one for what leaving an example out would change. One
        where there is one chunk.

    Reference: McCandlish, Kaplan, Amodei and the OpenAI Dota team, "An empirical model of large-batch training", 2018,
        section 2.2.

    Example:
        >>> found = noise_scale(lambda w, x: w * x, torch.tensor(0.0), torch.tensor([1.0, 2.0, 3.0, 4.0]))
        >>> round(found.trace, 4), round(found.square_norm, 4)
        (1.6667, 5.8333)
    """

    if world.parts > 1:
        fold_over = partial(fold, mask=mask, chunk_size=chunk_size, plan=plan, world=world)
        sums: Noise = fold_over(loss_fn, params, *batch, of=Noise.of)
        _check_count(sums)
        left_out: _LeftOut = fold_over(loss_fn, params, *batch, of=lambda part: _LeftOut.of(part, sums))
        return left_out.noise_scale(sums)

    def read() -> Iterable[Gradients]:
        return gradients("noise_scale", loss_fn, params, batch, mask, chunk_size, plan)

    alone = len(batches.chunks("statistics.noise_scale", batch, mask, chunk_size)) == 1
    kept = list(read()) if alone else None
    whole = reduce(merge, (Noise.of(part) for part in kept or read()))
    _check_count(whole)
    return reduce(merge, (_LeftOut.of(part, whole) for part in kept or read())).noise_scale(whole)


def _check_count(whole: Noise) -> None:
    if whole.count < 3:
        raise ValueError(f"noise_scale: at least three examples that count. Found {int(whole.count)}.")


def mean_noise_scale(traces: Tensor, square_norms: Tensor) -> NoiseScale:
    """The noise scale of several steps: the mean of tr Σ over the mean of |E ∇|².

    Args:
        traces, square_norms: (T,) unbiased estimates of single steps, such as those of `batch_noise` or
            `two_batch_sizes`, T at least 3, independent of each other. Steps of a run are so only nearly: what they
            estimate drifts.

    Returns:
        B_simple in examples, with the standard error of the jackknife over steps.

    Raises:
        ValueError: they are not (T,) both, fewer than three, or not finite, as those of a batch of one example.

    Reference: McCandlish et al., 2018, appendix A.1: a mean of ratios would be biased.
    """
    if traces.dim() != 1 or traces.shape != square_norms.shape or len(traces) < 3:
        raise ValueError(
            f"mean_noise_scale: traces and square_norms must be (T,), T at least 3. "
            f"Found {tuple(traces.shape)} and {tuple(square_norms.shape)}."
        )
    rows = torch.stack([traces.double(), square_norms.double()])  # (2, T)
    if not rows.isfinite().all():
        raise ValueError(
            "mean_noise_scale: estimates must be finite. Found NaN or infinity. Is a batch of one among them?"
        )
    count = rows.shape[1]
    trace, square = rows.mean(1).unbind()
    left_out = (rows.sum(1, keepdim=True) - rows) / (count - 1)
    deviations = _deviations(left_out[0], left_out[1], trace, square)
    return _result(trace, square, deviations.sum(1), deviations.square().sum(1), count)


def two_batch_sizes(small: Tensor, large: Tensor, *, small_size: int, large_size: int) -> tuple[Tensor, Tensor]:
    """Unbiased tr Σ and |E ∇|² from the squared norms of mean gradients of two batch sizes.

    Args:
        small, large: (T,) squared norms |G|² of the mean gradients of independent pairs of batches.
        small_size, large_size: examples in a small and in a large batch, 1 ≤ small_size < large_size.

    Returns:
        `(traces, square_norms)`, (T,) each, for `mean_noise_scale`.

    Raises:
        ValueError: the sizes are not in order, or the tensors not of one shape.

    Example:
        >>> two_batch_sizes(torch.tensor([3.0]), torch.tensor([2.0]), small_size=1, large_size=2)
        (tensor([2.], dtype=torch.float64), tensor([1.], dtype=torch.float64))

    Reference: McCandlish et al., "An empirical model of large-batch training", 2018, equations A.2 and A.3.
    """
    if small.shape != large.shape:
        raise ValueError(
            f"two_batch_sizes: small and large must be of pairs. Found {tuple(small.shape)} and {tuple(large.shape)}."
        )
    if not 1 <= small_size < large_size:
        raise ValueError(f"two_batch_sizes: small_size must be below large_size. Found {small_size}, {large_size}.")
    small, large = small.double(), large.double()
    square_norms = (large_size * large - small_size * small) / (large_size - small_size)
    return (small - large) / (1 / small_size - 1 / large_size), square_norms


@tree.register
@dataclass(frozen=True)
class _LeftOut(Sums):
    """The jackknife's leave-one-out deviations of tr Σ, |E ∇|² and their ratio."""

    deviations: Tensor
    """(3,): their sums over the examples."""
    squares: Tensor
    """(3,): the sums of their squares."""

    @classmethod
    def of(cls, part: Gradients, whole: Noise) -> _LeftOut:
        # |S - ∇_i|² = |S|² - 2 ⟨∇_i, S⟩ + |∇_i|²
        own = part.norms.square()
        products = part.factored.dot(whole.total).double()
        rest = _estimates(whole.count - 1, whole.square_of_sum - 2 * products + own, whole.squares - own)
        deviations = torch.where(part.keep, _deviations(*rest, whole.trace, whole.square_norm), 0.0)
        return cls(deviations.sum(1), deviations.square().sum(1))

    def noise_scale(self, whole: Noise) -> NoiseScale:
        return _result(whole.trace, whole.square_norm, self.deviations, self.squares, int(whole.count))


def _deviations(traces: Tensor, square_norms: Tensor, trace: Tensor, square_norm: Tensor) -> Tensor:
    """(3, N): of estimates that leave one out from those that do not, of tr Σ, |E ∇|² and their ratio."""
    return torch.stack([traces - trace, square_norms - square_norm, traces / square_norms - trace / square_norm])


def _result(trace: Tensor, square_norm: Tensor, sums: Tensor, squares: Tensor, count: int) -> NoiseScale:
    """The estimates with the jackknife's standard errors."""
    variances = (squares - sums.square() / count).clamp(min=0) * (count - 1) / count
    trace_error, square_norm_error, error = variances.sqrt().tolist()
    if float(square_norm) <= 0:  # the gradient is lost in the noise
        return NoiseScale(math.inf, math.inf, float(trace), trace_error, float(square_norm), square_norm_error, count)
    scale = float(trace / square_norm)
    return NoiseScale(scale, error, float(trace), trace_error, float(square_norm), square_norm_error, count)
