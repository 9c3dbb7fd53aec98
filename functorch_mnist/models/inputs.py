"""What a forward gets: nested dicts, lists and tuples of tensors, one for each example or one that all share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Spec = Any
"""What an argument looks like, hashable: its structure, and of each tensor the kind, shape, dtype and device."""


class Leaf(NamedTuple):
    """A tensor among the inputs."""

    name: str
    """Of the argument that holds it."""
    shared: bool
    """Whether all examples share it."""
    shape: tuple[int, ...]
    """Of one example, or of what is shared."""
    dtype: torch.dtype
    device: str


def described(value: Any, name: str, shared: bool, lead: int, found: list[Tensor]) -> Spec:
    """The spec of an argument.

    Args:
        value: the argument.
        name: its name.
        shared: whether all examples share its tensors.
        lead: how many leading axes number examples, where they do not.
        found: gets its tensors, in order.

    Raises:
        TypeError: a tensor is held by something else than dicts, lists and tuples.
    """
    if isinstance(value, Tensor):
        found.append(value)
        shape = tuple(value.shape) if shared else tuple(value.shape[lead:])
        return Leaf(name, shared, shape, value.dtype, str(value.device))
    if type(value) is dict:
        return "dict", tuple([(key, described(part, name, shared, lead, found)) for key, part in value.items()])
    if type(value) in (list, tuple):
        kind = "list" if type(value) is list else "tuple"
        return kind, tuple([described(part, name, shared, lead, found) for part in value])
    if isinstance(value, (dict, list, tuple)):
        raise TypeError(
            "apply: inputs must be tensors, or dicts, lists and tuples of them. "
            f"Found {type(value).__name__} in {name}."
        )
    return "value", value


def rebuilt(spec: Spec, tensors: Iterator[Tensor]) -> Any:
    """The argument with this spec and these tensors."""
    if isinstance(spec, Leaf):
        return next(tensors)
    kind, parts = spec
    if kind == "dict":
        return {key: rebuilt(part, tensors) for key, part in parts}
    if kind == "list":
        return [rebuilt(part, tensors) for part in parts]
    if kind == "tuple":
        return tuple([rebuilt(part, tensors) for part in parts])
    return parts


class Inputs:
    """Inputs of a trial, from what the inputs of a call look like."""

    def __init__(self, spec: Spec, batch_axis: int, numbers: Sequence[Tensor | None] | None = None) -> None:
        """From the spec of `(args, kwargs)`, and the numbers (B, …) of their tensors where these are at hand."""
        self.spec, self.batch_axis = spec, batch_axis
        self.leaves = leaves_of(spec)
        self.numbers = list(numbers) if numbers is not None else [None] * len(self.leaves)
        own = [x for leaf, x in zip(self.leaves, self.numbers, strict=True) if not leaf.shared]
        self.varies = not all([is_constant(x) for x in own])

    def examples(self, generator: torch.Generator) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Two examples, and the second one changed."""
        triples = [self._examples(leaf, x, generator) for leaf, x in zip(self.leaves, self.numbers, strict=True)]
        first, second, changed = ([triple[i] for triple in triples] for i in range(3))
        return first, second, changed

    def batched(self, examples: Sequence[Sequence[Tensor]]) -> tuple[list[Tensor], tuple[Any, Any]]:
        """The tensors for a batch of some examples, and the arguments that hold them."""
        tensors = [
            parts[0] if leaf.shared else torch.stack(parts, min(self.batch_axis, len(leaf.shape)))
            for leaf, parts in zip(self.leaves, zip(*examples, strict=True), strict=True)
        ]
        return tensors, rebuilt(self.spec, iter(tensors))

    def _examples(self, leaf: Leaf, x: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        device = "cpu" if leaf.device == "meta" else leaf.device
        if leaf.shared:
            shared = torch.zeros(leaf.shape, dtype=leaf.dtype, device=device) if x is None else x
            return shared, shared, shared
        if leaf.dtype.is_floating_point or leaf.dtype.is_complex:
            drawn = torch.randn((3, *leaf.shape), generator=generator).to(device, leaf.dtype)
            drawn.requires_grad_()  # so that each function which torch differentiates is seen
            return drawn[0], drawn[1], drawn[2]
        if x is None or len(x) == 0:
            first = torch.ones(leaf.shape, dtype=torch.int64)
            second = (torch.arange(first.numel()) + 1).remainder(2).reshape(leaf.shape)
            first, second = (part.to(device, leaf.dtype) for part in (first, second))
            return first, second, changed(second)
        if self.varies and is_constant(x):  # a mask without padding, say: what branches on it shall do as it will
            return x[0], x[0], x[0]
        varied = [row for row in x if not is_constant(row)]  # each of these decides as a batch that holds it
        first = varied[0] if varied else x[0]
        others = [row for row in varied if not torch.equal(row, first)]
        second = others[0] if others else changed(first)
        return first, second, changed(second)


def is_constant(x: Tensor | None) -> bool:
    """Whether a tensor holds one integer throughout."""
    if x is None or x.is_floating_point() or x.is_complex() or x.numel() == 0:
        return False
    return bool((x == x.flatten()[0]).all())


def changed(x: Tensor) -> Tensor:
    """Other integers, of the same set where there are two of them: what looks at all or any decides alike."""
    if x.dim() > 0:
        for other in (x.flip(-1), x.flip(0), x.roll(1, -1)):
            if not torch.equal(other, x):
                return other
    other = x.flatten().clone()
    other[-1:] = other[-1:] == 0
    return other.view(x.shape)


def leaves_of(spec: Spec) -> list[Leaf]:
    """The tensors in a spec, in order."""
    if isinstance(spec, Leaf):
        return [spec]
    kind, parts = spec
    if kind == "value":
        return []
    return [leaf for part in parts for leaf in leaves_of(part[1] if kind == "dict" else part)]


def with_leaves(spec: Spec, change: Callable[[Leaf], Leaf]) -> Spec:
    """The spec with other tensors."""
    if isinstance(spec, Leaf):
        return change(spec)
    kind, parts = spec
    if kind == "value":
        return spec
    if kind == "dict":
        return kind, tuple([(key, with_leaves(part, change)) for key, part in parts])
    return kind, tuple([with_leaves(part, change) for part in parts])
