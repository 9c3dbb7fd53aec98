"""The training loop.

Its random streams hang on the key in the state and nothing else: the order of an epoch on the epoch's number, an
example's key on the step and the example. So a run that stops and goes on from a saved state ends as one that did not.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import data, random
from .step import State, Step


class Progress(NamedTuple):
    """Where training stands after a step."""

    state: State
    loss: Tensor
    """0-d float64: the sum of the losses of the epoch's examples so far."""
    examples: int
    """How many examples of the epoch have been seen."""
    epoch: int
    """Which epoch, from 0."""
    step: int
    """How many steps have been made in all."""
    epoch_ended: bool
    aux: Mapping[str, Tensor]
    """What the step returned beside the state."""


class Watch(NamedTuple):
    """Another step, made in place of the ordinary one from time to time."""

    step: Step
    every: int
    """It is made at the first step and whenever so many have been made since; at least 1."""


def fit(
    step: Step,
    state: State,
    examples: Sequence[Tensor],
    *,
    epochs: int,
    batch_size: int,
    pad: bool = False,
    loss: Tensor | None = None,
    watch: Watch | None = None,
    callbacks: Iterable[Callable[[Progress], None]] = (),
) -> State:
    """The state after training until `epochs` epochs have been made.

    Args:
        step: called as `step(state, *rows of examples, keys, divisor=…)`, and with `mask=…` where `pad` is set. `keys`
            (B, 2) is one key per example, the last tensor that the loss sees.
        state: where to start; its `step` says how much has been done already.
        examples: tensors with one leading size N, on one device.
        epochs: how often each example is seen in all, at least 0.
        batch_size: B, at least 1. The last batch of an epoch may be smaller.
        pad: fill the last batch up to B rows with a mask, so that all steps have one shape.
        loss: the `Progress.loss` that goes with a state from the middle of an epoch.
        watch: a step such as one of `watching`, whose aux callbacks want now and then.
        callbacks: called after each step, in order.

    Raises:
        ValueError: the tensors differ in their number of examples, or have none, or a number is out of its range.
        TypeError: `examples` is one tensor.

    Guarantees: bit for bit the same on one machine, however often it was stopped and resumed.
    """
    if isinstance(examples, Tensor):
        raise TypeError("fit: examples must be a tuple of tensors. Found one tensor. Pass (x,)?")
    sizes = {len(tensor) for tensor in examples}
    if len(sizes) != 1 or 0 in sizes or batch_size < 1 or epochs < 0:
        raise ValueError(
            f"fit: examples must share a first size of at least 1, batch_size must be at least 1, epochs at least 0. "
            f"Found sizes {sorted(sizes)}, batch_size {batch_size}, epochs {epochs}."
        )
    if watch is not None and watch.every < 1:
        raise ValueError(f"fit: watch.every must be at least 1. Found {watch.every}.")
    (total,) = sizes
    callbacks = tuple(callbacks)
    per_epoch = data.steps_per_epoch(total, batch_size)
    order_key, noise_key = random.split(state.key).unbind(-2)
    done = int(state.step)
    for epoch in range(done // per_epoch, epochs):
        order = data.epoch_order(total, key=order_key, epoch=epoch)
        keys = _example_keys(noise_key, order, first_step=epoch * per_epoch, batch_size=batch_size)
        start = done - epoch * per_epoch
        loss = torch.zeros((), dtype=torch.float64, device=order.device) if loss is None or start == 0 else loss
        for batch in data.batches(order, batch_size=batch_size, start=start, pad=pad):
            rows = [tensor[batch.examples] for tensor in (*examples, keys)]
            seen = min((done - epoch * per_epoch + 1) * batch_size, total)
            count = seen - (done - epoch * per_epoch) * batch_size
            chosen = step if watch is None or done % watch.every else watch.step
            state, aux = chosen(state, *rows, mask=batch.mask, divisor=torch.tensor(float(count)))
            loss = loss + aux["loss"]
            done += 1
            for callback in callbacks:
                callback(Progress(state, loss, seen, epoch, done, seen == total, aux))
    return state


def _example_keys(key: Tensor, order: Tensor, *, first_step: int, batch_size: int) -> Tensor:
    """The key of each example in the step that sees it, `fold_in(fold_in(key, step), example)`: (N, 2)."""
    step_keys = random.fold_in(key, first_step + torch.arange(len(order), device=order.device) // batch_size)
    keys = torch.empty_like(step_keys)
    keys[order] = random.fold_in(step_keys, order)
    return keys
