"""Hyperparameter search: many training runs in one `vmap`, and gradients by hyperparameters through training.

    runs = sweep.grid(lr=[0.01, 0.1], seeds=range(5))           a table, one row for each run
    found = sweep.fit(vmapped, runs, sweep.init_sweep(…), width=…)     all of them, epoch by epoch
    sweep.hypergradient(step, loss_fn, hyper, state, …)         d validation loss / d hyperparameters

| file | what it holds |
|---|---|
| `runs.py` | tables of runs: grids and random draws |
| `vmapped.py` | a step of many runs in one call of `vmap`; what it costs vmapped and in a loop |
| `fitting.py` | the sweep: successive halving, early stopping, failures |
| `subsets.py` | runs that are each trained on their own subset of the examples |
| `unrolling.py` | the gradient through training, in memory that grows with the root of the steps |
| `descent.py` | descent on hyperparameters by that gradient |
"""

from .descent import LOG, LOG_FROM_ONE, Scale, Trial, Tuned, tune
from .fitting import FAILED, FINISHED, PRUNED, RUNNING, STATUSES, STOPPED, Halving, Sweep, fit, init_sweep
from .runs import SEED, LogUniform, OneOf, Runs, Uniform, grid, random_search, settings, with_seeds
from .subsets import SUBSET, on_subsets
from .unrolling import Hypergradient, Unrolled, hypergradient
from .vmapped import Program, Throughput, Values, VmappedStep, measure_throughput, stacked

__all__ = [
    "FAILED",
    "FINISHED",
    "LOG",
    "LOG_FROM_ONE",
    "PRUNED",
    "RUNNING",
    "SEED",
    "STATUSES",
    "STOPPED",
    "SUBSET",
    "Halving",
    "Hypergradient",
    "LogUniform",
    "OneOf",
    "Program",
    "Runs",
    "Scale",
    "Sweep",
    "Throughput",
    "Trial",
    "Tuned",
    "Uniform",
    "Unrolled",
    "Values",
    "VmappedStep",
    "fit",
    "grid",
    "hypergradient",
    "init_sweep",
    "measure_throughput",
    "on_subsets",
    "random_search",
    "settings",
    "stacked",
    "tune",
    "with_seeds",
]


def __dir__() -> list[str]:
    return __all__
