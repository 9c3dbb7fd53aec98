"""Which strategy takes a parameter's inner products.

Of G matrices (H, D) at T positions, per example: building the gradient takes 2 G T H D operations and G H D numbers;
the Gram matrices take 2 G T² (D + H) operations and 2 G T² numbers; at one position neither is needed. Fewer operations
mean less time (as measured on a CPU, `benchmarks/results/strategies-2-cores.json`: the two take equal times where they
take equal operations), so the cheaper one is taken, unless what it stores outgrows the factors themselves, T (D + H),
of a lookup T H: then it would set the peak of memory, and the smaller one is taken.
"""

from __future__ import annotations

from typing import NamedTuple

from .capture import Survey, Use
from .forms import Cost, LookupForm, MatrixForm, Sizes
from .layout import Layout, of_rows
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
    total = sizes[0]._replace(positions=sum([s.positions for s in sizes]))
    every = [form.costs(size) for form, size in zip(forms, sizes, strict=True)]
    selected = all([use.weight.selects for use in uses])
    if selected and all([alike(uses[0], use) for use in uses]):
        return _cheapest(total, forms[0].costs(total), forms[0].factors(total))
    if selected and _is_tied(uses):
        return _pairs(uses, total)
    if selected and all(["sum" in costs for costs in every]):
        return Choice("sum", total, {"sum": every[0]["sum"]}, f"{len(uses)} shifts or scales: sums of cotangents")
    memory = sum([min([cost.memory for cost in costs.values()]) for costs in every])
    arithmetic = sum([costs["build"].arithmetic if "build" in costs else costs["sum"].arithmetic for costs in every])
    reason = f"{len(uses)} uses that must be summed before squaring" if selected else "made into a weight: pulled back"
    return Choice("build", total, {"build": Cost(memory, arithmetic)}, reason)


def choose_all(found: Survey) -> list[Choice]:
    """The strategies of all parameters: what one weight is made of is taken in one way."""
    choices = [choose(uses) for uses in found.uses]
    dense = together(found, [choice.strategy is None for choice in choices])
    taken = "made into one weight with a parameter that is taken densely"
    return [
        choice._replace(strategy=None, reason=taken) if alone and choice.strategy is not None else choice
        for choice, alone in zip(choices, dense, strict=True)
    ]


def together(found: Survey, dense: list[bool]) -> list[bool]:
    """Which leaves are taken densely, if these are: with them all that they are made into one weight with."""
    weights = {use.weight.leaves for uses in found.uses for use in uses if len(use.weight.leaves) > 1}
    dense = [alone and len(uses) > 0 for alone, uses in zip(dense, found.uses, strict=True)]
    for _ in found.uses:
        spread = [leaves for leaves in weights if len({dense[leaf] for leaf in leaves}) > 1]
        if not spread:
            break
        dense = [alone or any([leaf in leaves for leaves in spread]) for leaf, alone in enumerate(dense)]
    return dense


def _read(use: Use) -> Layout | None:
    """How a linear map reads its matrix from columns to rows; none for what is no such map of a whole matrix."""
    if use.weight.made is not None or not isinstance(use.form, MatrixForm):
        return None
    read = of_rows(use.form.layout, use.weight.views)
    return None if read is None else read[0]


def alike(one: Use, other: Use) -> bool:
    """Whether two uses are one linear map, or one lookup, at the positions of both."""
    mine, theirs = one.weight, other.weight
    if one is other or not isinstance(other.form, type(one.form)):
        return one is other
    if mine.made is not None or theirs.made is not None:
        return isinstance(one.form, MatrixForm) and one.form == other.form and mine is theirs
    if isinstance(one.form, LookupForm) and isinstance(other.form, LookupForm):
        return one.form.shape == other.form.shape and mine.views == theirs.views
    if _read(one) is not None and _read(one) == _read(other):
        return True
    return isinstance(one.form, MatrixForm) and one.form == other.form and mine.views == theirs.views


def _is_tied(uses: list[Use]) -> bool:
    """Whether a matrix is used as a table, and as one linear map to its rows."""
    lookups = [use for use in uses if isinstance(use.form, LookupForm)]
    linear = [use for use in uses if not isinstance(use.form, LookupForm)]
    whole = all([use.weight.made is None and len(use.weight.views) == 0 for use in lookups])
    if len(lookups) == 0 or len(linear) == 0 or not whole or not all([alike(linear[0], use) for use in linear]):
        return False
    first = linear[0]
    rows = len(first.weight.views) == 0 and first.weight.made is None and getattr(first.form, "reads_rows", False)
    return bool(rows) or _read(first) is not None


def _pairs(uses: list[Use], total: Sizes) -> Choice:
    """Of a table that is a linear map too, as an embedding that is tied to the output layer."""
    costs, memory, positions = [], 0, []
    for lookup in (True, False):
        mine = [use for use in uses if isinstance(use.form, LookupForm) == lookup]
        form, sizes = mine[0].form, mine[0].sizes
        if form is None or sizes is None:
            continue
        sizes = sizes._replace(positions=sum([use.sizes.positions for use in mine if use.sizes is not None]))
        own = form.costs(sizes)
        costs.append(own["gram"] if lookup else min(own.values(), key=lambda cost: cost.arithmetic))
        memory += form.factors(sizes)
        positions.append(sizes.positions)
        if lookup:
            v, h = sizes.inputs, sizes.outputs
    s, t = positions
    pairs = Cost(2 * s * t + sum([c.memory for c in costs]), 2 * s * t * h + sum([c.arithmetic for c in costs]))
    build = Cost(2 * v * h, 2 * t * v * h + 3 * v * h)
    every: dict[Strategy, Cost] = {"pairs": pairs, "build": build}
    if pairs.memory > max(memory, build.memory):
        return Choice("build", total, every, "a table and a linear map: less memory")
    return Choice("pairs", total, every, "a table and a linear map: inner products of each pair")


def _cheapest(sizes: Sizes, costs: dict[Strategy, Cost], factors: int) -> Choice:
    if "sum" in costs:
        return Choice("sum", sizes, costs, "shift or scale: a sum of cotangents")
    if "outer product" in costs:
        return Choice("outer product", sizes, costs, "one position: |a|² |g|²")
    if "gram" not in costs:
        return Choice("build", sizes, costs, "no rule: the op's own vector-Jacobian product")
    gram, build = costs["gram"], costs["build"]
    gram_first = gram.arithmetic < build.arithmetic  # what is built is kept for sums
    fast: Strategy = "gram" if gram_first else "build"
    slow: Strategy = "build" if gram_first else "gram"
    if costs[fast].memory > max(factors, costs[slow].memory):
        return Choice(slow, sizes, costs, "less memory; the other would outgrow the factors")
    times = costs[slow].arithmetic / max(costs[fast].arithmetic, 1)
    return Choice(fast, sizes, costs, f"{times:.1f} times less arithmetic")
