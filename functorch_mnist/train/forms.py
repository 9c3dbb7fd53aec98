"""The forms a pure function can be run in: another precision, or compiled."""

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
    """The forward function, computed in `dtype`: float parameters and inputs are cast on entry, outputs to float32.

    Args:
        apply: a model's forward function.
        dtype: a float type, such as `torch.bfloat16`.

    Returns:
        A function of float32 parameters, whose gradients are float32. For float32 it is `apply` itself.
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
    """The function, compiled as one graph for fixed shapes.

    Args:
        fn: a pure function, or any callable that is pure. Transforms such as `grad` belong inside it.

    Guarantees: equal to `fn` up to rounding, also after what it reads has changed: other shapes, another global of the
        caller's, another rule of `per_sample`. Each call of `compiled` has a cache of its own; without it the copies of
        one function, such as the steps of several runs, would share torch's limit of eight.

    Cost: torch checks at each call whether all that the function has read is as it was. The functions of torch and of
        this library are taken to be so, which leaves out most of the checks.
    """

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return fn(*args, **kwargs)

    own = FunctionType(call.__code__.replace(), globals(), closure=call.__closure__)  # torch's caches hang on the code
    # By default a loop has at most 64 stored tensors: three draws of noise, and what does not fit is kept in memory.
    options: dict[str, Any] = {"guard_filter_fn": _may_change, "max_fusion_size": 1024}
    return torch.compile(own, fullgraph=True, dynamic=False, options=options)


def _may_change(guards: Sequence[Any]) -> list[bool]:
    """Which guards are of what may change: all but those of the globals of torch and of this library."""
    settled = ("G['__import_torch", f"G['__import_{__name__.split('.')[0]}")
    return [not guard.name.startswith(settled) or "_RULES" in guard.name for guard in guards]
