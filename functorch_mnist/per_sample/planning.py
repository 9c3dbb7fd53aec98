"""The plan: for each parameter the ops it enters, and how its sample gradients are taken."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from .. import arguments, tree
from ..tree import Tree
from .capture import LossFn, Survey, factor, survey
from .forms import Cost, Sizes
from .strategies import choose_all, together
from .terms import Strategy

Way: TypeAlias = Strategy | Literal["dense"]
"""A strategy, or `"dense"`: differentiated with the rest of the loss, (B, *w) numbers."""


@dataclass(frozen=True)
class Row:
    """How one parameter's sample gradients are taken."""

    path: str
    shape: tuple[int, ...]
    itemsize: int
    """Bytes per number."""
    ops: tuple[str, ...]
    """The ops that the parameter enters."""
    sizes: Sizes | None
    """Of all uses together; none where there is no factored form."""
    way: Way
    costs: dict[Way, Cost]
    """For one example, of each way there is."""
    reason: str

    @property
    def cost(self) -> Cost:
        """For one example, of the way taken."""
        return self.costs[self.way]


@dataclass(frozen=True)
class Plan:
    """What `per_sample` does with a loss. Printed, it is a table; `override` changes it."""

    rows: tuple[Row, ...]
    batch_size: int
    slow: tuple[str, ...] = ()
    """Ops of the loss that `vmap` runs one example at a time."""

    def override(self, path: str, way: Way) -> Plan:
        """The plan with another way for one parameter.

        Raises:
            ValueError: no parameter has this path, or the way does not apply to it.
        """
        paths = [row.path for row in self.rows]
        if path not in paths:
            raise ValueError(f"plan.override: the path must be a parameter's. Found {path!r}; there are {paths}.")
        row = self.rows[paths.index(path)]
        if way not in row.costs:
            raise ValueError(f"plan.override: {path} can be taken as {list(row.costs)}. Found {way!r}.")
        changed = replace(row, way=way, reason="asked for")
        return replace(self, rows=tuple(changed if r is row else r for r in self.rows))

    def of(self, loss_fn: LossFn) -> Planned:
        """The loss, whose sample gradients are then taken by this plan wherever it is passed to."""
        return Planned(loss_fn, self)

    @property
    def memory(self) -> int:
        """Bytes that the batch's inner products take besides the factors, all parameters at once."""
        return sum(row.cost.memory * row.itemsize for row in self.rows) * self.batch_size

    @property
    def arithmetic(self) -> int:
        """Operations of the batch's inner products."""
        return sum(row.cost.arithmetic for row in self.rows) * self.batch_size

    def __str__(self) -> str:
        heads = ("parameter", "shape", "ops", "T", "D", "H", "way", "memory", "arithmetic", "why")
        signs = "<<<>>><>><"  # numbers to the right
        body = [self._cells(row) for row in self.rows]
        widths = [max(len(line[i]) for line in (heads, *body)) for i in range(len(heads))]
        lines = [
            "  ".join(f"{cell:{sign}{w}}" for cell, sign, w in zip(line, signs, widths, strict=True)).rstrip()
            for line in (heads, *body)
        ]
        lines.insert(1, "  ".join("-" * w for w in widths))
        lines.append("T positions, D inputs and H outputs of the op, per example")
        memory, arithmetic = _human(self.memory, "B"), _human(self.arithmetic, "FLOP")
        lines.append(f"batch of {self.batch_size}: {memory} besides the factors, {arithmetic}")
        lines += [f"slow: vmap runs {op} one example at a time" for op in self.slow]
        return "\n".join(lines)

    def _cells(self, row: Row) -> tuple[str, ...]:
        groups, t, d, h = row.sizes or (1, None, None, None)
        times = f"{groups} x " if groups > 1 else ""
        numbers = [times + str(t) if t is not None else "", *("" if n is None else str(n) for n in (d, h))]
        memory = _human(row.cost.memory * row.itemsize * self.batch_size, "B")
        arithmetic = _human(row.cost.arithmetic * self.batch_size, "FLOP")
        shape = "x".join(map(str, row.shape)) or "()"
        ops = ", ".join(dict.fromkeys(row.ops)) or "none"
        return (row.path, shape, ops, *numbers, row.way, memory, arithmetic, row.reason)


@dataclass(frozen=True)
class Planned:
    """A loss and the plan of its sample gradients: called, it is the loss."""

    loss_fn: LossFn
    plan: Plan

    def __call__(self, params: Tree, *example: Tensor) -> Any:
        return self.loss_fn(params, *example)


def _human(count: int, unit: str) -> str:
    """Three digits and a unit, as in 4.72 MB."""
    if count < 1000:
        return f"{count} {unit}"
    value, prefixes = count / 1000, "kMGTP"
    while value >= 999.5 and len(prefixes) > 1:
        value, prefixes = value / 1000, prefixes[1:]
    return f"{value:#.3g}".rstrip(".") + f" {prefixes[0]}{unit}"


def plan(loss_fn: LossFn, params: Tree, *example: Tensor, batch_size: int) -> Plan:
    """How the sample gradients of a loss are taken, and what that costs.

    Args:
        loss_fn: `loss_fn(params, *example) -> ()`, pure.
        params: a pytree of float tensors.
        example: one example, without a batch axis.
        batch_size: B, for the costs.

    Returns:
        The plan that the functions of `per_sample` follow unless they are given another.

    Raises:
        ValueError: `batch_size` is below 1, or the loss does not fit, see `factored`.
    """
    if batch_size < 1:
        raise ValueError(f"plan: batch_size must be at least 1. Found {batch_size}.")
    arguments.check_params("per_sample.plan", params)
    batch = batch_of_one("plan", example)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = survey(loss_fn, params, batch)
    table = planned(params, found, batch_size)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        twice = [torch.cat([rows, rows]) for rows in batch]  # vmap warns where it takes examples one at a time
        factor(loss_fn, params, twice, found, strategies(params, found, table))
    texts = [str(warning.message) for warning in caught]
    slow = [text.split("batching rule for ")[1].split(".")[0] for text in texts if "batching rule for " in text]
    return replace(table, slow=tuple(dict.fromkeys(slow)))


def batch_of_one(where: str, example: Sequence[Any]) -> list[Tensor]:
    """One example with a batch axis: (1, …) each."""
    for x in example:
        if isinstance(x, (tuple, list)):
            raise TypeError(
                f"per_sample.{where}: an example must be tensors. Found {type(x).__name__}. Pass them one by one."
            )
    return [torch.as_tensor(x)[None] for x in example]


def planned(params: Tree, found: Survey, batch_size: int) -> Plan:
    """The plan that follows from a survey."""
    rows = []
    leaves = zip(tree.paths(params), tree.leaves(params), found.uses, choose_all(found), strict=True)
    for path, leaf, uses, choice in leaves:
        costs: dict[Way, Cost] = {"dense": Cost(leaf.numel(), 2 * leaf.numel())}
        costs.update(choice.costs.items())
        way: Way = choice.strategy or "dense"
        ops = tuple([use.op for use in uses])
        rows.append(Row(path, tuple(leaf.shape), leaf.element_size(), ops, choice.sizes, way, costs, choice.reason))
    return Plan(tuple(rows), batch_size)


def strategies(params: Tree, found: Survey, given: Plan | None) -> Sequence[Strategy | None]:
    """The strategy of each leaf, none for dense: from a plan that was given, or chosen.

    Raises:
        ValueError: the plan is of other parameters, or asks for what a parameter cannot have.
    """
    choices = choose_all(found)
    if given is None:
        return [choice.strategy for choice in choices]
    if not isinstance(given, Plan):
        raise TypeError(f"per_sample: the plan must be what per_sample.plan returns. Found {type(given).__name__}.")
    names, shapes = tree.paths(params), [tuple(leaf.shape) for leaf in tree.leaves(params)]
    if [(row.path, row.shape) for row in given.rows] != list(zip(names, shapes, strict=True)):
        raise ValueError(
            f"per_sample: the plan must be of these parameters. Found a plan of {[r.path for r in given.rows]}."
        )
    for row, choice in zip(given.rows, choices, strict=True):
        if row.way != "dense" and row.way not in choice.costs:
            raise ValueError(f"per_sample: the plan takes {row.path} as {row.way!r}, which this loss does not allow.")
    ways = [None if row.way == "dense" else row.way for row in given.rows]
    dense = together(found, [way is None for way in ways])
    return [None if alone else way for way, alone in zip(ways, dense, strict=True)]
