"""A native region: a module's forward runs on the whole batch, in the middle of a loss of one example.

Inside `vmap` the inputs of one example are taken out to the batch (native.taken_out), the forward runs as it was
written, with torch's own kernels for a batch, and its outputs are handed back as those of one example. Three things
need care, and a trial (trial.py) says where the batch lies in each:

    parameters    an op that a parameter enters is handed back to one example and taken out again, so that whoever
                  follows parameters sees it as anywhere in the loss; an op of parameters alone makes what one
                  example needs
    draws         each example has a key of its own, so its mask does not depend on its batch
    decisions     a branch on the data of the batch must be that of each of its examples
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .. import layers, native, random
from ..decompositions import fastest
from ..ops import DECIDING, METADATA, flat, nested, tensors, writes
from .draws import Drawing, channels
from .trial import Axis, Step, Trial, joined, split


class Region(Drawing):
    """Runs a forward on the batch of a `vmap` over `vmapped` examples, each of which holds `per_copy`."""

    def __init__(
        self,
        params: Iterable[Tensor],
        trial: Trial,
        *,
        at: tuple[int, int],
        per_copy: int,
        keys: Tensor | None,
        lifts: bool,
        decided: Callable[[Any], None] | None = None,
    ) -> None:
        """A region.

        Args:
            params: as the forward gets them.
            trial: of the module, for inputs like these.
            at: the level of `vmap` and its batch size; zeros outside of one.
            per_copy: how many examples each vmapped example holds.
            keys: (B, 2), of all examples; or none.
            lifts: whether ops that parameters enter are handed back to one vmapped example.
            decided: receives the value of each branch on data.
        """
        super().__init__()
        if trial.fault and (lifts or keys is not None):
            raise ValueError(trial.fault)
        self.params = tuple(params)
        self.mine = dict.fromkeys(self.params)  # and what is made of them alone; a tensor's hash is its identity
        self.steps = trial.steps if lifts else tuple([step for step in trial.steps if step.kind == "drawn"])
        self.next = 0
        self.at, self.vmapped, self.per_copy = at, max(at[1], 1), per_copy
        self.keys, self.draws, self.lifts, self.decided = keys, 0, lifts, decided
        self.level = native.level()

    # Parameters

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in METADATA:
            return func(*args, **kwargs)
        if func in DECIDING:
            value = func(*args, **kwargs)
            if self.decided is not None:
                self.decided(value)
            return value
        if not any([x in self.mine for x in tensors(args, kwargs)]):
            return fastest(func)(*args, **kwargs)
        values = flat((args, kwargs))
        if writes(func, args, kwargs) and args and any([p is args[0] for p in self.params]):
            raise ValueError(
                f"apply: a forward may not write to its parameters. Found {func.__name__} on one. Take the update in "
                "place out of the forward."
            )
        if not self.lifts:
            return fastest(func)(*args, **kwargs)
        if native.level() != self.level:
            raise ValueError(
                "apply: a module must use its parameters outside of transforms of torch.func. Found "
                f"{getattr(func, '__name__', func)} within one. Write it for a batch instead."
            )
        step = self.step(func)
        self.check(step, func, values)
        if step.kind == "made":
            args, kwargs = _replaced((args, kwargs), dict([(i, a + b * self.per_copy) for i, a, b in step.integers]))
            out = func(*args, **kwargs)
            for tensor in flat(out):
                if isinstance(tensor, Tensor):
                    self.mine[tensor] = None
            return out
        return self.lifted(step, func, args, kwargs, values)

    def step(self, func: Any) -> Step:
        """The next step of the trial, which must be this op."""
        step = self.steps[self.next] if self.next < len(self.steps) else None
        self.next += 1
        if step is None or not (torch.compiler.is_dynamo_compiling() or step.op == func):
            raise self.strayed(func)
        return step

    def strayed(self, func: Any) -> ValueError:
        name = "one" if torch.compiler.is_dynamo_compiling() else getattr(func, "__name__", func)
        return ValueError(
            "apply: a forward must run the same ops for all inputs of one shape. Found another op than when it was "
            f"tried: {name}. Does a branch depend on numbers?"
        )

    def check(self, step: Step, func: Any, values: list[Any]) -> None:
        """Refuses inputs of other shapes than when it was tried: those that depend on the numbers of a batch."""
        tensors = [value for value in values if isinstance(value, Tensor)]
        count = self.vmapped * self.per_copy
        if len(tensors) != len(step.inputs):
            raise self.strayed(func)
        for x, axis, shape in zip(tensors, step.inputs, step.shapes, strict=True):
            if axis is None:
                fits = shape is None or tuple(x.shape) == shape
            else:
                fits = x.shape[axis.axis] == axis.before * count * axis.after
            if not fits:
                raise ValueError(
                    "apply: a forward must run ops of the same shapes for all inputs of one shape. Found that "
                    f"{getattr(func, '__name__', func)} gets {tuple(x.shape)}. Does a selection depend on numbers? "
                    "Compute for all, and select by torch.where."
                )

    def lifted(self, step: Step, func: Any, args: Any, kwargs: Any, values: list[Any]) -> Any:
        """Runs an op for one vmapped example: its inputs are handed back, its results taken out."""
        axes = iter(step.inputs)
        changes: dict[int, Any] = dict([(i, a + b * self.per_copy) for i, a, b in step.integers])
        handed: list[tuple[Tensor, Tensor]] = []  # one tensor given twice stays one
        for i, value in enumerate(values):
            axis = next(axes) if isinstance(value, Tensor) else None
            if axis is None:
                continue
            for tensor, lifted in handed:
                if tensor is value:
                    changes[i] = lifted
                    break
            else:
                changes[i] = native.handed_back(split(value, self.vmapped_axis(axis), self.vmapped), self.at)
                handed.append((value, changes[i]))
        args, kwargs = _replaced((args, kwargs), changes)
        out = func(*args, **kwargs)
        if writes(func, args, kwargs):
            return values[0] if isinstance(values[0], Tensor) else out
        outputs = iter(step.outputs)

        def taken(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            axis = next(outputs)
            if axis is None:
                return value
            return joined(native.taken_out(value, self.at), self.vmapped_axis(axis))

        return nested(taken, out)

    def vmapped_axis(self, axis: Axis) -> Axis:
        """The place of the vmapped examples along an axis: each holds `per_copy` examples."""
        return Axis(axis.axis, axis.before, self.per_copy * axis.after)

    # Draws

    def key(self) -> Tensor:
        """The keys (B, 2) of the next draw."""
        if self.keys is None:
            raise ValueError(
                "apply: without a key nothing may be random. The module calls a dropout function in evaluation mode. "
                "Pass it training=self.training?"
            )
        if native.level() != self.level:
            raise ValueError("apply: a module must draw outside of transforms of torch.func. Found dropout within one.")
        self.draws += 1
        return random.fold_in(self.keys, self.draws - 1)

    def examples_of(self, x: Tensor, name: str) -> tuple[Tensor, Axis | None]:
        """What is drawn for, (B, …) example by example, and where the examples lie; none where there is one alone."""
        axis, count = self.step(name).outputs[0], self.vmapped * self.per_copy
        if axis is None and count > 1:
            raise ValueError(
                f"apply: each example must have draws of its own. The module calls {name} once for a whole batch. Set "
                "its rate to 0, or apply it to one example at a time."
            )
        return (x[None], None) if axis is None else (split(x, axis, count), axis)

    def dropped(self, input: Tensor, rate: float, batched_ndim: int | None) -> Tensor:
        keys = self.key()
        parts, axis = self.examples_of(input, "dropout")
        shape = tuple(parts.shape[1:]) if batched_ndim is None else channels(parts[0], batched_ndim)
        dropped = layers.drop(parts, keys, shape, rate=rate)
        return dropped[0] if axis is None else joined(dropped, axis)

    def uniform(self, like: Tensor, name: str) -> Tensor:
        keys = self.key()
        parts, axis = self.examples_of(like, name)
        draws = random.uniform(keys, tuple(parts.shape[1:])).to(like.dtype)
        return draws[0] if axis is None else joined(draws, axis)


def _replaced(value: Any, changes: dict[int, Any]) -> Any:
    """Nested arguments with some values, numbered in order, replaced."""
    numbers = itertools.count()

    def one(x: Any) -> Any:
        return changes.get(next(numbers), x)

    return nested(one, value)
