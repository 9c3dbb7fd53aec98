"""Linear discriminants with a shrunk covariance: what of features tells classes apart, and not the members of one.

    W = covariance within classes + λ (its mean variance) I = L Lᵀ
    B = covariance of the classes' means;  L⁻¹ B L⁻ᵀ u_i = b_i u_i,   b_1 ≥ b_2 ≥ …
    f(x) = z / |z|,   z = (u_1, …, u_k)ᵀ L⁻¹ (x - mean)

Of data that cost no privacy, such as random glyphs, they make features for private learning: what varies within a class
is shrunk, their mean is subtracted, and all examples get length 1. A clipped gradient then spends its norm
on what tells examples apart, so that the same noise does less.

Reference: Fisher, "The use of multiple measurements in taxonomic problems", Annals of Eugenics 7, 1936; the shrinkage
    of Friedman, "Regularized discriminant analysis", JASA 84, 1989, equation 18.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Discriminants(NamedTuple):
    """Directions in the space of features."""

    mean: Tensor
    """(D,): what is taken off features first."""
    directions: Tensor
    """(D, k): the columns of L⁻ᵀ (u_1, …, u_k)."""
    ratios: Tensor
    """(k,): b_i, how much larger the variance between classes is than the shrunk one within, highest first."""


def discriminants(features: Tensor, *, count: int, shrinkage: float) -> Discriminants:
    """The directions that best tell the classes of these features apart.

    Args:
        features: (K, V, D), V ≥ 2 members of each of K classes, float32 or float64.
        count: k, from 1 to K - 1 and at most D.
        shrinkage: λ, above 0.

    Raises:
        ValueError: one of these rules is broken.
        TypeError: the features are not float32 or float64.

    Guarantees: the directions are uncorrelated within classes up to the shrinkage, `directionsᵀ W directions = I`; the
        largest number of each is above 0, for a direction and its opposite tell as much, and machines differ in which
        they find;
        scaling or turning the features leaves what `discriminated` makes of them as it is, but for signs and rounding.

    Cost: K V D² + D³ / 3 + K² D products, and the memory of D² numbers and of the features twice.

    Example:
        >>> found = discriminants(torch.tensor([[[-3.0, 1.0], [-3.0, -1.0]], [[3.0, 1.0], [3.0, -1.0]]]), count=1,
        ...     shrinkage=0.1)
        >>> discriminated(torch.tensor([[2.0, 5.0], [-0.1, 5.0]]), found).squeeze(-1).abs()
        tensor([1., 1.])
    """
    if features.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"discriminants: features must be float32 or float64. Found {features.dtype}.")
    if features.dim() != 3 or features.shape[1] < 2:
        raise ValueError(f"discriminants: features must be (K, V, D) with V at least 2. Found {tuple(features.shape)}.")
    classes, members, size = features.shape
    if not 1 <= count <= min(classes - 1, size):
        raise ValueError(
            f"discriminants: count must be from 1 to {min(classes - 1, size)}, below the classes and at most the "
            f"features. Found {count}."
        )
    if not 0 < shrinkage < float("inf"):
        raise ValueError(f"discriminants: shrinkage must be above 0 and finite. Found {shrinkage}.")
    means = features.mean(1)
    mean = means.mean(0)
    inner = (features - means.unsqueeze(1)).flatten(0, 1)
    within = inner.T @ inner / (classes * (members - 1))
    within = within + shrinkage * within.diagonal().mean() * torch.eye(size, dtype=within.dtype, device=within.device)
    lower = torch.linalg.cholesky(within)
    between = torch.linalg.solve_triangular(lower, (means - mean).T, upper=False)  # (D, K)
    variances, axes = torch.linalg.eigh(between.T @ between)  # of K, not of D numbers: B has no more rank
    variances, axes = variances.flip(-1)[:count], axes.flip(-1)[:, :count]
    turned = between @ axes / variances.sqrt()
    directions = torch.linalg.solve_triangular(lower.T, turned, upper=True)
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return Discriminants(mean, directions * largest.sign(), variances / classes)


def discriminated(features: Tensor, found: Discriminants) -> Tensor:
    """Features along the directions, at length 1.

    Args:
        features: (..., D).
        found: from `discriminants`, of the same D.

    Returns:
        (..., k), of length 1; the mean itself gives zeros.

    Raises:
        ValueError: the features have another size.
    """
    if features.dim() < 1 or features.shape[-1] != len(found.mean):
        raise ValueError(
            f"discriminated: features must be (..., {len(found.mean)}), as the directions. "
            f"Found {tuple(features.shape)}."
        )
    return F.normalize((features - found.mean) @ found.directions, dim=-1)
