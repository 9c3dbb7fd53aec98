"""How a parameter is read by an op: as matrices, and through views."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How a parameter reads as G matrices (H, D), from D inputs to H outputs."""

    shape: tuple[int, ...]
    """Of the parameter."""
    split: tuple[int, ...]
    """The shape with its group axis split off."""
    order: tuple[int, ...]
    """The axes of `split`: those of groups, then of outputs, then of inputs."""
    sizes: tuple[int, int, int]
    """G, H, D."""

    def matrices(self, v: Tensor) -> Tensor:
        """(*lead, *shape) as (*lead, G, H, D)."""
        lead = v.shape[: v.dim() - len(self.shape)]
        axes = (*range(len(lead)), *(len(lead) + axis for axis in self.order))
        return v.reshape(*lead, *self.split).permute(axes).reshape(*lead, *self.sizes)

    def parameter(self, m: Tensor) -> Tensor:
        """(*lead, G, H, D) as (*lead, *shape)."""
        lead = m.shape[:-3]
        m = m.reshape(*lead, *(self.split[axis] for axis in self.order))
        axes = (*range(len(lead)), *(len(lead) + axis for axis in inverse(self.order)))
        return m.permute(axes).reshape(*lead, *self.shape)


def layout(
    shape: tuple[int, ...],
    *,
    groups: tuple[int, ...] = (),
    outputs: tuple[int, ...] = (0,),
    inputs: tuple[int, ...] | None = None,
) -> Layout:
    """The layout of a parameter whose axes are named.

    Args:
        shape: of the parameter.
        groups: its axes that number independent matrices.
        outputs: its axes that the op's output keeps.
        inputs: its axes that the op sums over; by default the others, in order.
    """
    rest = tuple(axis for axis in range(len(shape)) if axis not in groups + outputs)
    inputs = rest if inputs is None else inputs
    sizes = [math.prod([shape[axis] for axis in axes]) for axes in (groups, outputs, inputs)]
    return Layout(shape, shape, groups + outputs + inputs, (sizes[0], sizes[1], sizes[2]))


def kernel_layout(shape: tuple[int, ...], groups: int) -> Layout:
    """The layout of a convolution's weight (G · H, channels, *kernel): inputs in the order kernel, channel."""
    split = (groups, shape[0] // groups, *shape[1:])
    order = (0, 1, *range(3, len(split)), 2)
    return Layout(shape, split, order, (groups, split[1], math.prod(shape[1:])))


def inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    """The permutation that undoes `order`."""
    return tuple(sorted(range(len(order)), key=order.__getitem__))


@dataclass(frozen=True)
class View:
    """A parameter seen in another shape: its axes permuted, then reshaped."""

    before: tuple[int, ...]
    order: tuple[int, ...]
    after: tuple[int, ...]

    def forward(self, v: Tensor) -> Tensor:
        """(*lead, *before) as (*lead, *after)."""
        lead = v.shape[: v.dim() - len(self.before)]
        axes = (*range(len(lead)), *(len(lead) + axis for axis in self.order))
        return v.permute(axes).reshape(*lead, *self.after)

    def backward(self, v: Tensor) -> Tensor:
        """(*lead, *after) as (*lead, *before)."""
        lead = v.shape[: v.dim() - len(self.after)]
        v = v.reshape(*lead, *(self.before[axis] for axis in self.order))
        return v.permute((*range(len(lead)), *(len(lead) + axis for axis in inverse(self.order))))


def as_matrices(v: Tensor, layout: Layout, views: tuple[View, ...]) -> Tensor:
    """What is shaped as a parameter that is read through views, as matrices (*lead, G, H, D)."""
    for view in views:
        v = view.forward(v)
    return layout.matrices(v)


def as_parameter(m: Tensor, layout: Layout, views: tuple[View, ...]) -> Tensor:
    """The way back."""
    v = layout.parameter(m)
    for view in reversed(views):
        v = view.backward(v)
    return v


def permuting_view(fn: Callable[[Tensor], Tensor], before: tuple[int, ...]) -> View:
    """The view that `fn`, which permutes axes, takes."""
    marked = fn(torch.empty(tuple(range(2, 2 + len(before))), device="meta"))  # sizes that name the axes
    order = tuple(size - 2 for size in marked.shape)
    return View(before, order, tuple(before[axis] for axis in order))


def reshaping_view(before: tuple[int, ...], after: tuple[int, ...]) -> View:
    """The view that keeps the order of the numbers."""
    return View(before, tuple(range(len(before))), after)


def of_rows(layout_: Layout, views: tuple[View, ...]) -> tuple[Layout, bool] | None:
    """How a matrix read through views reads from its columns to its rows, and whether inputs and outputs then swap.

    `x W` is a linear map from rows to columns: its factors are those of the map from columns to rows, swapped. None for
    what is no matrix or its transpose.
    """
    shape = layout_.shape
    if len(shape) != 2 or layout_ not in (layout(shape), layout(shape, outputs=(1,))):
        return None
    swapped = layout_.order != (0, 1)
    for view in reversed(views):
        if (view.order, view.after) != ((1, 0), view.before[::-1]):
            return None
        shape, swapped = shape[::-1], not swapped
    return layout(shape), swapped
