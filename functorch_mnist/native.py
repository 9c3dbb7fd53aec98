"""Out of `vmap` and back, for what runs faster, or only, on a whole batch. All private functions of torch are here.

Inside `vmap` a tensor of one example is a view of the batch, (B, …), with its batch axis hidden. `taken_out` shows it
again: whatever then runs is native, with the kernels that torch has for a batch. `handed_back` hides the axis. Both
trace under `torch.compile(fullgraph=True)`. They need the batch to be what the innermost transform maps over, so `grad`
has to lie outside `vmap`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch import predispatch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._python_dispatch import _disable_current_modes

from .compiler import constant_to_the_compiler


@constant_to_the_compiler
def show_all_ops() -> bool:
    """Has the compiler show to modes what is named as if it were private too: the op of a weight norm."""
    from torch._dynamo.variables import torch as traced

    traced.get_overridable_functions().add(torch._weight_norm)
    return True


@constant_to_the_compiler
def level() -> int:
    """How many transforms of torch.func are being applied."""
    return int(_functorch.maybe_current_level() or 0)


@constant_to_the_compiler
def mapped() -> tuple[int, int]:
    """The level and the batch size of `vmap` where it is the innermost transform; else zeros."""
    innermost = _functorch.peek_interpreter_stack()
    if innermost is None or innermost.key() != _functorch.TransformType.Vmap:
        return 0, 0
    return int(innermost.level()), int(_functorch.CVmapInterpreterPtr(innermost).batchSize())


def in_backward() -> bool:
    """Whether autograd's engine runs this."""
    return bool(torch._C._current_graph_task_id() != -1)


def is_of_an_example(x: Tensor) -> bool:
    """Whether the innermost `vmap` maps over the tensor."""
    return bool(_functorch.is_batchedtensor(x))


def depends(x: Tensor) -> bool:
    """Whether a tensor inside `grad` depends on what is differentiated; True for a compiler, which cannot tell."""
    return torch.compiler.is_compiling() or bool(_functorch.is_gradtrackingtensor(x) and x.requires_grad)


def taken_out(x: Tensor, at: tuple[int, int]) -> Tensor:
    """The batch (B, …) of which `x` is one example; an `x` that all examples share is repeated, without a copy.

    Args:
        x: a tensor inside of `vmap`.
        at: what `mapped()` says there.
    """
    batch: Tensor = predispatch._remove_batch_dim(x, *at, 0)
    return batch


def handed_back(batch: Tensor, at: tuple[int, int]) -> Tensor:
    """One example of a batch (B, …): the way back. A tensor that is still one example may not be handed back."""
    example: Tensor = predispatch._add_batch_dim(batch, 0, at[0])
    return example


class PerExample(TorchFunctionMode):
    """A mode that has to see the ops that parameters enter for one example, not for a batch."""

    def real(self, value: Any) -> Any:
        """The numbers behind a tensor that stands for a parameter."""
        return value


def one_of(x: Tensor, at: tuple[int, int]) -> Tensor:
    """The numbers that stand behind a parameter: what a mode that follows it knows, or those of the first example."""
    for mode in _get_current_function_mode_stack():
        if isinstance(mode, PerExample):
            x = mode.real(x)
    return taken_out(x, at)[0] if at[0] and is_of_an_example(x) else x


def beneath(x: Tensor) -> Tensor:
    """The tensor that transforms have wrapped, with the axes that they hide."""
    while _functorch.is_functorch_wrapped_tensor(x):
        x = _functorch.get_unwrapped(x)
    return x


def numbers(x: Tensor) -> Tensor | None:
    """The tensor beneath all transforms; none where it has no numbers: on the meta device, or while compiling."""
    if torch.compiler.is_dynamo_compiling():
        return None
    x = beneath(x)
    return x.detach() if type(x) in (Tensor, torch.nn.Parameter) and x.device.type != "meta" else None


def inside(kind: type[TorchFunctionMode]) -> bool:
    """Whether a mode of this kind is on."""
    return any([isinstance(mode, kind) for mode in _get_current_function_mode_stack()])


@contextmanager
def outside() -> Iterator[None]:
    """Out of all transforms and modes, for what only looks: a trial run on numbers of its own."""
    modes = []  # of functions; those of dispatch, such as tensors without numbers, are switched off below
    while _get_current_function_mode_stack():
        modes.append(_pop_mode())
    forbidden = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()
    if forbidden is not None:
        torch._C._autograd._saved_tensors_hooks_enable()
    try:
        with temporarily_clear_interpreter_stack(), _disable_current_modes(), torch.enable_grad():
            yield
    finally:
        if forbidden is not None:
            torch._C._autograd._saved_tensors_hooks_disable(forbidden)
        for mode in reversed(modes):
            _push_mode(mode)


def saves_by_hooks() -> bool:
    """Whether tensors are saved for the backward pass by hooks, as activation checkpoints do; torch.func refuses it."""
    compiling = torch.compiler.is_dynamo_compiling()
    return not compiling and torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def is_old(function: Any) -> bool:
    """Whether an autograd function is of the old style, which torch.func refuses."""
    return bool(function.setup_context is torch.autograd.function._SingleLevelFunction.setup_context)


def refusal(function: Any) -> str:
    """Why an old-style autograd function is refused, and the way out."""
    if "checkpoint" in function.__module__:
        return (
            f"torch.func cannot differentiate through activation checkpoints. Found {function.__name__}. Switch "
            "checkpointing off; per-sample gradients keep few activations."
        )
    return (
        f"torch.func needs autograd functions with a setup_context. Found {function.__name__} of {function.__module__},"
        " which has none. Write it as forward(*inputs) and setup_context(ctx, inputs, output)."
    )


def old_function_behind(outputs: Iterable[Tensor]) -> Any:
    """An old-style autograd function that had a part in making tensors, if one had."""
    seen: set[Any] = set()
    ahead = [x.grad_fn for x in outputs if x.grad_fn is not None]
    while ahead:
        node = ahead.pop()
        if node in seen:
            continue
        seen.add(node)
        function = getattr(node, "_forward_cls", None)
        if function is not None and is_old(function):
            return function
        ahead += [parent for parent, _ in node.next_functions if parent is not None]
    return None
