"""Following parameters through a loss: which tensors are made of them, and the ops where they meet an example.

Parameters are known by identity. An op of parameters and constants makes a weight, which is followed on; an op that a
weight and a tensor of the example enter uses the weight. Where no gradient flows (under `no_grad`, into integers, out
of the loss as a Python number) the op gets the parameter's numbers, and its result is a constant.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import native
from ..decompositions import decomposition
from ..ops import METADATA, flat, nested, tensors, writes
from . import recurrence, rules
from .calls import CallForm, Slot
from .forms import Form
from .kernels import on_the_batch
from .layout import permuting_view, reshaping_view
from .weights import SELECTING, Made, Weight

# Tuples, for the compiler does not find every function of Python in a set.
_PERMUTING = (
    Tensor.t, Tensor.transpose, Tensor.permute, Tensor.movedim, Tensor.swapaxes, Tensor.swapdims, Tensor.moveaxis,
    torch.t, torch.transpose, torch.permute, torch.movedim, torch.swapaxes, torch.swapdims, torch.moveaxis,
    Tensor.T.__get__, Tensor.mT.__get__,  # type: ignore[attr-defined]
)  # fmt: skip
_RESHAPING = (
    Tensor.view, Tensor.reshape, Tensor.flatten, Tensor.unflatten, Tensor.squeeze, Tensor.unsqueeze, Tensor.view_as,
    Tensor.reshape_as, torch.reshape, torch.flatten, torch.unflatten, torch.squeeze, torch.unsqueeze,
)  # fmt: skip
_SHARING = (*_PERMUTING, *_RESHAPING, *SELECTING, Tensor.expand, Tensor.expand_as, Tensor.contiguous, Tensor.to)
_CASTING = (Tensor.to, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.contiguous, Tensor.clone)
_DETACHING = (Tensor.detach, torch.detach, Tensor.data.__get__)  # type: ignore[attr-defined]


class Known(NamedTuple):
    """A weight, as the loss holds it."""

    tensor: Tensor
    weight: Weight
    real: Tensor
    """Its numbers: what ops get in its place."""


class Found(NamedTuple):
    """A weight that an op uses, and how its sample gradients follow from the op."""

    known: Known
    form: Form | None
    """None where they do not."""
    saved: Any
    """What the form needs of the op's inputs: tensors."""
    reason: str = ""
    """Why there is no form."""


class Follower(native.PerExample):
    """Follows weights through a loss; subclasses say what happens where they are used."""

    def __init__(self, known: Iterable[Known], level: int) -> None:
        super().__init__()
        self.known = {one.tensor: one for one in known}  # a tensor's hash is its identity
        self.level = level

    def find(self, value: Any) -> Known | None:
        return self.known.get(value) if isinstance(value, Tensor) else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            return func(*args, **kwargs)
        values = tensors(args, kwargs)
        self.see(func, args, kwargs, values)
        found = [self.known[x] for x in values if x in self.known]
        if not found:
            return on_the_batch(func, args, kwargs)
        if native.level() != self.level:
            return self.use(func, args, kwargs, [Found(k, None, (), "inside a transform of torch.func") for k in found])
        if func in _DETACHING or not torch.is_grad_enabled():
            return func(*self.real(args), **self.real(kwargs))
        call = recurrence.read(func, self.real(args)) if func in recurrence.OPS else None
        if call is not None and self.recurs(call, args):
            return self.recur(call, args, kwargs)
        simpler = decomposition(func)
        if simpler is not None and rules.find(func) is None:
            with self:
                return simpler(*args, **kwargs)
        written = writes(func, args, kwargs)
        alone = not any([x not in self.known and native.is_of_an_example(x) for x in values])
        target = self.find(args[0]) if written and args else None
        if target is not None and alone and self.is_own(target):
            return self.remake(func, args, kwargs, found, target)
        if target is not None:
            return self.use(func, args, kwargs, [Found(k, None, (), "written to") for k in found])
        if alone and not written:
            return self.make(func, args, kwargs, found)
        return self.use(func, args, kwargs, self.uses(func, args, kwargs, found, written))

    def see(self, func: Any, args: Any, kwargs: Any, values: list[Tensor]) -> None:
        """Looks at any op, and the tensors that it gets."""

    def use(self, func: Any, args: Any, kwargs: Any, found: list[Found]) -> Any:
        """Runs an op of weights and of an example."""
        raise NotImplementedError

    def recurs(self, call: recurrence.Call, args: Any) -> bool:
        """Whether a recurrent op runs on the batch: only its input is of an example, and no state is a weight."""
        weights = [weight for layer in call.layers for weight in layer.weights]
        states = args[1] if isinstance(args[1], (list, tuple)) else [args[1]]
        return (
            native.mapped()[0] > 0
            and native.is_of_an_example(call.input)
            and not any([native.is_of_an_example(weight) for weight in weights])
            and not any([self.find(state) is not None for state in states])
        )

    def recur(self, call: recurrence.Call, args: Any, kwargs: Any) -> Any:
        """Runs a recurrent op of weights and an example."""
        raise NotImplementedError

    def of_layers(self, call: recurrence.Call) -> list[tuple[Known | None, Form, int]]:
        """What each of its weights stands for, none where it is no parameter."""
        known = {one.real: one for one in self.known.values()}
        return [(known.get(weight), form, tap) for weight, form, tap in recurrence.forms(call)]

    def real(self, value: Any) -> Any:
        """The arguments with the weights' numbers in their places."""
        return self.replaced(value, lambda known: known.real)

    def replaced(self, value: Any, put: Any) -> Any:
        def one(x: Any) -> Any:
            return put(self.known[x]) if isinstance(x, Tensor) and x in self.known else x

        return nested(one, value)

    def make(self, func: Any, args: Any, kwargs: Any, found: list[Known]) -> Any:
        """Runs an op of weights and constants. What it makes of them is a weight where a gradient can flow."""
        out = func(*args, **kwargs)
        unreal = any([known.real is not known.tensor for known in found])
        real = func(*self.real(args), **self.real(kwargs)) if unreal else out
        if isinstance(out, Tensor):
            return self.made(out, real, self.way(func, args, kwargs, found, None))
        if isinstance(out, (list, tuple)):
            parts = [
                self.made(x, y, self.way(func, args, kwargs, found, i)) if isinstance(x, Tensor) else y
                for i, (x, y) in enumerate(zip(out, real, strict=True))
            ]
            return type(out)(parts)
        return real

    def is_own(self, known: Known) -> bool:
        """Whether no other tensor has the memory of a weight, so that writing to it changes it alone."""
        made = known.weight.made
        if made is None or known.weight.views or made.op in _SHARING:
            return False
        others = [other.weight.made for other in self.known.values() if other.weight.made is not None]
        return not any([other.op in _SHARING and other.args and other.args[0] is known.weight for other in others])

    def remake(self, func: Any, args: Any, kwargs: Any, found: list[Known], target: Known) -> Any:
        """Runs an op that writes to a weight: the tensor stands for another weight then."""
        weight = self.way(_on_a_copy(func), args, kwargs, found, None)
        real = func(target.real.clone(), *self.real(args[1:]), **self.real(kwargs))
        out = func(*args, **kwargs) if target.real is not target.tensor else args[0].copy_(real)
        real = real if target.real is not target.tensor else args[0]
        self.known[target.tensor] = Known(target.tensor, weight, real)
        return out

    def made(self, out: Tensor, real: Tensor, weight: Weight) -> Tensor:
        if not (out.is_floating_point() or out.is_complex()):
            return real
        if self.find(out) is None:
            self.known[out] = Known(out, weight, real)
        return out

    def way(self, func: Any, args: Any, kwargs: Any, found: list[Known], output: int | None) -> Weight:
        """How the result of an op is made."""
        first = found[0]
        alone = len(found) == 1 and len(args) > 0 and args[0] is first.tensor
        types = [value for value in flat((args, kwargs)) if isinstance(value, torch.dtype)]
        if alone and func in _CASTING and all([dtype.is_floating_point for dtype in types]):
            return first.weight
        before = tuple(first.tensor.shape)
        if alone and func is Tensor.as_strided and _is_itself(first.tensor, *args[1:]):
            return first.weight
        if alone and func in _PERMUTING:
            return first.weight.viewed(permuting_view(lambda v: func(v, *args[1:], **kwargs), before))
        if alone and func in _RESHAPING and not types:
            shape = tuple(func(first.tensor, *args[1:], **kwargs).shape)
            return first.weight.viewed(reshaping_view(before, shape))
        leaves = tuple(sorted({leaf for known in found for leaf in known.weight.leaves}))
        filled = [self.replaced(value, lambda known: known.weight) for value in (args, kwargs)]
        return Weight(leaves, Made(func, filled[0], filled[1], output))

    def uses(self, func: Any, args: Any, kwargs: Any, found: list[Known], written: bool) -> list[Found]:
        """How each weight's sample gradients follow from an op: by its rule, or by the op itself."""
        rule = rules.find(func)
        entries = [] if rule is None else list(rule(*self.real(args), **self.real(kwargs)))
        result: list[Found] = []
        for known in found:
            if any([known.tensor is use.known.tensor for use in result]):
                continue
            own = [entry for entry in entries if entry.parameter is known.real and entry.form is not None]
            times = len([1 for other in found if other.tensor is known.tensor])
            if len(own) == times:
                result += [Found(known, entry.form, () if entry.saved is None else entry.saved) for entry in own]
            elif written:
                result.append(Found(known, None, (), "no rule for this op, which writes to a tensor"))
            else:
                result.append(self.call(func, args, kwargs, known))
        return result

    def call(self, func: Any, args: Any, kwargs: Any, known: Known) -> Found:
        """The op itself as a form."""
        examples: list[Tensor] = []
        others: list[Weight] = []

        def slot(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if value is known.tensor:
                return Slot("weight")
            other = self.find(value)
            if other is not None:
                others.append(other.weight)
                return Slot("other", len(others) - 1)
            examples.append(value)
            return Slot("saved", len(examples) - 1)

        arguments = nested(slot, args), nested(slot, kwargs)
        form = CallForm(tuple(known.tensor.shape), tuple(others), func, *arguments)
        return Found(known, form, tuple(examples))


def _on_a_copy(func: Any) -> Any:
    """An op that writes, writing to a copy."""
    return lambda first, *args, **kwargs: func(first.clone(), *args, **kwargs)


def _is_itself(x: Tensor, size: Any = (), stride: Any = (), *offset: Any) -> bool:
    """Whether a tensor is seen with the sizes and strides that it has."""
    return tuple(size) == tuple(x.shape) and tuple(stride) == tuple(x.stride()) and not any(offset)


def name_of(func: Any) -> str:
    """For people; the compiler knows no names of built-in methods."""
    if torch.compiler.is_dynamo_compiling():
        return "an op"
    name = str(getattr(func, "__name__", func))
    return str(getattr(getattr(func, "__self__", None), "__name__", name)) if name == "__get__" else name
