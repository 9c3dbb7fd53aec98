"""Many training runs in one call: `vmap` over parameters, optimizer states, hyperparameters and keys.

    s_k ← step(h_k, s_k, batch_k),   k = 1 … width,   in place

How many runs go side by side is the width. One is a loop over a step that is not mapped: on a CPU it is the faster way
for convolutions, whose mapped form is a grouped convolution. Linear models gain most from many.

A run's numbers do not depend on the runs beside it. They are the same bits for every width from two on, for the
products of each lane are made alike; a loop makes other products, equal up to rounding.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.func import vmap

from .. import random, tree
from ..data import batches
from ..train import State, compiled, epoch_draws
from ..tree import Tree
from .runs import SEED, Runs

T = TypeVar("T")

Values: TypeAlias = dict[str, Tensor]
"""One run's hyperparameters: 0-d tensors by name."""


class Program(NamedTuple):
    """What a sweep runs, as pure functions of one run's hyperparameters."""

    init: Callable[[Values, Tensor], State]
    """`init(hyper, key) -> state`, before the first step. The key is of the run's seed."""
    step: Callable[..., tuple[State, dict[str, Tensor]]]
    """`step(hyper, state, *rows, keys, mask=…, divisor=…) -> (state, aux)`, a `train.Step` of these hyperparameters."""
    score: Callable[[Values, State], dict[str, Tensor]]
    """`score(hyper, state) -> {name: ()}`: what a run is worth, such as its accuracy on a held-out split. The first
    counts: the higher, the better."""
    kept: Callable[[State], Tree] = lambda state: state.params
    """What is kept of a run's best epoch: some leaves of its state, such as the parameters or their average."""


class Throughput(NamedTuple):
    """What side by side costs and gains."""

    seconds: dict[int, float]
    """By width: of one step of one run, the median."""

    @property
    def best(self) -> int:
        """The width of least time."""
        return min(self.seconds, key=self.seconds.__getitem__)

    def __str__(self) -> str:
        def words(width: int) -> str:
            return f"{'one after the other' if width == 1 else f'{width} at once'} {1e3 * self.seconds[width]:.2f} ms"

        costs = ", ".join(words(width) for width in self.seconds)
        chosen = "one after the other" if self.best == 1 else f"{self.best} at once"
        return f"A step of a run takes: {costs}. The runs are made {chosen}."


def init(program: Program, runs: Runs) -> State:
    """The states before the first step, stacked: leaves (K, …). Each is the program's own, bit for bit."""
    seeds = runs[SEED]
    keys = [random.key(int(seed), device=seeds.device) for seed in seeds]
    return stacked([program.init(_lane(runs, k), key) for k, key in enumerate(keys)])


def stacked(states: Sequence[T]) -> T:
    """VmappedStep of these states: leaves (L, …)."""
    return tree.map(lambda *leaves: torch.stack(leaves), *states)


def take(stacked: T, which: Tensor) -> T:
    """Copies of some lanes (L,) of a tree of leaves (K, …)."""
    return tree.map(lambda leaf: leaf[which.to(leaf.device)], stacked)


def put_(stacked: Tree, which: Tensor, values: Tree) -> None:
    """Writes lanes back."""
    for leaf, value in zip(tree.leaves(stacked), tree.leaves(values), strict=True):
        leaf[which.to(leaf.device)] = value


class VmappedStep:
    """Steps of some runs at a time, of one width. Each width is compiled once."""

    def __init__(self, program: Program, examples: Sequence[Tensor], *, batch_size: int, compile: bool) -> None:
        self.program, self.examples, self.batch_size, self.compile = program, tuple(examples), batch_size, compile
        self._steps: dict[int, Callable[..., Tensor]] = {}

    def epoch_(self, runs: Runs, states: State, *, epoch: int) -> tuple[Tensor, Tensor]:
        """Trains lanes for an epoch, in place.

        Args:
            runs: of the lanes, (L,) each.
            states: leaves (L, …).
            epoch: which one, from 0; it must be the lanes' next.

        Returns:
            The mean loss of each lane's examples in the epoch, (L,) float64, and the number of its first step whose
            loss is not finite, -1 where all are, (L,) int64.
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
        """One step of each lane, in place: index (L, B), keys (L, B, 2), mask (B,) to the losses (L,)."""
        width = len(keys)
        if width not in self._steps:
            step_ = _step_(self.program, mapped=width > 1)
            self._steps[width] = compiled(step_) if self.compile else step_
        return self._steps[width](runs, states, index, keys, mask, *self.examples)


def _step_(program: Program, *, mapped: bool) -> Callable[..., Tensor]:
    """The step of lanes, in place; without a map of a single one."""

    def step_(runs: Runs, states: State, index: Tensor, keys: Tensor, mask: Tensor | None, *examples: Tensor) -> Tensor:
        divisor = torch.tensor(float(keys.shape[1])) if mask is None else mask.sum().float()

        def one(hyper: Values, state: State, *rows: Tensor) -> tuple[State, Tensor]:
            state, aux = program.step(hyper, state, *rows, mask=mask, divisor=divisor)
            return state, aux["loss"]

        rows = [*[x[index] for x in examples], keys]
        if mapped:
            new, losses = vmap(one)(runs, states, *rows)
        else:
            new, loss = one(_lane(runs), _lane(states), *[x[0] for x in rows])
            new, losses = tree.map(lambda leaf: leaf[None], new), loss[None]
        for leaf, value in zip(tree.leaves(states), tree.leaves(new), strict=True):
            leaf.copy_(value)
        return losses

    return step_


def judged(program: Program, runs: Runs, states: State) -> dict[str, Tensor]:
    """What the program says each lane is worth: (L,) each."""
    if len(states.key) == 1:
        found = program.score(_lane(runs), _lane(states))
        return {name: value[None] for name, value in found.items()}
    return vmap(program.score)(runs, states)


def measure_throughput(
    lanes: VmappedStep, runs: Runs, states: State, widths: Sequence[int], *, steps: int = 5
) -> Throughput:
    """What a step costs at each width, on copies of the first runs.

    Args:
        lanes: of the sweep; what is compiled here is used later.
        runs: (K,) each.
        states: leaves (K, …).
        widths: from 1 to K.
        steps: how many are timed at each width, after two that are not.
    """
    total = len(lanes.examples[0])
    seconds = {}
    for width in widths:
        which = torch.arange(width)
        some, copies = take(runs, which), take(states, which)
        drawn = epoch_draws(copies.key, total, epoch=0, batch_size=lanes.batch_size)
        first = next(
            iter(batches(torch.arange(total, device=drawn.keys.device), batch_size=lanes.batch_size, pad=True))
        )
        rows = drawn.examples[:, first.examples], drawn.keys[:, first.examples]
        times = []
        for _ in range(steps + 2):
            start = time.perf_counter()
            lanes.step_(some, copies, *rows, first.mask)
            if drawn.keys.is_cuda:
                torch.cuda.synchronize()
            times.append((time.perf_counter() - start) / width)
        seconds[width] = sorted(times[2:])[steps // 2]
    return Throughput(seconds)


def _lane(stacked: T, place: int = 0) -> T:
    """One lane of a tree of leaves (K, …)."""
    return tree.map(lambda leaf: leaf[place], stacked)
