"""Functions of tensors that the compiler does not follow: it calls them with tensors that have no numbers.

Of a function that it follows, Dynamo interprets each instruction of Python, for 50 microseconds each: transforms of
`torch.func` and the survey of a loss are 100,000 and more. Of an opaque one it gets the ops that come of it, which is
all that a graph needs. Tensors that such a function holds would be frozen into the graph, so they become arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from ..ops import nested

Function = Callable[..., list[Tensor]]
_FUNCTIONS: dict[str, Function] = {}


def call(name: str, *inputs: Tensor) -> list[Tensor]:
    """Runs the function of this name, which sees that it is being compiled."""
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = torch._guards.detect_fake_mode(inputs) is not None
    try:
        return _FUNCTIONS[name](*inputs)
    finally:
        torch.compiler._is_compiling_flag = before


def register(fn: Function, held: Sequence[Tensor]) -> str:
    """The name of a function, whose further inputs are then the tensors that it holds. For when the compiler traces.

    Args:
        fn: a function of tensors.
        held: what `held_by` found.
    """
    torch._dynamo.allow_in_graph(call)
    name = uuid4().hex  # the compiler keeps graphs on disk, where another program's function may be called as much

    def run(*inputs: Tensor) -> list[Tensor]:
        lent, count = WeakIdKeyDictionary(), len(inputs) - len(held)
        for mine, theirs in zip(held, inputs[count:], strict=True):
            lent[mine] = theirs
        with _Lending(lambda x: lent.get(x, x)):
            return fn(*inputs[:count])

    _FUNCTIONS[name] = run
    return name


def held_by(fn: Function, kinds: Sequence[tuple[Any, torch.dtype, torch.device]]) -> list[Tensor]:
    """The tensors that a function uses besides its inputs, of which these are the shapes, dtypes and devices."""
    found: Any = WeakIdKeyDictionary()
    mode = FakeTensorMode()

    def fake(x: Tensor) -> Tensor:
        if x not in found:
            found[x] = mode.from_tensor(x)
        known: Tensor = found[x]
        return known

    with mode:
        inputs = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in kinds]
        with _Lending(fake):
            fn(*inputs)
    return list(found.keys())


class _Lending(TorchDispatchMode):
    """Gives ops other tensors in place of plain ones."""

    def __init__(self, given: Callable[[Tensor], Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.given = given

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def lent(x: Any) -> Any:
            return self.given(x) if type(x) in (Tensor, Parameter) else x

        return func(*nested(lent, args), **nested(lent, kwargs or {}))
