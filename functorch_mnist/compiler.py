"""Words to the compiler: what to run while it traces, where to stop fusing, and what is a loop."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan


def constant_to_the_compiler(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which the compiler runs once while it traces: what `torch.compiler.assume_constant_result` does.

    That one would import the compiler, for 0.8 s.
    """
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn


def stored(x: Tensor) -> Tensor:
    """The same tensor, which `torch.compile` now computes once and stores with these strides.

    Otherwise it may write an expression out in full wherever it is used, and choose other strides where some size is 1.
    A view that the compiler does not see through does it; eager mode pays nothing. It is a view of a copy, which the
    compiler writes as it computes: an op may give other strides when it runs than when it was traced, and the numbers
    would then be read in another order.
    """
    if not torch.compiler.is_compiling():
        return x
    order = sorted(range(x.dim()), key=lambda axis: (x.stride(axis), x.shape[axis]), reverse=True)
    dense = x.permute(order).clone(memory_format=torch.contiguous_format)
    return dense.as_strided(dense.shape, dense.stride()).permute([order.index(axis) for axis in range(x.dim())])


@constant_to_the_compiler
def let_change() -> bool:
    """Has the compiler not refuse what the step of a loop changes outside itself: it is changed once, by the trace."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    tracer: Any = InstructionTranslator.current_tx().output.current_tracer
    tracer.unsafe_allow_externally_visible_side_effects = True  # of the step alone
    return True


def loop(
    step_fn: Callable[[list[Tensor], Tensor], tuple[list[Tensor], list[Tensor]]], state: list[Tensor], xs: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """The last state, and all outputs stacked, of `step_fn(state, x) -> (state, outputs)` over xs (n, …).

    `torch.compile` traces and compiles one step, whatever n is; a loop of Python it would write out. What a step
    changes outside itself it changes once; what it returns shares no memory; the state keeps shapes, dtypes, strides.
    """

    def step(both: tuple[Tensor, list[Tensor]], x: Tensor) -> tuple[tuple[Tensor, list[Tensor]], list[Tensor]]:
        let_change()
        state, outputs = step_fn(both[1], x)
        return (both[0].clone(), state), outputs

    (_, last), outputs = scan(step, (torch.zeros(()), state), xs)  # it must carry a tensor
    return last, outputs
