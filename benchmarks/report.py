"""A comparison as a table, for the terminal and in Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .limits import Rates
from .measure import Comparison, Missing, Timing

UNITS = ((1.0, "s"), (1e3, "ms"), (1e6, "us"))
"""Times are in the first of these in which the reference takes at least one."""


def markdown(comparison: Comparison, rates: Rates) -> str:
    """The table in Markdown; arms that have no time are its last rows."""
    heads, body = _cells(comparison, rates)
    rows = [[cell.replace("|", "\\|") for cell in row] for row in body]
    rows += [[without_time(one), *[""] * (len(heads) - 1)] for one in comparison.missing]
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def text(comparison: Comparison, rates: Rates | None = None) -> str:
    """The table in columns; arms that have no time are named below it. Without rates there is no limit."""
    heads, body = _cells(comparison, rates)
    widths = [max(len(row[i]) for row in (heads, *body)) for i in range(len(heads))]
    lines = [
        "  ".join(f"{cell:{'>' if i else '<'}{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in (heads, ["-" * w for w in widths], *body)
    ]
    return "\n".join([line.rstrip() for line in lines] + [f"{one.name}: {one.reason}" for one in comparison.missing])


def ratio(comparison: Comparison, timing: Timing) -> str:
    """An arm's ratio with its interval."""
    low, high = comparison.interval(timing)
    return f"{comparison.ratio(timing):.2f} ({low:.2f} to {high:.2f})"


def without_time(missing: Missing) -> str:
    """An arm without a time and why, as a cell in Markdown."""
    return f"{missing.name}: {missing.reason}".replace("|", "\\|")


def _cells(comparison: Comparison, rates: Rates | None) -> tuple[list[str], list[list[str]]]:
    """Heads, and a row for each time. A column that says nothing of any arm is left out."""
    reference = comparison.reference
    scale, unit = next(one for one in UNITS if reference.median * one[0] >= 1 or one is UNITS[-1])
    heads = ["arm", "first call, s", f"median, {unit}", f"quartiles, {unit}", "ratio (95 %)", "time"]
    heads += ["peak, MB", "of the limit", "recompilations"]
    body = []
    for timing in comparison.timings:
        low, high = timing.quartiles
        is_reference = timing is reference
        body.append(
            [
                timing.name,
                f"{timing.first:.2f}",
                f"{timing.median * scale:.2f}",
                f"{low * scale:.2f} to {high * scale:.2f}",
                "1 (reference)" if is_reference else ratio(comparison, timing),
                "" if is_reference else _signed(100 * (comparison.ratio(timing) - 1)),
                "" if timing.memory is None else f"{timing.memory / 1e6:.0f}",
                _of_limit(comparison, timing, rates),
                str(timing.compilations or ""),
            ]
        )
    kept = [i for i in range(len(heads)) if i < 6 or any(row[i] for row in body)]
    return [heads[i] for i in kept], [[row[i] for i in kept] for row in body]


def _signed(percent: float) -> str:
    return f"{percent:+.0f} %" if abs(percent) >= 10 else f"{percent:+.1f} %"


def _of_limit(comparison: Comparison, timing: Timing, rates: Rates | None) -> str:
    cost = comparison.costs.get(timing.precision)
    if cost is None or rates is None:
        return ""
    return f"{100 * rates.seconds(cost, timing.precision) / timing.median:.0f} %"


def limit_lines(comparison: Comparison, rates: Rates) -> list[str]:
    """What the work takes at the least, for each precision."""
    return [
        f"{precision}: {cost.arithmetic / 1e9:.2f} GFLOP and {cost.bytes / 1e6:.1f} MB at the least, "
        f"{1e3 * rates.seconds(cost, precision):.2f} ms here"
        for precision, cost in comparison.costs.items()
    ]


def rate_line(rates: Rates) -> str:
    """What the machine does in a second."""
    products = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {name}" for name, rate in rates.arithmetic.items())
    return f"This machine, measured: {products}; copies {rates.bytes / 1e9:.1f} GB/s"


def across(head: str, columns: Mapping[str, Mapping[str, float]], digits: int) -> str:
    """Numbers of arms, a case a column, in Markdown; a dash where an arm has none."""
    lines = [f"| {head} | " + " | ".join(columns) + " |", "|---" + "|---:" * len(columns) + "|"]
    for arm in dict.fromkeys(arm for column in columns.values() for arm in column):
        cells = [f"{column[arm]:.{digits}f}" if arm in column else "-" for column in columns.values()]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ratios(head: str, over: str, rows: Iterable[tuple[str, Comparison, Timing]], *, digits: int = 3) -> str:
    """Ratios of arms to their references with their intervals, in Markdown: a row for each name, comparison and arm."""
    lines = [f"| {head} | {over} | 95 % interval |", "|---|---:|---:|"]
    for name, comparison, timing in rows:
        ratio, (low, high) = comparison.ratio(timing), comparison.interval(timing)
        lines.append(f"| {name} | {ratio:.{digits}f} | {low:.{digits}f} to {high:.{digits}f} |")
    return "\n".join(lines)


class Exponent(NamedTuple):
    """How an arm's cost grows along an axis: as the axis to this power."""

    arm: str
    axis: str
    time: float
    memory: float | None


def exponents(comparisons: Sequence[Comparison]) -> list[Exponent]:
    """The powers fitted to each arm's times and memory, by least squares of logarithms, where it has three points."""
    points: dict[tuple[str, str], list[tuple[float, Timing]]] = {}
    for axis, timing in ((one.axis, timing) for one in comparisons if one.axis for timing in one.timings):
        points.setdefault((timing.name, axis.name), []).append((axis.value, timing))
    found = []
    for (arm, along), curve in points.items():
        if len(curve) >= 3:
            memory = [(value, timing.memory) for value, timing in curve if timing.memory]
            times = [(value, timing.median) for value, timing in curve]
            found.append(Exponent(arm, along, _slope(times), _slope(memory) if len(memory) >= 3 else None))
    return found


def exponent_table(comparisons: Sequence[Comparison]) -> str:
    """The fitted powers in Markdown; empty where nothing was varied."""
    found = exponents(comparisons)
    if not found:
        return ""
    lines = ["| arm | against | time grows as | memory grows as |", "|---|---|---:|---:|"]
    for one in found:
        memory = "" if one.memory is None else f"{one.axis}^{one.memory:.2f}"
        lines.append(f"| {one.arm} | {one.axis} | {one.axis}^{one.time:.2f} | {memory} |")
    return "\n".join(lines)


def _slope(points: Sequence[tuple[float, float]]) -> float:
    x, y = np.log(np.array(points)).T
    return float(np.polyfit(x, y, 1)[0])
