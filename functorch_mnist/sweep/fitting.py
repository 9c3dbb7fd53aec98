"""The sweep: all runs that are still running, epoch by epoch.

A run ends when its epochs are made, when successive halving prunes it, when its score has not improved for some epochs
(early stopping), or when its loss or parameters are no longer finite. The remaining runs are then regrouped.
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
from .vmapped import Program, VmappedStep, init, put_, score, take

RUNNING, FINISHED, PRUNED, STOPPED, FAILED = range(5)
"""The state of a run, in `Sweep.ended`: still running, or why it ended."""
STATUSES = ("running", "finished", "pruned", "stopped", "failed")
"""Their names, by number."""


class Halving(NamedTuple):
    """Successive halving: at intervals, only the best settings continue.

    Reference: Jamieson, Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization",
        AISTATS 2016.
    """

    every: int
    """Epochs between two prunings, at least 1."""
    keep: float
    """The fraction of the settings that continues, in (0, 1), rounded up."""


class Sweep(NamedTuple):
    """The state of a sweep of K runs over E epochs: one pytree of tensors of fixed shapes, to be saved and resumed."""

    states: State
    """Leaves (K, …): each run's training state, current or final."""
    best: Tree
    """Leaves (K, …): what the program keeps of each run's best epoch, by default its parameters."""
    ended: Tensor
    """(K,) int64: `RUNNING` or why it has ended."""
    failed: Tensor
    """(K,) int64: the step whose loss was not finite, -1 for none."""
    losses: Tensor
    """(K, E) float64: the mean training loss of each epoch, NaN where the run did not train."""
    scores: dict[str, Tensor]
    """(K, E) float64 each: the program's scores after each epoch, by name."""
    epoch: Tensor
    """0-d int64: how many epochs have been made."""

    @property
    def score(self) -> Tensor:
        """(K, E) float64: the first score, by which runs are compared, NaN where the run did not train."""
        return next(iter(self.scores.values()))

    @property
    def best_epoch(self) -> Tensor:
        """(K,) int64: the epoch of each run's highest score, from 0; -1 for a run without one."""
        score = self.score
        some = ~score.isnan().all(1)
        return torch.where(some, score.nan_to_num(nan=-torch.inf).argmax(1), -1)

    def at_best(self, name: str) -> Tensor:
        """A score after each run's best epoch.

        Args:
            name: of the score.

        Returns:
            (K,) float64, NaN for a run without a best epoch.
        """
        place = self.best_epoch
        value = self.scores[name].gather(1, place.clamp(min=0)[:, None]).squeeze(1)
        return torch.where(place >= 0, value, torch.nan)


def init_sweep(program: Program, runs: Runs, *, epochs: int) -> Sweep:
    """A sweep before its first epoch.

    Args:
        program: what a run is.
        runs: columns (K,), K at least 1, with `seed`.
        epochs: E, at least 1.

    Returns:
        The initial states of all runs, each the program's own, bit for bit, and no score.

    Raises:
        ValueError: the runs are no columns of one length with a seed, or `epochs` is below 1.
    """
    if epochs < 1:
        raise ValueError(f"sweep: epochs must be at least 1. Found {epochs}.")
    total = count(runs)
    states = init(program, runs)
    scores = score(program, take(runs, torch.arange(1)), take(states, torch.arange(1)))
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
    vmapped: VmappedStep,
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
        vmapped: makes the steps.
        runs: columns (K,), those of the sweep.
        sweep: its state, from `init_sweep`, or from a callback of an earlier call with the same arguments, to resume.
        width: how many runs one call of `vmap` trains, at least 1; see `measure_throughput`.
        halving: prune all but the best settings at intervals, by the mean score of a setting's runs. A failed run has
            the worst score.
        patience: stop a run after this many epochs without a higher score, at least 1; by default never.
        callbacks: called after each epoch with a copy of the sweep's state.
        world: the processes, which divide the runs of each epoch between them; all then hold all runs.

    Returns:
        The state in which no run is running.

    Raises:
        ValueError: a number is out of its range, or the runs are not the sweep's.

    Guarantees: a run's numbers do not depend on the runs trained with it: bit for bit at any width from 2 on, and at
        width 1, for any number of processes. A run that fails leaves the others as they are. A sweep that was
        interrupted and resumed from a callback's state ends with the same bits.

    Reference: successive halving: Jamieson, Talwalkar, AISTATS 2016, see `Halving`. Early stopping by patience:
        Prechelt, "Early stopping - but when?", 1998.
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
        _epoch_(vmapped, runs, sweep, width, world)
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


def _epoch_(vmapped: VmappedStep, runs: Runs, sweep: Sweep, width: int, world: World) -> None:
    """One more epoch of all runs that have not ended, in place."""
    epoch = int(sweep.epoch)
    alive = (sweep.ended == RUNNING).nonzero().squeeze(1)
    before = sweep.score.nan_to_num(nan=-torch.inf).amax(1)

    def trained(alive: Tensor) -> _Trained:
        groups = [_trained(vmapped, runs, sweep, some, width) for some in alive.split(_fitting(width, len(alive)))]
        return tree.map(lambda *parts: torch.cat(parts), *groups)

    after = map_rows(world, trained, alive)
    sweep.losses[alive, epoch] = after.losses.to(sweep.losses)
    sweep.failed[alive] = after.failed.to(sweep.failed)
    for name, column in sweep.scores.items():
        column[alive, epoch] = torch.where(after.failed < 0, after.scores[name], torch.nan).to(column)
    put_(sweep.states, alive, after.states)
    better = (sweep.score[alive, epoch] > before[alive]).nonzero().squeeze(1)
    put_(sweep.best, alive[better], take(vmapped.program.kept(after.states), better))
    sweep.epoch.add_(1)
    _end_(sweep, sweep.failed >= 0, FAILED)


class _Trained(NamedTuple):
    """Some runs after an epoch: leaves (W, …)."""

    states: State
    losses: Tensor
    failed: Tensor
    scores: dict[str, Tensor]


def _trained(vmapped: VmappedStep, runs: Runs, sweep: Sweep, some: Tensor, width: int) -> _Trained:
    """Some runs, at most `width`, after one more epoch, vmapped."""
    real = len(some)
    which = torch.cat([some, some[:1].expand(_fitting(width, real) - real)])  # the padding is copies, dropped below
    part, states = take(runs, which), take(sweep.states, which)
    losses, failed = vmapped.epoch_(part, states, epoch=int(sweep.epoch))
    scores = score(vmapped.program, part, states)
    finite = torch.stack([leaf.flatten(1).isfinite().all(1) for leaf in tree.leaves(states.params)]).all(0)
    failed = torch.where((failed < 0) & ~finite, states.step - 1, failed)
    return take(_Trained(states, losses, failed, scores), torch.arange(real))


def _fitting(width: int, runs: int) -> int:
    """The width for a number of runs: halved as long as all fit."""
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
