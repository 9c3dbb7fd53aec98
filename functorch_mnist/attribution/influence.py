"""Influence by inner products of gradients. With ∇_i of a training and ∇'_j of a test example:

    gradient dot       ⟨∇_i, ∇'_j⟩, the Gram matrix, which is `per_sample.gram`
    gradient cosine    ⟨∇_i, ∇'_j⟩ / (|∇_i| |∇'_j|)
    TracIn             Σ_t lr_t ⟨∇_i, ∇'_j⟩ at checkpoints t (TracInCP)

A step of SGD on example i lowers the loss of example j by lr ⟨∇_i, ∇'_j⟩, to first order.

Reference: Pruthi et al., "Estimating training data influence by tracing gradient descent", NeurIPS 2020, equation 1 and
section 3.3.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce

import torch
from torch import Tensor

from .. import native
from ..arguments import check_fn, check_params, check_tensors, shown
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
    """The cosine of the gradients of each training and each test example.

    Args:
        loss_fn: `loss_fn(params, *example) -> ()`, pure.
        params: a pytree of float tensors.
        train, test: tuples of tensors (N, …) and (M, …), as the loss takes them.
        chunk_size: examples taken at a time, at least 1; by default all.
        plan: how `per_sample` computes each parameter; by default the cheapest way.
        world: the processes, all with the same examples, which divide the training examples between them.

    Returns:
        (N, M) in [-1, 1], float32 or wider; 0 where a gradient is zero. Above zero, the training example helps.

    Raises:
        TypeError: the parameters are a module, or `train` or `test` is one tensor.
        ValueError: the batches, the chunk size or the plan does not fit.

    Guarantees: also where inner products of gradients would overflow or underflow float32.

    Cost: two backward passes over each set.

    Example:
        >>> gradient_cosine(lambda w, x: w @ x, torch.zeros(2), (torch.eye(2),), (torch.tensor([[3.0, 4.0]]),))
        tensor([[0.6000],
                [0.8000]])
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
    """TracIn of each training on each test example, over checkpoints (TracInCP).

    Args:
        loss_fn: `loss_fn(params, *example) -> ()`, pure.
        checkpoints: a list of the parameters at T checkpoints of training, T at least 1.
        train, test: tuples of tensors (N, …) and (M, …), as the loss takes them.
        lrs: (T,), the learning rate at each checkpoint. With momentum μ pass lr / (1 - μ): the same
            factor for all, which changes no ranking.
        chunk_size, plan, world: as in `gradient_cosine`.

    Returns:
        (N, M), float32 or wider: `Σ_t lr_t ⟨∇_i, ∇'_j⟩`. Above zero, training on i lowers the loss of j.

    Raises:
        ValueError: there is no checkpoint, or not one learning rate for each.
        TypeError: `checkpoints` is a dict, `lrs` a number, `train` or `test` one tensor, or `loss_fn` no function.

    Cost: one backward pass over each set per checkpoint.

    Example:
        >>> one = (torch.tensor([[1.0, 2.0]]),)
        >>> tracin(lambda w, x: w @ x, [torch.zeros(2)], one, one, lrs=[0.1])
        tensor([[0.5000]])

    Reference: Pruthi, Liu, Kale, Sundararajan, "Estimating training data influence by tracing gradient descent",
        NeurIPS 2020, section 3.3 (TracInCP).
    """
    check_fn("tracin", "loss_fn", loss_fn, "Pass tracin(loss_fn, checkpoints, train, test, lrs=…).")
    for name, batch in (("train", train), ("test", test)):
        check_tensors("tracin", name, batch)
    if isinstance(checkpoints, Mapping):
        raise TypeError("tracin: checkpoints must be a list of parameters. Found a dict. Pass [params]?")
    if isinstance(lrs, (int, float)):
        raise TypeError(
            f"tracin: lrs must be a list, a learning rate for each checkpoint. Found {shown(lrs)}. Pass [{lrs}]?"
        )
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
    total: Tensor = reduce(torch.add, parts)
    return total


def group_sums(values: Tensor, groups: Tensor, *, count: int | None = None) -> Tensor:
    """Sums over groups of examples, such as those of a class, a user, a source or a document.

    The influence of a group is the sum over its examples. So is its gradient: the Gram matrix of groups' gradients is
    `group_sums(group_sums(gram, groups).T, groups)`, whose diagonal has their squared norms.

    Args:
        values: (N, …), such as influences (N, M) or features (N, F).
        groups: (N,) int64, the group of each example, at least 0.
        count: K, the number of groups; by default one more than the largest group.

    Returns:
        (K, …), of the type of `values`; zero for a group without examples.

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
