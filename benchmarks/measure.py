"""The harness: arms that agree, timed in interleaved rounds.

Each arm is made, and called once; the time of that call, which includes compilation, is kept apart. Every arm must
start from the weights and the batch of the first one, and its outputs must be those expected; an arm that disagrees is
refused by name and not timed. Then come rounds in which every arm is timed once, in an order shuffled for each round,
so that a drift of the machine's speed affects all arms alike. A call that is timed follows one of the same arm, as a
step does in training, and not what another arm has left in the caches. Recompilations after an arm's first call are
counted.
"""

import gc
import hashlib
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np


class Setup(NamedTuple):
    """What holds for all arms of a run."""

    device: str = "cpu"
    threads: int = 1
    quick: bool = False
    keep_freed_memory: bool = True
    """Whether freed memory stays with the process, as `train` has it, or the C library hands it back at once."""


class Start(NamedTuple):
    """What an arm starts from, as the arm itself holds it: equal for all arms but for the precision."""

    weights: str
    """A digest."""
    batch: str
    """A digest."""
    precision: str
    threads: int


@dataclass(frozen=True)
class Work:
    """An arm that is ready to run."""

    call: Callable[[], object]
    """Does the work once. The harness waits for the device; work elsewhere must be waited for here."""
    outputs: Callable[[], Any]
    """What the calls so far have computed; not timed."""
    start: Start | None = None
    release: Callable[[], object] = lambda: None
    """Lets go of what the last call left behind, such as gradients."""


@dataclass(frozen=True)
class Arm:
    """One way to do the work."""

    name: str
    make: Callable[[], Work]
    """Raises ImportError where its package is missing."""
    tolerance: float = 0.0
    """How far the outputs of the first call may be from what is expected, in the unit of the case's `difference`."""
    precision: str = "float32"
    baseline: bool = False
    """Whether ratios may be to this arm: they are to the fastest such arm, so that it is no straw man."""
    expected: Callable[[], Any] | None = None
    """What the outputs must be; without it the first arm's."""


class Cost(NamedTuple):
    """What work takes at the least."""

    arithmetic: int
    """Multiplications and additions."""
    bytes: int
    """Read from memory or written to it."""


class Axis(NamedTuple):
    """What a case varies, such as the batch size: cases of one axis are points of a curve."""

    name: str
    value: float


@dataclass(frozen=True)
class Case:
    """One comparison: arms that do the same work."""

    name: str
    arms: Sequence[Arm]
    """The first is what others must agree with, and always a baseline."""
    difference: Callable[[Any, Any], float]
    """`difference(outputs, expected)`, at least 0; NaN counts as disagreement."""
    rounds: int
    """Timed calls of each arm."""
    warmups: int = 1
    """Calls of each arm between its first one and the rounds."""
    lead: int = 1
    """Calls of an arm before each that is timed."""
    sample: float = 0.0
    """The least seconds of a sample: shorter calls are timed several at a time."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What the numbers depend on, kept with them."""
    costs: Mapping[str, Cost] = field(default_factory=dict)
    """By precision, where the distance from the machine's limit is of interest."""
    axis: Axis | None = None
    memory: bool = False
    """Whether the peak memory of each arm is of interest."""
    compared: Callable[[], object] = lambda: None
    """Called once the arms have been compared, before they are timed."""


class Question(NamedTuple):
    """What a script measures."""

    name: str
    asks: str
    cases: Callable[[Setup], Iterator[Case]]
    conclude: Callable[[Sequence["Comparison"]], str] = lambda _: ""
    """What all cases together show, in Markdown."""


@dataclass(frozen=True)
class Timing:
    """The measured times of one arm, in seconds."""

    name: str
    precision: str
    first: float
    """The first call, with all compilation that no earlier arm's call has done already."""
    samples: list[float]
    """One for each round, in their order."""
    difference: float
    """Of the first call's outputs, from what was expected."""
    tolerance: float
    baseline: bool
    compilations: int = 0
    """Graphs compiled after the first call: a step that is recompiled does not have a steady time."""
    memory: int | None = None
    """Bytes taken by calls at their peak beyond what the process holds between them."""

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        low, high = np.quantile(self.samples, (0.25, 0.75))
        return float(low), float(high)


class Missing(NamedTuple):
    """An arm without a time."""

    name: str
    reason: str
    refused: bool
    """Whether it ran and was found wrong, or could not run."""


@dataclass(frozen=True)
class Comparison:
    """The result of a case."""

    case: str
    timings: list[Timing]
    missing: list[Missing]
    settings: Mapping[str, Any]
    costs: Mapping[str, Cost]
    axis: Axis | None = None

    @property
    def reference(self) -> Timing:
        """The fastest baseline, to which ratios are."""
        return min((timing for timing in self.timings if timing.baseline), key=lambda timing: timing.median)

    def ratio(self, timing: Timing) -> float:
        """The arm's median time over the reference's: below 1 is faster, above 1 is slower."""
        return timing.median / self.reference.median

    def interval(self, timing: Timing, draws: int = 2000) -> tuple[float, float]:
        """The 95 % bootstrap interval of the ratio. Rounds are drawn, so what slowed a whole round stays together."""
        ours, theirs = np.array(timing.samples), np.array(self.reference.samples)
        rows = np.random.default_rng(0).integers(len(ours), size=(draws, len(ours)))
        ratios = np.median(ours[rows], 1) / np.median(theirs[rows], 1)
        low, high = np.quantile(ratios, (0.025, 0.975))
        return float(low), float(high)


def digest(arrays: Iterable[Any]) -> str:
    """A short name of numbers and shapes: equal arrays have equal names. Tensors must be detached and on the CPU."""
    seen = hashlib.sha256()
    for array in arrays:
        values = np.ascontiguousarray(array)
        seen.update(f"{values.dtype} {values.shape}".encode())
        seen.update(values.tobytes())
    return seen.hexdigest()[:16]


def compare(
    case: Case, setup: Setup, *, seed: int = 0, progress: Callable[[str], object] = lambda _: None
) -> Comparison:
    """Times the arms of a case.

    Args:
        case: its arms have different names.
        setup: of the run.
        seed: of the shuffled orders.
        progress: called after each call of an arm, `calls(case)` times at most, with what was called.

    Raises:
        ValueError: no arm, two of one name, or no round.
        RuntimeError: the first arm could not run.
    """
    names = [arm.name for arm in case.arms]
    if not names or len(set(names)) != len(names) or case.rounds < 1:
        raise ValueError(
            f"compare: arms with different names and at least one round. Found {names}, {case.rounds} rounds."
        )
    _forget_graphs()
    ready: list[_Ready] = []
    missing: list[Missing] = []
    for arm in case.arms:
        found = _begin(arm, case, ready[0] if ready else None, setup)
        progress(f"{arm.name}, first call")
        if isinstance(found, _Ready):
            ready.append(found)
        elif ready:
            missing.append(found)
        else:
            raise RuntimeError(f"{case.name}: the first arm, {arm.name}, must run. Found: {found.reason}.")
    case.compared()
    for one in ready:
        for _ in range(case.warmups):
            one.loops = math.ceil(max(1.0, case.sample / one.timed(setup.device, 1)))
            progress(f"{one.arm.name}, warm-up")
    gc.collect()
    gc.freeze()  # else its walks over all that other arms' packages hold would be counted as an arm's time
    order, shuffler = list(ready), random.Random(seed)
    for number in range(case.rounds):
        shuffler.shuffle(order)
        for one in order:
            for _ in range(case.lead):
                one.timed(setup.device, 1)
            one.samples.append(one.timed(setup.device, one.loops))
            progress(f"{one.arm.name}, round {number + 1} of {case.rounds}")
    gc.unfreeze()
    if ready[0].fault:
        raise RuntimeError(f"{case.name}: the first arm, {names[0]}, must run. Found: {ready[0].fault}.")
    missing += [Missing(one.arm.name, one.fault, True) for one in ready if one.fault]
    timings = [one.timing(baseline=one.arm.baseline or one is ready[0]) for one in ready if not one.fault]
    return Comparison(case.name, timings, missing, case.settings, case.costs, case.axis)


def calls(case: Case) -> int:
    """How many calls `compare` makes."""
    return len(case.arms) * (1 + case.warmups + case.rounds)


@dataclass
class _Ready:
    """An arm that agreed."""

    arm: Arm
    work: Work
    first: float
    outputs: Any
    difference: float
    samples: list[float] = field(default_factory=list)
    compilations: int = 0
    loops: int = 1
    """Calls in a sample."""
    fault: str = ""
    """Why it has no times after all."""

    def timed(self, device: str, loops: int) -> float:
        """The time of one call, the mean of some; what they compile is counted. NaN once a call has failed."""
        if self.fault:
            return math.nan
        before = _graphs()
        try:
            seconds = _seconds(self.work, device, loops)
        except Exception as error:
            self.fault = _failed(error)
            return math.nan
        self.compilations += _graphs() - before
        return seconds

    def timing(self, *, baseline: bool) -> Timing:
        return Timing(
            self.arm.name, self.arm.precision, self.first, self.samples, self.difference, self.arm.tolerance, baseline,
            self.compilations,
        )  # fmt: skip


def _begin(arm: Arm, case: Case, reference: _Ready | None, setup: Setup) -> _Ready | Missing:
    """Makes the arm, calls it once and holds it against what is expected."""
    try:
        work = arm.make()
        fault = _other_start(arm, work.start, None if reference is None else reference.work.start, setup)
        if fault:
            return Missing(arm.name, f"refused: {fault}", True)
        first = _seconds(work, setup.device, 1)
        outputs = work.outputs()
        expected = arm.expected() if arm.expected else outputs if reference is None else reference.outputs
        difference = case.difference(outputs, expected)
    except ImportError as error:
        return Missing(arm.name, f"not installed: {_line(error)}", False)
    except Exception as error:  # others' code: whatever it raises, the other arms continue
        return Missing(arm.name, _failed(error), True)
    if not difference <= arm.tolerance:
        return Missing(
            arm.name, f"refused: outputs {difference:.1e} from those expected, above {arm.tolerance:g}", True
        )
    return _Ready(arm, work, first, outputs, difference)


def _other_start(arm: Arm, start: Start | None, reference: Start | None, setup: Setup) -> str | None:
    """In what an arm starts from something else than the first one, or than it should."""
    if start is None:
        return None if reference is None else "it does not say what it starts from"
    if start.precision != arm.precision:
        return f"it runs in {start.precision}, not in {arm.precision}"
    if start.threads != setup.threads:
        return f"it runs on {start.threads} threads, not on {setup.threads}"
    if reference is not None and start.weights != reference.weights:
        return "it starts from other weights"
    if reference is not None and start.batch != reference.batch:
        return "it takes another batch"
    return None


def _seconds(work: Work, device: str, loops: int) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(loops):
        work.call()
    _wait(device)
    return (time.perf_counter() - start) / loops


def _wait(device: str) -> None:
    if device != "cpu":
        sys.modules["torch"].cuda.synchronize()


def _graphs() -> int:
    """How many graphs torch has compiled in this process; none where its compiler was never used."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return int(dynamo.counters["stats"]["unique_graphs"]) if dynamo else 0


def _forget_graphs() -> None:
    """Drops what torch compiled for earlier cases: it keeps eight forms of a function, and runs a ninth uncompiled."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch"]._dynamo.reset()


def _failed(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {_line(error)}"


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:160]
