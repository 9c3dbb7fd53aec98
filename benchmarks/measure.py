"""The harness: arms that agree, timed in interleaved rounds, with all that a reader needs to judge the numbers.

Each arm is called once first, and that call's time, compilation and all, is kept apart. Its outputs are held against
the reference arm's; an arm that disagrees is not timed. Then come rounds in which every arm is timed once, in an order
that is shuffled anew, so that a machine whose speed drifts drifts for all of them.
"""

import json
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


class DisagreementError(Exception):
    """An arm's outputs are not the reference's, so its time would mean nothing."""


@dataclass(frozen=True)
class Arm:
    """One way to do the work."""

    name: str
    call: Callable[[], object]
    """Does the work once, and waits until it is done."""
    outputs: Callable[[], Any]
    """What the last call computed; not timed."""
    tolerance: float = 0.0
    """How far the outputs of the first call may be from the reference's, in the unit of `difference`."""


@dataclass(frozen=True)
class Timing:
    """The measured times of one arm, in seconds."""

    name: str
    first: float
    """The first call, compilation included."""
    samples: list[float]
    difference: float
    """Of the first call's outputs, from the reference's."""
    tolerance: float

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.samples) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high


@dataclass(frozen=True)
class Comparison:
    """The arms of one question, the reference first."""

    question: str
    timings: list[Timing]
    settings: Mapping[str, Any]

    @property
    def reference(self) -> Timing:
        return self.timings[0]

    def ratio(self, timing: Timing) -> float:
        """The arm's median time over the reference's: below 1 is faster, above 1 is slower."""
        return timing.median / self.reference.median


def compare(
    question: str,
    arms: Sequence[Arm],
    *,
    rounds: int,
    difference: Callable[[Any, Any], float],
    settings: Mapping[str, Any],
    warmups: int = 1,
    seed: int = 0,
    compared: Callable[[], None] = lambda: None,
    show: Callable[[str], None] = print,
) -> Comparison:
    """Times the arms against the first of them.

    Args:
        question: names the result.
        arms: the reference first; their names differ.
        rounds: timed calls of each arm, at least 1.
        difference: `difference(outputs, outputs of the reference)`, at least 0; NaN counts as disagreement.
        settings: what the numbers depend on, kept with them.
        warmups: calls of each arm between the first one and the rounds.
        seed: of the shuffled orders.
        compared: called once the arms have been compared, before they are timed.
        show: gets a line of progress.

    Raises:
        DisagreementError: an arm's difference is above its tolerance; nothing has been timed then.
        ValueError: no arm, two of one name, or no round.
    """
    names = [arm.name for arm in arms]
    if not arms or len(set(names)) != len(names) or rounds < 1:
        raise ValueError(f"compare: arms with different names and at least one round. Found {names}, {rounds} rounds.")
    first, differences, expected = {}, {}, None
    for arm in arms:
        start = time.perf_counter()
        arm.call()
        first[arm.name] = time.perf_counter() - start
        outputs = arm.outputs()
        expected = outputs if expected is None else expected
        differences[arm.name] = difference(outputs, expected)
        show(f"{arm.name}: first call {first[arm.name]:.2f} s, difference {differences[arm.name]:.2e}")
        if not differences[arm.name] <= arm.tolerance:
            raise DisagreementError(
                f"{arm.name}: outputs must be within {arm.tolerance} of {names[0]}'s. Found {differences[arm.name]}."
            )
    compared()
    for arm in arms:
        for _ in range(warmups):
            arm.call()
    samples: dict[str, list[float]] = {name: [] for name in names}
    order, shuffler = list(arms), random.Random(seed)
    for number in range(rounds):
        shuffler.shuffle(order)
        for arm in order:
            start = time.perf_counter()
            arm.call()
            samples[arm.name].append(time.perf_counter() - start)
        if rounds <= 10:
            show(f"round {number + 1} of {rounds}: " + ", ".join(f"{n} {samples[n][-1]:.2f} s" for n in names))
    timings = [Timing(a.name, first[a.name], samples[a.name], differences[a.name], a.tolerance) for a in arms]
    return Comparison(question, timings, settings)


def table(comparison: Comparison) -> str:
    """The comparison as a Markdown table; a slower arm shows a ratio above 1."""
    scale, unit = (1.0, "s") if comparison.reference.median >= 1 else (1e3, "ms")
    lines = [
        f"| arm | first call, s | median, {unit} | quartiles, {unit} | ratio |",
        "|---|---:|---:|---:|---:|",
    ]
    for t in comparison.timings:
        low, high = t.quartiles
        lines.append(
            f"| {t.name} | {t.first:.2f} | {t.median * scale:.2f} | {low * scale:.2f} to {high * scale:.2f} "
            f"| {comparison.ratio(t):.2f} |"
        )
    return "\n".join(lines)


def write(comparison: Comparison, folder: Path = RESULTS) -> Path:
    """Adds the comparison to the results, as JSON under a name that no earlier result has."""
    now = datetime.now(UTC)
    record = {
        "question": comparison.question,
        "time": now.isoformat(timespec="seconds"),
        "machine": machine(),
        "settings": dict(comparison.settings),
        "reference": comparison.reference.name,
        "arms": [
            {
                "name": t.name,
                "first_s": t.first,
                "median_s": t.median,
                "quartiles_s": list(t.quartiles),
                "ratio": comparison.ratio(t),
                "difference": t.difference,
                "tolerance": t.tolerance,
                "samples_s": t.samples,
            }
            for t in comparison.timings
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{comparison.question}-{now.strftime('%Y%m%d-%H%M%S')}"
    for number in range(1000):
        path = folder / f"{stem}{f'-{number}' if number else ''}.json"
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(json.dumps(record, indent=1, allow_nan=False) + "\n")
        except FileExistsError:
            continue
        return path
    raise FileExistsError(f"{folder} holds a thousand results of one second.")


def read(path: Path) -> Comparison:
    """The comparison that `write` wrote."""
    record = json.loads(path.read_text(encoding="utf-8"))
    timings = [
        Timing(arm["name"], arm["first_s"], arm["samples_s"], arm["difference"], arm["tolerance"])
        for arm in record["arms"]
    ]
    return Comparison(record["question"], timings, record["settings"])


def machine() -> dict[str, Any]:
    """Processor, versions and commit: what a number cannot be read without."""
    import torch

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", "torchvision", "functorch-mnist")},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
