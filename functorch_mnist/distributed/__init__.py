"""Many processes, one result. All draw the same batch by the same keys, each works on its rows, and their sums are one.

    with distributed.joined() as world:                          # of torchrun; without a launcher, one process
        step = train.make_step(loss_fn, optimizer, world)
        state = train.fit(step, state, examples, …, world=world)

Nothing here is global: a world is an argument. One of a single process costs nothing.

The files, in the order of reading: `world`, `sums`, `rows`, `shards`, `agreement`, `cores`,
`attendance`, `joined`, `launch`.
"""

from .agreement import DisagreementError as DisagreementError
from .agreement import check_agreed as check_agreed
from .agreement import digest as digest
from .attendance import Ended as Ended
from .attendance import EndedError as EndedError
from .attendance import LostError as LostError
from .attendance import deferred_signals as deferred_signals
from .attendance import is_collective_error as is_collective_error
from .cores import bind_cores as bind_cores
from .joining import JoinError as JoinError
from .joining import joined as joined
from .launching import LaunchError as LaunchError
from .launching import launch as launch
from .rows import map_rows as map_rows
from .rows import parts_of as parts_of
from .rows import rows_of as rows_of
from .rows import split_rows as split_rows
from .shards import Shard as Shard
from .shards import Sharded as Sharded
from .shards import sharded as sharded
from .sums import all_gather as all_gather
from .sums import all_reduce as all_reduce
from .sums import broadcast as broadcast
from .sums import pairwise_sum as pairwise_sum
from .sums import reduce_scatter as reduce_scatter
from .world import SINGLE_PROCESS as SINGLE_PROCESS
from .world import World as World
