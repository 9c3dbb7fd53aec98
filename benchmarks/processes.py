"""What several processes cost and gain on one machine: ordinary and clipped steps, the bytes that they send, a model.

A step of P processes of T threads each takes the same batch as one of P T threads; DDP and Opacus' DPDDP are timed as
well. Then sums over processes, of one number and of the CNN's size, and ordinary steps of 1 to 4 processes of one
thread: a model with two constants is fitted to the sums and compared with the steps.

    seconds(P) = compute(P) + log2(P) latency + 2 (P - 1) / P · bytes / bandwidth

Bytes are the kernel's count of what has gone over the loopback interface.
"""

import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from functorch_mnist import tree

from .measure import Arm, Case, Comparison, Question, Setup, Work
from .problems import Problem, cnn
from .ranks import STEPS, Ranks, started
from .steps import relative_difference

ROWS = 128
TOLERANCE = 2e-3
"""Relative, of the way that the parameters have gone in a call: ten steps take rounding along."""


class Run(NamedTuple):
    """An arm of some processes."""

    arm: str
    """Of `ranks.ARMS`."""
    size: int
    threads: int
    shards: int | None = None


def arm(name: str, run: Run, problem: Problem, setup: Setup, counts: dict[str, float], *, baseline: bool) -> Arm:
    """An arm, whose bytes are counted in its first call that is not one of compilation."""

    def make() -> Work:
        ranks = Ranks(run.arm, len(problem.labels), size=run.size, threads=run.threads, shards=run.shards)
        calls = 0

        def call() -> None:
            nonlocal calls
            before = _sent()
            ranks.ask(str(STEPS))
            calls += 1
            if calls == 2:
                counts[name] = (_sent() - before) / STEPS

        def outputs() -> Any:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "outputs.pt"
                ranks.ask(f"save {path}")
                return torch.load(path)

        return Work(call, outputs, started(problem, setup.threads))

    return Arm(name, make, TOLERANCE, baseline=baseline)


def _sent() -> int:
    """Bytes that have gone over the loopback interface since the machine has started."""
    line = next(x for x in Path("/proc/net/dev").read_text().splitlines() if x.strip().startswith("lo:"))
    return int(line.split()[9])


def cases(setup: Setup) -> Iterator[Case]:
    """Steps of one and two processes, then what a model needs, and steps that it is held against."""
    problem, threads = cnn(ROWS, setup.device), setup.threads
    half = max(1, threads // 2)
    numbers = sum(leaf.numel() for leaf in tree.leaves(problem.params))
    rounds = 3 if setup.quick else 12
    two = f"2 processes of {half} thread{'s' * (half > 1)}"
    one = f"1 process of {threads} thread{'s' * (threads > 1)}"
    others = {
        "ordinary": {
            f"compiled nn.Module, {one}": Run("module", 1, threads),
            f"compiled nn.Module, DDP, {two}": Run("module", 2, half),
        },
        "clipped": {
            f"Opacus, hooks, DPDDP, {two}": Run("opacus, hooks", 2, half),
            f"Opacus, ghost, DPDDP, {two}": Run("opacus, ghost", 2, half),
        },
    }
    for kind in ("ordinary", "clipped"):
        runs = {
            f"functional, {one}": Run(kind, 1, threads),
            f"functional, {two}": Run(kind, 2, half),
            f"functional, optimizer in shards, {two}": Run(f"{kind}, optimizer in shards", 2, half),
            f"functional, --shards 2, {two}": Run(kind, 2, half, 2),
            **({} if setup.quick else others[kind]),
        }
        counts: dict[str, float] = {}
        arms = [
            arm(name, run, problem, setup, counts, baseline=name == f"functional, {one}") for name, run in runs.items()
        ]
        settings = {"batch_size": ROWS, "steps": STEPS, "numbers": numbers, "bytes of a step": counts}
        yield Case(f"{kind}, B={ROWS}", arms, relative_difference, rounds, settings=settings)
    if setup.quick:
        return
    for size in (2, 3, 4):
        arms = [
            arm(name, Run(name, size, 1), problem, setup, {}, baseline=True) for name in ("one number", "all numbers")
        ]
        yield Case(f"sums, P={size}", arms, relative_difference, rounds, settings={"numbers": numbers, "steps": STEPS})
    arms = [
        arm(f"{size} of one thread", Run("ordinary", size, 1), problem, setup, {}, baseline=size == 1)
        for size in (1, 2, 3, 4)
    ]
    yield Case("ordinary, P of one thread", arms, relative_difference, rounds, settings={"steps": STEPS})


def conclude(comparisons: Sequence[Comparison]) -> str:
    """Bytes, and the model."""
    found = {comparison.case: comparison for comparison in comparisons}
    return "\n\n".join(part for part in (_bytes(found), _model(found)) if part)


def _bytes(found: dict[str, Comparison]) -> str:
    lines = ["| arm | MB a step | over the least |", "|---|---:|---:|"]
    for case, comparison in found.items():
        counts = comparison.settings.get("bytes of a step", {})
        least = 2 * 4 * comparison.settings.get("numbers", 0)  # of two processes: each sends the vector once
        lines += [
            f"| {case}: {name} | {count / 1e6:.2f} | {count / least:.3f} |"
            for name, count in counts.items()
            if "2 processes" in name
        ]
    return "\n".join(lines) if len(lines) > 2 else ""


class Constants(NamedTuple):
    """Of a model of sums over processes."""

    latency: float
    """Seconds of a message, of which one follows another log2(P) times."""
    bandwidth: float
    """Bytes that a process sends in a second."""

    def seconds(self, size: int, numbers: int) -> float:
        """What a sum of float32 numbers takes."""
        return math.log2(size) * self.latency + 2 * (size - 1) / size * 4 * numbers / self.bandwidth


def constants(found: dict[str, Comparison]) -> dict[int, Constants]:
    """By the number of processes."""
    fitted = {}
    for size in (2, 3, 4):
        comparison = found.get(f"sums, P={size}")
        if comparison is not None and len(comparison.timings) == 2:
            small, large = (timing.median / comparison.settings["steps"] for timing in comparison.timings)
            sent = 2 * (size - 1) / size * 4 * comparison.settings["numbers"]
            fitted[size] = Constants(small / math.log2(size), sent / (large - small))
    return fitted


GPUS = {
    "8, NVLink 4": (8, Constants(10e-6, 450e9)),
    "64, InfiniBand NDR": (64, Constants(20e-6, 50e9)),
    "512, InfiniBand NDR": (512, Constants(20e-6, 50e9)),
}
"""Published bandwidths of a GPU in one direction: H100's NVLink 900 GB/s in both, and ConnectX-7's 400 Gb/s (NVIDIA's
data sheets). The latencies, 10 and 20 us, are assumed."""
MODELS = {"CNN, 1.2 M": 1_199_882, "GPT-2, 124 M": 124_439_808, "1.3 B": 1_300_000_000}


def _model(found: dict[str, Comparison]) -> str:
    fitted, steps = constants(found), found.get("ordinary, P of one thread")
    if not fitted or steps is None:
        return ""
    times = {int(timing.name.split()[0]): timing.median / steps.settings["steps"] for timing in steps.timings}
    numbers = next(one.settings["numbers"] for one in found.values() if one.case.startswith("sums"))
    lines = [
        "| processes of one thread | latency, us | GB/s | step by the model, ms | measured, ms | model / measured |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    cores = 2
    for size, seconds in times.items():
        one = fitted.get(size, Constants(0.0, float("inf")))
        by_model = times[1] / min(size, cores) + one.seconds(size, numbers)
        latency, bandwidth = (f"{1e6 * one.latency:.0f}", f"{one.bandwidth / 1e9:.2f}") if size > 1 else ("", "")
        lines.append(
            f"| {size} | {latency} | {bandwidth} | {1e3 * by_model:.2f} | {1e3 * seconds:.2f} "
            f"| {by_model / seconds:.2f} |"
        )
    lines += ["", "| GPUs | " + " | ".join(f"sum of {name}, ms" for name in MODELS) + " |"]
    lines.append("|---|" + "---:|" * len(MODELS))
    for name, (size, one) in GPUS.items():
        cells = " | ".join(f"{1e3 * one.seconds(size, count):.2f}" for count in MODELS.values())
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


QUESTION = Question(
    "processes", "steps of several processes, the bytes that they send, and a model of more", cases, conclude
)
