"""Statistics of sample gradients over a data set, as folds: they stream in chunks, and parts merge exactly.

    fold(a + b) = merge(fold(a), fold(b))

A statistic is a function of some examples' gradients (`Gradients`) to sums over them. The sums are a pytree of tensors
whose size does not depend on the number of examples; what is computed from them, such as a mean or a quantile, is a
property.

    folds.py          sums, how they merge, and the fold over chunks
    distribution.py   the distribution of numbers, with quantiles
    gradients.py      what a fold can take: norms, moments, alignment, Kronecker factors, their corrected eigenvalues
    noise.py          the gradient noise scale with an error bar, the critical batch size, the gradient diversity
    fisher.py         the Fisher information of a classifier: its diagonal, its Kronecker factors, their eigenvalues

Functions over data take `loss_fn`, `params` and `*batch` as `per_sample` does, and `mask`, `chunk_size` and `plan`.
Sums are in float64 and cannot be differentiated.
"""

from .distribution import Distribution
from .fisher import fisher_diagonal, fisher_eigenvalues, fisher_kronecker
from .folds import Gradients, Sums, fold, merge
from .gradients import Alignment, Eigenvalues, KroneckerFactors, Moments, Norms, cosines
from .noise import (
    Efficiency,
    Noise,
    NoiseScale,
    batch_noise,
    efficiency,
    mean_noise_scale,
    noise_scale,
    two_batch_sizes,
)

__all__ = [
    "Alignment",
    "Distribution",
    "Efficiency",
    "Eigenvalues",
    "Gradients",
    "KroneckerFactors",
    "Moments",
    "Noise",
    "NoiseScale",
    "Norms",
    "Sums",
    "batch_noise",
    "cosines",
    "efficiency",
    "fisher_diagonal",
    "fisher_eigenvalues",
    "fisher_kronecker",
    "fold",
    "mean_noise_scale",
    "merge",
    "noise_scale",
    "two_batch_sizes",
]


def __dir__() -> list[str]:
    return __all__
