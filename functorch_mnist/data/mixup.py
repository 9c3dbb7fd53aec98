"""How much of each image a mixture of two takes: draws from the beta distribution Beta(α, α).

With t = x^α, or x itself for α of 1 and more, the distribution function on x ≤ 1/2 is an integral of what is bounded,

    F(x) ∝ ∫ (1 - t^{1/α})^{α-1} dt,        F(x) ∝ ∫ (t (1 - t))^{α-1} dt,

so a table of it is turned around; the other half is its mirror image.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import random

_CELLS = 4096


def mixup_weights(alpha: float) -> Callable[[Tensor], Tensor]:
    """What draws the weight λ of the first of two images, and of its label, in their mixture.

    Args:
        alpha: α, from 0.05 to 100: small values give mixtures that are mostly of one image, 1 a uniform
            weight.

    Returns:
        `weights(keys (*lead, 2)) -> (*lead)`, float32 in [0, 1], of mean 1/2 and variance 1 / (4 (2 α + 1)). A
        weight depends on its key alone.

    Raises:
        ValueError: `alpha` is out of its range.

    Guarantees: the distribution function is within 3e-4 of Beta(α, α)'s.

    Cost: the table is made once, here.

    Reference: Zhang, Cisse, Dauphin, Lopez-Paz, "mixup: Beyond empirical risk minimization", ICLR 2018,
        https://arxiv.org/abs/1710.09412.
    """
    if not 0.05 <= alpha <= 100:
        raise ValueError(f"mixup_weights: alpha must be from 0.05 to 100. Found {alpha}.")
    table = _places(alpha)

    def weights(keys: Tensor) -> Tensor:
        part, side = random.uniform(keys, (2,)).unbind(-1)
        places = table.to(part.device)
        cell = (part * _CELLS).long()
        low, high = (places.index_select(0, index.reshape(-1)).view(index.shape) for index in (cell, cell + 1))
        place = torch.lerp(low, high, part * _CELLS - cell)
        weight = place ** (1 / alpha) if alpha < 1 else place
        return torch.where(side < 0.5, weight, 1 - weight)

    return weights


def _places(alpha: float) -> Tensor:
    """At which t the distribution function, on x ≤ 1/2, has each of the values 0, 1 / cells … 1: float32."""
    fine = 16 * _CELLS
    t = torch.linspace(0, 1, fine + 1, dtype=torch.float64) * (0.5**alpha if alpha < 1 else 0.5)
    density = (1 - t ** (1 / alpha)) ** (alpha - 1) if alpha < 1 else (t * (1 - t)) ** (alpha - 1)
    chance = torch.cat([t.new_zeros(1), torch.cumulative_trapezoid(density / density.max(), t)])
    wanted = torch.linspace(0, 1, _CELLS + 1, dtype=torch.float64) * chance[-1]
    after = torch.searchsorted(chance, wanted).clamp(1, fine)
    part = (wanted - chance[after - 1]) / (chance[after] - chance[after - 1]).clamp(min=1e-300)
    return torch.lerp(t[after - 1], t[after], part.clamp(0, 1)).float()
