"""The trial: what a module does with a batch, found by running it on batches of two and of three examples.

A region needs to know, of each op that it hands to one example, along which axis the batch lies: an axis whose size
grows with the batch, and along it the places that change when one example does. The same runs show whether examples
mix, and whether the forward writes to its parameters or calls what torch.func cannot differentiate. A trial has numbers
of its own for parameters and float inputs; it depends on shapes and dtypes, and on integers where they are at hand.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .. import native
from ..ops import DECIDING, METADATA, flat, writes
from .copies import Copies
from .draws import Drawing
from .inputs import Inputs


class Axis(NamedTuple):
    """Where the batch lies in a tensor: along an axis of `before · B · after` places."""

    axis: int
    before: int
    after: int


class Step(NamedTuple):
    """An op of parameters, or a draw, in the order of the forward."""

    op: Any
    kind: str
    """"made" of parameters and constants, "used" with an example, or "drawn"."""
    inputs: tuple[Axis | None, ...]
    """Of each tensor among the arguments; none where it is the same for all batches."""
    shapes: tuple[tuple[int, ...] | None, ...]
    """Of each that is: none where it is made of parameters."""
    integers: tuple[tuple[int, int, int], ...]
    """Integers among the arguments that depend on the batch size B: which, and a and b of a + b B."""
    outputs: tuple[Axis | None, ...]
    """Of each tensor among the results."""


class Trial(NamedTuple):
    """What was found."""

    steps: tuple[Step, ...]
    outputs: tuple[Axis | None, ...]
    """Of each tensor in what the forward returns."""
    written: tuple[str, ...]
    """Buffers that the forward writes to."""
    overwritten: tuple[int, ...]
    """Input tensors that it writes to."""
    fault: str
    """Why its steps are unknown, so that only its outputs are usable; else empty."""


class _Event(NamedTuple):
    op: Any
    inputs: list[Any]
    """All values among the arguments."""
    outputs: list[Any]
    drawn: bool


class _Watcher(Drawing):
    """Notes every op of a forward."""

    def __init__(self, params: Mapping[str, Tensor], layers_of: Callable[[], str]) -> None:
        super().__init__()
        self.params = {id(p): name for name, p in params.items()}
        self.where = layers_of
        self.events: list[_Event] = []

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if native.saves_by_hooks():
            raise ValueError(
                f"apply: torch.func cannot differentiate through saved-tensor hooks, as activation checkpoints are. "
                f"Found them in {self.where()}. Switch checkpointing off; per-sample gradients keep few activations."
            )
        if writes(func, args, kwargs) and args and id(args[0]) in self.params:
            raise _written(self.params[id(args[0])], self.where())
        out = func(*args, **kwargs)
        if func not in METADATA and func not in DECIDING:
            self.note(func, (args, kwargs), out)
        return out

    def note(self, func: Any, arguments: Any, out: Any, *, drawn: bool = False) -> None:
        if native.level():  # within a transform: what parameters do there cannot be followed, see region.py
            return
        self.events.append(_Event(func, flat(arguments), flat(out), drawn))

    def dropped(self, input: Tensor, rate: float, batched_ndim: int | None) -> Tensor:  # noqa: ARG002
        out = input * (1 - rate)
        self.note("dropout", (input,), out, drawn=True)
        return out

    def uniform(self, like: Tensor, name: str) -> Tensor:
        out = torch.full_like(like, 0.5)
        self.note(name, (like,), out, drawn=True)
        return out


@native.outside()
def hold_trial(copies: Copies, like: Mapping[str, Tensor], constants: Mapping[str, Tensor], inputs: Inputs) -> Trial:
    """Runs a module on batches of its own.

    Args:
        copies: of the module.
        like: tensors like the parameters, whose numbers are not looked at.
        constants: frozen parameters and buffers.
        inputs: what they look like, see there.

    Raises:
        ValueError: examples mix, a parameter is written to, or an op cannot be differentiated by torch.func.
    """
    generator = torch.Generator().manual_seed(0)
    params = {name: _parameter(p, generator) for name, p in like.items()}
    examples = inputs.examples(generator)
    before = {name: p.detach().clone() for name, p in params.items()}
    held = {name: c.clone() for name, c in constants.items()}
    written: set[str] = set()
    overwritten: set[int] = set()

    def run(chosen: Sequence[Any]) -> tuple[Any, list[_Event]]:
        lent = {name: c.clone() for name, c in held.items()}
        with copies.lent({**params, **lent}) as module:
            watcher = _Watcher(params, lambda: _here(stack))
            stack: list[str] = []
            hooks = _follow_layers(module, stack)
            tensors, (args, kwargs) = inputs.batched(chosen)
            given = [x.clone() for x in tensors]
            try:
                with watcher:
                    out = module(*args, **kwargs)
            finally:
                for hook in hooks:
                    hook.remove()
        overwritten.update([i for i, (x, y) in enumerate(zip(tensors, given, strict=True)) if not same(x, y, 0)])
        for name, p in params.items():
            if not torch.equal(p.detach(), before[name]):
                raise _written(name, "the module")
        written.update([name for name, c in lent.items() if not same(c, held[name], 0)])
        return out, watcher.events

    first, second, changed = examples
    two, events = run((first, second))
    _refuse_functions(two)
    other, events_changed = run((first, changed))
    behind, _ = run((changed, second))
    three, events_three = run((first, second, second))
    outputs = _outputs(two, other, behind, three)
    one, _ = run((second,))
    _check_alone(outputs, one, two)
    steps: list[Step] = []
    fault = ""
    try:
        steps = _steps(params, events, events_changed, events_three)
    except _Unknown as error:
        fault = str(error)
    return Trial(tuple(steps), outputs, tuple(written), tuple(overwritten), fault)


def _parameter(p: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers that let every part of a network be seen."""
    drawn = torch.randn(p.shape, generator=generator)
    numbers = drawn / math.sqrt(max(1, p.numel() // p.shape[0])) if p.dim() > 1 else 0.5 + 0.25 * drawn.abs()
    device = "cpu" if p.device.type == "meta" else p.device
    return numbers.to(device, p.dtype).requires_grad_()


def _outputs(two: Any, other: Any, behind: Any, three: Any) -> tuple[Axis | None, ...]:
    """The batch axis of each output; refuses what mixes examples.

    Args:
        two: for two examples.
        other: with another second one.
        behind: with another first one.
        three: for three examples.
    """
    names, _ = named(two)
    axes: list[Axis | None] = []
    for name, a, b, c, d in zip(names, *[named(x)[1] for x in (two, other, behind, three)], strict=True):
        axis = batch_axis(a, d, b)
        if isinstance(axis, str):
            raise _mixes(name, axis)
        if axis is None:
            if not (same(a, b, TIGHT) and same(a, c, TIGHT)):
                raise _mixes(name, f"its shape {tuple(a.shape)} does not grow with the batch, but its numbers change")
        else:
            mine, its, behind_its = (split(x, axis, 2) for x in (a, b, c))
            if not (same(mine[0], its[0], TIGHT) and same(mine[1], behind_its[1], TIGHT)):
                raise _mixes(name, _CHANGES)
        axes.append(axis)
    return tuple(axes)


def _check_alone(axes: Sequence[Axis | None], one: Any, two: Any) -> None:
    """Refuses outputs that hold something else for the second of two examples than for it alone."""
    names, _ = named(two)
    for name, axis, a, b in zip(names, axes, named(one)[1], named(two)[1], strict=True):
        if axis is None:
            if not same(a, b, LOOSE):
                raise _mixes(name, f"its shape {tuple(b.shape)} does not grow with the batch, but its numbers change")
        elif a.shape[axis.axis] != axis.before * axis.after or not same(
            split(a, axis, 1)[0], split(b, axis, 2)[1], LOOSE
        ):
            raise _mixes(name, _CHANGES)


_CHANGES = "what it holds for one example changes with the others"


def _steps(
    params: Mapping[str, Tensor], events: list[_Event], changed: list[_Event], three: list[_Event]
) -> list[Step]:
    """The ops that parameters enter, and the draws."""
    runs = [_Relevant(params, run) for run in (events, changed, three)]
    steps = []
    for a, b, c in itertools.zip_longest(*runs):
        if a is None or b is None or c is None or not a.op == b.op == c.op:
            name = next(getattr(e.op, "__name__", e.op) for e in (a, b, c) if e is not None)
            raise _Unknown(
                f"apply: a forward must run the same ops for all inputs of one shape. Found {name} for one batch, and "
                "another op for another. Does a branch depend on numbers?"
            )
        tensors = [[x for x in e.inputs if isinstance(x, Tensor)] for e in (a, b, c)]
        inputs = tuple([None if runs[0].is_mine(x) else _told(a.op, x, z, y) for x, y, z in zip(*tensors, strict=True)])
        results = [[x for x in e.outputs if isinstance(x, Tensor)] for e in (a, b, c)]
        integers = tuple(
            [
                (i, 2 * (x - z) + x, z - x)
                for i, (x, z) in enumerate(zip(a.inputs, c.inputs, strict=True))
                if isinstance(x, int) and isinstance(z, int) and not isinstance(x, bool) and x != z
            ]
        )
        shapes = tuple(
            [
                None if axis is not None or runs[0].is_mine(x) else tuple(x.shape)
                for axis, x in zip(inputs, tensors[0], strict=True)
            ]
        )
        if a.drawn or any(inputs):
            outputs = tuple([_told(a.op, x, z, y) for x, y, z in zip(*results, strict=True)])
            steps.append(Step(a.op, "drawn" if a.drawn else "used", inputs, shapes, integers, outputs))
        else:
            steps.append(Step(a.op, "made", inputs, shapes, integers, ()))
            for run, made in zip(runs, results, strict=True):
                run.add(made)
    return steps


def _told(op: Any, two: Tensor, three: Tensor, changed: Tensor) -> Axis | None:
    """Where the batch lies in an input or output of an op, which must be known."""
    axis = batch_axis(two, three, changed)
    if isinstance(axis, str):
        name = getattr(op, "__name__", op)
        raise _Unknown(f"apply: examples must not mix. Found that an input or output of {name} {axis}.")
    return axis


class _Unknown(Exception):
    """What a step does with the batch is unknown."""


class _Relevant:
    """The events of one run that parameters, or what is made of them, enter, and the draws."""

    def __init__(self, params: Mapping[str, Tensor], events: list[_Event]) -> None:
        self.mine = {id(p) for p in params.values()}
        self.events = iter(events)

    def __iter__(self) -> Iterator[_Event]:
        for event in self.events:
            if event.drawn or any([self.is_mine(x) for x in event.inputs]):
                yield event

    def is_mine(self, value: Any) -> bool:
        return isinstance(value, Tensor) and id(value) in self.mine

    def add(self, made: list[Tensor]) -> None:
        self.mine |= {id(x) for x in made}


def batch_axis(two: Tensor, three: Tensor, changed: Tensor) -> Axis | str | None:
    """Where the batch lies in a tensor, none where it does not grow with it, or why that is unknown.

    Args:
        two: for a batch of two.
        three: for a batch of three.
        changed: for a batch of two of which the second example is another.
    """
    if two.dim() != three.dim():
        return "has another number of axes for another batch size"
    grown = [i for i, (x, y) in enumerate(zip(two.shape, three.shape, strict=True)) if x != y]
    if not grown:
        return None if same(two, changed, TIGHT) else "does not grow with the batch, but changes with an example"
    if len(grown) > 1 or two.shape[grown[0]] % 2 or three.shape[grown[0]] * 2 != two.shape[grown[0]] * 3:
        return f"has the shapes {tuple(two.shape)} and {tuple(three.shape)} for two and three examples"
    at = grown[0]
    places = two.shape[at] // 2
    if two.numel() == 0 or two.device.type == "meta":
        return Axis(at, 1, places)
    rows, others = (x.detach().movedim(at, 0).reshape(2 * places, -1) for x in (two, changed))
    moved = _differ(rows, others, TIGHT).any(1)
    for after in [n for n in range(places, 0, -1) if places % n == 0]:
        before = places // after
        owners = torch.arange(2).repeat_interleave(after).repeat(before).to(moved.device)
        if bool(moved.any()):
            fits = not bool(moved[owners == 0].any())
        elif places == 1:
            fits = True
        else:
            fits = torch.equal(rows[owners == 0], rows[owners == 1])
        if fits:
            return Axis(at, before, after)
    return "holds the batch in no recognised order"


def split(x: Tensor, axis: Axis, count: int) -> Tensor:
    """(count, …): the examples of a tensor, each with the axis as it is for a batch of one."""
    parts: Tensor = x.unflatten(axis.axis, (axis.before, count, axis.after)).movedim(axis.axis + 1, 0)
    return parts.flatten(axis.axis + 1, axis.axis + 2)


def joined(parts: Tensor, axis: Axis) -> Tensor:
    """The way back from (count, …)."""
    parts = parts.unflatten(axis.axis + 1, (axis.before, axis.after))
    return parts.movedim(0, axis.axis + 1).flatten(axis.axis, axis.axis + 2)


TIGHT, LOOSE = 16, 2**13
"""Units in the last place by which equal results may differ: of kernels of one shape, and of another."""


def same(a: Tensor, b: Tensor, ulps: int) -> bool:
    """Whether two results are equal but for rounding."""
    if a.shape != b.shape or a.device.type == "meta":
        return a.shape == b.shape
    return not bool(_differ(a.detach(), b.detach(), ulps).any())


def _differ(a: Tensor, b: Tensor, ulps: int) -> Tensor:
    """Where two tensors hold something else, but for rounding.

    What is called rounding goes by the largest of the numbers that differ, or their usual size: a mask's -1e9 or -inf
    in the same places would hide the others.
    """
    unequal = ~((a == b) | ((a != a) & (b != b)))
    if not (a.is_floating_point() or a.is_complex()) or not bool(unequal.any()):
        return unequal
    size, finite = b.abs(), a.isfinite() & b.isfinite()
    usual, unsure = size[finite & (size > 0)], size[finite & unequal]
    least = 1e-6 if ulps == LOOSE else 0.0  # what runs in float32 whatever its inputs
    tolerance = min(max(ulps * torch.finfo(a.dtype).eps, least), 0.1)
    scale = max(float(usual.median()) if usual.numel() else 0.0, float(unsure.max()) if unsure.numel() else 0.0)
    return unequal & ~(finite & ((a - b).abs() <= tolerance * scale))


def named(out: Any) -> tuple[list[str], list[Tensor]]:
    """The tensors in what a forward returns, by their paths."""
    found = [(pytree.keystr(path), x) for path, x in pytree.tree_flatten_with_path(out)[0] if isinstance(x, Tensor)]
    return [name for name, _ in found], [x for _, x in found]


def _refuse_functions(out: Any) -> None:
    """Refuses old-style autograd functions, which torch.func cannot differentiate, by their names."""
    function = native.old_function_behind(named(out)[1])
    if function is not None:
        raise ValueError(f"apply: {native.refusal(function)}")


def _mixes(name: str, why: str) -> ValueError:
    output = f"output {name}" if name else "its output"
    return ValueError(
        f"apply: examples must not mix. The module's result for one example depends on the others in its batch: of "
        f"{output}, {why}. Is the batch along another axis (batch_axis=1 for batch_first=False), or is there a mean "
        "over the batch? Take a loss from the outputs of one example."
    )


def _written(name: str, where: str) -> ValueError:
    return ValueError(
        f"from_module: a forward may not write to its parameters. Found that {where} writes to {name!r}. Take "
        "max_norm, or the update in place, out of the forward."
    )


def _follow_layers(module: nn.Module, stack: list[str]) -> list[Any]:
    """Keeps the names of the layers that are being run."""
    hooks = []
    for name, layer in module.named_modules():
        kind = f"layer {name!r} ({type(layer).__name__})"
        hooks.append(layer.register_forward_pre_hook(lambda *_, kind=kind: stack.append(kind)))
        hooks.append(layer.register_forward_hook(lambda *_: stack.pop() and None))
    return hooks


def _here(stack: list[str]) -> str:
    return stack[-1] if stack else "the module"
