"""Training runs as functions: many at once, and differentiated by what they are set to.

    runs = sweep.grid(lr=[0.01, 0.1], seeds=range(5))           a table, one row for each run
    found = sweep.fit(lanes, runs, sweep.start(…), width=…)     all of them, epoch by epoch
    sweep.hypergradient(step, loss_fn, hyper, state, …)         d validation loss / d hyperparameters

| file | what it holds |
|---|---|
| `runs.py` | tables of runs: grids and random draws |
| `lanes.py` | a step of many runs in one call; what it costs side by side and one after the other |
| `fit.py` | the sweep: successive halving, early stopping, failures |
| `subsets.py` | runs that are each trained on a part of the examples of its own |
| `hypergradient.py` | the gradient through training, in memory that grows with the root of the steps |
| `tune.py` | descent on hyperparameters by that gradient |
"""

from .fit import FAILED as FAILED
from .fit import RUNNING as RUNNING
from .fit import WORDS as WORDS
from .fit import Halving as Halving
from .fit import Sweep as Sweep
from .fit import fit as fit
from .fit import start as start
from .hypergradient import Hypergradient as Hypergradient
from .hypergradient import Unrolled as Unrolled
from .hypergradient import hypergradient as hypergradient
from .lanes import Lanes as Lanes
from .lanes import Measured as Measured
from .lanes import Program as Program
from .lanes import Values as Values
from .lanes import measure as measure
from .lanes import stacked as stacked
from .runs import SEED as SEED
from .runs import LogUniform as LogUniform
from .runs import OneOf as OneOf
from .runs import Runs as Runs
from .runs import Uniform as Uniform
from .runs import drawn as drawn
from .runs import grid as grid
from .runs import settings as settings
from .runs import with_seeds as with_seeds
from .subsets import SUBSET as SUBSET
from .subsets import on_subsets as on_subsets
from .tune import LOG as LOG
from .tune import LOG_FROM_ONE as LOG_FROM_ONE
from .tune import Scale as Scale
from .tune import Trial as Trial
from .tune import Tuned as Tuned
from .tune import tune as tune
