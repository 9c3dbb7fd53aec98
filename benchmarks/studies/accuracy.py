"""Whether `train` ends as accurate as the article's program: whole commands, one epoch in float32, thirty seeds each.

The article's program is the one with its fault mended, and stops after its epoch whatever it has reached. A seed does
not give both programs the same numbers, so the interval of the difference of their means is Welch's, of two samples:

    difference ± t s,    s² = s_1²/n_1 + s_2²/n_2,    degrees of freedom = s⁴ / Σ_i (s_i²/n_i)² / (n_i - 1)
"""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import NormalDist, fmean, stdev
from typing import Any, NamedTuple

from .. import epoch, programs
from . import markdown

QUESTION = "Does `train` end as accurate as the article's program?"

ARTICLE, TRAIN = "article's program", "train"
COMMANDS: dict[str, tuple[str, ...]] = {
    ARTICLE: ("-m", "benchmarks.article", "{root}", "{seed}", "1", "100", "cpu", "1"),
    TRAIN: ("-m", "functorch_mnist", "train", "--seed", "{seed}", "--out", "{folder}/run", "--threads", "1"),
}
"""Python's arguments, in which the seed, an empty folder and the one with the images are put in."""
SEEDS, QUICK_SEEDS = 30, 2
LEVEL = 0.95
LEAST = 98.0
"""In %: what `benchmarks.epoch` trains the article's program to."""


class Difference(NamedTuple):
    """Of two means, in percent points."""

    mean: float
    error: float
    """Its standard error."""
    degrees: float
    """Of freedom, of Student's distribution."""
    interval: tuple[float, float]
    """That of `LEVEL`."""


def difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """The second sample's mean less the first's, with Welch's interval; each has two values at least, not all equal."""
    parts = [stdev(values) ** 2 / len(values) for values in (first, second)]
    square = sum(parts)
    pairs = zip(parts, (first, second), strict=True)
    degrees = square**2 / sum(part**2 / (len(values) - 1) for part, values in pairs)
    mean, error = fmean(second) - fmean(first), square**0.5
    half = student_quantile((1 + LEVEL) / 2, degrees) * error
    return Difference(mean, error, degrees, (mean - half, mean + half))


def student_quantile(probability: float, degrees: float) -> float:
    """The quantile of Student's distribution by its expansion about the normal one, good to 1e-4 from 10 degrees on.

    Reference: Abramowitz, Stegun, "Handbook of mathematical functions", 1964, equation 26.7.5.
    """
    x = NormalDist().inv_cdf(probability)
    terms = (
        x,
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return sum(term / degrees**power for power, term in enumerate(terms))


def run(*, quick: bool, progress: Callable[[str], object]) -> dict[str, Any]:
    """The record: each run's accuracy, and what they are together."""
    seeds = range(QUICK_SEEDS if quick else SEEDS)
    made: dict[tuple[str, int], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as root, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        epoch.unpack_mnist(Path(root))
        waiting = {pool.submit(_made, name, seed, root): (name, seed) for seed in seeds for name in COMMANDS}
        try:
            for done in as_completed(waiting):
                one = made[waiting[done]] = done.result()
                line = f"{one['accuracy']:.2f} %, {one['seconds']:.0f} s"
                progress(f"{len(made)} of {len(waiting)}: {one['program']}, seed {one['seed']}: {line}")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return record_of([made[key] for key in waiting.values()])


def record_of(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The runs, and what they are together."""
    found = {name: _of(name, runs) for name in COMMANDS}
    return {
        "settings": {"epochs": 1, "precision": "float32", "threads": 1, "commands": COMMANDS},
        "runs": list(runs),
        "programs": {name: {"mean": fmean(of), "deviation": stdev(of)} for name, of in found.items()},
        "difference": difference(found[ARTICLE], found[TRAIN])._asdict(),
    }


def table(record: dict[str, Any]) -> dict[str, str]:
    """Test accuracy of both programs, and the difference."""
    rows = []
    for name, summary in record["programs"].items():
        of = _of(name, record["runs"])
        mean = f"{summary['mean']:.3f} ± {summary['deviation']:.3f}"
        below = sum(accuracy < LEAST for accuracy in of)
        rows.append([name, str(len(of)), mean, f"{min(of):.2f}", f"{max(of):.2f}", str(below)])
    found = record["difference"]
    low, high = found["interval"]
    rows.append(["difference", "", f"{found['mean']:+.3f} ({low:+.3f} to {high:+.3f})", "", "", ""])
    heads = ("program", "seeds", "test %, difference (95 %)", "minimum", "maximum", f"below {LEAST:g} %")
    return {"Accuracy after an epoch": markdown(heads, rows)}


def _made(name: str, seed: int, root: str) -> dict[str, Any]:
    """One run, of a process of its own."""
    start = time.perf_counter()
    accuracy = programs.accuracy(*COMMANDS[name], seed=seed, root=root)
    return {"program": name, "seed": seed, "accuracy": accuracy, "seconds": round(time.perf_counter() - start, 1)}


def _of(name: str, runs: Sequence[dict[str, Any]]) -> list[float]:
    """A program's accuracies."""
    return [one["accuracy"] for one in runs if one["program"] == name]
