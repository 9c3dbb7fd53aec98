"""Quantities of per-sample gradients, each by one backward pass over the batch.

With ∇_i the gradient of example i's loss:

    norms            |∇_i|
    grad_and_norms   Σ_i ∇_i  and  |∇_i|
    grad_and_dot     Σ_i ∇_i  and  ⟨∇_i, v⟩
    weighted_sum     Σ_i c_i ∇_i
    clipped_sum      Σ_i min(1, C / |∇_i|) ∇_i
    dot              ⟨∇_i, v⟩
    gram             ⟨∇_i, ∇_j⟩
    second_moment    Σ_i ∇_i²
    kronecker        Σ_i Σ_t a_it a_itᵀ  and  Σ_i Σ_t g_it g_itᵀ

All take `loss_fn(params, *example) -> ()`, a pure function of one example; `params`, a pytree of float tensors; and
`*batch`, tensors (B, …). All take `mask` (B,) bool: an example with False, whatever it holds, gives exactly zero; and
`chunk_size`: that many examples are taken at a time, and the result does not depend on it. `torch.compile` compiles one
chunk, whatever their number; in `grads` and `gram`, and inside a transform of torch.func, it compiles each.

Most take `group` (B,), any integers: the group of each example. ∇_i is then the sum over its group,

    G_i = Σ_{j: group_j = group_i} ∇_j

in norms, products and dense gradients, whose row i stays example i's; sums over examples become sums over groups, each
once. A masked example belongs to no group: it adds nothing, and its row is zero. A chunk holds whole groups, so a group
of more than `chunk_size` rows is refused, and compiled, where sizes are not known, so is a `chunk_size` below B.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import arguments, native, tree
from .. import batch as batches
from ..batch import Chunk, masked
from ..distributed import SINGLE_PROCESS, World, map_rows
from ..tree import Tree
from .algebra import Factored
from .capture import LossFn, dense_grads
from .chunked import Chunked, Run
from .groups import checked, firsts, leads, summed
from .planning import Plan
from .prepared import TENSOR, TREE, passes, returns
from .terms import Kronecker


class ClippedSum(NamedTuple):
    """A sum of clipped gradients, and what was seen on the way."""

    grads: Tree
    """Σ_i s_i ∇_i, like `params`."""
    norms: Tensor
    """(B,): |∇_i| before clipping; zero where masked."""
    losses: Tensor
    """(B,): zero where masked."""
    nonfinite: Tensor
    """0-d int64: how many examples, or groups, were left out because their gradient's norm is inf or NaN."""


class GradAndNorms(NamedTuple):
    """The gradient of the summed loss, and what the gradients that add up to it are like."""

    grads: Tree
    """Σ_i ∇_i, like `params`."""
    norms: Tensor
    """(B,): |∇_i|; zero where masked."""
    losses: Tensor
    """(B,): zero where masked."""


class GradAndDot(NamedTuple):
    """The gradient of the summed loss, and how the gradients that add up to it lie to a direction."""

    grads: Tree
    """Σ_i ∇_i, like `params`."""
    products: Tensor
    """(B,): ⟨∇_i, v⟩; zero where masked."""
    losses: Tensor
    """(B,): zero where masked."""


def grads(
    loss_fn: LossFn,
    params: Tree,
    *batch: Tensor,
    mask: Tensor | None = None,
    group: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tree:
    """The dense gradients: a tree with leaves (B, *w). The oracle of all the others: no rule and no factor in it.

    Args:
        loss_fn: `loss_fn(params, *example) -> ()`, a pure function of one example.
        params: a pytree of float tensors.
        batch: tensors (B, …): the examples in their rows.
        mask: (B,) bool; an example with False gives exactly zero, whatever it holds.
        group: (B,) integers, the group of each example: ∇_i is then the sum over its group.
        chunk_size: examples taken at a time, at least 1; by default all. The result does not depend on it.

    Raises:
        TypeError: a parameter is not a float tensor, or the loss takes other arguments.
        ValueError: the batch, the mask, the loss or the plan does not fit.

    Cost: B times the parameters in memory.

    Example:
        >>> grads(lambda w, x: w * x, torch.tensor(2.0), torch.tensor([1.0, 3.0]))
        tensor([1., 3.])
    """
    arguments.check_params("per_sample.grads", params)
    parts = []
    for chunk in batches.chunks("per_sample.grads", batch, mask, chunk_size):
        leaves = dense_grads(loss_fn, params, batches.blanked(chunk.batch, chunk.mask))
        if chunk.mask is not None:
            leaves = [masked(leaf, chunk.mask) for leaf in leaves]
        parts.append([chunk.unpadded(leaf) for leaf in leaves])
    rows = [torch.cat(leaf_parts) for leaf_parts in zip(*parts, strict=True)]
    first = _firsts("grads", batch, mask, group)
    return tree.unflatten(params, rows if first is None else [summed(first, leaf) for leaf in rows])


def factored(
    loss_fn: LossFn,
    params: Tree,
    *batch: Tensor,
    mask: Tensor | None = None,
    plan: Plan | None = None,
    has_aux: bool = False,
) -> Factored:
    """The factored gradients of each example of a batch, by one backward pass.

    Args:
        loss_fn: `loss_fn(params, *example) -> ()`, a pure function of one example.
        params: a pytree of float tensors.
        batch: tensors (B, …), B at least 1.
        mask: (B,) bool; the gradient of an example with False is exactly zero.
        plan: strategies to take instead of those that would be chosen.
        has_aux: the loss returns `(loss, aux)`, aux a pytree of tensors that is kept with the losses.

    Raises:
        TypeError: a parameter is not a float tensor.
        ValueError: the batch, the mask, the loss or the plan does not fit; the loss mixes examples by a batch norm.

    Cost: one forward pass of one example, one forward and one backward pass of the batch.
    """
    if batches.check("per_sample", batch, mask) == 0:
        raise ValueError("per_sample.factored: at least one example. Found an empty batch.")
    found: Factored = passes(loss_fn, params, plan, has_aux)(batch, mask)
    return found


def norms(
    loss_fn: LossFn,
    params: Tree,
    *batch: Tensor,
    mask: Tensor | None = None,
    group: Tensor | None = None,
    chunk_size: int | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """|∇_i|: (B,), float32 or wider.

    Args:
        loss_fn: `loss_fn(params, *example) -> ()`, a pure function of one example.
        params: a pytree of float tensors.
        batch: tensors (B, …): the examples in their rows.
        mask: (B,) bool; an example with False gives exactly zero, whatever it holds.
        group: (B,) integers, the group of each example: ∇_i is then the sum over its group.
        chunk_size: examples taken at a time, at least 1; by default all. The result does not depend on it.
        plan: strategies to take instead of those that would be chosen, from `plan`.

    Raises:
        TypeError: a parameter is not a float tensor, or the loss takes other arguments.
        ValueError: the batch, the mask, the loss or the plan does not fit; a group does not fit in a chunk.

    Guarantees: right though float32 may not hold the squares, for gradients with numbers from 5e-35.

    Example:
        >>> norms(lambda w, x: w @ x, torch.zeros(2), torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        tensor([5., 1.])
    """
    chunked, ids = _in_groups("norms", loss_fn, params, batch, mask, group, chunk_size, plan)
    return chunked.rows(lambda run, *ids: [run(Factored.norms, *ids)], *ids)[0]


def leaf_norms(
    loss_fn: LossFn,
    params: Tree,
    *batch: Tensor,
    mask: Tensor | None = None,
    group: Tensor | None = None,
    chunk_size: int | None = None,
    plan: Plan | None = None,
) -> Tree:
    """The norm of each parameter's part of ∇_i: a tree with leaves (B,), float32 or wider.

    Args:
        loss_fn: `loss_fn(params, *example) -> ()`, a pure function of one example.
        params: a pytree of float tensors.
        batch: tensors (B, …): the examples in their rows.
        mask: (B,) bool; an example with False gives exactly zero, whatever it holds.
        group: (B,) integers, the group of each example: ∇_i is then the sum over its group.
        chunk_size: examples taken at a time, at least 1; by default all. The result does not depend on it.
        plan: strategies to take instead of those that would be chosen, from `plan`.

    Raises:
        TypeError: a parameter is not a float tensor, or the loss takes other arguments.
        ValueError: the batch, the mask, the loss or the plan does not fit; a group does not fit in a chunk.

    Example:
        >>> leaf_norms(lambda p, x: p["a"] * x + p["b"], {"a": torch.zeros(()), "b": torch.zeros(())}, torch.ones(2))
        {'a': tensor([1., 1.]), 'b': tensor([1., 1.])}
    """
    chunked, ids = _in_groups("leaf_norms", loss_fn, params, batch, mask, group, chunk_size, plan)
    return tree.unflatten(params, chunked.rows(lambda run, *ids: tree.leaves(run(Factored.leaf_norms, *ids)), *ids))


def grad_and_norms(
    loss_fn: LossFn,
    params: Tree,
    *batch: Tensor,
    mask: Tensor | None = None,
    group: Tensor | None = None,
    chunk_size: int | None = None,
    plan: Plan | None = None,
) -> GradAndNorms:
    """The gradient of the summed loss and all norms, for a training step that also monitors its gradients.

    Args:
        loss_fn: `loss_fn(params, *example) -> ()`, a pure function of one example.
        params: a pytree of float tensors.
        batch: tensors (B, …): the examples in their rows.
        mask: (B,) bool; an example with False gives exactly zero, whatever it holds.
        group: (B,) integers, the group of each example: ∇_i is then the sum over its group.
        chunk_size: examples taken at a time, at least 1; by default all. The result does not depend on it.
        plan: strategies to take instead of those that would be chosen, from `plan`.

    Returns:
        The sum like `params`; norms and losses (B,).

    Raises:
        TypeError: a parameter is not a float tensor, or the loss takes other arguments.
        ValueError: the batch, the mask, the loss or the plan does not fit; a group does not fit in a chunk.

    Cost: one backward pass. Of a prepared loss, each parameter's factors are let go as soon as its cotangents are
        there, so no more memory than an ordinary backward pass.

    Example:
        >>> found = grad_and_norms(lambda w, x: w * x, torch.tensor(0.0), torch.tensor([1.0, -3.0]))
        >>> found.grads, found.norms
        (tensor(-2.), tensor([1., 3.]))
    """
    chunked, ids = _in_groups("grad_and_norms", loss_fn, params, batch, mask, group, chunk_size, plan)
    grads, (sizes, losses) = _sum_and_rows(chunked, lambda run, *ids: run(_sum, *ids), *ids)
    return GradAndNorms(grads, sizes, losses)


def grad_and_dot(
    loss_fn: LossFn,
    params: Tree,
    *batch: Tensor,
    direction: Tree,
    mask: Tensor | None = None,
    group: Tensor | None = None,
    chunk_size: int | None = None,
    plan: Plan | None = None,
) -> GradAndDot:
    """The gradient of the summed loss and all inner products with v, a tree like `params`.

    Args:
        loss_fn: `loss_fn(params, *example) -> ()`, a pure function of one example.
        params: a pytree of float tensors.
        batch: tensors (B, …): the examples in their rows.
        direction: v, a tree with the structure and shapes of `params`.
        mask: (B,) bool; an example with False gives exactly zero, whatever it holds.
        group: (B,) integers, the group of each example: ∇_i is then the sum over its group.
        chunk_size: examples taken at a time, at least 1; by default all. The result does not depend on it.
        plan: strategies to take instead of those that would be chosen, from `plan`.

    Returns:
        The sum like `params`; products and losses (B,).

    Raises:
        TypeError: a parameter is not a float tensor, or the loss takes other arguments.
        ValueError: the batch, the mask, the loss or the plan does not fit; `direction` has other shapes.

    Cost: one backward pass, and less than one forward pass; sample gradients that are small are built once for both.

    Example:
        >>> batch = torch.tensor([1.0, -3.0])
        >>> found = grad_and_dot(lambda w, x: w * x, torch.tensor(0.0), batch, direction=torch.tensor(2.0))
        >>> found.grads, found.products
        (tensor(-2.), tensor([ 2., -6.]))
    """
    chunked = Chunked("grad_and_dot", loss_fn, params, batch, mask, chunk_size, plan)
    grads, (products, losses) = _sum_and_rows(chunked, lambda run: run(_sum_and_dot, direction))
    first = _firsts("grad_and_dot", batch, mask, group)
    return GradAndDot(grads, products if first is None else summed(first, products), losses)


def weighted_sum(
    loss_fn: LossFn,
    params: Tree,
    *batch: Tensor,
    weights: Tensor,
    mask: Tensor | None = None,
    chunk_size: int | None = None,
    plan: Plan | None = None,
) -> Tree:
    """Σ_i c_i ∇_i for weights c (B,): a tree like `params`; of groups it needs none, for these have one weight each.

    Args:
        loss_fn: `loss_fn(params, *example) -> ()`, a pure function of one example.
        params: a pytree of float tensors.
        batch: tensors (B, …): the examples in their rows.
        weights: (B,) c, of any sign.
        mask: (B,) bool; an example with False gives exactly zero, whatever it holds.
        chunk_size: examples taken at a time, at least 1; by default all. The result does not depend on it.
        plan: strategies to take instead of those that would be chosen, from `plan`.

    Raises:
        TypeError: a parameter is not a float tensor, or the loss takes other arguments.
        ValueError: the batch, the mask, the loss or the plan does not fit.

    Guarantees: its gradient with respect to the weights is `dot`.

    Example:
        >>> weights = torch.tensor([1.0, 2.0])
        >>> weighted_sum(lambda w, x: w * x, torch.tensor(0.0), torch.tensor([1.0, 3.0]), weights=weights)
        tensor(7.)
    """
    batches.check("per_sample.weighted_sum", batch, mask)
    _check_rows("weighted_sum", "weights", weights, batch)
    weights = weights if mask is None else masked(weights, mask)
    chunked = Chunked("weighted_sum", loss_fn, params, batch, mask, chunk_size, plan)
    return chunked.sums(lambda run, c: run(Factored.weighted_sum, c), weights, like=params)


def clipped_sum(
    loss_fn: LossFn,
    params: Tree,
    *batch: Tensor,
    max_norm: float | Tensor | Callable[[Tensor], Tensor],
    mask: Tensor | None = None,
    group: Tensor | None = None,
    chunk_size: int | None = None,
    plan: Plan | None = None,
) -> ClippedSum:
    """Σ_i s_i ∇_i with `s_i = min(1, max_norm / |∇_i|)`, by one backward pass.

    Args:
        loss_fn: `loss_fn(params, *example) -> ()`, a pure function of one example.
        params: a pytree of float tensors.
        batch: tensors (B, …): the examples in their rows.
        max_norm: the largest norm that an example keeps, above 0: a number, or a 0-d tensor, whose value is not
            checked. Or another rule: a function of all norms (B,), zero where masked, to the factors s (B,); with
            groups it has to give all examples of one the same, as an elementwise rule does.
        mask: (B,) bool; an example with False gives exactly zero, whatever it holds.
        group: (B,) integers, the group of each example: the groups' sums are clipped, and `norms` are theirs.
        chunk_size: examples taken at a time, at least 1; by default all. The result does not depend on it.
        plan: strategies to take instead of those that would be chosen, from `plan`.

    Raises:
        TypeError: a parameter is not a float tensor, the loss takes other arguments, or `max_norm` is none of these.
        ValueError: the batch, the mask, the loss or the plan does not fit; `max_norm` is a number not above 0, a tensor
            with axes, or a function that does not return (B,); a group does not fit in a chunk.

    Guarantees: an example whose norm is inf or NaN adds exactly zero and is counted; one whose norm is zero adds zero.
        A group whose norm is inf or NaN is left out whole, and counted once.

    Cost: with a function and a `chunk_size` smaller than B there are two backward passes, for it needs all norms.

    Example:
        >>> clipped_sum(lambda w, x: w * x, torch.tensor(0.0), torch.tensor([1.0, 3.0]), max_norm=2.0).grads
        tensor(3.)
        >>> x, user = torch.tensor([1.0, 3.0, -2.5]), torch.tensor([48213, -1, 48213])
        >>> clipped_sum(lambda w, x: w * x, torch.tensor(0.0), x, max_norm=2.0, group=user).norms
        tensor([1.5000, 3.0000, 1.5000])

    Reference: Abadi et al., "Deep learning with differential privacy", CCS 2016, algorithm 1; in one pass, Bu et al.,
        "Differentially private optimization on large model at small cost", ICML 2023.
    """
    batches.check("per_sample.clipped_sum", batch, mask)
    if not (isinstance(max_norm, (int, float, Tensor)) or callable(max_norm)):
        raise TypeError(f"clipped_sum: max_norm must be a number, a tensor or a function. Found {max_norm!r}.")
    if isinstance(max_norm, (int, float)) and not max_norm > 0:
        raise ValueError(f"clipped_sum: max_norm must be above 0. Found {max_norm}.")
    if isinstance(max_norm, Tensor) and max_norm.dim() > 0:
        raise ValueError(f"clipped_sum: a tensor max_norm must be 0-d. Found {tuple(max_norm.shape)}.")
    chunked, ids = _in_groups("clipped_sum", loss_fn, params, batch, mask, group, chunk_size, plan)
    grouped = len(ids)
    known: list[Tensor] = []
    if callable(max_norm) and not chunked.alone:
        sizes = norms(loss_fn, params, *batch, mask=mask, group=group, chunk_size=chunk_size, plan=plan)
        known.append(_factors(max_norm, sizes))

    def clipped(run: Run, *columns: Tensor) -> tuple[Tree, list[Tensor]]:
        ids, known = columns[:grouped], columns[grouped:]
        if callable(max_norm):
            found, sizes = run(_built, *ids)
            factors = known[0] if known else _factors(max_norm, sizes)
            grads, sizes, losses, count = _scaled(found, sizes, factors, *ids, careful=True)
        else:
            limit = max_norm if isinstance(max_norm, Tensor) else torch.tensor(float(max_norm), dtype=torch.float64)
            grads, sizes, losses, count = _clipped(run, limit, *ids, looks=batch[0].device.type == "cpu")
        return (grads, count), [sizes, losses]

    none = torch.zeros((), dtype=torch.int64, device=batch[0].device)
    (total, nonfinite), (all_norms, losses) = chunked.both(clipped, *ids, *known, like=(params, none))
    return ClippedSum(total, all_norms, losses, nonfinite)


def dot(
    loss_fn: LossFn,
    params: Tree,
    *batch: Tensor,
    direction: Tree,
    mask: Tensor | None = None,
    group: Tensor | None = None,
    chunk_size: int | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """⟨∇_i, v⟩ for a tree v like `params`: (B,), float32 or wider.

    Args:
        loss_fn: `loss_fn(params, *example) -> ()`, a pure function of one example.
        params: a pytree of float tensors.
        batch: tensors (B, …): the examples in their rows.
        direction: v, a tree with the structure and shapes of `params`.
        mask: (B,) bool; an example with False gives exactly zero, whatever it holds.
        group: (B,) integers, the group of each example: ∇_i is then the sum over its group.
        chunk_size: examples taken at a time, at least 1; by default all. The result does not depend on it.
        plan: strategies to take instead of those that would be chosen, from `plan`.

    Raises:
        TypeError: a parameter is not a float tensor, or the loss takes other arguments.
        ValueError: the batch, the mask, the loss or the plan does not fit; `direction` has other shapes.

    Example:
        >>> dot(lambda w, x: w * x, torch.tensor(0.0), torch.tensor([1.0, 3.0]), direction=torch.tensor(2.0))
        tensor([2., 6.])
    """
    chunked = Chunked("dot", loss_fn, params, batch, mask, chunk_size, plan)
    products = chunked.rows(lambda run: [run(Factored.dot, direction)])[0]
    first = _firsts("dot", batch, mask, group)
    return products if first is None else summed(first, products)


def gram(
    loss_fn: LossFn,
    params: Tree,
    batch_a: Sequence[Tensor],
    batch_b: Sequence[Tensor] | None = None,
    *,
    mask: Tensor | None = None,
    mask_b: Tensor | None = None,
    group: Tensor | None = None,
    group_b: Tensor | None = None,
    chunk_size: int | None = None,
    plan: Plan | None = None,
    world: World = SINGLE_PROCESS,
) -> Tensor:
    """⟨∇_i, ∇'_j⟩ for all i of one batch and j of another: (B, B'), float32 or wider.

    Args:
        loss_fn: `loss_fn(params, *example) -> ()`, a pure function of one example.
        params: a pytree of float tensors.
        batch_a, batch_b: tuples of tensors (B, …) and (B', …); without `batch_b` all pairs of `batch_a`.
        mask, mask_b: of the two; without `batch_b`, `mask` holds for both.
        group, group_b: of the two, (B,) and (B',) integers, in the same way.
        chunk_size: examples taken at a time, at least 1; by default all. The result does not depend on it.
        plan: strategies to take instead of those that would be chosen, from `plan`.
        world: the processes, all with the same examples, which divide the rows of the result between them.

    Raises:
        TypeError: a parameter is not a float tensor, or the loss takes other arguments.
        ValueError: the batch, the mask, the loss or the plan does not fit; `mask_b` or `group_b` comes without
            `batch_b`.

    Cost: one backward pass over each batch, over `batch_b` by each process. With chunks, the factors of `batch_b` (of
        `batch_a`, where it stands for both) are kept, gradients that are smaller than their factors in place of these.

    Example:
        >>> gram(lambda w, x: w @ x, torch.zeros(2), (torch.tensor([[1.0, 2.0], [0.0, 1.0]]),))
        tensor([[5., 2.],
                [2., 1.]])
    """
    if isinstance(batch_a, Tensor) or isinstance(batch_b, Tensor):
        raise TypeError("gram: a batch must be a tuple of tensors, such as (x, y). Found a tensor.")
    if batch_b is None and (mask_b is not None or group_b is not None):
        raise ValueError("gram: mask_b and group_b belong to batch_b. Found no batch_b.")
    if group is not None or group_b is not None:
        first = _firsts("gram", batch_a, mask, group)
        first_b = first if batch_b is None else _firsts("gram", batch_b, mask_b, group_b)
        options: dict[str, Any] = {"chunk_size": chunk_size, "plan": plan, "world": world}
        products = gram(loss_fn, params, batch_a, batch_b, mask=mask, mask_b=mask_b, **options)
        products = products if first is None else summed(first, products)
        return products if first_b is None else summed(first_b, products.T).T
    if world.size > 1:
        batch_b, mask_b = (batch_a, mask) if batch_b is None else (batch_b, mask_b)

        def band_of(*rows: Tensor, mask: Tensor | None = None) -> Tensor:
            return gram(loss_fn, params, rows, batch_b, mask=mask, mask_b=mask_b, chunk_size=chunk_size, plan=plan)

        batches.size_of_chunks("per_sample.gram", batch_a, mask, chunk_size)
        return map_rows(world, band_of, *batch_a, mask=mask, unit=chunk_size)
    mine = Chunked("gram", loss_fn, params, tuple(batch_a), mask, chunk_size, plan).runs()
    if batch_b is None:
        return _symmetric([(chunk, run(Factored.built)) for chunk, run in mine])
    theirs = Chunked("gram", loss_fn, params, tuple(batch_b), mask_b, chunk_size, plan).runs()
    kept = [(chunk, run(Factored.built)) for chunk, run in theirs]
    bands = []
    for chunk, run in mine:
        part = run(Factored.built)
        band = torch.cat([other.unpadded(part.gram(factors).T) for other, factors in kept]).T
        bands.append(chunk.unpadded(band))
    return torch.cat(bands)


def _symmetric(parts: list[tuple[Chunk, Factored]]) -> Tensor:
    """The inner products of all pairs, each block of two chunks taken once."""
    rows: list[list[Tensor]] = [[] for _ in parts]
    for i, (mine, part) in enumerate(parts):
        for j, (other, factors) in enumerate(parts[: i + 1]):
            block = other.unpadded(mine.unpadded(part.gram(factors)).T).T
            rows[i].append(block)
            if j < i:
                rows[j].append(block.T)
    return torch.cat([torch.cat(row, 1) for row in rows])


def second_moment(
    loss_fn: LossFn,
    params: Tree,
    *batch: Tensor,
    mask: Tensor | None = None,
    group: Tensor | None = None,
    chunk_size: int | None = None,
    plan: Plan | None = None,
) -> Tree:
    """Σ_i ∇_i², elementwise: a tree like `params`, float32 or wider.

    Args:
        loss_fn: `loss_fn(params, *example) -> ()`, a pure function of one example.
        params: a pytree of float tensors.
        batch: tensors (B, …): the examples in their rows.
        mask: (B,) bool; an example with False gives exactly zero, whatever it holds.
        group: (B,) integers, the group of each example: ∇_i is then the sum over its group.
        chunk_size: examples taken at a time, at least 1; by default all. The result does not depend on it.
        plan: strategies to take instead of those that would be chosen, from `plan`.

    Raises:
        TypeError: a parameter is not a float tensor, or the loss takes other arguments.
        ValueError: the batch, the mask, the loss or the plan does not fit; a group does not fit in a chunk.

    Example:
        >>> second_moment(lambda w, x: w * x, torch.tensor(0.0), torch.tensor([1.0, 3.0]))
        tensor(10.)
    """
    chunked, ids = _in_groups("second_moment", loss_fn, params, batch, mask, group, chunk_size, plan)
    return chunked.sums(lambda run, *ids: run(Factored.second_moment, *ids), *ids, like=tree.map(tree.wide, params))


def kronecker(
    loss_fn: LossFn,
    params: Tree,
    *batch: Tensor,
    mask: Tensor | None = None,
    chunk_size: int | None = None,
    plan: Plan | None = None,
) -> dict[str, Kronecker]:
    """The factors Σ a aᵀ and Σ g gᵀ over examples and positions, of each factored parameter, by its path.

    With a bias that the same op adds come the sums Σ a, for the factor `Kronecker.joined` of both. Positions count one
    by one, so the factors of groups are the same.

    Args:
        loss_fn: `loss_fn(params, *example) -> ()`, a pure function of one example.
        params: a pytree of float tensors.
        batch: tensors (B, …): the examples in their rows.
        mask: (B,) bool; an example with False gives exactly zero, whatever it holds.
        chunk_size: examples taken at a time, at least 1; by default all. The result does not depend on it.
        plan: strategies to take instead of those that would be chosen, from `plan`.

    Raises:
        TypeError: a parameter is not a float tensor, or the loss takes other arguments.
        ValueError: the batch, the mask, the loss or the plan does not fit.

    Example:
        >>> factors = kronecker(lambda w, x: (w @ x).sum(), torch.zeros(1, 2), torch.tensor([[1.0, 2.0]]))
        >>> factors[""].inputs
        tensor([[[1., 2.],
                 [2., 4.]]])

    Reference: Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature", ICML
        2015, section 3; for convolutions Grosse and Martens, ICML 2016.
    """
    batches.check("per_sample.kronecker", batch, mask)
    chunked = Chunked("kronecker", loss_fn, params, batch, mask, chunk_size, plan)
    keep = torch.ones_like(batch[0].flatten(1)[:, 0], dtype=torch.bool) if mask is None else mask
    factors: dict[str, Kronecker] = chunked.sums(lambda run, keep: run(Factored.kronecker, keep), keep)
    return factors


def _built(found: Factored, *group: Tensor) -> tuple[Factored, Tensor]:
    """What a clipped sum is taken of, and the norms."""
    found = found.built()
    return found, found.norms(*group)


def _in_groups(
    where: str,
    loss_fn: LossFn,
    params: Tree,
    batch: Sequence[Tensor],
    mask: Tensor | None,
    group: Tensor | None,
    chunk_size: int | None,
    plan: Plan | None,
) -> tuple[Chunked, list[Tensor]]:
    """The gradients of a batch in chunks of whole groups, and the column of groups, if there is one."""
    first = _firsts(where, batch, mask, group)
    chunked = Chunked(where, loss_fn, params, batch, mask, chunk_size, plan, first)
    return chunked, [] if first is None else [first]


def _firsts(where: str, batch: Sequence[Tensor], mask: Tensor | None, group: Tensor | None) -> Tensor | None:
    """The first row of each row's group, checked."""
    if group is None:
        return None
    return checked(where, group, mask, batches.check(f"per_sample.{where}", batch, mask))


def _sum_and_rows(chunked: Chunked, of: Callable[..., Any], *columns: Tensor) -> tuple[Tree, list[Tensor]]:
    """The sum over all chunks that `of(run, *columns)` returns first, and the rows (B,) that it returns after it."""

    def both(run: Run, *columns: Tensor) -> tuple[Tree, list[Tensor]]:
        grads, *rows = of(run, *columns)
        return grads, rows

    return chunked.both(both, *columns, like=chunked.params)


@returns(TREE, TENSOR, TENSOR)
def _sum(found: Factored, *group: Tensor) -> tuple[Tree, Tensor, Tensor]:
    """The sum of all gradients, the norms and the losses."""
    found, sizes = _built(found, *group)
    return found.weighted_sum(torch.ones_like(found.losses)), sizes, found.losses


@returns(TREE, TENSOR, TENSOR)
def _sum_and_dot(found: Factored, direction: Tree) -> tuple[Tree, Tensor, Tensor]:
    """The sum of all gradients, their inner products with a direction, and the losses."""
    found = found.built()
    return found.weighted_sum(torch.ones_like(found.losses)), found.dot(direction), found.losses


@returns(TREE, TENSOR, TENSOR, TENSOR)
def _clip(found: Factored, max_norm: Tensor, *group: Tensor) -> tuple[Tree, Tensor, Tensor, Tensor]:
    """The clipped sum, the norms, the losses and how many norms are not finite."""
    found, sizes = _built(found, *group)
    return _scaled(found, sizes, (max_norm / sizes).clamp(max=1), *group, careful=True)


def _clip_finite(found: Factored, max_norm: Tensor, *group: Tensor) -> tuple[Tree, Tensor, Tensor, Tensor]:
    """The same where all norms are finite: so that nothing need be copied for those that are not."""
    found, sizes = _built(found, *group)
    return _scaled(found, sizes, (max_norm / sizes).clamp(max=1), *group, careful=False)


def _clipped(run: Run, max_norm: Tensor, *group: Tensor, looks: bool) -> tuple[Tree, Tensor, Tensor, Tensor]:
    """The same, of one chunk; `looks`: whether the program may wait for a number."""
    if looks and not torch.compiler.is_dynamo_compiling():
        result: tuple[Tree, Tensor, Tensor, Tensor] = run(_clip_finite, max_norm, *group)
        count = native.numbers(result[3])
        if count is not None and not count.any():
            return result
    careful: tuple[Tree, Tensor, Tensor, Tensor] = run(_clip, max_norm, *group)
    return careful


def _scaled(
    found: Factored, sizes: Tensor, factors: Tensor, *group: Tensor, careful: bool
) -> tuple[Tree, Tensor, Tensor, Tensor]:
    finite = sizes.isfinite()
    kept = found.masked(finite) if careful else found
    clipped = kept.weighted_sum(masked(factors, finite & (sizes > 0)))
    once = [leads(firsts(ids)) for ids in group]
    return clipped, sizes, found.losses, torch.stack([~finite, *once]).all(0).sum()


def _factors(max_norm: Callable[[Tensor], Tensor], sizes: Tensor) -> Tensor:
    """The factors that a rule makes of all norms, checked."""
    factors = max_norm(sizes)
    _check_rows("clipped_sum", "what max_norm returns", factors, (sizes,))
    return factors


def _check_rows(where: str, name: str, values: Tensor, batch: tuple[Tensor, ...]) -> None:
    if not isinstance(values, Tensor) or values.shape != batch[0].shape[:1]:
        found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"{where}: {name} must be a tensor ({len(batch[0])},). Found {found}.")
