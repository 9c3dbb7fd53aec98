"""The world: the number of processes, and the rank of this one."""

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class World:
    """The processes that compute one result, as one of them sees them: an argument of all that sums over examples.

    All hold the same parameters, data and keys, and call the same functions with the same arguments; each works on its
    own rows, and their sums are the same on all.

    Raises:
        ValueError: the rank is not below the size, several processes have no group, or the shards are no power of two
            that the size divides.
    """

    rank: int = 0
    """Which process this is, from 0."""
    size: int = 1
    """The number of processes."""
    device: torch.device = field(default=torch.device("cpu"))
    """The device of this process."""
    group: str = ""
    """The name of torch's process group; none is needed for a single process."""
    shards: int | None = None
    """S, a power of two: a batch is summed in S equal parts, in a fixed binary tree, so that sums are the same bits for
    1, 2, 4, … S processes of equal threads on equal machines. None: equal up to rounding for any number of processes.
    """

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"World: rank must be from 0, below size. Found {self.rank} of {self.size}.")
        if self.size > 1 and not self.group:
            raise ValueError("World: several processes need a process group. Found none. Enter `joined` for one.")
        if self.shards is not None and (self.shards < 1 or self.shards & (self.shards - 1)):
            raise ValueError(f"World: shards must be a power of two. Found {self.shards}.")
        if self.shards is not None and self.shards % self.size:
            raise ValueError(
                f"World: the number of processes must divide the shards. Found {self.size} and {self.shards}."
            )

    @property
    def parts(self) -> int:
        """The number of parts in which all processes together sum a batch."""
        return self.shards or self.size

    @property
    def parts_here(self) -> int:
        """The number of parts of this process."""
        return self.parts // self.size


SINGLE_PROCESS = World()
"""The world of a single process."""
