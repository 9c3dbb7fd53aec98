"""Rules: what an op's inputs and its output's cotangent say about the sample gradients of its parameters.

A rule is a function with the signature of its op, registered under it. It sees one example and returns an entry for
each weight whose sample gradients it knows. For the others the op's own vector-Jacobian product is taken. So a rule can
only make things faster: what it leaves out is exact all the same.
"""

import math
import string
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..decompositions import fastest
from .forms import ConvolutionForm, Form, LookupForm, MatrixForm, ScaleForm, ShiftForm
from .layout import layout


class Entry(NamedTuple):
    """What a rule says about one parameter of an op."""

    parameter: Tensor | None
    """As the op got it; an entry for anything but a parameter of the model is ignored."""
    form: Form | None = None
    """None where it is best left to the op's own vector-Jacobian product."""
    saved: Tensor | None = None
    """What the form needs of the op's inputs, for one example."""


Rule = Callable[..., Iterable[Entry]]

_RULES: dict[Callable[..., Any], Rule] = {}


def rule(*ops: Callable[..., Any]) -> Callable[[Rule], Rule]:
    """Registers the decorated rule for ops such as `torch.nn.functional.linear`, in place of any before it.

    The rule is called with the arguments of the op, for one example. It returns entries; none at all where it does not
    apply, and then the op's own vector-Jacobian product is taken.

    Example:
        >>> @rule(torch.outer)
        ... def outer(input, vec2):
        ...     return [matrix(vec2, input[:, None]), Entry(input)]  # y_th = w_h x_t
    """

    def register(fn: Rule) -> Rule:
        for op in ops:
            _RULES[op] = fn
        return fn

    return register


def find(op: Callable[..., Any]) -> Rule | None:
    """The rule of an op, if it has one."""
    return _RULES.get(op)


def shift(parameter: Tensor | None, axes_after: int = 0, *, factor: float = 1) -> Entry:
    """The entry of a shift: a parameter that the op adds to its output, `axes_after` axes before the last.

    Args:
        parameter: as the op got it; none gives an entry that is ignored.
        axes_after: axes of the output behind those of the parameter, as 2 for the bias of images (C, height, width).
        factor: by which the op multiplies it.
    """
    if parameter is None:
        return Entry(None)
    shape = tuple(parameter.shape)
    return Entry(parameter, ShiftForm(shape, shape + (1,) * axes_after, factor))


def scale(parameter: Tensor | None, inputs: Tensor, axes_after: int = 0) -> Entry:
    """The entry of a scale: a parameter that the op multiplies with `inputs`, `axes_after` axes before the last."""
    if parameter is None:
        return Entry(None)
    shape = tuple(parameter.shape)
    return Entry(parameter, ScaleForm(shape, shape + (1,) * axes_after), inputs)


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
    """`y = W ⋆ x + b` in 1, 2 or 3 dimensions of space."""
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


@rule(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)
def matmul(input: Tensor, other: Tensor) -> list[Entry]:
    """`y = x W` and `y = W x`, with W of any axes: those before its last two number groups."""
    return _product(input, other)


@rule(Tensor.__rmatmul__)
def rmatmul(input: Tensor, other: Tensor) -> list[Entry]:
    """`y = other @ input`."""
    return _product(other, input)


@rule(torch.mm, Tensor.mm)
def mm(input: Tensor, mat2: Tensor) -> list[Entry]:
    """`y = x W` and `y = W x`."""
    return _product(input, mat2)


@rule(torch.mv, Tensor.mv)
def mv(input: Tensor, vec: Tensor) -> list[Entry]:
    """`y = W x`."""
    return _product(input, vec)


@rule(torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm)
def addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> list[Entry]:
    """`y = β b + α x W`."""
    return _added_product(input, mat1, mat2, beta, alpha)


@rule(torch.addmv, Tensor.addmv)
def addmv(input: Tensor, mat: Tensor, vec: Tensor, *, beta: float = 1, alpha: float = 1) -> list[Entry]:
    """`y = β b + α W x`."""
    return _added_product(input, mat, vec, beta, alpha)


def _added_product(input: Tensor, left: Tensor, right: Tensor, beta: float, alpha: float) -> list[Entry]:
    entries = [] if beta == 0 else [shift(input, factor=beta)]
    return entries + [
        entry if alpha == 1 or entry.saved is None else entry._replace(saved=entry.saved * alpha)
        for entry in _product(left, right)
    ]


def _product(left: Tensor, right: Tensor) -> list[Entry]:
    """The entries of `left @ right`."""
    if left.dim() == 0 or right.dim() == 0:
        return []
    entries = []
    if right.dim() == 2:
        form = MatrixForm(layout(tuple(right.shape), outputs=(1,)), tuple(range(left.dim())))
        entries.append(Entry(right, form, _rows(left)))
    if left.dim() == 2 and right.dim() <= 2:
        columns, order = (right, (0,)) if right.dim() == 1 else (right.T, (1, 0))
        entries.append(Entry(left, MatrixForm(layout(tuple(left.shape)), order), _rows(columns)))
    if left.dim() > 1 and right.dim() > 1 and max(left.dim(), right.dim()) > 2:
        entries += _batched_product(left, right)
    return entries


def _batched_product(left: Tensor, right: Tensor) -> list[Entry]:
    """The entries of a product whose factors have leading axes, as `matmul` aligns them."""
    names = string.ascii_lowercase[: max(left.dim(), right.dim()) - 2]
    x, w = (names[len(names) - (side.dim() - 2) :] for side in (left, right))
    axes = f"{x}XY", f"{w}YZ", f"{names}XZ"
    entries = [] if right.dim() == 2 else _contraction(*axes, left, right)
    return entries + _contraction(axes[1], axes[0], axes[2], right, left)


@rule(F.bilinear)
def bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[Entry]:
    """`y_h = x1ᵀ W_h x2 + b_h`."""
    pairs = (input1[..., :, None] * input2[..., None, :]).flatten(-2)
    return [matrix(weight, pairs), shift(bias)]


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


@rule(F.layer_norm, torch.layer_norm)
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> list[Entry]:
    """Scale and shift of the last axes, normalised."""
    return [scale(weight, F.layer_norm(input, normalized_shape, eps=eps)), shift(bias)]


@rule(F.rms_norm, torch.rms_norm)
def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> list[Entry]:
    """Scale of the last axes, normalised."""
    return [scale(weight, F.rms_norm(input, normalized_shape, eps=eps))]


@rule(F.group_norm, torch.group_norm)
def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> list[Entry]:
    """Scale and shift of channels, normalised by groups."""
    space = input.dim() - 2
    return [scale(weight, fastest(F.group_norm)(input, num_groups, eps=eps), space), shift(bias, space)]


@rule(F.instance_norm)
def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> list[Entry]:
    """Scale and shift of channels, normalised one by one."""
    space = input.dim() - 2
    plain = F.instance_norm(input, running_mean, running_var, None, None, use_input_stats, momentum, eps)
    return [scale(weight, plain, space), shift(bias, space)]


def may_mix(op: Callable[..., Any]) -> bool:
    """Whether an op may average over a batch."""
    return op is F.batch_norm or op is F.instance_norm


def refuse_mixing(op: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Raises for a norm that averages over examples.

    Raises:
        ValueError: an example would change what the next one sees.
    """
    given = {**dict(zip(_NORM_ARGUMENTS, args, strict=False)), **kwargs}
    if op is F.batch_norm and given.get("training", False):
        raise ValueError(
            "per_sample: examples must not mix. The loss calls batch_norm in training mode, where it averages over the "
            "batch. Use evaluation mode, or a group norm instead."
        )
    if op is F.instance_norm and given.get("training", True) and given.get("running_mean") is not None:
        raise ValueError(
            "per_sample: an example must not change what the next one sees. The loss calls instance_norm with running "
            "statistics in training mode. Use track_running_stats=False or evaluation mode."
        )


_NORM_ARGUMENTS = ("input", "running_mean", "running_var", "weight", "bias", "training")


@rule(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__)
def add(input: Any, other: Any, *more: Any, alpha: float = 1, **_: Any) -> list[Entry]:
    """A shift outside an op: `y = x + α b`."""
    return [] if more else _shifts(input, other, 1, alpha)


@rule(torch.sub, Tensor.sub, Tensor.__sub__, torch.subtract, Tensor.subtract, Tensor.sub_, Tensor.__isub__)
def sub(input: Any, other: Any, *more: Any, alpha: float = 1, **_: Any) -> list[Entry]:
    """`y = x - α b`."""
    return [] if more else _shifts(input, other, 1, -alpha)


@rule(torch.rsub, Tensor.__rsub__)
def rsub(input: Any, other: Any, *more: Any, alpha: float = 1, **_: Any) -> list[Entry]:
    """`y = b - α x`."""
    return [] if more else _shifts(input, other, -alpha, 1)


def _shifts(input: Any, other: Any, first: float, second: float) -> list[Entry]:
    if not _of_one_type(input, other):
        return []
    return [shift(x, factor=factor) for x, factor in ((input, first), (other, second)) if isinstance(x, Tensor)]


@rule(torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.mul_)
@rule(Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__)
def mul(input: Any, other: Any, *more: Any, **_: Any) -> list[Entry]:
    """A scale outside an op: `y = w ∘ x`."""
    if more or not (isinstance(input, Tensor) and isinstance(other, Tensor)) or not _of_one_type(input, other):
        return []
    return [scale(input, other), scale(other, input)]


@rule(torch.div, Tensor.div, Tensor.__truediv__, torch.true_divide, Tensor.true_divide, torch.divide, Tensor.divide)
def div(input: Any, other: Any, *more: Any, rounding_mode: str | None = None, **_: Any) -> list[Entry]:
    """`y = x / w`, whose derivative by w is `-x / w²`; and `y = w / x`."""
    if more or rounding_mode is not None or not (isinstance(input, Tensor) and isinstance(other, Tensor)):
        return []
    if not _of_one_type(input, other):
        return []
    return [scale(input, 1 / other), scale(other, -input / other.square())]


def _of_one_type(input: Any, other: Any) -> bool:
    """Whether two arguments have one dtype, so that no gradient is cast on its way."""
    return not (isinstance(input, Tensor) and isinstance(other, Tensor)) or input.dtype == other.dtype


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
