"""Which strategy takes a parameter's inner products.

Of G matrices (H, D) at T positions, per example: building the gradient takes 2 G T H D operations and G H D numbers;
the Gram matrices take 2 G T² (D + H) operations and 2 G T² numbers; at one position neither is needed. Fewer operations
mean less time (as measured on a CPU, `benchmarks/results/strategies-2-cores.json`: the two take equal times where they
take equal operations), so the cheaper one is taken, unless what it stores outgrows the factors themselves, T (D + H):
then it would set the peak of memory, and the smaller one is taken.
"""

from __future__ import annotations

from typing import NamedTuple

from .capture import Survey, Use
from .forms import Cost, MatrixForm, Sizes
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
    if selected and (len(uses) == 1 or mergeable(uses)):
        return _cheapest(total, forms[0].costs(total))
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


def mergeable(uses: list[Use]) -> bool:
    """Whether several uses are one linear map at the positions of all."""
    first = uses[0]

    def same(use: Use) -> bool:
        one, other = use.weight, first.weight
        return one is other or (one.made is None and other.made is None and one.views == other.views)

    return all([isinstance(use.form, MatrixForm) and use.form == first.form and same(use) for use in uses])


def _cheapest(sizes: Sizes, costs: dict[Strategy, Cost]) -> Choice:
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
    factors = sizes.groups * sizes.positions * (sizes.inputs + sizes.outputs)
    if costs[fast].memory > max(factors, costs[slow].memory):
        return Choice(slow, sizes, costs, "less memory; the other would outgrow the factors")
    times = costs[slow].arithmetic / max(costs[fast].arithmetic, 1)
    return Choice(fast, sizes, costs, f"{times:.1f} times less arithmetic")
