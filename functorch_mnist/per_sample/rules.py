"""Rules: what an op's inputs and its output's cotangent say about the sample gradients of its parameters.

A rule is a function with the signature of its op, registered under it. It sees one example and returns an entry for
each parameter it knows the op to be linear in; the others are differentiated with the rest of the loss. So a rule can
only make things faster: what it leaves out is exact all the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import Layout, layout
from .terms import Convolution, Dense, Lookup, Outer, Strategy, Term


class Sizes(NamedTuple):
    """What the cost of one example's term hangs on."""

    groups: int
    positions: int
    inputs: int
    outputs: int


class Cost(NamedTuple):
    """What the inner product of one example's gradient with itself costs."""

    memory: int
    """Numbers stored besides the factors."""
    arithmetic: int
    """Multiplications and additions."""


class Form(Protocol):
    """How a parameter's sample gradients follow from what a rule saved and from the cotangent of the op's output."""

    def sizes(self, saved: Any, output: torch.Size) -> Sizes:
        """From the shapes of one example."""
        ...

    def costs(self, sizes: Sizes) -> dict[Strategy, Cost]:
        """Of each strategy that applies."""
        ...

    def term(self, saved: Any, cotangent: Tensor, strategy: Strategy) -> Term:
        """From the tensors of B examples."""
        ...


class Entry(NamedTuple):
    """What a rule says about one parameter of an op."""

    parameter: Tensor | None
    """As the op got it; an entry for anything but a parameter of the model is ignored."""
    form: Form | None = None
    """None where its sample gradient is best left to autograd: it is no larger than the cotangent itself."""
    saved: Tensor | None = None
    """What the form needs of the op's inputs, for one example."""


Rule = Callable[..., Iterable[Entry]]

_RULES: dict[Callable[..., Any], Rule] = {}


def rule(*ops: Callable[..., Any]) -> Callable[[Rule], Rule]:
    """Registers the decorated rule for ops such as `torch.nn.functional.linear`, in place of any before it.

    The rule is called with the arguments of the op, for one example. It returns entries; none at all where it does not
    apply, and then the op's parameters are differentiated densely.

    Example:
        >>> @rule(F.bilinear)
        ... def bilinear(x1, x2, weight, bias=None):
        ...     pairs = (x1[..., :, None] * x2[..., None, :]).flatten(-2)  # y_h = Σ_jk w_hjk x1_j x2_k + b_h
        ...     return [matrix(weight, pairs), Entry(bias)]
    """

    def register(fn: Rule) -> Rule:
        for op in ops:
            _RULES[op] = fn
        return fn

    return register


def find(op: Callable[..., Any]) -> Rule | None:
    """The rule of an op, if it has one."""
    return _RULES.get(op)


@dataclass(frozen=True)
class MatrixForm:
    """`y[positions, outputs] = Σ_inputs W[outputs, inputs] a[positions, inputs]`, for each group."""

    layout: Layout
    order: tuple[int, ...]
    """The axes of the op's output: those of groups, of positions, of outputs."""

    def sizes(self, saved: Any, output: torch.Size) -> Sizes:  # noqa: ARG002 (the layout knows)
        groups, outputs, inputs = self.layout.sizes
        return Sizes(groups, saved[1], inputs, outputs)

    def costs(self, sizes: Sizes) -> dict[Strategy, Cost]:
        return _matrix_costs(sizes, patches=0)

    def term(self, saved: Any, cotangent: Tensor, strategy: Strategy) -> Outer:
        groups, outputs, _ = self.layout.sizes
        saved = saved.to(cotangent.dtype)  # autocast runs the op in another precision than its input's
        g = cotangent.permute(0, *[axis + 1 for axis in self.order])
        return Outer(saved, g.reshape(len(saved), groups, saved.shape[2], outputs), self.layout, strategy)


@dataclass(frozen=True)
class ConvolutionForm:
    """A convolution; `swapped` for a transposed one."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    swapped: bool

    def sizes(self, saved: Any, output: torch.Size) -> Sizes:
        positions = saved if self.swapped else output
        space = len(self.stride)
        count = math.prod(positions[-space:]) * saved[0]
        return Sizes(self.groups, count, math.prod(self.shape[1:]), self.shape[0] // self.groups)

    def costs(self, sizes: Sizes) -> dict[Strategy, Cost]:
        return _matrix_costs(sizes, patches=sizes.groups * sizes.positions * sizes.inputs)

    def term(self, saved: Any, cotangent: Tensor, strategy: Strategy) -> Convolution:
        saved = saved.to(cotangent.dtype)
        cotangent = cotangent.reshape(*saved.shape[:2], *cotangent.shape[-len(self.stride) - 1 :])
        image, cotangent = (cotangent, saved) if self.swapped else (saved, cotangent)
        padding = self.padding
        if self.swapped:  # output_padding adds places at the end that the kernel does not reach at so many positions
            reach = [
                s * (n - 1) + d * (k - 1) + 1
                for s, n, d, k in zip(self.stride, saved.shape[3:], self.dilation, self.shape[2:], strict=True)
            ]
            sides = [(p, r - p - n) for p, r, n in zip(padding, reach, image.shape[3:], strict=True)]
            image = F.pad(image, [side for pair in reversed(sides) for side in pair])
            padding = (0,) * len(padding)
        return Convolution(image, cotangent, self.shape, self.stride, padding, self.dilation, self.groups, strategy)


@dataclass(frozen=True)
class LookupForm:
    """Rows of a table (V, H)."""

    shape: tuple[int, ...]
    padding_idx: int | None

    def sizes(self, saved: Any, output: torch.Size) -> Sizes:  # noqa: ARG002 (the table knows)
        return Sizes(1, saved[0], *self.shape)

    def costs(self, sizes: Sizes) -> dict[Strategy, Cost]:
        _, t, v, h = sizes
        return {"gram": Cost(t * t + t * h, 2 * t * t * h), "build": Cost(v * h, t * h + 2 * v * h)}

    def term(self, saved: Any, cotangent: Tensor, strategy: Strategy) -> Lookup:
        live = torch.ones_like(saved, dtype=torch.bool) if self.padding_idx is None else saved != self.padding_idx
        g = cotangent.reshape(*saved.shape, self.shape[1])
        g = torch.where(live[..., None], g, torch.zeros((), dtype=g.dtype, device=g.device))
        return Lookup(saved, g, live, self.shape, strategy)


@dataclass(frozen=True)
class ShiftForm:
    """A parameter that is added to the op's output: its sample gradient is the cotangent's sum where it is repeated."""

    shape: tuple[int, ...]
    """Of the parameter."""
    broadcast: tuple[int, ...]
    """The same with axes of 1, as it is broadcast to the output."""

    def sizes(self, saved: Any, output: torch.Size) -> Sizes:  # noqa: ARG002 (nothing is saved)
        outputs = math.prod(self.shape)
        return Sizes(1, math.prod(output) // max(outputs, 1), 1, outputs)

    def costs(self, sizes: Sizes) -> dict[Strategy, Cost]:
        return {"sum": Cost(sizes.outputs, sizes.positions * sizes.outputs)}

    def term(self, saved: Any, cotangent: Tensor, strategy: Strategy) -> Dense:  # noqa: ARG002
        full = (1,) * (cotangent.dim() - 1 - len(self.broadcast)) + self.broadcast
        repeated = [i + 1 for i, size in enumerate(full) if size == 1]
        sums = cotangent.sum(repeated) if repeated else cotangent
        return Dense(sums.reshape(len(cotangent), *self.shape))


def _matrix_costs(sizes: Sizes, patches: int) -> dict[Strategy, Cost]:
    """Of G matrices (H, D) at T positions, where the (T, D) inputs must first be stored for all but `build`."""
    g, t, d, h = sizes
    costs: dict[Strategy, Cost] = {
        "gram": Cost(2 * g * t * t + patches, 2 * g * t * t * (d + h)),
        "build": Cost(g * h * d, 2 * g * t * h * d),
    }
    return {"outer product": Cost(0 if t * d == patches else patches, 2 * g * (d + h)), **costs} if t == 1 else costs


def shift(parameter: Tensor | None, axes_after: int = 0) -> Entry:
    """The entry of a shift: a parameter that the op adds to its output, `axes_after` axes before the last."""
    if parameter is None:
        return Entry(None)
    shape = tuple(parameter.shape)
    return Entry(parameter, ShiftForm(shape, shape + (1,) * axes_after))


def matrix(parameter: Tensor, inputs: Tensor) -> Entry:
    """The entry of a linear map: `y[*positions, h] = Σ_d W[h, d] inputs[*positions, d]`.

    Args:
        parameter: (H, *D), read as (H, D).
        inputs: (*positions, D), of one example of an op whose output is (*positions, H).
    """
    form = layout(tuple(parameter.shape))
    return Entry(parameter, MatrixForm(form, tuple(range(inputs.dim()))), _rows(inputs))


@rule(F.linear)
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[Entry]:
    """`y = x Wᵀ + b`."""
    return [matrix(weight, input), shift(bias)] if weight.dim() == 2 else []


def _convolution(
    space: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> list[Entry]:
    """`y = W ⋆ x + b` in so many dimensions of space."""
    strides, dilations = _each(stride, space), _each(dilation, space)
    image = _with_axes(input, space)
    if isinstance(padding, str):
        totals = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilations, weight.shape[2:], strict=True)]
        if any(total % 2 for total in totals):  # one more on the right: padded here, once
            image = F.pad(image, [side for t in reversed(totals) for side in (t // 2, t - t // 2)])
            totals = [0] * space
        paddings = tuple(total // 2 for total in totals)
    else:
        paddings = _each(padding, space)
    form = ConvolutionForm(tuple(weight.shape), strides, paddings, dilations, groups, False)
    return [Entry(weight, form, image), shift(bias, space)]


def _transposed(
    space: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,  # noqa: ARG001 (the output's size tells)
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> list[Entry]:
    """The adjoint of a convolution, plus b."""
    sizes = (_each(stride, space), _each(padding, space), _each(dilation, space))
    return [
        Entry(weight, ConvolutionForm(tuple(weight.shape), *sizes, groups, True), _with_axes(input, space)),
        shift(bias, space),
    ]


for _space, _op, _adjoint in (
    (1, torch.conv1d, torch.conv_transpose1d),
    (2, torch.conv2d, torch.conv_transpose2d),
    (3, torch.conv3d, torch.conv_transpose3d),
):
    rule(_op)(partial(_convolution, _space))
    rule(_adjoint)(partial(_transposed, _space))


@rule(F.embedding)
def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,  # noqa: ARG001 (of max_norm)
    scale_grad_by_freq: bool = False,
    sparse: bool = False,  # noqa: ARG001 (a storage of ordinary gradients)
) -> list[Entry]:
    """`y_t = W[a_t]`."""
    if max_norm is not None or scale_grad_by_freq:
        return []
    if padding_idx is not None and padding_idx < 0:
        padding_idx += len(weight)
    return [Entry(weight, LookupForm(tuple(weight.shape), padding_idx), input.reshape(-1))]


@rule(torch.matmul, Tensor.matmul, Tensor.__matmul__)
def matmul(input: Tensor, other: Tensor) -> list[Entry]:
    """`y = x W` and `y = W x`, with W of two axes."""
    return _product(input, other)


@rule(torch.mm, Tensor.mm)
def mm(input: Tensor, mat2: Tensor) -> list[Entry]:
    """`y = x W` and `y = W x`."""
    return _product(input, mat2)


@rule(torch.mv, Tensor.mv)
def mv(input: Tensor, vec: Tensor) -> list[Entry]:
    """`y = W x`."""
    return _product(input, vec)


def _product(left: Tensor, right: Tensor) -> list[Entry]:
    entries = []
    if right.dim() == 2:
        form = MatrixForm(layout(tuple(right.shape), outputs=(1,)), tuple(range(left.dim())))
        entries.append(Entry(right, form, _rows(left)))
    if left.dim() == 2 and right.dim() <= 2:
        columns, order = (right, (0,)) if right.dim() == 1 else (right.T, (1, 0))
        entries.append(Entry(left, MatrixForm(layout(tuple(left.shape)), order), _rows(columns)))
    return entries


@rule(torch.einsum)
def einsum(equation: str, *operands: Any) -> list[Entry]:
    """Two operands, of which one is a parameter: each of its letters is kept by the output or summed with the other."""
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or "..." in equation or "->" not in equation:
        return []
    left, _, output = equation.replace(" ", "").partition("->")
    names = left.split(",")
    return [
        entry
        for this, (x, w) in (((0, 1), operands), ((1, 0), operands[::-1]))
        for entry in _contraction(names[this[0]], names[this[1]], output, x, w)
    ]


def _contraction(x_axes: str, w_axes: str, y_axes: str, x: Tensor, w: Tensor) -> list[Entry]:
    """The entry of W in `y = Σ x W`, axes named by letters; none where it is not a matrix product of groups."""
    groups = [c for c in w_axes if c in x_axes and c in y_axes]
    outputs = [c for c in w_axes if c not in x_axes and c in y_axes]
    inputs = [c for c in w_axes if c in x_axes and c not in y_axes]
    positions = [c for c in x_axes if c not in w_axes and c in y_axes]
    plain = all([len(set(axes)) == len(axes) for axes in (x_axes, w_axes, y_axes)])
    sizes = [(x.shape[x_axes.index(c)], w.shape[w_axes.index(c)]) for c in w_axes if c in x_axes]
    plain = plain and len(w_axes) > 0 and all([a == b for a, b in sizes])  # an axis of 1 may be broadcast
    if not plain or len(groups + outputs + inputs) != len(w_axes) or len(groups + inputs + positions) != len(x_axes):
        return []
    at = [tuple(w_axes.index(c) for c in names) for names in (groups, outputs, inputs)]
    form = layout(tuple(w.shape), groups=at[0], outputs=at[1], inputs=at[2])
    a = x.permute([x_axes.index(c) for c in groups + positions + inputs])
    order = tuple(y_axes.index(c) for c in groups + positions + outputs)
    count = math.prod([x.shape[x_axes.index(c)] for c in positions])
    return [Entry(w, MatrixForm(form, order), a.reshape(form.sizes[0], count, form.sizes[2]))]


@rule(F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm, F.group_norm, torch.group_norm)
def norm(*arguments: Any, **named: Any) -> list[Entry]:
    """A normalisation's scale and shift: elementwise."""
    return [Entry(p) for p in (*arguments[1:], *named.values()) if isinstance(p, Tensor)]


@rule(F.instance_norm)
def instance_norm(
    input: Tensor,  # noqa: ARG001
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,  # noqa: ARG001
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    *_: Any,
    **__: Any,
) -> list[Entry]:
    """Scale and shift: elementwise."""
    if use_input_stats and running_mean is not None:
        raise ValueError(
            "per_sample: an example must not change what the next one sees. The loss calls instance_norm with running "
            "statistics in training mode. Use track_running_stats=False or evaluation mode."
        )
    return [Entry(weight), Entry(bias)]


@rule(F.batch_norm)
def batch_norm(
    input: Tensor,  # noqa: ARG001
    running_mean: Tensor | None,  # noqa: ARG001
    running_var: Tensor | None,  # noqa: ARG001
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    *_: Any,
    **__: Any,
) -> list[Entry]:
    """Scale and shift by fixed statistics: elementwise. Batch statistics would mix examples."""
    if training:
        raise ValueError(
            "per_sample: examples must not mix. The loss calls batch_norm in training mode, where it averages over the "
            "batch. Use evaluation mode, or a group norm instead."
        )
    return [Entry(weight), Entry(bias)]


@rule(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
def add(input: Any, other: Any, *more: Any, alpha: float = 1, **_: Any) -> list[Entry]:
    """A shift outside an op: `y = x + b`."""
    if more or alpha != 1 or (isinstance(input, Tensor) and isinstance(other, Tensor) and input.dtype != other.dtype):
        return []
    return [shift(x) for x in (input, other) if isinstance(x, Tensor)]


def _rows(x: Tensor) -> Tensor:
    """(*positions, D) as (1, T, D)."""
    return x.reshape(1, math.prod(x.shape[:-1]), x.shape[-1])


def _each(value: int | Sequence[int], space: int) -> tuple[int, ...]:
    """One number per axis of space."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * space if len(values) == 1 else values


def _with_axes(images: Tensor, space: int) -> Tensor:
    """One image (channels, *space) as a batch of one."""
    return images[None] if images.dim() == space + 1 else images
