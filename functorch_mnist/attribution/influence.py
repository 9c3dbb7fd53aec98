"""Influence by inner products of gradients. With ∇_i of a training and ∇'_j of a test example:

    gradient dot       ⟨∇_i, ∇'_j⟩, which is `per_sample.gram`
    gradient cosine    ⟨∇_i, ∇'_j⟩ / (|∇_i| |∇'_j|)
    TracIn             Σ_t lr_t ⟨∇_i, ∇'_j⟩ at checkpoints t

A step of SGD on example i lowers the loss of example j by lr ⟨∇_i, ∇'_j⟩, to first order.

Reference: Pruthi et al., "Estimating training data influence by tracing gradient descent", NeurIPS 2020, equation 1 and
section 3.3.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce

import torch
from torch import Tensor

from .. import native
from ..arguments import check_params, check_tensors
from ..distributed import SINGLE_PROCESS, World, map_rows
from ..per_sample import Plan, gram, norms
from ..per_sample.squares import power
from ..tree import Tree


def gradient_cosine(
    loss_fn: Callable[..., Tensor],
    params: Tree,
    train: Sequence[Tensor],
    test: Sequence[Tensor],
    *,
    chunk_size: int | None = None,
    plan: Plan | None = None,
    world: World = SINGLE_PROCESS,
) -> Tensor:
    """The cosine of the gradients of each training and each test example: (N, M), 0 where one is zero.

    Args:
        loss_fn: `loss_fn(params, *example) -> ()`, pure.
        params: a pytree of float tensors.
        train, test: tensors (N, …) and (M, …).
        chunk_size, plan, world: as in `per_sample.gram`.
    """
    check_params("gradient_cosine", params)
    for name, batch in (("train", train), ("test", test)):
        check_tensors("gradient_cosine", name, batch)
    of = partial(norms, loss_fn, params, chunk_size=chunk_size, plan=plan)
    sizes = [map_rows(world, of, *batch, unit=chunk_size) for batch in (train, test)]
    scales = [power(lengths) for lengths in sizes]
    if all([_are_ones(c) for c in scales]):
        products = gram(loss_fn, params, train, test, chunk_size=chunk_size, plan=plan, world=world)
    else:  # inner products may be out of float32's range: those of losses times powers of two are not

        def scaled_fn(params: Tree, *example: Tensor) -> Tensor:
            return loss_fn(params, *example[:-1]) * example[-1]

        pair = [(*batch, c) for batch, c in zip((train, test), scales, strict=True)]
        products = gram(scaled_fn, params, *pair, chunk_size=chunk_size, plan=plan, world=world)
        sizes = [lengths.double() * c.double() for lengths, c in zip(sizes, scales, strict=True)]
    lengths = sizes[0][:, None].double() * sizes[1].double()
    return torch.where(lengths == 0, 0.0, products / lengths).to(products.dtype)  # a NaN stays one


def _are_ones(c: Tensor) -> bool:
    """Whether all are, so far as the program may look."""
    known = native.numbers(c)
    return known is not None and bool((known == 1).all())


def tracin(
    loss_fn: Callable[..., Tensor],
    checkpoints: Sequence[Tree],
    train: Sequence[Tensor],
    test: Sequence[Tensor],
    *,
    lrs: Sequence[float] | Tensor,
    chunk_size: int | None = None,
    plan: Plan | None = None,
    world: World = SINGLE_PROCESS,
) -> Tensor:
    """TracIn of each training on each test example: (N, M).

    Args:
        loss_fn: `loss_fn(params, *example) -> ()`, pure.
        checkpoints: the parameters at T moments of training, at least one.
        train, test: tensors (N, …) and (M, …).
        lrs: (T,), the learning rate at each checkpoint. With momentum μ a step goes 1 / (1 - μ) times as far in all,
            which changes no order.
        chunk_size, plan, world: as in `per_sample.gram`.

    Raises:
        ValueError: there is no checkpoint, or there are not as many learning rates.

    Cost: for each checkpoint one backward pass over each set.
    """
    for name, batch in (("train", train), ("test", test)):
        check_tensors("tracin", name, batch)
    if isinstance(checkpoints, Mapping):
        raise TypeError("tracin: checkpoints must be a list of parameters. Found a dict. Pass [params]?")
    rates = torch.as_tensor(lrs)
    if len(checkpoints) < 1 or rates.shape != (len(checkpoints),):
        raise ValueError(
            f"tracin: at least one checkpoint, and a learning rate for each. "
            f"Found {len(checkpoints)} and rates of shape {tuple(rates.shape)}."
        )
    parts = (
        lr * gram(loss_fn, params, train, test, chunk_size=chunk_size, plan=plan, world=world)
        for params, lr in zip(checkpoints, lrs, strict=True)
    )
    found: Tensor = reduce(torch.add, parts)
    return found


def group_sums(values: Tensor, groups: Tensor, *, count: int | None = None) -> Tensor:
    """Sums over groups of examples, such as those of a class, a user, a source or a document.

    An influence adds up: that of a group is the sum over its examples. So does a gradient: the Gram matrix of groups'
    gradients is `group_sums(group_sums(gram, groups).T, groups)`, whose diagonal has their squared norms.

    Args:
        values: (N, …), such as influences (N, M) or features (N, F).
        groups: (N,) int64, the group of each example, at least 0.
        count: K, how many groups there are; by default one more than the largest number.

    Returns:
        (K, …).

    Raises:
        ValueError: shapes do not agree, or a group is out of range.

    Example:
        >>> group_sums(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([0, 1, 0]))
        tensor([[4.],
                [2.]])
    """
    if groups.dtype != torch.int64 or groups.shape != values.shape[:1]:
        raise ValueError(
            f"group_sums: groups must be int64 ({len(values)},). Found {groups.dtype} {tuple(groups.shape)}."
        )
    most = int(groups.max()) + 1 if count is None and len(groups) else count or 0
    if len(groups) and not 0 <= int(groups.min()) <= int(groups.max()) < most:
        raise ValueError(
            f"group_sums: groups must be from 0 to {most - 1}. Found {int(groups.min())} to {int(groups.max())}."
        )
    return values.new_zeros(most, *values.shape[1:]).index_add_(0, groups, values)
