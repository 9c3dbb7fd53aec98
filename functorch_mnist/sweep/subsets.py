"""Runs of which each is trained on a part of the examples, as if it had no others: what attribution is graded by.

    runs = {"subset": torch.arange(R), "seed": torch.arange(R)}      subset r, from a start of its own
    lanes = sweep.on_subsets(program, examples, subsets, …)
    found = sweep.fit(lanes, runs, sweep.init_sweep(lanes.program, runs, …), width=…)

Runs of one subset with several seeds are averaged to lessen the noise of starts and orders.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..train import State
from .vmapped import Program, Values, VmappedStep

SUBSET = "subset"
"""The name of the column of runs that says which subset a run is trained on, from 0."""


def on_subsets(
    program: Program, examples: Sequence[Tensor], subsets: Tensor, *, batch_size: int, compile: bool
) -> VmappedStep:
    """A `VmappedStep` whose runs see the examples of their own subset alone, in an order and in batches of their own.

    Args:
        program: what a run is, as if the examples of its subset were all; it may ignore the column `subset`.
        examples: tensors (N, …).
        subsets: (R, N) bool, all of one size, at least 1; see `attribution.subsets`.
        batch_size, compile: as in `VmappedStep`.

    Returns:
        A `VmappedStep`; its program is the one to start the sweep with. The runs need a column `subset` (K,) of numbers
        from 0 to R - 1.

    Raises:
        ValueError: the subsets are not (R, N) bool, differ in size, or are empty.

    Guarantees: a run is that of `VmappedStep(program, [x[subset] for x in examples], …)`, bit for bit at one width.
    """
    total = len(examples[0])
    if subsets.dim() != 2 or subsets.shape[1] != total or subsets.dtype != torch.bool or not len(subsets):
        raise ValueError(
            f"on_subsets: subsets must be bool (R, {total}), R at least 1. "
            f"Found {subsets.dtype} {tuple(subsets.shape)}."
        )
    sizes = subsets.sum(1)
    if int(sizes.min()) != int(sizes.max()) or not int(sizes[0]):
        raise ValueError(
            f"on_subsets: subsets must be of one size, at least 1. Found {int(sizes.min())} to {int(sizes.max())}."
        )
    members = subsets.nonzero()[:, 1].reshape(len(subsets), -1)  # (R, n)
    rows = tuple(examples)

    def step(
        hyper: Values, state: State, positions: Tensor, keys: Tensor, *, mask: Tensor | None, divisor: Tensor
    ) -> tuple[State, dict[str, Tensor]]:
        index = members[hyper[SUBSET].long()][positions]
        return program.step(hyper, state, *[x[index] for x in rows], keys, mask=mask, divisor=divisor)

    positions = torch.arange(members.shape[1], device=members.device)
    return VmappedStep(program._replace(step=step), (positions,), batch_size=batch_size, compile=compile)
