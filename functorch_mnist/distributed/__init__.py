"""Many processes, one result. All draw the same batch by the same keys, each works on its rows, and their sums are one.

    with distributed.joined() as world:                          # of torchrun; without a launcher, one process
        step = train.make_step(loss_fn, optimizer, world)
        state = train.fit(step, state, examples, …, world=world)

Nothing here is global: a world is an argument. A world of a single process costs nothing.

The files, in the order of reading: `world`, `sums` (collectives), `rows`, `shards` (ZeRO), `agreement`, `cores`,
`attendance` (lost processes), `joining`, `launching`.
"""

from .agreement import DisagreementError, check_agreed, digest
from .attendance import Ended, EndedError, LostError
from .cores import bind_cores
from .joining import JoinError, joined
from .launching import LaunchError, launch
from .rows import map_rows, rows_of
from .shards import Shard, Sharded, sharded
from .sums import all_gather, all_reduce, broadcast, reduce_scatter
from .world import SINGLE_PROCESS, World

__all__ = [
    "SINGLE_PROCESS",
    "DisagreementError",
    "Ended",
    "EndedError",
    "JoinError",
    "LaunchError",
    "LostError",
    "Shard",
    "Sharded",
    "World",
    "all_gather",
    "all_reduce",
    "bind_cores",
    "broadcast",
    "check_agreed",
    "digest",
    "joined",
    "launch",
    "map_rows",
    "reduce_scatter",
    "rows_of",
    "sharded",
]


def __dir__() -> list[str]:
    return __all__
