"""Sharded optimizers (ZeRO): each process keeps, and updates, 1 / P of the optimizer's state.

    G = reduce_scatter(Σ over own rows)      (n / P,)
    w, s ← update(w, s, G / divisor)      of the shard alone
    params = gather(w)

The shard is a slice of the parameters as one flat vector, padded to a multiple of P.

Reference: Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter models", SC 2020: stages 1
and 2; with the parameters in shards between steps, stage 3 by the whole model.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import tree
from ..optim import Optimizer
from ..tree import Tree
from .sums import all_gather, reduce_scatter
from .world import World

_ALIGNED = 64
"""Shards are multiples of 64 numbers: vectorised kernels round the last few numbers of a tensor differently."""


class Shard(NamedTuple):
    """A process's slice of a tree that is shaped as the parameters: a pytree."""

    values: Tensor
    """(n / P,)."""


class Sharded(NamedTuple):
    """A sharded optimizer. Its trees hold a `Shard` in place of each subtree that is shaped as the parameters."""

    init: Callable[[Tree], Tree]
    """`init(params) -> state`."""
    sum: Callable[[Tree], Shard]
    """`sum(grads) -> shard`: this process's slice of the sum over processes of the gradients of their rows."""
    update: Callable[[Tree, Tree, Shard], tuple[Tree, Tree]]
    """`update(params, state, grads) -> (params, state)`, with `params` as `keep` gives them."""
    keep: Callable[[Tree], Tree]
    """`keep(params)`: the parameters as they are kept between steps: whole, or a `Shard`."""
    split: Callable[[Tree], Tree]
    """`split(tree)`: from a tree of the plain optimizer, such as its state, to the shards of this process."""
    whole: Callable[[Tree], Tree]
    """`whole(tree)`: the inverse of `split`, the same on all processes, bit for bit: for evaluation, and for files that
    do not depend on the number of processes."""


def sharded(optimizer: Optimizer, world: World, params: Tree, *, keep_params: bool = True) -> Sharded:
    """The optimizer with its state in shards, for `train.make_step`.

    Args:
        optimizer: an elementwise one, whose update of a number depends on that number's gradient and state alone, see
            `Optimizer.elementwise`.
        world: the processes.
        params: a pytree of float tensors of one type, whose shapes are used.
        keep_params: whether each process keeps all parameters between steps (ZeRO stage 2), or a shard of them.

    Returns:
        The sharded optimizer.

    Raises:
        ValueError: the parameters are of several types, or the optimizer is not elementwise, such as one that clips.

    Guarantees: equal to the plain optimizer up to rounding. With `world.shards`, the same bits for any number of
        processes of one thread.

    Cost: the state takes 1 / P of its memory per process. A step sends as much as one all-reduce of the gradient.

    Example:
        >>> from functorch_mnist import optim
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> optimizer = sharded(optim.sgd(0.5), World(), params)
        >>> grads = optimizer.sum({"w": torch.tensor([2.0, 0.0])})
        >>> optimizer.update(params, optimizer.init(params), grads)[0]
        {'w': tensor([0., 2.])}

    Reference: Rajbhandari, Rasley, Ruwase, He, "ZeRO: memory optimizations toward training trillion parameter models",
        SC 2020.
    """
    if not optimizer.elementwise:
        raise ValueError(
            "sharded: an update of a number must depend on that number alone. Found an optimizer that does not say so. "
            "Does it clip by a norm? Clip before, or, where it is elementwise, say so by optimizer._replace."
        )
    like = tree.map(torch.Tensor.detach, params)
    leaves, structure = tree.flatten(like)
    kinds = {leaf.dtype for leaf in leaves}
    if len(kinds) != 1:
        raise ValueError(f"sharded: the parameters must be of one type. Found {sorted(map(str, kinds))}.")
    sizes = [leaf.numel() for leaf in leaves]
    length = -(-sum(sizes) // (world.size * _ALIGNED)) * _ALIGNED
    shapes = [leaf.shape for leaf in leaves]
    wanted = [(shape, True) for shape in shapes]

    def is_like_params(node: Tree) -> bool:
        found, other = tree.flatten(node)
        return other == structure and [(leaf.shape, leaf.dtype.is_floating_point) for leaf in found] == wanted

    def shard(values: Tree) -> Shard:
        start = world.rank * length
        return Shard(_slice(tree.leaves(values), start, start + length))

    def restored(node: Shard) -> Tree:
        pieces = all_gather(world, node.values)[: sum(sizes)].split(sizes)
        made = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
        return tree.restore(structure, made)

    def whole(values: Tree) -> Tree:
        return tree.replaced(values, lambda node: isinstance(node, Shard), restored)

    def split(values: Tree) -> Tree:
        return tree.replaced(values, is_like_params, shard)

    def keep(params: Tree) -> Tree:
        return params if keep_params else shard(params)

    def total(grads: Tree) -> Shard:
        flat = torch.cat([tree.wide(leaf).reshape(-1) for leaf in tree.leaves(grads)])
        missing = length * world.size - len(flat)
        return Shard(reduce_scatter(world, torch.cat([flat, flat.new_zeros(missing)]) if missing else flat))

    def update(params: Tree, state: Tree, grads: Shard) -> tuple[Tree, Tree]:
        own = shard(params) if keep_params else params
        own, state = optimizer.update(own, state, Shard(grads.values.to(own.values.dtype)))
        return (whole(own) if keep_params else own), state

    return Sharded(lambda params: optimizer.init(shard(params)), total, update, keep, split, whole)


def _slice(leaves: list[Tensor], start: int, stop: int) -> Tensor:
    """The numbers from start to stop of some tensors one after the other, with zeros beyond the last."""
    pieces, begin = [], 0
    for leaf in leaves:
        first, last = max(start - begin, 0), min(stop - begin, leaf.numel())
        if first < last:
            pieces.append(leaf.reshape(-1)[first:last])
        begin += leaf.numel()
    missing = stop - max(start, begin)
    if missing > 0:
        pieces.append(leaves[0].new_zeros(missing))
    return torch.cat(pieces)
