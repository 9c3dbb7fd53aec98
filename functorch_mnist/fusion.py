"""A word to the compiler about where to stop fusing."""

import torch
from torch import Tensor


def stored(x: Tensor) -> Tensor:
    """The same tensor, which `torch.compile` now computes once and puts away, rather than in full wherever it is used.

    A view that the compiler must not see through does it; eager mode pays nothing. It is worth it for an expression that
    would double with every use, and before a change of order that would keep a fused loop from being vectorised.
    """
    return x.as_strided(x.shape, x.stride()) if torch.compiler.is_compiling() else x
