"""Transformations of pure functions: another precision, and compilation."""

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from .. import tree
from ..models import Apply, Params

P = ParamSpec("P")
R = TypeVar("R")


def in_precision(apply: Apply, dtype: torch.dtype) -> Apply:
    """Mixed precision: the forward in `dtype`, with float parameters and inputs cast on entry, and outputs to float32.

    Args:
        apply: a model's forward, `apply(params, *inputs, key=None)`.
        dtype: a float type, such as `torch.bfloat16`.

    Returns:
        A function of float32 parameters, whose gradients are float32. For float32 it is `apply` itself.

    Raises:
        TypeError: `dtype` is no float type, such as a text.

    Example:
        >>> from functorch_mnist import models
        >>> apply = in_precision(models.linear(2, 3).apply, torch.bfloat16)
        >>> apply({"weight": torch.ones(3, 2), "bias": torch.zeros(3)}, torch.ones(2)).dtype
        torch.float32

    Reference: Micikevicius et al., "Mixed precision training", ICLR 2018.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"in_precision: dtype must be a float type of torch. Found {dtype!r}. Pass torch.bfloat16?")
    if dtype == torch.float32:
        return apply

    def cast(x: Any, dtype: torch.dtype) -> Any:
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x  # not tokens, which are looked up

    def cast_apply(params: Params, *inputs: Any, key: Tensor | None = None, **named: Any) -> Any:
        inputs, named = tree.map(lambda x: cast(x, dtype), (inputs, named))
        outputs = apply({name: p.to(dtype) for name, p in params.items()}, *inputs, key=key, **named)
        return tree.map(lambda x: cast(x, torch.float32), outputs)

    return cast_apply


def compiled(fn: Callable[P, R]) -> Callable[P, R]:
    """The function, compiled by `torch.compile` as one graph for fixed shapes.

    Args:
        fn: a pure function, or any callable that is pure. Transforms such as `grad` belong inside it.

    Returns:
        A function of the same arguments, which compiles at its first call and for each new shape.

    Guarantees: equal to `fn` up to rounding, also after what it reads has changed: other shapes, another global of the
        caller's, another rule of `per_sample`. Each call of `compiled` has its own cache; otherwise copies of one
        function, such as the steps of several runs, would share torch's limit of eight.

    Cost: at each call torch guards what the function has read. The functions of torch and of this library are assumed
        to be constant, which saves most guards.

    Example:
        >>> step = compiled(torch.func.grad(lambda w: w * w))  # compiles when it is called
    """

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return fn(*args, **kwargs)

    own = FunctionType(call.__code__.replace(), globals(), closure=call.__closure__)  # torch caches by the code object
    # By default a loop has at most 64 stored tensors: three draws of noise, and what does not fit is kept in memory.
    options: dict[str, Any] = {"guard_filter_fn": _may_change, "max_fusion_size": 1024}
    return torch.compile(own, fullgraph=True, dynamic=False, options=options)


def _may_change(guards: Sequence[Any]) -> list[bool]:
    """Which guards to keep: all but those of the globals of torch and of this library."""
    settled = ("G['__import_torch", f"G['__import_{__name__.split('.')[0]}")
    return [not guard.name.startswith(settled) or "_RULES" in guard.name for guard in guards]
