"""Runs that are each trained on their own subset of the examples: the ground truth of the linear datamodeling score.

    runs = {"subset": torch.arange(R), "seed": torch.arange(R)}      run r: subset r, its own initialisation
    vmapped = sweep.on_subsets(program, examples, subsets, …)
    result = sweep.fit(vmapped, runs, sweep.init_sweep(vmapped.program, runs, …), width=…)

Average runs of one subset over several seeds to reduce the variance of initialisations and orders.

Reference: Ilyas, Park, Engstrom, Leclerc, Madry, "Datamodels: predicting predictions from training data", ICML 2022.
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
    """A `VmappedStep` whose runs see only the examples of their own subset, each in its own order and batches.

    Args:
        program: what a run is, as if the examples of its subset were all; it may ignore the column `subset`.
        examples: tensors (N, …).
        subsets: (R, N) bool, all of one size n, at least 1; see `attribution.subsets`.
        batch_size: B, at least 1: examples in a step of a run.
        compile: compile a step for each width.

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
