"""Words to the compiler: what to run while it traces, and where to stop fusing."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def constant_to_the_compiler(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which the compiler runs once while it traces: what `torch.compiler.assume_constant_result` does.

    That one would import the compiler, for 0.8 s.
    """
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn


def unseen(name: str, *inputs: Tensor) -> list[Tensor]:
    """Runs a function that has a name by `unseen_as`: Python that the compiler calls with tensors without numbers.

    It follows no instruction of it, only the ops that come of it.
    """
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = torch._guards.detect_fake_mode(inputs) is not None
    try:
        return _UNSEEN[name](*inputs)
    finally:
        torch.compiler._is_compiling_flag = before


def unseen_as(run: Callable[..., list[Tensor]]) -> str:
    """The name of a function for `unseen`. To be called while the compiler traces."""
    torch._dynamo.allow_in_graph(unseen)
    name = str(len(_UNSEEN))
    _UNSEEN[name] = run
    return name


_UNSEEN: dict[str, Callable[..., list[Tensor]]] = {}


def stored(x: Tensor) -> Tensor:
    """The same tensor, which `torch.compile` now computes once and stores with these strides.

    Otherwise it may write an expression out in full wherever it is used, and choose other strides where some size is 1.
    A view that the compiler does not see through does it; eager mode pays nothing. It is a view of a copy, which the
    compiler writes as it computes: an op may give other strides when it runs than when it was traced, and the numbers
    would then be read in another order.
    """
    if not torch.compiler.is_compiling():
        return x
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    dense = x.permute(order).clone(memory_format=torch.contiguous_format)
    return dense.as_strided(dense.shape, dense.stride()).permute([order.index(axis) for axis in range(x.dim())])
