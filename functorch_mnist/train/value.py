"""In-run data Shapley: the value of training examples, computed while they are trained on.

A step of SGD on a subset S of its batch would change the loss L on validation examples by

    U(S) = L(w - η Σ_{i in S} ∇_i) - L(w) ≈ -η ⟨∇L, Σ_S ∇_i⟩ + η²/2 ⟨Σ_S ∇_i, H Σ_S ∇_j⟩,    H = ∇²L

The Shapley value of each example in this game has a closed form. Above zero where training on the example lowers the
validation loss, and with η the learning rate over the divisor of the batch, it is

    v_i = η p_i - η²/2 q_i,    p_i = ⟨∇L, ∇_i⟩,    q_i = ⟨∇_i, H Σ_j ∇_j⟩

to second order, and η p_i to first order. Values add up over the steps of a run.

Reference: Wang, Mittal, Song and Jia, "Data Shapley in one training run", ICLR 2025, equation 1, theorem 3 (first
order) and theorem 4, equations 2 and 3 (second order), with the opposite sign: https://arxiv.org/abs/2406.11011
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad, vmap

from .. import per_sample, random, tree
from ..arguments import check_fn, check_takes, check_tensors
from ..batch import check
from ..tree import Tree
from .step import Estimator, Shared, check_loss


class _Direction(NamedTuple):
    """The validation gradient of a step, with which per-sample gradients are multiplied."""

    sum: Tree
    """Like `params`: the weighted sum of validation gradients."""
    weight: Tensor
    """0-d: the sum of the weights."""
    examples: tuple[Tensor, ...]
    """The validation examples of this step."""


def gradient_with_data_values(
    loss_fn: Callable[..., Tensor],
    validation: Sequence[Tensor],
    *,
    validation_loss: Callable[..., Tensor] | None = None,
    validation_batch: int | None = None,
    ema_decay: float | None = None,
    refresh: bool = True,
    order: int = 1,
) -> Estimator:
    """The estimator of the ordinary gradient, with the in-run data Shapley value of each example.

    Args:
        loss_fn: `loss_fn(params, *example) -> ()`, pure. In `fit` the last tensor of an example is its key (2,).
        validation: a tuple of tensors (M, …), at least one example, none of them trained on: an example's gradient
            contributes |∇_i|² to its own value.
        validation_loss: `validation_loss(params, *validation example) -> ()`, pure; by default `loss_fn`. Without
            dropout and augmentation it needs no keys.
        validation_batch: how many validation examples a step draws, at least 1, with replacement, by the state's key
            and the step: their mean gradient is an unbiased estimate of that of all. By default each step takes all.
        ema_decay: decay d in [0, 1) of an exponential moving average of the validation gradients, which is kept in the
            state and takes the place of the step's own. With draws its variance is (1 - d) / (1 + d) of theirs, and it
            lags d / (1 - d) steps. By default nothing is kept.
        refresh: False leaves the moving average as it is and evaluates no validation example: for the steps between
            those of an estimator that refreshes it, see `Watch`. Before the first refresh all values are NaN.
        order: 1 or 2, of the Taylor expansion.

    Returns:
        The estimator. Its gradient is that of `gradient(loss_fn)`, up to rounding. Its aux holds, besides `"loss"`:
        `"count"`, the number of examples that count; `"keep"` (B,) bool, the mask; `"gradient_dot"` (B,), p_i; with
        order 2 also `"gradient_hessian_gradient"` (B,), q_i, with H at the validation examples of this step. Both are
        zero where masked, and per unit of η: see `data_values`. Make its state with `init_state(…, estimator)`.

    Raises:
        ValueError: a number is out of its range, or there is no validation example. From the estimator, if it keeps a
            moving average, for a state that was made without it. From `make_step`, for order 2 with several processes
            or shards, for q_i needs the gradient of the whole batch.
        TypeError: `validation` is one tensor, or a loss takes other arguments.

    Guarantees: with order 1, equal up to rounding for any number of processes. Compiles as one graph.

    The game is that of plain SGD. With momentum μ a gradient also acts in later steps, 1 / (1 - μ) times as far in
    total: p_i, which counts only the first of these, keeps the ranking at a constant learning rate if the validation
    gradient changes slowly. With Adam a gradient also changes the scale of all later steps: p_i is then the value of a
    plain SGD step in its place.

    Cost: the pass of `per_sample.grad_and_dot`, and, unless `refresh` is off, an ordinary gradient of the step's
        validation examples. With order 2 also a Hessian-vector product of their loss. With `ema_decay`, one more copy
        of the parameters.

    Example:
        >>> import torch
        >>> estimator = gradient_with_data_values(lambda w, x: (w - x) ** 2 / 2, (torch.tensor([3.0]),), order=2)
        >>> grads, aux = estimator(torch.tensor(0.0), torch.tensor([1.0, -1.0]))
        >>> aux["gradient_dot"], data_values(aux, lr=0.5)
        (tensor([ 3., -3.]), tensor([ 0.7500, -0.7500]))

    Reference: Wang et al., "Data Shapley in one training run", ICLR 2025, theorems 3 and 4.
    """
    check_fn("gradient_with_data_values", "loss_fn", loss_fn)
    check_tensors("gradient_with_data_values", "validation", validation)
    total = check("gradient_with_data_values", validation, None)
    smooth = ema_decay is None or 0 <= ema_decay < 1
    if total < 1 or (validation_batch is not None and validation_batch < 1) or not smooth or order not in (1, 2):
        raise ValueError(
            "gradient_with_data_values: at least one validation example, validation_batch at least 1, ema_decay in "
            f"[0, 1), order 1 or 2. Found {total} examples, {validation_batch}, {ema_decay} and {order}."
        )
    if not refresh and (ema_decay is None or order == 2):
        raise ValueError(
            f"gradient_with_data_values: refresh=False needs an ema_decay and order 1. Found {ema_decay} and {order}."
        )
    one = loss_fn if validation_loss is None else validation_loss
    examples = tuple(validation)
    check_takes(
        "gradient_with_data_values", "validation_loss", one, ["params", *["a tensor"] * len(examples)],
        "By default it is loss_fn. One that takes a key needs a validation_loss without it, or keys in validation.",
    )  # fmt: skip

    def mean_loss(params: Tree, rows: tuple[Tensor, ...]) -> Tensor:
        return vmap(one, in_dims=(None, *[0] * len(rows)))(params, *rows).mean()

    def init(params: Tree) -> Tree:
        if ema_decay is None:
            return ()
        wide = tree.map(lambda w: torch.zeros_like(tree.wide(w)), params)
        return wide, torch.zeros((), dtype=torch.float64, device=examples[0].device)

    def shared(params: Tree, kept: Tree, key: Tensor) -> tuple[Tree, _Direction]:
        if len(tree.leaves(kept)) != (0 if ema_decay is None else 1 + len(tree.leaves(params))):
            raise ValueError(
                "gradient_with_data_values: the state must keep what this estimator needs. Found "
                f"{len(tree.leaves(kept))} tensors in state.estimator. "
                "Make it with init_state(params, optimizer, key, estimator)."
            )
        if not refresh:
            mean, weight = kept
            return kept, _Direction(mean, weight, ())
        rows = examples
        if validation_batch is not None:
            which = random.randint(key, (validation_batch,), 0, total)
            rows = tuple([x[which] for x in examples])
        gradient = grad(mean_loss)(params, rows)
        if ema_decay is None:
            one_alone = torch.ones((), dtype=torch.float64, device=rows[0].device)
            return kept, _Direction(gradient, one_alone, rows)
        before, weight = kept
        mean = tree.map(lambda a, b: torch.lerp(tree.wide(b), a, ema_decay), before, gradient)
        weight = weight * ema_decay + (1 - ema_decay)
        return (mean, weight), _Direction(mean, weight, rows)

    def estimate(
        params: Tree, *batch: Tensor, mask: Tensor | None, shared: _Direction
    ) -> tuple[Tree, dict[str, Tensor]]:
        count = check("gradient_with_data_values", batch, mask)
        check_loss("gradient_with_data_values", "loss_fn", loss_fn, batch)
        keep = torch.ones(count, dtype=torch.bool, device=batch[0].device) if mask is None else mask
        if count == 0:
            nothing = torch.zeros(0, device=batch[0].device)
            products = {"gradient_dot": nothing} | ({"gradient_hessian_gradient": nothing} if order == 2 else {})
            return tree.zeros_like(params), {"loss": nothing.sum(), "count": keep.sum(), "keep": keep, **products}
        if order == 1:
            grads, dots, losses = per_sample.grad_and_dot(loss_fn, params, *batch, mask=mask, direction=shared.sum)
            products = {"gradient_dot": dots / shared.weight}
        else:
            factors = per_sample.factored(loss_fn, params, *batch, mask=mask).built()
            grads, losses = factors.weighted_sum(torch.ones_like(factors.losses)), factors.losses
            hvp = grad(lambda params: tree.dot(grad(mean_loss)(params, shared.examples), grads))(params)  # H Σ ∇_j
            products = {
                "gradient_dot": factors.dot(shared.sum) / shared.weight,
                "gradient_hessian_gradient": factors.dot(hvp),
            }
        return grads, {"loss": tree.wide(losses).sum(), "count": keep.sum(), "keep": keep, **products}

    return Estimator(estimate, shared=Shared(init, shared), whole=order == 2)


def data_values(aux: Mapping[str, Tensor], *, lr: float | Tensor, divisor: float | Tensor | None = None) -> Tensor:
    """The in-run data Shapley value of each example in a step of plain SGD.

    Args:
        aux: of a step with an estimator of `gradient_with_data_values`.
        lr: the learning rate of the step, a number or a 0-d tensor.
        divisor: what the step divided by; by default the number of examples that count.

    Returns:
        (B,), in units of the validation loss; zero where masked. Values add up over steps.

    Guarantees: above zero where training on the example lowers the validation loss. With order 2, the values of a batch
        sum to the second-order Taylor expansion of that decrease.

    Example: see `gradient_with_data_values`.

    Reference: Wang, Mittal, Song, Jia, "Data Shapley in one training run", ICLR 2025, theorems 3 and 4.
    """
    rate = lr / (aux["count"].double() if divisor is None else divisor)
    values = rate * aux["gradient_dot"]
    if "gradient_hessian_gradient" in aux:
        values = values - rate**2 / 2 * aux["gradient_hessian_gradient"]
    return values
