"""A word to the compiler about where to stop fusing."""

import torch
from torch import Tensor


def stored(x: Tensor) -> Tensor:
    """The same tensor, which `torch.compile` now computes once and stores with these strides.

    Otherwise it may write an expression out in full wherever it is used, and choose other strides where some size is 1.
    A view that the compiler does not see through does it; eager mode pays nothing.
    """
    return x.as_strided(x.shape, x.stride()) if torch.compiler.is_compiling() else x
