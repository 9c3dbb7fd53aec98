"""The pictures of the pages, drawn from committed results.

A picture is numbers, read from results, and a drawing of these numbers alone. A file carries the digest of its numbers
as text of the PNG, so whether it is drawn from the committed results is known without drawing it again.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from PIL import Image

from . import results
from .measure import Comparison, Timing
from .studies import frontier, imbalance, overfitting

DIGEST = "Data-SHA256"
"""The name of the text in a PNG that holds the digest of its numbers."""
HERE, OTHERS, REFERENCE = "#1b6ca8", "#b0b0b0", "#444444"
"""Colours: this library, others, the reference."""

Numbers = Mapping[str, Any]
"""What a picture shows, as JSON has it."""


class Picture(NamedTuple):
    """A picture of a page."""

    numbers: Callable[[Path], Numbers]
    """Reads what is shown from a folder of results."""
    draw: Callable[[Numbers], Figure]


def write(folder: Path, source: Path = results.RESULTS) -> list[Path]:
    """Draws all pictures into a folder, from the results in `source`."""
    written = []
    for name, picture in PICTURES.items():
        numbers = picture.numbers(source)
        written.append(folder / name)
        metadata = {DIGEST: digest(numbers), "Software": None}
        picture.draw(numbers).savefig(written[-1], dpi=150, facecolor="white", metadata=metadata)
    return written


def digest(numbers: Numbers) -> str:
    """The SHA-256 of what a picture shows."""
    return hashlib.sha256(json.dumps(numbers, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def digest_of(path: Path) -> str | None:
    """The digest that a picture carries."""
    with Image.open(path) as image:
        found = image.info.get(DIGEST)
    return found if isinstance(found, str) else None


def _read(folder: Path, name: str) -> tuple[dict[str, Comparison], str]:
    """The comparisons of a result, by case, and a line that names the machine."""
    path = folder / f"{name}.json"
    comparisons, _ = results.read(path)
    record = json.loads(path.read_text(encoding="utf-8"))
    machine, threads = record["machine"], record["setup"]["threads"]
    line = f"{machine['processor']}, {threads} cores, torch {machine['versions']['torch']}, float32"
    return {one.case: one for one in comparisons}, line


def _study(folder: Path, name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / f"study-{name}.json").read_text(encoding="utf-8"))
    return record


def _fastest(comparison: Comparison, names: Sequence[str]) -> Timing:
    return min((one for one in comparison.timings if one.name in names), key=lambda one: one.median)


# A clipped step's time

CLIPPED = {
    "this library, compiled": ("factored, compiled, float32",),
    "Opacus, ghost clipping": ("Opacus, ghost clipping",),
    "vmap(grad)": ("vmap(grad), eager", "vmap(grad), compiled"),
    "Opacus, hooks": ("Opacus, hooks",),
    "JAX, jit(vmap(grad))": ("JAX, jit(vmap(grad))",),
}
"""The arms of `per_sample` by the name shown; of several the fastest."""


def _clipped_numbers(folder: Path) -> Numbers:
    cases, machine = _read(folder, "per-sample-2-cores")
    panels = {}
    for size in (64, 512):
        comparison = cases[f"clipped, B={size}"]
        chosen = {shown: _fastest(comparison, names) for shown, names in CLIPPED.items()}
        panels[f"batch of {size}"] = {
            "ordinary, ms": 1e3 * comparison.reference.median,
            "ratios": {shown: [comparison.ratio(one), *comparison.interval(one)] for shown, one in chosen.items()},
        }
    return {"machine": machine, "panels": panels}


def _draw_clipped(numbers: Numbers) -> Figure:
    figure = Figure(figsize=(8.4, 3.1), layout="constrained")
    figure.suptitle(
        "Time of a training step with per-sample clipping, over an ordinary step without it", fontsize=11, weight="bold"
    )
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (title, panel) in zip(panels, numbers["panels"].items(), strict=True):
        for place, (name, (ratio, low, high)) in enumerate(panel["ratios"].items()):
            ours = name.startswith("this library")
            axes.barh(place, ratio, color=HERE if ours else OTHERS, height=0.7)
            axes.errorbar(ratio, place, xerr=[[ratio - low], [high - ratio]], color="black", capsize=3, linewidth=1)
            axes.text(
                high, place, f"  {ratio:.{2 if ratio < 10 else 1}f}", va="center", fontsize=9,
                weight="bold" if ours else "normal",
            )  # fmt: skip
        axes.axvline(1, color=REFERENCE, linewidth=1, linestyle="--")
        axes.text(1, -0.62, " ordinary step", fontsize=8, color=REFERENCE, va="bottom")
        axes.set(xlim=(0, 1.18 * max(high for _, _, high in panel["ratios"].values())), ylim=(4.5, -1.05))
        axes.set_title(f"{title}, ordinary step {panel['ordinary, ms']:.0f} ms", fontsize=9)
        axes.set_yticks(range(len(panel["ratios"])), list(panel["ratios"]), fontsize=9)
        axes.tick_params("y", length=0)
        axes.tick_params("x", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(
        f"CNN of the PyTorch tutorial on MNIST; medians with 95 % intervals; ordinary step: compiled nn.Module\n"
        f"{numbers['machine']}",
        fontsize=8, color=REFERENCE,
    )  # fmt: skip
    return figure


# Memory against B and T

BY_BATCH = {
    "ordinary step": ("ordinary step, compiled nn.Module, float32", "compiled nn.Module, float32"),
    "clipped, this library": ("factored, compiled, float32", "clipped, compiled, float32"),
    "clipped, vmap(grad)": ("vmap(grad), eager", "clipped, vmap(grad), eager, float32"),
    "clipped, Opacus, ghost clipping": ("Opacus, ghost clipping", ""),
    "clipped, Opacus, hooks": ("Opacus, hooks", ""),
}
"""The arm of `per_sample` and that of `scaling`, by the name shown."""
BY_LENGTH = {
    "ordinary step": "ordinary",
    "clipped, this library": "clipped, prepared",
    "clipped, Opacus, ghost clipping": "clipped, Opacus, ghost clipping",
}
"""The arms of `machines`, by the name shown."""
STYLES: dict[str, dict[str, Any]] = {
    "ordinary step": {"color": REFERENCE, "linestyle": "--", "marker": "o"},
    "clipped, this library": {"color": HERE, "linestyle": "-", "marker": "o"},
    "clipped, vmap(grad)": {"color": "#c98a1b", "linestyle": "-", "marker": "s"},
    "clipped, Opacus, ghost clipping": {"color": "#b3446c", "linestyle": "-", "marker": "^"},
    "clipped, Opacus, hooks": {"color": "#5b8c3a", "linestyle": "-", "marker": "D"},
}


def _memory_numbers(folder: Path) -> Numbers:
    per_sample, machine = _read(folder, "per-sample-2-cores")
    scaling, _ = _read(folder, "scaling-2-cores")
    machines, _ = _read(folder, "machines-2-cores")
    batch = {16: scaling["B=16"], 64: per_sample["clipped, B=64"], 256: scaling["B=256"]}
    batch[512] = per_sample["clipped, B=512"]
    lengths = {int(one.axis.value): one for one in machines.values() if one.axis and one.axis.name == "T"}
    return {
        "machine": machine,
        "B": {shown: _peaks(batch, names) for shown, names in BY_BATCH.items()},
        "T": {shown: _peaks(lengths, [name]) for shown, name in BY_LENGTH.items()},
        "refused at T": [
            size for size, one in lengths.items() if any("ghost" in arm.name and arm.refused for arm in one.missing)
        ],
    }


def _peaks(comparisons: Mapping[int, Comparison], names: Iterable[str]) -> list[tuple[int, float]]:
    """Peak memory in MB at each size, where it was measured."""
    found = [
        (size, timing.memory / 1e6)
        for size, comparison in comparisons.items()
        for timing in comparison.timings
        if timing.name in names and timing.memory
    ]
    return sorted(found)


def _draw_memory(numbers: Numbers) -> Figure:
    figure = Figure(figsize=(8.4, 4.2), layout="constrained")
    figure.suptitle("Peak memory of a training step", fontsize=11, weight="bold")
    panels = figure.subplots(1, 2)
    titles = {"B": "CNN of the tutorial, against the batch size B", "T": "Transformer, one text, against its length T"}
    for axes, (axis, title) in zip(panels, titles.items(), strict=True):
        for name, points in numbers[axis].items():
            axes.plot(*zip(*points, strict=True), label=name, markersize=4, **STYLES[name])
        sizes = sorted({size for points in numbers[axis].values() for size, _ in points})
        axes.set(xscale="log", yscale="log", xlabel=axis, ylabel="peak memory, MB")
        axes.set_title(title, fontsize=9)
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=8)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_locator(NullLocator())
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for size in numbers["refused at T"]:
        ghost = "clipped, Opacus, ghost clipping"
        panels[1].text(
            size, 0.5 * numbers["T"][ghost][-1][1], f"T = {size:,}:\nrefused, its\noutputs differ", fontsize=7,
            ha="right", va="top", color=STYLES[ghost]["color"],
        )  # fmt: skip
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8,
        title=numbers["machine"], title_fontsize=8,
    )  # fmt: skip
    return figure


# Label errors detected

SCORES = {
    "EL2N, mean over epochs": {"color": HERE, "marker": "o"},
    "loss, end": {"color": "#c98a1b", "marker": "s"},
    "data value, clean validation, first order": {"color": "#b3446c", "marker": "v"},
    "forgetting events": {"color": "#7a5195", "marker": "^"},
    "random": {"color": REFERENCE, "marker": ".", "linestyle": "--"},
}


def _labels_numbers(folder: Path) -> Numbers:
    record = _study(folder, "mislabelled")
    panels = {}
    for scale, model in (("thousand", "MLP, 20 epochs"), ("whole", "CNN of the tutorial, 2 epochs")):
        seeds = record[scale]["seeds"]
        title = f"{record[scale]['settings']['images']:,} images, {model}, {_counted(len(seeds), 'seed')}"
        panels[title] = {
            name: [_moments([100 * seed["scores"][name]["detected"][place] for seed in seeds]) for place in range(3)]
            for name in SCORES
        }
    return {"flipped": 100 * record["thousand"]["settings"]["flipped"], "inspected": [10, 20, 30], "panels": panels}


def _draw_labels(numbers: Numbers) -> Figure:
    figure = Figure(figsize=(8.4, 4.0), layout="constrained")
    figure.suptitle("Flipped labels detected when the most suspicious images are inspected", fontsize=11, weight="bold")
    panels = figure.subplots(1, 2, sharey=True)
    places, flipped = [0, *numbers["inspected"]], numbers["flipped"]
    for axes, (title, scores) in zip(panels, numbers["panels"].items(), strict=True):
        axes.plot([0, flipped, places[-1]], [0, 100, 100], color="black", linewidth=1, linestyle=":", label="perfect")
        for number, (name, moments) in enumerate(scores.items()):
            means, spreads = zip((0.0, 0.0), *moments, strict=True)
            moved = [place + 0.3 * number * (place > 0) for place in places]  # so that no point hides another
            axes.errorbar(
                moved, means, yerr=spreads, label=name, markersize=4, capsize=2, linewidth=1.2, **SCORES[name]
            )
        axes.set_title(title, fontsize=9)
        axes.set(xlabel="inspected, % of the training set", ylim=(0, 104), xticks=places)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("detected, % of the flipped labels")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


# Remedies


def _remedies_numbers(folder: Path) -> Numbers:
    over, rare = _study(folder, "overfitting")["runs"], _study(folder, "imbalance")["runs"]
    plain = {run["seed"]: run["accuracy"] for run in over if run["name"] == "plain"}
    return {
        "overfitting": {
            name: _moments([run["accuracy"] - plain[run["seed"]] for run in over if run["name"] == name])
            for name in overfitting.REMEDIES
            if name != "plain"
        },
        "plain": _moments(list(plain.values())),
        "imbalance": {
            name: _moments([fmean(run["recall"][k] for k in imbalance.CUT) for run in rare if run["name"] == name])
            for name in imbalance.REMEDIES
        },
    }


def _draw_remedies(numbers: Numbers) -> Figure:
    figure = Figure(figsize=(9.6, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    mean, spread = numbers["plain"]
    _dots(left, numbers["overfitting"], f"points above the plain run ({mean:.1f} ± {spread:.1f} %)", line=0.0)
    left.set_title("Overfitting: test accuracy after training on 1,000 images\n5 seeds, paired", fontsize=9)
    _dots(right, numbers["imbalance"], "mean recall of the two rare classes, %", line=numbers["imbalance"]["plain"][0])
    right.set_title("Imbalance: digits 8 and 9 cut to 1 %\n3 seeds", fontsize=9)
    figure.supxlabel(
        "means and standard deviations over seeds, CNN of the tutorial on MNIST", fontsize=8, color=REFERENCE
    )
    return figure


def _dots(axes: Axes, rows: Mapping[str, Sequence[float]], label: str, *, line: float) -> None:
    """A point with its error bar for each row, the largest first."""
    ordered = sorted(rows.items(), key=lambda row: -row[1][0])
    for place, (_, (mean, spread)) in enumerate(ordered):
        axes.errorbar(mean, place, xerr=spread, marker="o", markersize=5, capsize=3, color=HERE)
    axes.axvline(line, color=REFERENCE, linewidth=1, linestyle="--")
    axes.set_yticks(range(len(ordered)), [name for name, _ in ordered], fontsize=8)
    axes.set_ylim(len(ordered) - 0.4, -0.6)
    axes.set_xlabel(label, fontsize=8)
    axes.tick_params("x", labelsize=8)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


# Accuracy against ε


def _frontier_numbers(folder: Path) -> Numbers:
    rows = _study(folder, "frontier")["frontier"]
    epsilons = dict.fromkeys(row["epsilon"] for row in rows)
    here = {str(e): _moments([row["accuracy"] for row in rows if row["epsilon"] == e]) for e in epsilons}
    published: dict[str, list[tuple[float, float]]] = {}
    for point in frontier.PUBLISHED:
        name = f"{point.method}{' (accounting disputed)' if 'disputed' in point.account else ''}"
        published.setdefault(name, []).append((point.epsilon, point.accuracy))
    return {"here": here, "published": published}


def _draw_frontier(numbers: Numbers) -> Figure:
    figure = Figure(figsize=(8.4, 4.4), layout="constrained")
    axes = figure.subplots()
    epsilons = [float(epsilon) for epsilon in numbers["here"]]
    means, spreads = zip(*numbers["here"].values(), strict=True)
    axes.errorbar(
        epsilons, means, yerr=spreads, marker="o", capsize=3, color=HERE, label="this library, recipe private (PLD)"
    )
    for number, (name, points) in enumerate(numbers["published"].items()):
        axes.plot(
            *zip(*points, strict=True), color=f"C{number + 1}", label=name, markersize=5,
            linestyle="", marker="x" if "disputed" in name else "sD^vP"[number % 5],
        )  # fmt: skip
    axes.set_title("Test accuracy of private classifiers of MNIST against their budget ε", fontsize=11, weight="bold")
    axes.set(xscale="log", xlabel="ε at δ = 1e-5, as published", ylabel="test accuracy, %", ylim=(94, 99.7))
    axes.set_xticks(epsilons, [f"{epsilon:g}" for epsilon in epsilons])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend([handles[-1], *handles[:-1]], [labels[-1], *labels[:-1]], loc="outside right center", fontsize=8)
    return figure


def _moments(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation; zero of a single value."""
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' if count > 1 else ''}"


PICTURES = {
    "clipped-step.png": Picture(_clipped_numbers, _draw_clipped),
    "memory.png": Picture(_memory_numbers, _draw_memory),
    "label-errors.png": Picture(_labels_numbers, _draw_labels),
    "remedies.png": Picture(_remedies_numbers, _draw_remedies),
    "frontier.png": Picture(_frontier_numbers, _draw_frontier),
}
"""By file name."""
