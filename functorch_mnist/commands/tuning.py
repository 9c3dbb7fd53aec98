"""`train --tune`: better hyperparameters by hypergradients through a short training, before the run itself."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from .. import optim, run_folder, sweep
from .. import train as training
from ..distributed import World
from ..options import Train, UsageError, flag, tuned_names
from . import build
from .faults import refusing
from .sources import Parts
from .waiting import Compiling

JUDGED = 2000
"""The most held-out images that judge a training: their activations are in memory at once."""
FIRST_DECAY = 1e-4
"""Where weight decay starts if the options have none: its logarithm is moved."""

_SCALES = {"lr": sweep.LOG, "momentum": sweep.LOG_FROM_ONE, "weight_decay": sweep.LOG}


class Tuning:
    """A short training with a run's options, whose hyperparameters are free."""

    def __init__(self, options: Train, parts: Parts) -> None:
        self.options, self.parts = replace(options, epochs=1, swa_start=None, ema_decay=0.0), parts
        self.steps = options.tune_steps
        self.made = build.classifier(build.origin(options, parts))
        self.batch_size = min(options.batch_size, len(parts.train.labels))
        held_out = tuple(part[:JUDGED] for part in parts.judging)
        losses_fn = build.losses(self.made, options, build.partners(options, parts.train))
        self._examples = build.prepared(self.made, parts.train.images), parts.train.labels

        def step(hyper: sweep.Values, state: training.State, *rows: Tensor) -> training.State:
            made = training.make_step(training.batch_gradient(losses_fn), self._optimizer(hyper))
            return made(state, *rows)[0]

        def loss_fn(_: sweep.Values, state: training.State) -> Tensor:
            return self.made.test_loss(self.made.outputs(state.params, held_out[0]), held_out[1]).mean()

        self._unrolled = sweep.Unrolled(step, loss_fn, compile=options.compile == "on")

    def hypergradient(self, hyper: sweep.Values) -> sweep.Hypergradient:
        """The held-out loss after the short training, and its gradient."""
        plain = replace(self.options, patience=None, watch=None, watch_every=1)
        start = build.start(plain, self.made, self._optimizer(hyper), self.parts.train.images.device).state
        return self._unrolled.hypergradient(hyper, start, self._inputs(start.key), steps=self.steps)

    def _optimizer(self, hyper: sweep.Values) -> optim.Optimizer:
        return build.optimizer(build.with_values(self.options, hyper), self.steps)

    def _inputs(self, key: Tensor) -> Callable[[int], tuple[Tensor, ...]]:
        """The rows and keys of a step, as `train` would draw them; of whole batches alone."""
        total = len(self._examples[1])
        per_epoch = total // self.batch_size
        drawn = dict[int, training.Draws]()

        def inputs(t: int) -> tuple[Tensor, ...]:
            epoch, place = divmod(t, per_epoch)
            if epoch not in drawn:
                drawn[epoch] = training.epoch_draws(key, total, epoch=epoch, batch_size=self.batch_size)
            which = slice(place * self.batch_size, (place + 1) * self.batch_size)
            some = drawn[epoch].examples[which]
            return *(x[some] for x in self._examples), drawn[epoch].keys[which]

        return inputs


def tuned(options: Train, parts: Parts, folder: Path, world: World) -> Train:
    """The options with better values of those that `--tune` names; prints each round and records it in the folder.

    Raises:
        UsageError: with no value training stays finite, there is no memory for it, or the folder holds a run already.
    """
    wanted = tuned_names(options)
    names = [name.replace("-", "_") for name in wanted]
    where = parts.train.images.device
    tuning = Tuning(options, parts)
    values = {name: getattr(options, name) for name in names}
    if "weight_decay" in values and values["weight_decay"] == 0:
        values["weight_decay"] = FIRST_DECAY
    start = {name: torch.tensor(value, dtype=torch.float32, device=where) for name, value in values.items()}
    build.optimizer(options, 1)  # refuses numbers that do not go together
    if world.rank == 0:
        run_folder.start_tuning(folder)
    print(
        f"Tuning {', '.join(wanted)} by hypergradients: {options.tune_rounds} rounds of {tuning.steps} steps, recorded "
        f"in {folder / run_folder.TUNING}.",
        flush=True,
    )
    began, rounds = time.perf_counter(), count(1)

    def objective(hyper: sweep.Values) -> tuple[Tensor, sweep.Values]:
        gradient = tuning.hypergradient(hyper)
        return gradient.loss, gradient.grads

    def report(trial: sweep.Trial) -> None:
        number = next(rounds)
        took = f"{time.perf_counter() - began:.0f} s"
        print(f"round {number}: {words(trial.hyper)}: held-out loss {trial.loss:.4f}, after {took}", flush=True)
        if world.rank == 0:
            hyper = {name: value.item() for name, value in trial.hyper.items()}
            loss = trial.loss if math.isfinite(trial.loss) else None
            record = {"kind": "tune", "step": 0, "round": number, **hyper, "held_out_loss": loss}
            run_folder.append_metrics(folder, record, name=run_folder.TUNING)

    scales = {name: _SCALES[name] for name in names}
    compiling = Compiling("a step of the tuning", enabled=options.compile == "on")
    with refusing(RuntimeError, "--tune must fit in memory. Found: "), compiling:
        best = sweep.tune(objective, start, scales=scales, rounds=options.tune_rounds, callback=report)
    if best.loss == float("inf"):
        raise UsageError("--tune found no value with which training stays finite. Start at a smaller --lr.")
    print(f"The best is {words(best.hyper)}, after {time.perf_counter() - began:.0f} s.", flush=True)
    values = {name: float(f"{value.item():.6g}") for name, value in best.hyper.items()}
    if options.nesterov and "momentum" in values:
        values["momentum"] = max(values["momentum"], 1e-6)
    return build.with_values(options, values)


def words(hyper: sweep.Values) -> str:
    """Hyperparameters as they are typed."""
    return ", ".join(f"{flag(name)} {value.item():.4g}" for name, value in hyper.items())
