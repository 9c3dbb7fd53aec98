"""Pictures of a result: the arms' times as bars, and curves where cases vary along an axis.

matplotlib comes with the `plot` extra; without it there are no pictures.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .measure import Comparison


def draw(question: str, comparisons: Sequence[Comparison], path: Path) -> list[Path]:
    """Draws a question's comparisons into PNG files whose names begin as `path`'s; none without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return []
    drawn = []
    along = {c.axis.name for c in comparisons if c.axis}
    for name, figure in [("bars", _bars(pyplot, question, comparisons))] + [
        (axis, _curves(pyplot, question, axis, [c for c in comparisons if c.axis and c.axis.name == axis]))
        for axis in sorted(along)
    ]:
        target = path.with_name(f"{path.stem}-{name}.png")
        figure.savefig(target, dpi=130)
        pyplot.close(figure)
        drawn.append(target)
    return drawn


def _bars(pyplot: Any, question: str, comparisons: Sequence[Comparison]) -> Any:
    """Each arm's ratio, with its interval, one row of axes for each comparison."""
    heights = [0.9 + 0.26 * len(c.timings) for c in comparisons]
    figure, rows = pyplot.subplots(
        len(comparisons), 1, figsize=(9, sum(heights)), layout="constrained", squeeze=False, height_ratios=heights
    )
    for axes, comparison in zip(rows[:, 0], comparisons, strict=True):
        for place, timing in enumerate(comparison.timings):
            ratio, (low, high) = comparison.ratio(timing), comparison.interval(timing)
            color = "tab:gray" if timing is comparison.reference else "tab:green" if ratio <= 1 else "tab:red"
            axes.barh(place, ratio, color=color, xerr=[[max(0, ratio - low)], [max(0, high - ratio)]], capsize=2)
            axes.text(max(ratio, high), place, f" {ratio:.2f}", va="center", fontsize=8)
        axes.set_yticks(range(len(comparison.timings)), [timing.name for timing in comparison.timings], fontsize=8)
        axes.invert_yaxis()
        axes.axvline(1, color="black", linewidth=0.8)
        axes.margins(x=0.12)
        axes.set_title(f"{question}, {comparison.case}: time over {comparison.reference.name}", fontsize=9, loc="left")
    return figure


def _curves(pyplot: Any, question: str, axis: str, comparisons: Sequence[Comparison]) -> Any:
    """Times, and memory where it was measured, against what was varied."""
    with_memory = any(timing.memory for c in comparisons for timing in c.timings)
    figure, columns = pyplot.subplots(
        1, 1 + with_memory, figsize=(7 * (1 + with_memory), 5), layout="constrained", squeeze=False
    )
    panels = [("time, ms", lambda timing: 1e3 * timing.median), ("peak memory, MB", lambda t: (t.memory or 0) / 1e6)]
    names = dict.fromkeys(timing.name for c in comparisons for timing in c.timings)
    for axes, (label, value) in zip(columns[0], panels, strict=False):
        for name in names:
            points = [(c.axis.value, value(t)) for c in comparisons if c.axis for t in c.timings if t.name == name]
            shown = [point for point in points if point[1] > 0]
            axes.plot(*zip(*shown, strict=True), marker="o", markersize=3, label=name) if shown else None
        axes.set(xscale="log", yscale="log", xlabel=axis, ylabel=label)
        axes.grid(alpha=0.3)
    columns[0][0].legend(fontsize=7)
    figure.suptitle(f"{question} against {axis}", fontsize=10)
    return figure
