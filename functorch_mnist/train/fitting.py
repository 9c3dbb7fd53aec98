"""The training loop.

Its random streams hang on the key in the state and nothing else: the order of an epoch on the epoch's number, an
example's key on the step and the example. So a run that stops and goes on from a saved state ends as one that did not.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import data
from ..arguments import check_fn, check_takes, check_tensors, shown
from ..distributed import SINGLE_PROCESS, World, rows_of
from .agreement import CHECK_EVERY, check_examples, check_state
from .draws import Order, epoch_draws
from .step import State, Step, check_is_state


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
    drawn: Tensor | None = None
    """(B,) int64: which examples the step saw, one for each row of `aux`; none where draws are secret."""


class Watch(NamedTuple):
    """Another step, made in place of the ordinary one from time to time."""

    step: Step
    every: int
    """It is made at the first step and whenever so many have been made since; at least 1."""


def listed(where: str, callbacks: Iterable[Callable[[Progress], None]]) -> tuple[Callable[[Progress], None], ...]:
    """The callbacks as a tuple.

    Raises:
        TypeError: they are one function.
    """
    if callable(callbacks):
        raise TypeError(f"{where}: callbacks must be a list of functions. Found one function. Pass [callback]?")
    return tuple(callbacks)


def fit(
    step: Step,
    state: State,
    examples: Sequence[Tensor],
    *,
    epochs: int,
    batch_size: int,
    pad: bool = False,
    order: Order | None = None,
    loss: Tensor | None = None,
    watch: Watch | None = None,
    until: Callable[[Progress], bool] | None = None,
    callbacks: Iterable[Callable[[Progress], None]] = (),
    world: World = SINGLE_PROCESS,
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
        order: which examples an epoch sees; by default each once, at random.
        loss: the `Progress.loss` that goes with a state from the middle of an epoch.
        watch: a step such as one of `gradient_with_noise`, whose aux callbacks want now and then.
        until: asked after each epoch, before the callbacks; where it says so, training ends.
        callbacks: called after each step, in order, on all processes.
        world: the processes. All are given the same examples and state, and draw the same batches; `step` is of the
            same world, and sees this process's rows.

    Raises:
        ValueError: the tensors differ in their number of examples, or have none, or a number is out of its range.
        TypeError: `examples` is one tensor.
        DisagreementError: examples or states differ between processes: at the start, every 100 steps or at the end.

    Guarantees: bit for bit the same on one machine, however often it was stopped and resumed. Equal up to rounding for
        any number of processes; with `world.shards` bit for bit.
    """
    check_tensors("fit", "examples", examples)
    check_is_state("fit", state)
    if hasattr(step, "mechanism"):
        raise TypeError("fit: a private step draws its own examples. Found a PrivateStep. Use fit_private.")
    check_takes(
        "fit", "step", step, ["state", *["rows"] * len(examples), "keys"],
        "Make it with train.make_step(loss_fn, optimizer).", keywords=("mask", "divisor"),
    )  # fmt: skip
    if watch is not None and not isinstance(watch, Watch):
        raise TypeError(f"fit: watch must be a train.Watch. Found {shown(watch)}. Pass Watch(step, every)?")
    if order is not None:
        check_fn("fit", "order", order, "Pass a function order(key, epoch) -> (N,) int64.")
    for name, number in (("epochs", epochs), ("batch_size", batch_size)):
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"fit: {name} must be a whole number. Found {number!r}.")
    callbacks = listed("fit", callbacks)
    sizes = {len(tensor) for tensor in examples}
    if len(sizes) != 1 or 0 in sizes or batch_size < 1 or epochs < 0:
        raise ValueError(
            f"fit: examples must share a first size of at least 1, batch_size must be at least 1, epochs at least 0. "
            f"Found sizes {sorted(sizes)}, batch_size {batch_size}, epochs {epochs}."
        )
    if watch is not None and watch.every < 1:
        raise ValueError(f"fit: watch.every must be at least 1. Found {watch.every}.")
    (total,) = sizes
    check_examples(world, examples)
    check_state(world, state)
    per_epoch = data.steps_per_epoch(total, batch_size)
    done = int(state.step)
    for epoch in range(done // per_epoch, epochs):
        drawn = epoch_draws(state.key, total, epoch=epoch, batch_size=batch_size, order=order)
        start = done - epoch * per_epoch
        loss = torch.zeros((), dtype=torch.float64, device=state.key.device) if loss is None or start == 0 else loss
        places = torch.arange(total, device=state.key.device)
        for batch in data.batches(places, batch_size=batch_size, start=start, pad=pad):
            drawn_rows, which = len(batch.examples), drawn.examples[batch.examples]
            batch = rows_of(world, batch)
            examples_of = drawn.examples[batch.examples]
            rows = [*[tensor[examples_of] for tensor in examples], drawn.keys[batch.examples]]
            seen = min((done - epoch * per_epoch + 1) * batch_size, total)
            count = seen - (done - epoch * per_epoch) * batch_size
            chosen = step if watch is None or done % watch.every else watch.step
            state, aux = chosen(state, *rows, mask=batch.mask, divisor=torch.tensor(float(count)))
            if world.parts > 1:  # the rows of the padding, of which each number of processes has its own
                aux = {name: value[:drawn_rows] if value.dim() else value for name, value in aux.items()}
            loss = loss + aux["loss"]
            done += 1
            progress = Progress(state, loss, seen, epoch, done, seen == total, aux, which)
            ended = until is not None and progress.epoch_ended and until(progress)
            if done % CHECK_EVERY == 0 or done == epochs * per_epoch or ended:
                check_state(world, state)
            for callback in callbacks:
                callback(progress)
            if ended:
                return state
    return state
