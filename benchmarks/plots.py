"""Pictures of a result: the arms' ratios as bars, and curves where cases vary along an axis."""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from .measure import Comparison, Timing

COLUMNS = 4
"""Cases in a row, at most."""
COLORS = {"reference": "tab:gray", "faster": "tab:green", "slower": "tab:red"}
LINES = ("-", "--", ":", "-.")


def draw(question: str, comparisons: Sequence[Comparison], path: Path) -> list[Path]:
    """Draws a question's comparisons into PNG files whose names begin as `path`'s."""
    figures = {"bars": _bars(question, comparisons)}
    varied = {(c.axis.name, c.axis.value) for c in comparisons if c.axis}
    for axis, points in sorted(Counter(name for name, _ in varied).items()):
        if points > 1:
            figures[axis] = _curves(question, axis, comparisons)
    drawn = []
    for name, figure in figures.items():
        drawn.append(path.with_name(f"{path.stem}-{name}.png"))
        figure.savefig(drawn[-1], dpi=130)
    return drawn


def _bars(question: str, comparisons: Sequence[Comparison]) -> Figure:
    """The ratios of each case with their intervals, cases of the same arms in a row."""
    groups: dict[frozenset[str], list[Comparison]] = {}
    for comparison in comparisons:
        groups.setdefault(frozenset(_names([comparison])), []).append(comparison)
    columns = min(COLUMNS, max(map(len, groups.values())))
    shapes = [(math.ceil(len(group) / COLUMNS), len(names)) for names, group in groups.items()]
    heights = [rows * (0.8 + 0.2 * arms) for rows, arms in shapes]
    size = (3.6 + max(5.0, 2.6 * columns), 0.5 + sum(heights))
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(
        f"{question}: time over that of the fastest baseline, with 95 % intervals; pale where they hold 1",
        fontsize=9,
    )
    parts = figure.subfigures(len(groups), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, group, (rows, _) in zip(parts, groups.values(), shapes, strict=True):
        _panels(part.subplots(rows, min(COLUMNS, len(group)), sharex=True, sharey=True, squeeze=False).flat, group)
    return figure


def _panels(panels: Any, group: Sequence[Comparison]) -> None:
    """Draws the cases of one set of arms, all to one scale: logarithmic where ratios span more than a factor of 10."""
    names = _names(group)
    ratios = [c.ratio(timing) for c in group for timing in c.timings]
    logarithmic = max(ratios) > 10 * min(ratios)
    for axes, comparison in zip(panels, group, strict=False):
        for timing in comparison.timings:
            _bar(axes, names.index(timing.name), comparison, timing, start=1.0 if logarithmic else 0.0)
        for one in comparison.missing:
            reason = one.reason.partition(":")[0]
            axes.text(1, names.index(one.name), f" {reason}", va="center", fontsize=7, style="italic")
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_title(comparison.case, fontsize=9)
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.tick_params("x", labelsize=7, labelbottom=True)
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    panels[0].margins(x=0.2)
    if logarithmic:
        panels[0].set_xscale("log")
        _plain(panels[0].xaxis)
    for axes in panels[len(group) :]:
        axes.set_visible(False)


def _bar(axes: Any, place: int, comparison: Comparison, timing: Timing, *, start: float) -> None:
    """One arm's ratio, as a bar from `start` on."""
    ratio, (low, high) = comparison.ratio(timing), comparison.interval(timing)
    kind = "reference" if timing is comparison.reference else "faster" if ratio <= 1 else "slower"
    alpha = 0.4 if kind != "reference" and low <= 1 <= high else 1.0
    axes.barh(place, ratio - start, left=start, color=COLORS[kind], alpha=alpha)
    axes.errorbar(
        ratio, place, xerr=[[max(0, ratio - low)], [max(0, high - ratio)]], color="black", capsize=2, linewidth=1
    )
    label = kind if kind == "reference" else f"{ratio:.{2 if ratio < 10 else 1}f}"
    axes.text(max(ratio, high, 1), place, f" {label}", va="center", fontsize=7)


def _curves(question: str, axis: str, comparisons: Sequence[Comparison]) -> Figure:
    """Times, and memory where it was measured, against what was varied; an arm has one colour in all figures."""
    points = [(c.axis.value, timing) for c in comparisons if c.axis and c.axis.name == axis for timing in c.timings]
    panels = {"time, ms": [(value, timing.name, 1e3 * timing.median) for value, timing in points]}
    memory = [(value, timing.name, timing.memory / 1e6) for value, timing in points if timing.memory]
    if memory:
        panels["peak memory, MB"] = memory
    figure = Figure(figsize=(3.2 + 5 * len(panels), 5), layout="constrained")
    columns = figure.subplots(1, len(panels), squeeze=False)
    values = sorted({value for value, _ in points})
    for axes, (label, shown) in zip(columns[0], panels.items(), strict=True):
        for number, name in enumerate(_names(comparisons)):
            curve = sorted((value, y) for value, arm, y in shown if arm == name)
            style = {"color": f"C{number % 10}", "linestyle": LINES[number // 10 % len(LINES)]}
            if curve:
                axes.plot(*zip(*curve, strict=True), marker="o", markersize=3, label=name, **style)
        axes.set(xscale="log", yscale="log", xlabel=axis, ylabel=label)
        _plain(axes.yaxis)
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
    figure.legend(*columns[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=7, handlelength=4)
    figure.suptitle(f"{question} against {axis}", fontsize=10)
    return figure


def _plain(axis: Any) -> None:
    """Marks a logarithmic axis at 1, 2, 5, 10, and so on, in plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def _names(comparisons: Sequence[Comparison]) -> list[str]:
    """The names of arms, each once, those without a time as well."""
    names = [[timing.name for timing in c.timings] + [one.name for one in c.missing] for c in comparisons]
    return list(dict.fromkeys(chain.from_iterable(names)))
