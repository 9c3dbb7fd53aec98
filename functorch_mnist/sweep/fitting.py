"""The sweep: epoch by epoch, all runs that are still in it, until they end one way or another.

A run ends when its epochs are made, when others are better (successive halving), when it has not become better for a
while (early stopping), or when its loss or parameters are no longer finite. What ends makes room: the runs that are
left are put together anew.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import tree
from ..distributed import SINGLE_PROCESS, World, map_rows
from ..train import State
from ..tree import Tree
from .runs import Runs, count, settings
from .vmapped import Program, VmappedStep, init, judged, put_, take

RUNNING, FINISHED, PRUNED, STOPPED, FAILED = range(5)
"""The state of a run, in `Sweep.ended`: still running, or why it ended."""
STATUSES = ("running", "finished", "pruned", "stopped", "failed")
"""The same in words."""


class Halving(NamedTuple):
    """Successive halving: now and then only the best settings go on.

    Reference: Jamieson, Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization",
        AISTATS 2016.
    """

    every: int
    """Epochs from one cut to the next, at least 1."""
    keep: float
    """The part of the settings that goes on, in (0, 1), rounded up."""


class Sweep(NamedTuple):
    """Where a sweep stands: one pytree of tensors of fixed shapes, to be saved and gone on with."""

    states: State
    """Leaves (K, …): each run's, where it stands or ended."""
    best: Tree
    """Leaves (K, …): what the program keeps of each run's best epoch, its parameters by default."""
    ended: Tensor
    """(K,) int64: `RUNNING` or why it has ended."""
    failed: Tensor
    """(K,) int64: the step whose loss was not finite, -1 for none."""
    losses: Tensor
    """(K, E) float64: mean training loss of each epoch, NaN where it was not made."""
    scores: dict[str, Tensor]
    """(K, E) float64 each: what the program's judge said after each epoch."""
    epoch: Tensor
    """0-d int64: how many epochs have been made."""

    @property
    def score(self) -> Tensor:
        """(K, E): the score that counts, NaN where an epoch was not made."""
        return next(iter(self.scores.values()))

    @property
    def best_epoch(self) -> Tensor:
        """(K,) int64: the epoch of each run's highest score, from 0; -1 for a run without one."""
        score = self.score
        some = ~score.isnan().all(1)
        return torch.where(some, score.nan_to_num(nan=-torch.inf).argmax(1), -1)

    def at_best(self, name: str) -> Tensor:
        """(K,): a score after each run's best epoch, NaN for a run without one."""
        place = self.best_epoch
        value = self.scores[name].gather(1, place.clamp(min=0)[:, None]).squeeze(1)
        return torch.where(place >= 0, value, torch.nan)


def init_sweep(program: Program, runs: Runs, *, epochs: int) -> Sweep:
    """A sweep before its first epoch.

    Raises:
        ValueError: the runs are no columns of one length with a seed, or `epochs` is below 1.
    """
    if epochs < 1:
        raise ValueError(f"sweep: epochs must be at least 1. Found {epochs}.")
    total = count(runs)
    states = init(program, runs)
    scores = judged(program, take(runs, torch.arange(1)), take(states, torch.arange(1)))
    nothing = torch.full((total, epochs), torch.nan, dtype=torch.float64)
    return Sweep(
        states,
        tree.map(torch.clone, program.kept(states)),
        torch.zeros(total, dtype=torch.int64),
        torch.full((total,), -1),
        nothing,
        {name: nothing.clone() for name in scores},
        torch.zeros((), dtype=torch.int64),
    )


def fit(
    lanes: VmappedStep,
    runs: Runs,
    sweep: Sweep,
    *,
    width: int,
    halving: Halving | None = None,
    patience: int | None = None,
    callbacks: Iterable[Callable[[Sweep], None]] = (),
    world: World = SINGLE_PROCESS,
) -> Sweep:
    """The sweep after all its runs have ended.

    Args:
        lanes: makes the steps.
        runs: (K,) each.
        sweep: where it stands, of `start` or of an earlier call with the same arguments.
        width: how many runs are made at once, at least 1; see `measure`.
        halving: now and then cut all but the best settings, by the mean score of each one's runs; of a setting with a
            failed run the failed one counts as worst.
        patience: end a run after so many epochs without a higher score, at least 1.
        callbacks: called after each epoch with where the sweep stands, a value of its own.
        world: the processes, which divide the runs of each epoch between them; all then hold all runs.

    Raises:
        ValueError: a number is out of its range, or there are other runs than in the sweep.

    Guarantees: a run's numbers are those of the same run alone, bit for bit, at any width from 2 on, and at width 1,
        for any number of processes.
        A run that fails leaves the others as they are. One that was broken off goes on from any value given to a
        callback, to the same bits.
    """
    if width < 1 or (patience is not None and patience < 1):
        raise ValueError(f"sweep: width and patience must be at least 1. Found {width} and {patience}.")
    if halving is not None and not (halving.every >= 1 and 0 < halving.keep < 1):
        raise ValueError(f"sweep: halving needs every at least 1 and keep in (0, 1). Found {halving}.")
    if count(runs) != len(sweep.ended):
        raise ValueError(f"sweep: the runs must be the sweep's {len(sweep.ended)}. Found {count(runs)}.")
    callbacks, epochs = tuple(callbacks), sweep.losses.shape[1]
    sweep = tree.map(torch.clone, sweep)
    while int(sweep.epoch) < epochs and bool((sweep.ended == RUNNING).any()):
        _epoch_(lanes, runs, sweep, width, world)
        made = int(sweep.epoch)
        if patience is not None:
            _end_(sweep, (made - 1 - sweep.best_epoch) >= patience, STOPPED)
        if halving is not None and made % halving.every == 0 and made < epochs:
            _end_(sweep, _worse(runs, sweep, halving.keep), PRUNED)
        if made == epochs:
            _end_(sweep, torch.ones_like(sweep.ended, dtype=torch.bool), FINISHED)
        for callback in callbacks:
            callback(tree.map(torch.clone, sweep))
    return sweep


def _epoch_(lanes: VmappedStep, runs: Runs, sweep: Sweep, width: int, world: World) -> None:
    """One more epoch of all runs that have not ended, in place."""
    epoch = int(sweep.epoch)
    alive = (sweep.ended == RUNNING).nonzero().squeeze(1)
    before = sweep.score.nan_to_num(nan=-torch.inf).amax(1)

    def trained(alive: Tensor) -> _Trained:
        groups = [_trained(lanes, runs, sweep, some, width) for some in alive.split(_fitting(width, len(alive)))]
        return tree.map(lambda *parts: torch.cat(parts), *groups)

    found = map_rows(world, trained, alive)
    sweep.losses[alive, epoch] = found.losses.to(sweep.losses)
    sweep.failed[alive] = found.failed.to(sweep.failed)
    for name, column in sweep.scores.items():
        column[alive, epoch] = torch.where(found.failed < 0, found.scores[name], torch.nan).to(column)
    put_(sweep.states, alive, found.states)
    better = (sweep.score[alive, epoch] > before[alive]).nonzero().squeeze(1)
    put_(sweep.best, alive[better], take(lanes.program.kept(found.states), better))
    sweep.epoch.add_(1)
    _end_(sweep, sweep.failed >= 0, FAILED)


class _Trained(NamedTuple):
    """Some runs after an epoch: leaves (L, …)."""

    states: State
    losses: Tensor
    failed: Tensor
    scores: dict[str, Tensor]


def _trained(lanes: VmappedStep, runs: Runs, sweep: Sweep, some: Tensor, width: int) -> _Trained:
    """Some runs, at most `width`, after one more epoch of them side by side."""
    real = len(some)
    which = torch.cat([some, some[:1].expand(_fitting(width, real) - real)])  # idle lanes are copies, dropped below
    part, states = take(runs, which), take(sweep.states, which)
    losses, failed = lanes.epoch_(part, states, epoch=int(sweep.epoch))
    scores = judged(lanes.program, part, states)
    finite = torch.stack([leaf.flatten(1).isfinite().all(1) for leaf in tree.leaves(states.params)]).all(0)
    failed = torch.where((failed < 0) & ~finite, states.step - 1, failed)
    return take(_Trained(states, losses, failed, scores), torch.arange(real))


def _fitting(width: int, runs: int) -> int:
    """The width for so many runs: half as wide, again and again, as long as all fit."""
    while width > 2 and width // 2 >= runs:
        width = (width + 1) // 2
    return width


def _end_(sweep: Sweep, which: Tensor, reason: int) -> None:
    """Ends those runs that have not ended yet."""
    sweep.ended[which & (sweep.ended == RUNNING)] = reason


def _worse(runs: Runs, sweep: Sweep, keep: float) -> Tensor:
    """(K,) bool: the runs of all but the best settings that are still running."""
    setting = settings(runs)
    last = sweep.score.nan_to_num(nan=-torch.inf)[:, int(sweep.epoch) - 1]
    now = torch.where(sweep.ended == STOPPED, sweep.at_best(next(iter(sweep.scores))), last)
    number = int(setting.max()) + 1
    mean = torch.zeros(number, dtype=now.dtype).index_add(0, setting, now) / torch.bincount(setting, minlength=number)
    running = torch.zeros(number, dtype=torch.bool).index_fill(0, setting[sweep.ended == RUNNING], True)
    order = torch.where(running, mean, torch.nan).nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True)
    left = int(running.sum())
    gone = torch.ones(number, dtype=torch.bool)
    gone[order[: max(1, math.ceil(left * keep - 1e-9))]] = False  # a third of three is one
    return gone[setting]
