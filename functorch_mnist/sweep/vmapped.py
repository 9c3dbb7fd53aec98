"""Vmapped training runs: `vmap` over parameters, optimizer states, hyperparameters and keys.

    s_k ← step(h_k, s_k, batch_k),   k = 1 … width,   in place

The width is the number of runs in one call of `vmap`. Width 1 is a loop over a step without `vmap`: on a CPU it is
faster for convolutions, whose vmapped form is a grouped convolution. Linear models gain most from a large width.

A run's numbers do not depend on the other runs of its call. They are the same bits for every width from 2 on, for
batched products treat each run alike; the loop's products are equal up to rounding.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.func import vmap

from .. import random, tree
from ..arguments import check_tensors
from ..data import batches
from ..train import State, compiled, epoch_draws
from ..tree import Tree
from .runs import SEED, Runs

T = TypeVar("T")

Values: TypeAlias = dict[str, Tensor]
"""One run's hyperparameters: 0-d tensors by name."""


class Program(NamedTuple):
    """A training run as pure functions of its hyperparameters, to be vmapped over runs."""

    init: Callable[[Values, Tensor], State]
    """`init(hyper, key) -> state`, before the first step. The key (2,) is `random.key(seed)` of the run's seed."""
    step: Callable[..., tuple[State, dict[str, Tensor]]]
    """`step(hyper, state, *rows, keys, mask=…, divisor=…) -> (state, aux)`, a `train.Step` of the run."""
    score: Callable[[Values, State], dict[str, Tensor]]
    """`score(hyper, state) -> {name: ()}`: metrics of a run, such as its held-out accuracy. Runs are compared by the
    first: the higher, the better."""
    kept: Callable[[State], Tree] = lambda state: state.params
    """What is kept of a run's best epoch: some leaves of its state, such as the parameters or their EMA."""


class Throughput(NamedTuple):
    """The measured time of a step at each width."""

    seconds: dict[int, float]
    """By width: the median time of a step, per run, in seconds."""

    @property
    def best(self) -> int:
        """The width with the least time per run."""
        return min(self.seconds, key=self.seconds.__getitem__)

    def __str__(self) -> str:
        def words(width: int) -> str:
            return f"{'in a loop' if width == 1 else f'{width} vmapped'} {1e3 * self.seconds[width]:.2f} ms"

        costs = ", ".join(words(width) for width in self.seconds)
        chosen = "in a loop" if self.best == 1 else f"{self.best} vmapped"
        return f"Time of a step per run: {costs}. The runs are trained {chosen}."


def init(program: Program, runs: Runs) -> State:
    """The states before the first step: leaves (K, …). Each is the program's own, bit for bit."""
    seeds = runs[SEED]
    keys = [random.key(int(seed), device=seeds.device) for seed in seeds]
    return stacked([program.init(_run(runs, k), key) for k, key in enumerate(keys)])


def stacked(states: Sequence[T]) -> T:
    """A stack of trees, for `vmap`.

    Args:
        states: W trees of one structure, such as the states of runs.

    Returns:
        One tree with leaves (W, …).
    """
    return tree.map(lambda *leaves: torch.stack(leaves), *states)


def take(stacked: T, which: Tensor) -> T:
    """Copies of the runs `which` (W,) of a tree of leaves (K, …)."""
    return tree.map(lambda leaf: leaf[which.to(leaf.device)], stacked)


def put_(stacked: Tree, which: Tensor, values: Tree) -> None:
    """Writes runs back in place."""
    for leaf, value in zip(tree.leaves(stacked), tree.leaves(values), strict=True):
        leaf[which.to(leaf.device)] = value


class VmappedStep:
    """The training step of a program over W runs in one call of `vmap`. Each width W is compiled once."""

    def __init__(self, program: Program, examples: Sequence[Tensor], *, batch_size: int, compile: bool) -> None:
        """
        Args:
            program: what a run is.
            examples: tensors (N, …), the training examples of all runs.
            batch_size: B, at least 1: examples in a step of a run. The last batch of an epoch is padded and masked.
            compile: compile the step, once for each width.

        Raises:
            TypeError: `examples` is one tensor.
        """
        check_tensors("VmappedStep", "examples", examples)
        self.program, self.examples, self.batch_size, self.compile = program, tuple(examples), batch_size, compile
        self._steps: dict[int, Callable[..., Tensor]] = {}

    def epoch_(self, runs: Runs, states: State, *, epoch: int) -> tuple[Tensor, Tensor]:
        """Trains some runs for an epoch, in place.

        Args:
            runs: their hyperparameters, (W,) each.
            states: leaves (W, …), overwritten.
            epoch: the number of the epoch, from 0; it must be the runs' next.

        Returns:
            The mean loss of each run's examples in the epoch, (W,) float64, and the number of its first step whose loss
            is not finite, -1 where all are finite, (W,) int64.
        """
        total = len(self.examples[0])
        drawn = epoch_draws(states.key, total, epoch=epoch, batch_size=self.batch_size)
        losses = torch.zeros(len(states.key), dtype=torch.float64, device=states.key.device)
        failed = torch.full_like(losses, -1, dtype=torch.int64)
        for batch in batches(torch.arange(total, device=losses.device), batch_size=self.batch_size, pad=True):
            rows = drawn.examples[:, batch.examples], drawn.keys[:, batch.examples]
            before = states.step.clone()
            loss = self.step_(runs, states, *rows, batch.mask)
            losses += loss
            failed = torch.where((failed < 0) & ~loss.isfinite(), before, failed)
        return losses / total, failed

    def step_(self, runs: Runs, states: State, index: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
        """One step of each run, in place.

        Args:
            runs: their hyperparameters, (W,) each.
            states: leaves (W, …), overwritten.
            index: (W, B) int64, the examples of each run's batch.
            keys: (W, B, 2), a key of each example.
            mask: (B,) bool, or none.

        Returns:
            (W,): the sum of the losses of each run's batch.
        """
        width = len(keys)
        if width not in self._steps:
            step_ = _step_(self.program, mapped=width > 1)
            self._steps[width] = compiled(step_) if self.compile else step_
        return self._steps[width](runs, states, index, keys, mask, *self.examples)


def _step_(program: Program, *, mapped: bool) -> Callable[..., Tensor]:
    """The step of W runs, in place; without `vmap` for a single one."""

    def step_(runs: Runs, states: State, index: Tensor, keys: Tensor, mask: Tensor | None, *examples: Tensor) -> Tensor:
        divisor = torch.tensor(float(keys.shape[1])) if mask is None else mask.sum().float()

        def one(hyper: Values, state: State, *rows: Tensor) -> tuple[State, Tensor]:
            state, aux = program.step(hyper, state, *rows, mask=mask, divisor=divisor)
            return state, aux["loss"]

        rows = [*[x[index] for x in examples], keys]
        if mapped:
            new, losses = vmap(one)(runs, states, *rows)
        else:
            new, loss = one(_run(runs), _run(states), *[x[0] for x in rows])
            new, losses = tree.map(lambda leaf: leaf[None], new), loss[None]
        for leaf, value in zip(tree.leaves(states), tree.leaves(new), strict=True):
            leaf.copy_(value)
        return losses

    return step_


def score(program: Program, runs: Runs, states: State) -> dict[str, Tensor]:
    """The program's scores of each run: (W,) each."""
    if len(states.key) == 1:
        return {name: value[None] for name, value in program.score(_run(runs), _run(states)).items()}
    return vmap(program.score)(runs, states)


def measure_throughput(
    vmapped: VmappedStep, runs: Runs, states: State, widths: Sequence[int], *, steps: int = 5
) -> Throughput:
    """The time of a step at each width, on copies of the first runs.

    Args:
        vmapped: of the sweep, which uses what is compiled here.
        runs: columns (K,).
        states: leaves (K, …); they are copied.
        widths: the widths to measure, from 1 to K.
        steps: timed steps at each width, at least 1, after two that are not timed.

    Returns:
        The median seconds of a step per run, by width.
    """
    total = len(vmapped.examples[0])
    seconds = {}
    for width in widths:
        which = torch.arange(width)
        some, copies = take(runs, which), take(states, which)
        drawn = epoch_draws(copies.key, total, epoch=0, batch_size=vmapped.batch_size)
        first = next(
            iter(batches(torch.arange(total, device=drawn.keys.device), batch_size=vmapped.batch_size, pad=True))
        )
        rows = drawn.examples[:, first.examples], drawn.keys[:, first.examples]
        times = []
        for _ in range(steps + 2):
            start = time.perf_counter()
            vmapped.step_(some, copies, *rows, first.mask)
            if drawn.keys.is_cuda:
                torch.cuda.synchronize()
            times.append((time.perf_counter() - start) / width)
        seconds[width] = sorted(times[2:])[steps // 2]
    return Throughput(seconds)


def _run(stacked: T, place: int = 0) -> T:
    """One run of a tree of leaves (K, …)."""
    return tree.map(lambda leaf: leaf[place], stacked)
