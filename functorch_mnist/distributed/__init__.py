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
from .attendance import of_a_sum as of_a_sum
from .attendance import undisturbed as undisturbed
from .cores import bind as bind
from .joined import JoinError as JoinError
from .joined import joined as joined
from .launch import LaunchError as LaunchError
from .launch import launch as launch
from .rows import parts_of as parts_of
from .rows import rows_of as rows_of
from .rows import rows_over as rows_over
from .rows import shares as shares
from .shards import Shard as Shard
from .shards import Sharded as Sharded
from .shards import sharded as sharded
from .sums import first_of as first_of
from .sums import gather as gather
from .sums import in_pairs as in_pairs
from .sums import scatter_sum as scatter_sum
from .sums import sum_over as sum_over
from .world import ALONE as ALONE
from .world import World as World
