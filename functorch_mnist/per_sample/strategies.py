"""Which strategy takes a parameter's inner products.

Of G matrices (H, D) at T positions, per example: building the gradient takes 2 G T H D operations and G H D numbers;
the Gram matrices take 2 G T² (D + H) operations and 2 G T² numbers; at one position neither is needed. Fewer operations
mean less time (as measured on a CPU, `benchmarks/results/strategies-2-cores.json`: the two take equal times where they
take equal operations), so the cheaper one is taken, unless what it stores outgrows the factors themselves, T (D + H):
then it would set the peak of memory, and the smaller one is taken.
"""

from __future__ import annotations

from typing import NamedTuple

from .capture import Use
from .rules import Cost, MatrixForm, Sizes
from .terms import Strategy


class Choice(NamedTuple):
    """The strategy of one parameter."""

    strategy: Strategy | None
    """None: differentiated densely."""
    sizes: Sizes | None
    costs: dict[Strategy, Cost]
    """Of each strategy that applies."""
    reason: str


def choose(uses: list[Use]) -> Choice:
    """The strategy for a parameter with these uses."""
    if not uses:
        return Choice(None, None, {}, "no op that it enters was seen")
    for use in uses:
        if use.form is None:
            return Choice(None, None, {}, f"{use.op}: {use.reason}")
    forms = [use.form for use in uses if use.form is not None]
    sizes = [use.sizes for use in uses if use.sizes is not None]
    if len(uses) == 1:
        return _cheapest(sizes[0], forms[0].costs(sizes[0]))
    total = sizes[0]._replace(positions=sum([s.positions for s in sizes]))
    costs = forms[0].costs(total)
    if mergeable(uses):
        return _cheapest(total, costs)
    if all(["sum" in form.costs(size) for form, size in zip(forms, sizes, strict=True)]):
        return Choice("sum", total, {"sum": costs["sum"]}, f"{len(uses)} shifts: the cotangents' sum")
    costs = {"build": costs["build"] if "build" in costs else costs["sum"]}
    return Choice("build", total, costs, f"{len(uses)} uses that must be summed before squaring")


def mergeable(uses: list[Use]) -> bool:
    """Whether several uses are one linear map at the positions of all."""
    first = uses[0]
    return all([isinstance(use.form, MatrixForm) and use[3:] == first[3:] for use in uses])


def _cheapest(sizes: Sizes, costs: dict[Strategy, Cost]) -> Choice:
    if "sum" in costs:
        return Choice("sum", sizes, costs, "a shift: the cotangent's sum")
    if "outer product" in costs:
        return Choice("outer product", sizes, costs, "one position: |a|² |g|²")
    gram, build = costs["gram"], costs["build"]
    gram_first = gram.arithmetic <= build.arithmetic
    fast: Strategy = "gram" if gram_first else "build"
    slow: Strategy = "build" if gram_first else "gram"
    factors = sizes.groups * sizes.positions * (sizes.inputs + sizes.outputs)
    if costs[fast].memory > max(factors, costs[slow].memory):
        return Choice(slow, sizes, costs, "less memory; the other would outgrow the factors")
    times = costs[slow].arithmetic / max(costs[fast].arithmetic, 1)
    return Choice(fast, sizes, costs, f"{times:.1f} times less arithmetic")
