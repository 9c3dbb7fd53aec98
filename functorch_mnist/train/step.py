"""One training step.

    G = Σ_i m_i ∇loss(w; example_i),    (w, s) ← optimizer(w, s, G / divisor)

An estimator works on sums over examples and the step divides once, so that chunks, padding and several processes give
the same result. The step of one process is that of a world of one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.func import grad, vmap

from .. import native, random, tree
from ..arguments import check_fn, check_key, check_params, check_takes, independent, shown
from ..batch import blanked, check
from ..distributed import SINGLE_PROCESS, Sharded, World, all_gather, all_reduce
from ..distributed.sums import pairwise_sum
from ..optim import Optimizer
from ..tree import Tree

_SHARED = 2
"""The stream of `Shared.fn`, folded into the state's key: the first two are the order and the keys of `Draws`."""


class State(NamedTuple):
    """The training state: all that training carries from step to step, one pytree of tensors. `init_state` makes it."""

    params: Tree
    """The parameters, a pytree of float tensors."""
    optimizer: Tree
    """The optimizer's state."""
    step: Tensor
    """0-d int64: the number of steps made."""
    key: Tensor
    """(2,): the root of all random streams; steps do not change it."""
    estimator: Tree = ()
    """What the estimator keeps or adapts, such as an adaptive clipping norm."""


def _as_it_is(_grads: Tree, aux: dict[str, Tensor]) -> dict[str, Tensor]:
    return aux


class Shared(NamedTuple):
    """What an estimator computes once per step, the same on all processes: it does not depend on the batch."""

    init: Callable[[Tree], Tree]
    """`init(params) -> kept`: the initial value of what is kept between steps, in `State.estimator`."""
    fn: Callable[[Tree, Tree, Tensor], tuple[Tree, Tree]]
    """`fn(params, kept, key) -> (kept, shared)`, with the step's own key (2,); `shared` is passed to `Estimator.fn`."""


@dataclass(frozen=True)
class Estimator:
    """A gradient estimator: `(params, *batch, mask=None) -> (grads, aux)`, sums over the examples of the batch.

    `grads` is shaped as `params`. `aux` holds tensors by name: the 0-d sum of the losses `"loss"` at least; other 0-d
    tensors are sums as well, added over processes; tensors (B, …) are rows of the examples. Take medians in callbacks.
    A masked example, whatever it holds, adds exactly nothing.

    Example:
        >>> gradient(lambda w, x: w * x)(torch.tensor(2.0), torch.tensor([1.0, 3.0]))
        (tensor(4.), {'loss': tensor(8.)})
    """

    fn: Callable[..., tuple[Tree, dict[str, Tensor]]]
    """`fn(params, *batch, mask=…) -> (grads, aux)`; with `shared`, it also takes `shared=…`. The mask is (B,) bool, or
    None where all rows are examples."""
    finish: Callable[[Tree, dict[str, Tensor]], dict[str, Tensor]] = _as_it_is
    """`finish(grads, aux) -> aux`: adds what follows from the sums over all processes, such as a ratio."""
    shared: Shared | None = None
    """What is computed once per step; None for most estimators."""
    whole: bool = False
    """Whether `fn` needs all rows of a batch at once: then neither several processes nor shards are possible."""

    def __call__(
        self, params: Tree, *batch: Tensor, mask: Tensor | None = None, key: Tensor | None = None
    ) -> tuple[Tree, dict[str, Tensor]]:
        """The estimate of one batch.

        Args:
            params: a pytree of float tensors.
            batch: tensors (B, …).
            mask: (B,) bool; by default all examples count.
            key: (2,), for what is shared; by default `random.key(0)`.

        Returns:
            `(grads, aux)`.
        """
        if self.shared is None:
            grads, aux = self.fn(params, *batch, mask=mask)
        else:
            own = random.key(0, device=batch[0].device) if key is None else key
            _, shared = self.shared.fn(params, self.shared.init(params), own)
            grads, aux = self.fn(params, *batch, mask=mask, shared=shared)
        return grads, self.finish(grads, aux)


def check_is_state(where: str, state: object) -> None:
    """Refuses what is no training state, such as parameters alone.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(state, State):
        raise TypeError(
            f"{where}: the first argument must be a train.State. Found {shown(state)}. Are these the "
            "parameters? Make a state of them with train.init_state(params, optimizer, key), or init_private_state."
        )


def check_optimizer(where: str, optimizer: object) -> None:
    """Refuses what is no optimizer of this library.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(optimizer, (Optimizer, Sharded)):
        raise TypeError(
            f"{where}: optimizer must be an optim.Optimizer. Found {shown(optimizer)}. One of torch.optim "
            "changes parameters in place: take optim.sgd, optim.adam, … of this library?"
        )


def check_loss(where: str, name: str, loss_fn: Callable[..., Tensor], batch: Sequence[Tensor]) -> None:
    """Refuses a loss whose signature does not take the parameters and each tensor of a batch.

    Raises:
        TypeError: it does not.
    """
    tensors = [f"a tensor {(*x.shape[1:],)}".replace(",)", ")") for x in batch]
    code = None if torch.compiler.is_compiling() else getattr(loss_fn, "__code__", None)
    if code is not None and "mask" in code.co_varnames[code.co_argcount :][: code.co_kwonlyargcount]:
        raise TypeError(
            f"{where}: {name} must return losses. Found one that takes a mask. Is it a train.Estimator(fn)?"
        )
    check_takes(
        where, name, loss_fn, ["params", *tensors],
        "fit and fit_private append a key (2,) of each example, for dropout and augmentation: write "
        "loss_fn(params, x, y, key), also where it does not use the key.",
    )  # fmt: skip


def check_estimate(out: Any) -> tuple[Tree, dict[str, Tensor]]:
    """What the function of an estimator returned, refused where a step could not use it.

    Raises:
        TypeError: it is no pair of gradients and a dict of tensors with the sum of the losses.
    """
    rule = "Estimator: fn(params, *batch, mask) must return (grads, aux), aux a dict of tensors that has 'loss'."
    if type(out) is not tuple or len(out) != 2 or not isinstance(out[1], dict):
        raise TypeError(f"{rule} Found {type(out).__name__}. Return result.grads, {{'loss': result.losses.sum()}}?")
    aux = out[1]
    if "loss" not in aux:
        raise TypeError(f"{rule} Found {sorted(aux)}. Add the 0-d sum of the losses.")
    for name, value in aux.items():
        if not isinstance(value, Tensor):
            remedy = "The mask is None where no row is padding." if value is None else "Keep it a tensor: no .item()."
            raise TypeError(f"{rule} Found {name!r}: {type(value).__name__}. {remedy}")
    return out


def init_state(params: Tree, optimizer: Optimizer | Sharded, key: Tensor, estimator: Estimator | None = None) -> State:
    """The training state before the first step.

    Args:
        params: a pytree of float tensors, such as those of `models.from_module`.
        optimizer: the optimizer of the step, which makes its own initial state.
        key: (2,), the root of all random streams: the order of examples, dropout, an estimator's draws.
        estimator: the estimator of the step, where it keeps something, such as a moving average.

    Raises:
        TypeError: the parameters are a module, the optimizer is one of torch's, or the key is a seed.
        ValueError: the key is not (2,).

    Example:
        >>> from functorch_mnist import optim
        >>> init_state({"w": torch.zeros(2)}, optim.sgd(0.1), random.key(0)).step
        tensor(0)
    """
    check_params("init_state", params)
    check_optimizer("init_state", optimizer)
    check_key("init_state", key)
    kept = optimizer.keep(params) if isinstance(optimizer, Sharded) else params
    theirs = () if estimator is None or estimator.shared is None else estimator.shared.init(params)
    step = torch.zeros((), dtype=torch.int64, device=key.device)
    return State(kept, optimizer.init(params), step, key, theirs)


def gradient(loss_fn: Callable[..., Tensor]) -> Estimator:
    """The estimator of the ordinary gradient, from the loss of one example.

    Args:
        loss_fn: `loss_fn(params, *example) -> ()`, pure. In `fit` the last tensor of an example is its key (2,).

    Returns:
        The estimator. Its aux holds the sum of the losses, `"loss"`.

    Raises:
        ValueError: from the estimator, for a loss that is not 0-d, or a batch that does not fit.
        TypeError: from the estimator, for a loss that does not take the tensors of the batch, such as `fit`'s keys.

    Cost: an ordinary forward and backward pass, under `vmap`.

    Example:
        >>> grads, aux = gradient(lambda w, x: (w - x) ** 2)(torch.tensor(0.0), torch.tensor([1.0, 3.0]))
        >>> grads, aux["loss"]
        (tensor(-8.), tensor(10.))
    """

    check_fn("gradient", "loss_fn", loss_fn, "Pass a function of params and one example.")

    def one(params: Tree, *example: Tensor) -> Tensor:
        loss = loss_fn(params, *example)
        if loss.shape != ():
            raise ValueError(
                f"gradient: the loss of one example must be 0-d. Found {tuple(loss.shape)}. Is a mean missing?"
            )
        return loss

    def losses(params: Tree, *batch: Tensor) -> Tensor:
        check_loss("gradient", "loss_fn", loss_fn, batch)
        of_each: Tensor = vmap(one, in_dims=(None, *[0] * len(batch)))(params, *batch)
        return of_each

    return batch_gradient(losses)


def batch_gradient(losses_fn: Callable[..., Tensor]) -> Estimator:
    """The estimator of the ordinary gradient, from the losses of a batch: for forwards written for batches.

    Args:
        losses_fn: `losses_fn(params, *batch) -> (B,)`, pure, its i-th number a function of the i-th example alone. In
            `fit` the last tensor of the batch is the examples' keys (B, 2).

    Returns:
        The estimator. Its aux holds the sum of the losses, `"loss"`.

    Raises:
        ValueError: from the estimator, for losses that are not (B,), such as a mean, or a batch that does not fit.
        TypeError: from the estimator, for losses that do not take the tensors of the batch, such as `fit`'s keys.

    Cost: an ordinary forward and backward pass.

    Example:
        >>> grads, aux = batch_gradient(lambda w, x: (w - x) ** 2)(torch.tensor(0.0), torch.tensor([1.0, 3.0]))
        >>> grads, aux["loss"]
        (tensor(-8.), tensor(10.))
    """

    def estimate(params: Tree, *batch: Tensor, mask: Tensor | None) -> tuple[Tree, dict[str, Tensor]]:
        rows = check("gradient", batch, mask)
        check_loss("batch_gradient", "losses_fn", losses_fn, batch)

        def total(params: Tree) -> tuple[Tensor, Tensor]:
            losses = losses_fn(params, *blanked(batch, mask))
            if losses.shape != (rows,):
                raise ValueError(
                    f"batch_gradient: the losses must be one per example, ({rows},). Found {tuple(losses.shape)}. "
                    "Is there a mean?"
                )
            loss = (losses if mask is None else torch.where(mask, losses, 0.0)).sum()
            if tree.leaves(params) and not native.depends(loss):
                raise independent("gradient")
            return loss, loss.detach()

        grads, loss = grad(total, has_aux=True)(params)
        return grads, {"loss": loss}

    return Estimator(estimate)


class Step(Protocol):
    """A training step, `step(state, *batch, mask=None, divisor=None) -> (state, aux)`: the shape of a scan."""

    def __call__(
        self, state: State, *batch: Tensor, mask: Tensor | None = None, divisor: float | Tensor | None = None
    ) -> tuple[State, dict[str, Tensor]]: ...


def make_step(
    loss_fn: Callable[..., Tensor] | Estimator, optimizer: Optimizer | Sharded, world: World = SINGLE_PROCESS
) -> Step:
    """A training step: the estimator, the sum over processes, one division, the optimizer.

    Args:
        loss_fn: an `Estimator`, or the loss of one example, `loss_fn(params, *example) -> ()`, pure, which stands for
            `gradient(loss_fn)`. For `fit` it takes a key (2,) last: `loss_fn(params, x, y, key)`.
        optimizer: from `optim`; gets the mean gradient.
        world: the processes. The step of each takes its own rows, those of `distributed.rows_of`.

    Returns:
        `step(state, *batch, mask=None, divisor=None) -> (state, aux)`. `batch`: tensors (B, …). `mask`: (B,) bool.
        `divisor`: what the sums are divided by, by default B. `aux`: the estimator's, the sum `"loss"` in it, over the
        rows of all processes. The state is the same on all.

    Raises:
        ValueError: from the step, for tensors that differ in B, a mask that is not (B,) bool, and without a divisor for
            a mask (B would count padding), several processes (each knows only its rows) or an empty batch; where the
            parts of a world do not divide B. At once, where the estimator needs whole batches and the world has parts.
        TypeError: the optimizer is one of torch's. From the step, for parameters in place of a state, the state of
            another optimizer, or a loss that does not take the tensors of the batch.

    Guarantees: pure. Compiles as one graph. With `world.shards`, the same bits for any number of processes, where the
        estimator's parts are called alike: compile the estimator and the optimizer then, not the step.

    Example:
        >>> from functorch_mnist import optim, random
        >>> step = make_step(lambda w, x: (w - x) ** 2, optim.sgd(0.5))
        >>> state = init_state(torch.tensor(0.0), optim.sgd(0.5), random.key(0))
        >>> state, aux = step(state, torch.tensor([1.0, 3.0]))
        >>> state.params, aux["loss"]
        (tensor(2.), tensor(10.))
    """
    check_optimizer("make_step", optimizer)
    estimator = loss_fn if isinstance(loss_fn, Estimator) else gradient(loss_fn)
    if estimator.whole and world.parts > 1:
        raise ValueError(
            f"make_step: this estimator needs all rows of a batch in one place. Found a world of {world.parts} parts."
        )

    def step(
        state: State, *batch: Tensor, mask: Tensor | None = None, divisor: float | Tensor | None = None
    ) -> tuple[State, dict[str, Tensor]]:
        check_is_state("step", state)
        rows = check("step", batch, mask)
        if divisor is None and (mask is not None or world.size > 1):
            which = (
                "a mask needs a divisor, for B counts the padding" if world.size == 1 else "processes need a divisor"
            )
            raise ValueError(f"step: {which}. Pass the number of real rows of all.")
        if divisor is None and rows == 0:
            raise ValueError("step: a batch without a divisor must have an example. Found B = 0. Pass a divisor?")
        count = rows if divisor is None else divisor
        params = optimizer.whole(state.params) if isinstance(optimizer, Sharded) else state.params
        fn, kept = estimator.fn, state.estimator
        if estimator.shared is not None:
            key = random.fold_in(random.fold_in(state.key, _SHARED), state.step)
            kept, shared = estimator.shared.fn(params, kept, key)
            fn = partial(fn, shared=shared)
        sums, aux = _total(world, replace(estimator, fn=fn), optimizer, params, batch, mask)
        grads = tree.map(lambda g: g / count, sums)
        own, optimizer_state = optimizer.update(state.params, state.optimizer, grads)
        return State(own, optimizer_state, state.step + 1, state.key, kept), aux

    return step


def _total(
    world: World,
    estimator: Estimator,
    optimizer: Optimizer | Sharded,
    params: Tree,
    batch: Sequence[Tensor],
    mask: Tensor | None,
) -> tuple[Tree, dict[str, Tensor]]:
    """The estimate over the rows of all processes: the sums, as the optimizer takes them, and aux."""
    rows, parts = len(batch[0]), world.parts_here
    if rows % parts:
        raise ValueError(f"step: the {parts} parts of a process must divide its rows. Found {rows}. Use rows_of?")
    estimates, columns = [], []
    for part in range(parts):
        which = slice(part * rows // parts, (part + 1) * rows // parts)
        out = estimator.fn(params, *[x[which] for x in batch], mask=None if mask is None else mask[which])
        grads, aux = check_estimate(out)
        estimates.append((grads, {name: value for name, value in aux.items() if value.dim() == 0}))
        columns.append({name: value for name, value in aux.items() if value.dim() > 0})
        for name, value in columns[-1].items():
            if world.parts > 1 and len(value) != rows // parts:
                raise ValueError(
                    f"step: of several parts, aux must hold 0-d sums or rows of the {rows // parts} examples. "
                    f"Found {name} {tuple(value.shape)}."
                )
    mine = estimates[0]
    if parts > 1:  # parts are added in float32 or wider, as `all_reduce` adds them
        mine = pairwise_sum([tree.map(_wide, part) for part in estimates], lambda a, b: tree.map(torch.add, a, b))
        columns[0] = tree.map(lambda *pieces: torch.cat(pieces), *columns)
    if isinstance(optimizer, Sharded):
        sums, scalars = optimizer.sum(mine[0]), all_reduce(world, mine[1])
    else:
        sums, scalars = tree.map(lambda total, part: total.to(part.dtype), all_reduce(world, mine), estimates[0])
    aux = {**scalars, **all_gather(world, columns[0])}
    if estimator.finish is not _as_it_is:
        aux = estimator.finish(optimizer.whole(sums) if isinstance(optimizer, Sharded) else sums, aux)
    return sums, aux


def _wide(leaf: Tensor) -> Tensor:
    return tree.wide(leaf) if leaf.is_floating_point() else leaf
