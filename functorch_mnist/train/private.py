"""Differentially private training: clipped sums over a random draw, noise once, then the optimizer.

    for each step:  draw examples;  G = Σ over chunks of clipped sums;  (G + noise) / n;  optimizer

Its randomness hangs on a secret and the step alone: the secret is split into roots of draws, of noise and of examples'
keys (dropout, augmentation), and the step is folded into them. The secret is in no state and in no file.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import privacy, random, tree
from ..data import Batch
from ..distributed import ALONE, World, first_of, in_pairs, parts_of, rows_of, sum_over
from ..optim import Optimizer
from ..privacy import Clipping, Mechanism, Secret, Sums, chunks, clipped_sums, draw, joins, released
from ..tree import Tree
from .agreement import CHECK_EVERY, check_examples, check_state
from .fit import Progress
from .forms import compiled
from .step import State, init_state


class PrivateStep(NamedTuple):
    """A step in parts, for a large draw has more than one chunk. Each is pure and compiles as one graph."""

    add: Callable[..., Sums]
    """`add(state, sums, keys, batch, *examples) -> sums`: with those of one more chunk; before the first they are None.
    `keys` (2, 2) are those of the step's noise and of its examples, `batch` says which rows of `examples` it takes."""
    step: Callable[..., tuple[State, dict[str, Tensor]]]
    """`step(state, sums, keys, batch, *examples) -> (state, aux)`: adds the last chunk, if there is one, sums over all
    processes, and makes the step, with noise. `aux` holds what is never private, see `Sums.seen`."""
    joins: Callable[..., Tensor] = joins
    """`privacy.joins`, by which a Poisson step draws its examples."""
    keys: Callable[[Tensor, Tensor], Tensor] = random.fold_in
    """From the roots of a run's keys (2, 2) and the step, 0-d, to the step's."""

    def compiled(self) -> "PrivateStep":
        """All parts compiled, for the fixed shapes of chunks."""
        return PrivateStep(compiled(self.add), compiled(self.step), compiled(self.joins), compiled(self.keys))


def init_private_state(params: Tree, optimizer: Optimizer, key: Tensor, clipping: Clipping) -> State:
    """The state before the first step.

    Args:
        params: a pytree of float tensors.
        optimizer: gives its own initial state.
        key: (2,), of what need not be secret.
        clipping: gives its own initial state.
    """
    return init_state(params, optimizer, key)._replace(estimator=clipping.init())


def make_private_step(
    loss_fn: Callable[..., Tensor],
    optimizer: Optimizer,
    *,
    clipping: Clipping,
    noise_multiplier: float,
    expected: float,
    world: World = ALONE,
) -> PrivateStep:
    """A private training step.

    Args:
        loss_fn: `loss_fn(params, *example, key) -> ()`, pure; the key (2,) is the example's own, of this step.
        optimizer: gets the noisy mean gradient.
        clipping: the rule.
        noise_multiplier: σ, at least 0.
        expected: what sums are divided by: the expected number of examples of a step of all processes, not the
            realised one.
        world: the processes. Each adds the chunks of its own rows; all add the same noise to the sum.

    Raises:
        ValueError: a number is out of its range.

    Guarantees: the same for any division of the examples into chunks, up to rounding.

    Example:
        >>> from functorch_mnist import optim, privacy
        >>> optimizer, clipping = optim.sgd(0.5), privacy.Flat(1.0)
        >>> step = make_private_step(
        ...     lambda w, x, key: w * x, optimizer, clipping=clipping, noise_multiplier=0, expected=2
        ... )
        >>> state = init_private_state(torch.tensor(0.0), optimizer, random.key(0), clipping)
        >>> (batch,) = privacy.chunks(torch.arange(2), (2,))
        >>> state, seen = step.step(state, None, random.split(random.key(1)), batch, torch.tensor([0.5, 3.0]))
        >>> state.params, seen["clipped"]
        (tensor(-0.3750), tensor(1))

    Reference: Abadi et al., "Deep learning with differential privacy", CCS 2016, algorithm 1.
    """
    if not 0 <= noise_multiplier < float("inf"):
        raise ValueError(f"make_private_step: noise_multiplier must be at least 0, finite. Found {noise_multiplier}.")
    if not 0 < expected < float("inf"):
        raise ValueError(f"make_private_step: expected must be above 0 and finite. Found {expected}.")
    if noise_multiplier:
        clipping.deviations(noise_multiplier)  # refuses what cannot be divided

    def add(state: State, sums: Sums | None, keys: Tensor, batch: Batch, *examples: Tensor) -> Sums:
        rows = [tensor[batch.examples] for tensor in examples]
        more = clipped_sums(
            loss_fn, state.params, *rows, random.fold_in(keys[1], batch.examples), clipping=clipping,
            clipping_state=state.estimator, mask=batch.mask,
        )  # fmt: skip
        return more if sums is None else tree.map(torch.add, sums, more)

    def step(
        state: State, sums: Sums | None, keys: Tensor, batch: Batch | None, *examples: Tensor
    ) -> tuple[State, dict[str, Tensor]]:
        total = sum_over(world, sums if batch is None else add(state, sums, keys, batch, *examples))
        if total is None:
            raise ValueError("private step: there must be a chunk, or sums. Found neither.")
        grads, estimator = released(
            state.params, total, keys[0], clipping=clipping, noise_multiplier=noise_multiplier, expected=expected,
            clipping_state=state.estimator,
        )  # fmt: skip
        params, optimizer_state = optimizer.update(state.params, state.optimizer, grads)
        return State(params, optimizer_state, state.step + 1, state.key, estimator), total.seen

    return PrivateStep(add, step)


def fit_private(
    step: PrivateStep,
    state: State,
    examples: Sequence[Tensor],
    *,
    mechanism: Mechanism,
    secret: Secret,
    steps: int,
    chunk_sizes: Sequence[int] | None = None,
    loss: Tensor | None = None,
    callbacks: Iterable[Callable[[Progress], None]] = (),
    world: World = ALONE,
) -> State:
    """The state after training until `steps` steps have been made.

    Args:
        step: as from `make_private_step`.
        state: where to start; its `step` says how many have been made already.
        examples: tensors with one leading size N, on one device.
        mechanism: how examples are sampled: what the accountant is told.
        secret: of draws, noise and examples' keys. A run that goes on with a fresh one is as private as one that was
            never stopped; with one from a seed it also ends as that one, bit for bit.
        steps: how many there shall be in all, at least 0.
        chunk_sizes: fixed sizes for `privacy.chunks`; by default `privacy.chunk_sizes`.
        loss: the `Progress.loss` that goes with a state from the middle of an epoch.
        callbacks: called after each step, in order, on all processes.
        world: the processes, of which `step` is as well. Draws and noise are those of process 0's secret, once for all:
            the account is that of one process.

    Raises:
        ValueError: the tensors differ in their number of examples, or have none, or a number is out of its range.
        DisagreementError: examples or states differ between processes.
    """
    lengths = {len(tensor) for tensor in examples}
    if len(lengths) != 1 or 0 in lengths or steps < 0:
        raise ValueError(
            f"fit_private: examples must share a first size of at least 1, steps must be at least 0. "
            f"Found sizes {sorted(lengths)}, steps {steps}."
        )
    (total,) = lengths
    device, callbacks = examples[0].device, tuple(callbacks)
    sizes = privacy.chunk_sizes(mechanism, total) if chunk_sizes is None else chunk_sizes
    check_examples(world, examples)
    check_state(world, state)
    roots, expected = random.split(first_of(world, secret.key(device)), 3), privacy.expected_examples(mechanism, total)
    per_epoch = max(1, round(total / expected))
    for done in range(int(state.step), steps):
        keys = step.keys(roots[1:], state.step)
        drawn = chunks(draw(mechanism, roots[0], step=state.step, examples=total, joins=step.joins), sizes)
        state, aux = _stepped(step, state, keys, [rows_of(world, batch) for batch in drawn], examples, world)
        if (done + 1) % CHECK_EVERY == 0 or done + 1 == steps:
            check_state(world, state)
        epoch, before = divmod(done, per_epoch)
        loss = aux["loss"].double() + (0 if loss is None or before == 0 else loss)
        progress = Progress(state, loss, round(expected * (before + 1)), epoch, done + 1, before + 1 == per_epoch, aux)
        for callback in callbacks:
            callback(progress)
    return state


def _stepped(
    step: PrivateStep, state: State, keys: Tensor, chunks: list[Batch], examples: Sequence[Tensor], world: World
) -> tuple[State, dict[str, Tensor]]:
    """A step over this process's rows of some chunks."""
    if world.shards is None:
        sums = None
        for batch in chunks[:-1]:
            sums = step.add(state, sums, keys, batch, *examples)
        return step.step(state, sums, keys, chunks[-1], *examples)
    totals: list[Sums | None] = [None] * world.parts_here
    for batch in chunks:
        parts = parts_of(world, batch)
        totals = [step.add(state, sums, keys, part, *examples) for sums, part in zip(totals, parts, strict=True)]
    sums = in_pairs(totals, lambda a, b: tree.map(torch.add, a, b))
    return step.step(state, sums, keys, None, *examples)
