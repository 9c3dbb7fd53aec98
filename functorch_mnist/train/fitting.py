"""The training loop.

Its random streams are functions of the key in the state: the order of an epoch of the epoch's number, an example's key
of the step and the example. So a run that is interrupted and resumed from a saved state ends as one that was not.
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
    """The progress of training after a step, which callbacks receive.

    Fields:
        state: the training `State` after the step.
        loss: 0-d float64, the sum of the losses of the epoch's examples so far; divided by `examples` their mean.
        examples: int, the number of examples of the epoch so far; of `fit_private` the expected number.
        epoch: int, the number of the epoch, from 0.
        step: int, the number of steps made in total.
        epoch_ended: bool, whether this was the last step of the epoch.
        aux: a mapping of tensors, what the step returned besides the state.
        drawn: (B,) int64, the indices of the step's examples, a row of `aux` each; None where draws are secret.
    """

    state: State
    """The training state after the step."""
    loss: Tensor
    """0-d float64: the sum of the losses of the epoch's examples so far; divided by `examples` it is their mean."""
    examples: int
    """The number of examples of the epoch that have been seen."""
    epoch: int
    """The number of the epoch, from 0."""
    step: int
    """The number of steps made in total."""
    epoch_ended: bool
    """Whether this was the last step of the epoch."""
    aux: Mapping[str, Tensor]
    """What the step returned besides the state; of tensors (B, …) the rows of examples, without padding."""
    drawn: Tensor | None = None
    """(n,) int64: the indices of the step's n examples, one for each row of `aux`; None where draws are secret."""


class Watch(NamedTuple):
    """Another step that takes the place of the ordinary one at intervals, for a costlier estimator."""

    step: Step
    """Such as one of `gradient_with_noise`."""
    every: int
    """The interval, in steps, at least 1: it is made at steps 0, every, 2 every, …."""


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
    """Trains until a number of epochs have been made.

    Args:
        step: from `make_step`, called as `step(state, *rows of examples, keys, mask=…, divisor=…)`. `keys` (B, 2) holds
            a key per example, for dropout and augmentation: the loss takes it last, `loss_fn(params, x, y, key)`.
        state: from `init_state`, or a saved one to resume from; its `step` is the number of steps made.
        examples: a tuple of tensors (N, …), on one device.
        epochs: the number of epochs in total, at least 0, those that `state` has made included.
        batch_size: B, at least 1. The last batch of an epoch may be smaller.
        pad: pad the last batch to B rows with a mask, so that all steps have one shape, as a compiled step needs.
        order: `order(key, epoch) -> (N,) int64`, the examples of an epoch; by default each once, shuffled.
        loss: the `Progress.loss` that belongs to a state from the middle of an epoch.
        watch: a step that takes the place of `step` at intervals, such as one of `gradient_with_noise`.
        until: `until(progress) -> bool`, called after each epoch, before the callbacks; training ends where it is True.
        callbacks: called with the `Progress` after each step, in order, on all processes.
        world: the processes. All have the same examples and state, and draw the same batches; `step` is of the same
            world, and takes this process's rows.

    Returns:
        The state after the last step.

    Raises:
        ValueError: the tensors differ in their number of examples, or have none, a number is out of its range, or an
            order is not of N examples.
        TypeError: `examples` is one tensor, `state` no state, `step` a loss or a private step, or the loss takes no
            key.
        DisagreementError: examples or states differ between processes: at the start, every 100 steps or at the end.

    Guarantees: bit for bit the same on one machine, however often it was interrupted and resumed. Equal up to rounding
        for any number of processes; with `world.shards` bit for bit.

    Example:
        >>> from functorch_mnist import optim, random
        >>> from functorch_mnist.train import init_state, make_step
        >>> step = make_step(lambda w, x, key: (w - x) ** 2, optim.sgd(0.5))
        >>> state = init_state(torch.tensor(0.0), optim.sgd(0.5), random.key(0))
        >>> fit(step, state, (torch.tensor([1.0, 3.0]),), epochs=1, batch_size=2).params
        tensor(2.)
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
            which = drawn.examples[batch.examples]
            batch = rows_of(world, batch)
            examples_of = drawn.examples[batch.examples]
            rows = [*[tensor[examples_of] for tensor in examples], drawn.keys[batch.examples]]
            seen = min((done - epoch * per_epoch + 1) * batch_size, total)
            count = seen - (done - epoch * per_epoch) * batch_size
            chosen = step if watch is None or done % watch.every else watch.step
            state, aux = chosen(state, *rows, mask=batch.mask, divisor=torch.tensor(float(count)))
            if batch.mask is not None:  # padding, at the end, is no example: its norms are 0
                aux = {name: value[:count] if value.dim() else value for name, value in aux.items()}
            loss = loss + aux["loss"]
            done += 1
            progress = Progress(state, loss, seen, epoch, done, seen == total, aux, which[:count])
            ended = until is not None and progress.epoch_ended and until(progress)
            if done % CHECK_EVERY == 0 or done == epochs * per_epoch or ended:
                check_state(world, state)
            for callback in callbacks:
                callback(progress)
            if ended:
                return state
    return state
