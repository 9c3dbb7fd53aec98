"""What an optimizer is, and what each one asks of its trees."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import tree
from ..arguments import shown
from ..tree import Tree


class Optimizer(NamedTuple):
    """A pair of pure functions over any pytree of parameters."""

    init: Callable[[Tree], Tree]
    """`init(params) -> state`."""
    update: Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]
    """`update(params, state, grads) -> (params, state)`; `grads` is shaped as `params`."""
    elementwise: bool = False
    """Whether the update of a number depends on its own gradient and state alone, so that it can be made in shards."""


def no_updates(params: Tree) -> Tensor:
    """The count of updates at the start: a 0-d int64 zero on the device of the parameters."""
    values = tree.leaves(params)
    return torch.zeros((), dtype=torch.int64, device=values[0].device if values else None)


def check_grads(where: str, params: Tree, grads: Tree) -> None:
    """Raises ValueError for gradients without the structure and shapes of the parameters."""
    if all(tree.leaves(tree.map(lambda w, g: w.shape == g.shape, params, grads))):
        return
    for path, w, g in zip(tree.paths(params), tree.leaves(params), tree.leaves(grads), strict=True):
        if w.shape != g.shape:
            raise ValueError(
                f"{where}: gradients must have their parameters' shapes. Found {path}: {tuple(g.shape)} for "
                f"{tuple(w.shape)}. Are they per example?"
            )


def check_state(where: str, params: Tree, updates: Tensor, *, least: torch.dtype | None = None, **parts: Tree) -> None:
    """Raises ValueError for a state that `init` does not give for these parameters: moved, cast or of other shapes.

    Args:
        where: the optimizer that the error names.
        params: as given to `update`.
        updates: the count of updates.
        least: the narrowest type that the parts are kept in; by default that of the parameters.
        parts: the fields of the state that are shaped as the parameters.
    """
    leaves = tree.leaves(params)
    if leaves and (updates.shape, updates.dtype, updates.device) != ((), torch.int64, leaves[0].device):
        _refuse(where, "updates", _shown(updates), _shown(no_updates(params)))
    wanted = [(w.shape, torch.promote_types(w.dtype, least) if least else w.dtype, w.device) for w in leaves]
    for name, part in parts.items():
        values = tree.leaves(part)
        if len(values) != len(leaves):
            _refuse(where, name, f"{len(values)} tensors", f"{len(leaves)}")
        if [(v.shape, v.dtype, v.device) for v in values] == wanted:
            continue
        for path, v, (shape, dtype, device) in zip(tree.paths(part), values, wanted, strict=True):
            if (v.shape, v.dtype, v.device) != (shape, dtype, device):
                _refuse(where, f"{name}/{path}".rstrip("/"), _shown(v), f"{dtype} {tuple(shape)} on {device}")


def check_kind(where: str, state: object, kind: type) -> None:
    """Raises TypeError for the state of another optimizer.

    Args:
        where: the optimizer that the error names.
        state: as given to `update`.
        kind: of the states that `init` gives.
    """
    if not isinstance(state, kind):
        raise TypeError(
            f"{where}: the state must be the {kind.__name__} that init gives. Found {shown(state)}. "
            "Was it made for another optimizer?"
        )


def _refuse(where: str, path: str, found: str, wanted: str) -> None:
    raise ValueError(
        f"{where}: the state must be what init gives for these parameters. Found {path}: {found} for {wanted}. "
        "Were the parameters changed after init? Convert the state with them, or init again."
    )


def _shown(x: Tensor) -> str:
    return f"{x.dtype} {tuple(x.shape)} on {x.device}"
