"""`train --tune`: better hyperparameters by gradients through a short training, before the run itself."""

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .. import optim, sweep
from .. import train as training
from ..options import TUNED, Train, UsageError, flag, listed
from . import build
from .faults import refusing
from .sources import Parts

JUDGED = 2000
"""At most so many held-out images judge a training: their activations are in memory at once."""
FIRST_DECAY = 1e-4
"""Where weight decay starts if the options have none: its logarithm is moved."""

_SCALES = {"lr": sweep.LOG, "momentum": sweep.LOG_FROM_ONE, "weight_decay": sweep.LOG}


class Tuning:
    """A short training with a run's options, of which hyperparameters are left open."""

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


def tuned(options: Train, parts: Parts) -> Train:
    """The options with better values of those that `--tune` names; prints each trial."""
    wanted = listed("--tune", options.tune or "", TUNED)
    names = [name.replace("-", "_") for name in wanted]
    where = parts.train.images.device
    tuning = Tuning(options, parts)
    values = {name: getattr(options, name) for name in names}
    if "weight_decay" in values and values["weight_decay"] == 0:
        values["weight_decay"] = FIRST_DECAY
    start = {name: torch.tensor(value, dtype=torch.float32, device=where) for name, value in values.items()}
    build.optimizer(options, 1)  # refuses numbers that do not go together
    print(f"Tuning {', '.join(wanted)} by gradients through {tuning.steps} steps.", flush=True)
    began = time.perf_counter()

    def objective(hyper: sweep.Values) -> tuple[Tensor, sweep.Values]:
        found = tuning.hypergradient(hyper)
        return found.loss, found.grads

    def told(trial: sweep.Trial) -> None:
        print(f"{words(trial.hyper)}: held-out loss {trial.loss:.4f}", flush=True)

    with refusing(RuntimeError, "--tune must fit in memory. Found: "):
        found = sweep.tune(
            objective, start, scales={name: _SCALES[name] for name in names}, rounds=options.tune_rounds, callback=told
        )
    if found.loss == float("inf"):
        raise UsageError("--tune found no value with which training stays finite. Start at a smaller --lr.")
    print(f"The best is {words(found.hyper)}, found in {time.perf_counter() - began:.0f} s.", flush=True)
    values = {name: float(f"{value.item():.6g}") for name, value in found.hyper.items()}
    if options.nesterov and "momentum" in values:
        values["momentum"] = max(values["momentum"], 1e-6)
    return build.with_values(options, values)


def words(hyper: sweep.Values) -> str:
    """Hyperparameters as they are typed."""
    return ", ".join(f"{flag(name)} {value.item():.4g}" for name, value in hyper.items())
