"""Kinds of torch functions: which only ask what a tensor is like, which write to one, which branch on its numbers.

What writes is asked in functions that the compiler runs while it traces: it would guard each op in the sets else.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .compiler import constant_to_the_compiler

_NAMED = re.compile("[a-z][a-z0-9_]*[a-z0-9]_")
"""Names of functions that write."""
METADATA = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad")),
    *(getattr(Tensor, name).__get__ for name in ("is_cuda", "is_leaf", "is_meta", "is_sparse", "is_quantized")),
    *(getattr(Tensor, name).__get__ for name in ("is_nested", "is_mkldnn", "is_cpu", "is_mps", "is_xpu", "itemsize")),
    Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.stride, Tensor.is_contiguous,
    Tensor.is_floating_point, Tensor.is_complex, Tensor.element_size, Tensor.__len__, Tensor.get_device, torch.numel,
    torch.is_floating_point, torch.is_complex, torch.is_tensor,
}  # fmt: skip
"""Functions that look at no number."""
DECIDING = {
    Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.item, Tensor.tolist,
    Tensor.is_nonzero, torch.is_nonzero, torch.equal, Tensor.equal, torch.allclose, Tensor.allclose,
}  # fmt: skip
"""Functions that turn numbers of a tensor into those of Python."""
_AUGMENTED = (
    "iadd__",
    "isub__",
    "imul__",
    "itruediv__",
    "ifloordiv__",
    "imod__",
    "ipow__",
    "iand__",
    "ior__",
    "ixor__",
)
_INPLACE = {
    getattr(space, name)
    for space in (Tensor, torch)
    for name in dir(Tensor)
    if (name.endswith("_") and not name.startswith(("_", "resize_as")))
    or name.removeprefix("__") in _AUGMENTED
    or name == "__setitem__"
    if hasattr(space, name)
}
_WITH_INPLACE = {
    F.relu, F.relu6, F.leaky_relu, F.elu, F.celu, F.selu, F.silu, F.mish, F.hardtanh, F.hardswish, F.hardsigmoid,
    F.threshold, F.rrelu, F.dropout, F.alpha_dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.feature_alpha_dropout,
}  # fmt: skip


def writes(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an op writes to a tensor in place."""
    if _named_to_write(func) or kwargs.get("out") is not None or kwargs.get("inplace") is True:
        return True
    return any([value is True for value in args]) and _may_be_told_to_write(func)


@constant_to_the_compiler
def _named_to_write(func: Any) -> bool:
    return func in _INPLACE or bool(_NAMED.fullmatch(str(getattr(func, "__name__", "")).split(".")[0]))


@constant_to_the_compiler
def _may_be_told_to_write(func: Any) -> bool:
    return func in _WITH_INPLACE


def flat(value: Any) -> list[Any]:
    """All values in nested lists, tuples and dicts."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [v for part in value for v in flat(part)]
    return [value]


def tensors(args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors in the arguments of an op, in nested lists, tuples and dicts too.

    Each op of a loss is looked through, and the compiler follows every step of it: hence so few.
    """
    found = []
    for part in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(part, Tensor):
            found.append(part)
        elif isinstance(part, dict):
            found += tensors(part.values(), {})
        elif isinstance(part, (list, tuple)):
            found += tensors(part, {})
    return found


def nested(fn: Callable[[Any], Any], value: Any) -> Any:
    """Nested lists, tuples and dicts of `fn(v)` for each value v in them, in order."""
    if isinstance(value, (list, tuple)):
        return type(value)([nested(fn, part) for part in value])
    if isinstance(value, dict):
        return {name: nested(fn, part) for name, part in value.items()}
    return fn(value)
