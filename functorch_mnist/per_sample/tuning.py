"""Ways that are measured: of each parameter all that move about as little, the fastest on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import tree
from ..tree import Tree
from . import measured
from .capture import LossFn, Survey, factor, survey
from .planning import Plan, Row, Way, planned, strategies
from .squares import CAREFUL, Plain
from .terms import Term

MUCH = 4
"""A strategy that computes, or keeps, this many times as much as another is not tried."""
NEAR = 4
"""Where nothing is timed: the times of a batch up to this many times as large or small are taken."""
LEAST_GAIN = 0.05
"""The chosen way is changed for one that takes less by this part: what is within it is noise."""


def tune(
    loss_fn: LossFn,
    params: Tree,
    *batch: Tensor,
    compile: bool = False,
    seconds: float = 8.0,
    file: Path | None = None,
    measure: bool = True,
) -> Plan:
    """The plan with the fastest ways on this machine, for these shapes, this precision and these threads.

    Of each parameter that can be taken in several ways, clipped sums of its sample gradients are timed by each. Times
    are kept in a file, in milliseconds, and those it has are not measured again.

    Args:
        loss_fn: `loss_fn(params, *example) -> ()`, pure.
        params: a pytree of float tensors.
        batch: tensors (B, …), as large as the batches to come.
        compile: whether what is timed is compiled, as for calls that will be; compiling takes seconds a way besides.
        seconds: about how long may be timed in all; at least three rounds.
        file: of the times; by default `functorch_mnist/ways.json` in the user's cache folder. A damaged one is ignored,
            which is said as a warning.
        measure: else nothing is timed: what the file has, also of batches up to four times as large or small, is taken,
            and what it does not have stays as it was planned.

    Returns:
        The plan, to be given to the functions of `per_sample`, or `plan.of(loss_fn)` to any that take a loss. Results
        are the same, up to rounding.

    Raises:
        ValueError: the batch is empty, or the loss does not fit, see `factored`.
        OSError: the times cannot be kept.
    """
    if len(batch) == 0 or len(batch[0]) == 0:
        raise ValueError("per_sample.tune: at least one example. Found an empty batch.")
    path = measured.default_file() if file is None else file
    found = survey(loss_fn, params, [x[:1] for x in batch])
    plan = planned(params, found, len(batch[0]))
    records = measured.read(path)
    device = tree.leaves(params)[0].device
    here = {**measured.here(device), "compiled": compile, "batch": len(batch[0])}
    places: dict[int, dict[str, Any]] = {}
    times: dict[int, dict[str, float]] = {}
    for leaf, row in enumerate(plan.rows):
        if len(candidates(row)) > 1:
            forms = [repr(use.form) for use in found.uses[leaf]]
            precisions = sorted({str(x.dtype) for call in found.calls for x in call.taps})
            places[leaf] = {**here, "precision": precisions, "ops": list(row.ops), "forms": forms}
            times[leaf] = measured.find(records, places[leaf], near=1 if measure else NEAR) or {}
    missing: list[int] = []
    for leaf, known in times.items():
        alike = any(places[leaf] == places[other] for other in missing)
        if not alike and not set(candidates(plan.rows[leaf])) <= known.keys():
            missing.append(leaf)
    if measure and missing:
        terms = _terms(loss_fn, params, batch, found, plan, missing)
        for leaf in missing:
            times[leaf] = _times(terms[leaf], compile, seconds / len(missing))
            measured.add(path, places[leaf], times[leaf])
            for other in times:
                if places[other] == places[leaf]:
                    times[other] = times[leaf]
    rows = [_fastest(row, times.get(leaf, {})) for leaf, row in enumerate(plan.rows)]
    return replace(plan, rows=tuple(rows))


def candidates(row: Row) -> list[Way]:
    """The ways of a parameter that are worth timing: those it can be taken in without much more work or memory."""
    ways = {way: cost for way, cost in row.costs.items() if way != "dense"}
    if "unfold" in ways:  # one of the two ways to build a convolution's gradients
        ways.pop("build")
    if row.way == "dense" or len(ways) < 2:
        return [row.way]
    work, memory = min(c.arithmetic for c in ways.values()), max(row.cost.memory, min(c.memory for c in ways.values()))
    return [way for way, c in ways.items() if c.arithmetic <= MUCH * work and c.memory <= MUCH * memory]


def _terms(
    loss_fn: LossFn, params: Tree, batch: Sequence[Tensor], found: Survey, plan: Plan, leaves: Sequence[int]
) -> dict[int, dict[Way, Term]]:
    """The term of each leaf by each of its ways: from one pass for each."""
    terms: dict[int, dict[Way, Term]] = {leaf: {} for leaf in leaves}
    for number in range(max(len(candidates(plan.rows[leaf])) for leaf in leaves)):
        rows = list(plan.rows)
        for leaf in leaves:
            ways = candidates(rows[leaf])
            rows[leaf] = replace(rows[leaf], way=ways[min(number, len(ways) - 1)])
        chosen = strategies(params, found, replace(plan, rows=tuple(rows)))
        _, all_terms, _ = factor(loss_fn, params, list(batch), found, chosen)
        for leaf in leaves:
            terms[leaf].setdefault(rows[leaf].way, all_terms[leaf])
    return terms


def _times(terms: dict[Way, Term], compile: bool, seconds: float) -> dict[str, float]:
    """The median milliseconds of a clipped sum by each way, in turns."""

    kinds = [x.dtype for term in terms.values() for x in term.factors()]

    def clipped(term: Term, norm: Tensor) -> Tensor:
        built, by = term.built(), CAREFUL if compile or torch.float64 in kinds else Plain()
        return built.weighted_sum((norm / built.square_norms(by).sqrt()).clamp(max=1))

    norm = torch.tensor(1.0, device=next(iter(terms.values())).factors()[0].device)
    runs: dict[Way, Callable[[], Tensor]] = {}
    for way, term in terms.items():
        fn = torch.compile(clipped, dynamic=False, fullgraph=True) if compile else clipped
        runs[way] = lambda fn=fn, term=term: fn(term, norm)  # type: ignore[misc]
    taken: dict[Way, list[float]] = {way: [] for way in runs}
    for run in runs.values():
        run()
    start = time.perf_counter()
    while len(next(iter(taken.values()))) < 3 or time.perf_counter() - start < seconds:
        for way, run in runs.items():
            before = time.perf_counter()
            run()
            if norm.device.type == "cuda":
                torch.cuda.synchronize(norm.device)
            taken[way].append(1000 * (time.perf_counter() - before))
        if len(taken[way]) >= 25:
            break
    return {way: float(f"{statistics.median(every):.4g}") for way, every in taken.items()}


def _fastest(row: Row, times: dict[str, float]) -> Row:
    """The row, with the fastest of the ways that were measured."""
    known = {way: times[way] for way in candidates(row) if way in times}
    if len(known) < 2:
        return row
    best = min(known, key=known.__getitem__)
    before = known.get(row.way, max(known.values()))
    if known[best] > (1 - LEAST_GAIN) * before:
        best = row.way
    others = ", ".join(f"{way} {ms:.3g} ms" for way, ms in known.items())
    return replace(row, way=best, reason=f"measured: {others}")
