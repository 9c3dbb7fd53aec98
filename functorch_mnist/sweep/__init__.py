"""Training runs as functions: many at once, and differentiated by what they are set to.

    runs = sweep.grid(lr=[0.01, 0.1], seeds=range(5))           a table, one row for each run
    found = sweep.fit(lanes, runs, sweep.init_sweep(…), width=…)     all of them, epoch by epoch
    sweep.hypergradient(step, loss_fn, hyper, state, …)         d validation loss / d hyperparameters

| file | what it holds |
|---|---|
| `runs.py` | tables of runs: grids and random draws |
| `vmapped.py` | a step of many runs in one call; what it costs side by side and one after the other |
| `fitting.py` | the sweep: successive halving, early stopping, failures |
| `subsets.py` | runs that are each trained on a part of the examples of its own |
| `unrolling.py` | the gradient through training, in memory that grows with the root of the steps |
| `descent.py` | descent on hyperparameters by that gradient |
"""

from .descent import LOG as LOG
from .descent import LOG_FROM_ONE as LOG_FROM_ONE
from .descent import Scale as Scale
from .descent import Trial as Trial
from .descent import Tuned as Tuned
from .descent import tune as tune
from .fitting import FAILED as FAILED
from .fitting import RUNNING as RUNNING
from .fitting import STATUSES as STATUSES
from .fitting import Halving as Halving
from .fitting import Sweep as Sweep
from .fitting import fit as fit
from .fitting import init_sweep as init_sweep
from .runs import SEED as SEED
from .runs import LogUniform as LogUniform
from .runs import OneOf as OneOf
from .runs import Runs as Runs
from .runs import Uniform as Uniform
from .runs import grid as grid
from .runs import random_search as random_search
from .runs import settings as settings
from .runs import with_seeds as with_seeds
from .subsets import SUBSET as SUBSET
from .subsets import on_subsets as on_subsets
from .unrolling import Hypergradient as Hypergradient
from .unrolling import Unrolled as Unrolled
from .unrolling import hypergradient as hypergradient
from .vmapped import Program as Program
from .vmapped import Throughput as Throughput
from .vmapped import Values as Values
from .vmapped import VmappedStep as VmappedStep
from .vmapped import measure_throughput as measure_throughput
from .vmapped import stacked as stacked
