"""Checks that processes that train together have the same examples at the start, and the same state throughout."""

from collections.abc import Sequence

from torch import Tensor

from .. import tree
from ..distributed import Shard, World, check_agreed, digest
from .step import State

CHECK_EVERY = 100
"""Steps from one comparison of the states to the next."""
_ROWS = 1000
"""The number of examples that the digest covers."""


def check_examples(world: World, examples: Sequence[Tensor]) -> None:
    """Refuses examples that are not the same on all processes, such as those of a loader that gives each its own part.

    Cost: a digest of a thousand examples, evenly spaced.
    """
    if world.size == 1:
        return
    step = max(1, len(examples[0]) // _ROWS)
    mine = digest([x[::step] for x in examples])
    check_agreed(
        world,
        f"fit, with {len(examples[0]):,} examples of {tuple(examples[0].shape[1:])} on this process",
        "Give all of them to each: its own rows are chosen by rank.",
        examples=mine,
    )


def check_state(world: World, state: State) -> None:
    """Refuses states that are no longer the same on all processes.

    Cost: a digest of the state, and 32 bytes sent.
    """
    if world.size == 1:
        return
    own = tree.replaced(state, lambda node: isinstance(node, Shard), lambda _: ())  # shards differ
    check_agreed(
        world,
        f"Training, after step {int(state.step)}",
        "Do all have the same memory, libraries and kind of processor?",
        state=digest(own),
    )
