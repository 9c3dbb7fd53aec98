"""The linear datamodeling score (LDS): how well influences predict models that were trained on subsets of the data.

    LDS_j = ρ( -loss_j(θ(S_r)),  Σ_{i in S_r} τ_ij ),    over subsets r = 1 … R

with ρ Spearman's rank correlation, θ(S) the model trained on the subset S, and τ_ij the influence of training example i
on test example j. An influence above zero says that training on i lowers the loss of j, so it predicts the negative
loss. Outputs are losses here: for an output that rises with a better fit, such as the log-odds of the label, pass its
negative.

Reference: Park et al., "TRAK: attributing model behavior at scale", ICML 2023, definition 2.3. Datamodels: Ilyas et
al., "Datamodels: predicting predictions from training data", ICML 2022.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import random
from .grading import rank_correlation


class Interval(NamedTuple):
    """A mean with its 95 % bootstrap confidence interval."""

    mean: float
    """The estimate from all test examples and subsets."""
    low: float
    """The 2.5 % quantile of the bootstrap."""
    high: float
    """The 97.5 % quantile of the bootstrap."""


def subsets(examples: int, *, key: Tensor, count: int, fraction: float) -> Tensor:
    """Random subsets of the training examples, all of one size, drawn without replacement.

    Args:
        examples: N, the number of training examples, at least 1.
        key: (2,), of the draw.
        count: R, the number of subsets, at least 1.
        fraction: α from 0 to 1: a subset has `round(fraction N)` examples.

    Returns:
        (R, N) bool: which examples each subset holds.

    Raises:
        ValueError: a number is out of its range.

    Guarantees: subset r depends on the key, on r, on N and on `fraction`, not on R.

    Example:
        >>> subsets(10, key=random.key(0), count=3, fraction=0.5).sum(1)
        tensor([5, 5, 5])
    """
    if examples < 1 or count < 1 or not 0 <= fraction <= 1:
        raise ValueError(
            "subsets: examples and count must be at least 1, fraction from 0 to 1. "
            f"Found {examples}, {count} and {fraction}."
        )
    keys = random.fold_in(key.expand(count, 2), torch.arange(count, device=key.device))
    chosen = random.permutation(keys, examples)[:, : round(fraction * examples)]
    return torch.zeros(count, examples, dtype=torch.bool, device=key.device).scatter(1, chosen, True)


def linear_datamodeling_score(influence: Tensor, subsets: Tensor, outputs: Tensor) -> Tensor:
    """LDS: the rank correlation, over subsets, of summed influences with the losses of models trained on the subsets.

    Args:
        influence: (N, M), of each training on each test example: above zero where training on it lowers the loss.
        subsets: (R, N) bool, R at least 2: which examples each model was trained on.
        outputs: (R, M), the models' losses of the test examples. Average several models of one subset before.

    Returns:
        (M,) float64 from -1 to 1, Spearman's: 1 where the summed influence orders all subsets by falling loss; 0 where
        all sums or all losses are equal.

    Raises:
        ValueError: shapes do not fit, there are fewer than two subsets, or a number is not finite.

    Guarantees: invariant to a positive factor on a test example's column of influences, to a constant added to it for
        subsets of one size, and to a rising function of the losses.

    Example:
        Each of three models leaves out one example. Their losses say that the first example helps most, the last least.

        >>> left_out = torch.eye(3, dtype=torch.bool)
        >>> losses = torch.tensor([[0.9], [0.5], [0.1]])
        >>> linear_datamodeling_score(torch.tensor([[3.0], [2.0], [1.0]]), ~left_out, losses).round(decimals=9)
        tensor([1.], dtype=torch.float64)

    Reference: Park, Georgiev, Ilyas, Leclerc, Madry, "TRAK: attributing model behavior at scale", ICML 2023, definition
        2.3.
    """
    return rank_correlation(*_predicted("linear_datamodeling_score", influence, subsets, outputs))


def datamodeling_interval(
    influence: Tensor, subsets: Tensor, outputs: Tensor, *, key: Tensor, resamples: int = 1000
) -> Interval:
    """The mean linear datamodeling score of the test examples, with its 95 % bootstrap confidence interval.

    A resample draws R subsets and M test examples, both with replacement. The interval is from the 2.5 % to the 97.5 %
    quantile of the resamples' means.

    Args:
        influence, subsets, outputs: as in `linear_datamodeling_score`.
        key: (2,), of the resamples.
        resamples: the number of bootstrap resamples, at least 1.

    Returns:
        The mean score of the data as they are, and the ends of the interval.

    Raises:
        ValueError: as in `linear_datamodeling_score`, or `resamples` is below 1.

    Guarantees: two influences with one key are graded on the same resamples, so that their difference is paired.

    Cost: the score, once per resample.

    Example:
        >>> left_out = torch.eye(3, dtype=torch.bool)
        >>> influence = losses = torch.tensor([[3.0], [2.0], [1.0]])
        >>> interval = datamodeling_interval(influence, ~left_out, losses, key=random.key(0), resamples=9)
        >>> round(interval.mean, 9)
        1.0

    Reference: Efron and Tibshirani, "An introduction to the bootstrap", 1993, chapter 13.
    """
    if resamples < 1:
        raise ValueError(f"datamodeling_interval: resamples must be at least 1. Found {resamples}.")
    sums, targets = _predicted("datamodeling_interval", influence, subsets, outputs)
    count, tests = sums.shape
    subset_key, test_key = random.split(key)
    of_subsets = random.randint(subset_key, (resamples, count), 0, count).long()
    of_tests = random.randint(test_key, (resamples, tests), 0, tests).long()
    means = torch.stack(
        [rank_correlation(sums[a], targets[a])[b].mean() for a, b in zip(of_subsets, of_tests, strict=True)]
    )
    low, high = means.quantile(means.new_tensor([0.025, 0.975])).tolist()
    return Interval(float(rank_correlation(sums, targets).mean()), low, high)


def _predicted(where: str, influence: Tensor, subsets: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """The summed influences (R, M) float64, and the negative losses."""
    dims = influence.dim() == subsets.dim() == outputs.dim() == 2
    fits = dims and outputs.shape == (len(subsets), influence.shape[1]) and len(influence) == subsets.shape[1]
    if not fits or subsets.dtype != torch.bool or not influence.is_floating_point() or not outputs.is_floating_point():
        raise ValueError(
            f"{where}: influence (N, M), subsets (R, N) bool, outputs (R, M), numbers in floating point. "
            f"Found {influence.dtype} {tuple(influence.shape)}, {subsets.dtype} {tuple(subsets.shape)} and "
            f"{outputs.dtype} {tuple(outputs.shape)}."
        )
    if len(subsets) < 2 or not outputs.shape[1]:
        raise ValueError(
            f"{where}: two subsets and one test example at least. Found {len(subsets)} and {outputs.shape[1]}."
        )
    for name, values in (("influence", influence), ("outputs", outputs)):
        if not values.isfinite().all():
            bad = int((~values.isfinite()).sum())
            raise ValueError(f"{where}: {name} must be finite. Found {bad} of {values.numel()} that are not.")
    return subsets.double() @ influence.double(), -outputs.double()
