"""Statistics of sample gradients over a data set, as folds: they stream in chunks, and parts merge exactly.

    fold(a + b) = merge(fold(a), fold(b))

A statistic is a function of some examples' gradients (`Gradients`) to sums over them. The sums are a pytree of tensors
whose size does not hang on the number of examples; what is asked of them, such as a mean or a quantile, is a property.

    folds.py          sums, how they merge, and the fold over chunks
    distribution.py   the distribution of numbers, with quantiles
    gradients.py      what a fold can take: norms, moments, alignment, Kronecker factors, their corrected eigenvalues
    noise.py          their noise: the noise scale with an error bar, the batch size that it advises, the diversity
    fisher.py         the Fisher information of a classifier: its diagonal, its Kronecker factors, their eigenvalues

What goes over data takes `loss_fn`, `params` and `*batch` as `per_sample` does, and `mask`, `chunk_size` and `plan`.
Sums are in float64 and cannot be differentiated.
"""

from .distribution import Distribution as Distribution
from .fisher import fisher_diagonal as fisher_diagonal
from .fisher import fisher_eigenvalues as fisher_eigenvalues
from .fisher import fisher_kronecker as fisher_kronecker
from .folds import Gradients as Gradients
from .folds import Sums as Sums
from .folds import fold as fold
from .folds import merge as merge
from .gradients import Alignment as Alignment
from .gradients import Eigenvalues as Eigenvalues
from .gradients import KroneckerFactors as KroneckerFactors
from .gradients import Moments as Moments
from .gradients import Norms as Norms
from .gradients import cosines as cosines
from .noise import Efficiency as Efficiency
from .noise import Noise as Noise
from .noise import NoiseScale as NoiseScale
from .noise import batch_noise as batch_noise
from .noise import efficiency as efficiency
from .noise import mean_noise_scale as mean_noise_scale
from .noise import noise_scale as noise_scale
from .noise import two_batch_sizes as two_batch_sizes
