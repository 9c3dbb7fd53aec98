"""What `train` does after each step: saves checkpoints, shows progress, and writes records into `metrics.jsonl`."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import checkpoint, data, files, optim, plots, run_folder, statistics
from ..distributed import World
from ..options import Train
from ..train import Progress, data_values, evaluate
from ..train.agreement import check_state
from . import build, outputs
from .build import Best, Classifier, Saved, Values
from .faults import check_finite
from .passes import bar
from .private import Private
from .sources import Parts
from .waiting import SAY_EVERY, Compiling, say


class Saver:
    """Saves every N steps, and holds the newest state for the last save."""

    def __init__(
        self,
        run: Path,
        newest: Saved,
        judge: "Judge",
        *,
        saved_step: int,
        every: int,
        keep: int,
        config: Callable[[int], Any],
        world: World,
        valuer: "Valuer | None" = None,
        private: Private | None = None,
    ) -> None:
        """A saver; in other processes than the first it holds the newest state and writes nothing."""
        self.run, self.valuer, self.private = run, valuer, private
        self.folder, self.every, self.keep, self.config = run / run_folder.CHECKPOINTS, every, keep, config
        self.newest, self.saved_step, self.judge, self.world = newest, saved_step, judge, world

    def __call__(self, progress: Progress) -> None:
        values = () if self.valuer is None else self.valuer.values
        self.newest = Saved(progress.state, progress.loss, self.judge.best, values)
        if progress.step % self.every == 0:
            check_state(self.world, progress.state)
            self.save()

    def save(self) -> int:
        """Saves the newest state unless it is saved already, and returns its step.

        Raises:
            DivergedError: it is not finite; what was saved before stays.
        """
        step = int(self.newest.state.step)
        check_finite(self.newest, f"Loss and parameters after step {step}")
        if step != self.saved_step and self.world.rank == 0:
            shown = self.newest
            if self.private is not None:
                self.private.hidden(self.run, step, float(shown.loss))
                shown = shown._replace(loss=torch.zeros_like(shown.loss))
            checkpoint.save(self.folder, shown, step=step, config=self.config(step), keep=self.keep)
            self.saved_step = step
            if isinstance(self.newest.values, Values) and self.valuer is not None:
                self.valuer.write(self.newest.values)
        return step


class Judge:
    """Evaluates held-out images after each epoch, holds the best epoch, and says when no better one has come."""

    def __init__(
        self,
        run: Path,
        options: Train,
        made: Classifier,
        held_out: data.Split | None,
        best: Best | tuple[()],
        world: World,
    ) -> None:
        self.run, self.options, self.made, self.held_out, self.best = run, options, made, held_out, best
        self.world = world

    def __call__(self, progress: Progress) -> bool:
        """Whether training ends after this epoch."""
        if self.held_out is None:
            return False
        params = build.current(self.options, progress.state)
        check_finite((params, progress.loss), f"Loss and parameters after step {progress.step}")
        result = evaluate(self.made.outputs, self.made.test_loss, params, *self.held_out, world=self.world)
        if self.world.rank == 0:
            record = {"loss": result.loss.item(), "correct": result.correct, "total": result.total}
            when = {"kind": "held-out", "epoch": progress.epoch, "step": progress.step}
            run_folder.append_metrics(self.run, when | record)
        where = f"the {result.total:,} held-out images after epoch {progress.epoch + 1}"
        say(f"Accuracy on {where}: {100 * result.accuracy:.2f}%")
        if isinstance(self.best, Best) and result.correct > int(self.best.correct):
            correct, epoch = (self.best.epoch.new_tensor(value) for value in (result.correct, progress.epoch))
            self.best = Best({name: p.clone() for name, p in params.items()}, correct, epoch)
        return self.over(progress.epoch + 1)

    def over(self, epochs: int) -> bool:
        """Whether a run of that many epochs has waited long enough for a better one."""
        patience = self.options.patience
        return isinstance(self.best, Best) and patience is not None and epochs - 1 - int(self.best.epoch) >= patience


class Reporter:
    """Shows a bar on a terminal and plain lines elsewhere, at least every 10 seconds; writes records."""

    LINE_EVERY, BAR_EVERY, BAR_SECONDS = 100, 20, 0.5

    def __init__(
        self,
        run: Path,
        *,
        epochs: int,
        total: int,
        done: int,
        seen: int,
        compiling: Compiling,
        epsilon: Callable[[int], float] | None = None,
        silent: bool = False,
    ) -> None:
        """A reporter of a run; `epsilon(steps)` is what a private one has spent."""
        self.run, self.epochs, self.total, self.epsilon = run, epochs, total, epsilon
        self.compiling, self.compiled_before, self.said = compiling, 0.0, time.monotonic()
        form = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        self.bar = bar(total=total, done=done, form=form, silent=silent)
        self.bar.set_description("first step")
        self.since, self.examples_before = time.perf_counter(), seen

    def __call__(self, progress: Progress) -> None:
        line = progress.step % self.LINE_EVERY == 0 or progress.epoch_ended
        waited = time.monotonic() - self.said > (SAY_EVERY if self.bar.disable else self.BAR_SECONDS)
        if not line and not waited and (self.bar.disable or progress.step % self.BAR_EVERY):
            return
        self.said = time.monotonic()
        check_finite(progress.loss, f"The loss after step {progress.step}")
        loss = progress.loss.item() / progress.examples
        rate = self._examples_per_second(progress)
        self.bar.set_description(f"epoch {progress.epoch + 1}/{self.epochs}", refresh=False)
        spent = "" if self.epsilon is None else f"ε {self.epsilon(progress.step):.3f}, "
        self.bar.set_postfix_str(f"{spent}loss {loss:.4f}, {rate:,.0f} examples/s", refresh=False)
        self.bar.n = progress.step
        self.bar.refresh()
        if line:
            self._record(progress, loss, rate)
        if self.bar.disable:
            mean = "mean loss" if progress.epoch_ended else "loss"
            print(
                f"epoch {progress.epoch + 1}/{self.epochs}  step {progress.step}/{self.total}  "
                f"{spent}{mean} {loss:.4f}  {rate:,.0f} examples/s",
                flush=True,
            )

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self.bar.close()

    def _examples_per_second(self, progress: Progress) -> float:
        now = time.perf_counter()
        examples = progress.examples - (self.examples_before if progress.examples > self.examples_before else 0)
        seconds = now - self.since - (self.compiling.seconds - self.compiled_before)
        rate = examples / max(seconds, 1e-9)
        self.compiled_before = self.compiling.seconds
        self.since, self.examples_before = now, progress.examples
        return rate

    def _record(self, progress: Progress, loss: float, rate: float) -> None:
        kind = "epoch" if progress.epoch_ended else "step"
        record = {"kind": kind, "epoch": progress.epoch, "step": progress.step, "loss": loss, "examples_per_s": rate}
        if self.epsilon is not None:
            record["epsilon"] = self.epsilon(progress.step)
        run_folder.append_metrics(self.run, record)


class Watcher:
    """Writes what a watched step has seen of per-sample gradients, and sums up each epoch."""

    QUANTILES = (0.1, 0.5, 0.9)

    def __init__(self, run: Path, watches: Sequence[str]) -> None:
        self.run, self.watches = run, watches

    def __call__(self, progress: Progress) -> None:
        if self.watches and "norms" in progress.aux:
            self._record(progress)
        if self.watches and progress.epoch_ended:
            self._sum_up(progress.epoch)

    def _record(self, progress: Progress) -> None:
        aux = progress.aux
        check_finite(aux["norms"], f"The gradients of step {progress.step}")
        norms = aux["norms"][aux["keep"]].double()
        record: dict[str, Any] = {"kind": "watch", "epoch": progress.epoch, "step": progress.step}
        if "norms" in self.watches:
            low, median, high = norms.quantile(norms.new_tensor(self.QUANTILES)).tolist()
            record["norms"] = {"mean": norms.mean().item(), "10 %": low, "50 %": median, "90 %": high,
                               "most": norms.max().item()}  # fmt: skip
        if "noise-scale" in self.watches and len(norms) > 1:
            record |= {"trace": aux["trace"].item(), "square_norm": aux["square_norm"].item()}
        run_folder.append_metrics(self.run, record)

    def _sum_up(self, epoch: int) -> None:
        records = [r for r in run_folder.read_metrics(self.run) if r["kind"] == "watch" and r.get("epoch") == epoch]
        noise = [(r["trace"], r["square_norm"]) for r in records if "trace" in r]
        if len(noise) >= 3:
            scale = statistics.mean_noise_scale(*torch.tensor(noise, dtype=torch.float64).unbind(1))
            say(f"Gradient noise scale of the epoch: {scale}, from {scale.samples} steps")
        largest = [r["norms"]["most"] for r in records if "norms" in r]
        if largest:
            say(f"Largest norm of a per-sample gradient in the epoch: {max(largest):.4g}")


class Valuer:
    """Adds up what the training images are worth, step by step, and shows it."""

    SHOWN = 5
    """Lines printed of each end."""

    def __init__(self, run: Path, values: Values, dataset: Parts, rate: optim.Schedule) -> None:
        """A valuer.

        Args:
            run: the run's folder.
            values: those of the steps made so far.
            dataset: the training images, and their indices in the data set.
            rate: the learning rate of a step, from 0.
        """
        self.run, self.values, self.dataset, self.rate = run, values, dataset, rate

    def __call__(self, progress: Progress) -> None:
        if progress.drawn is None or "gradient_dot" not in progress.aux:
            return
        aux = progress.aux
        values = data_values(aux, lr=self.rate(progress.state.step - 1))
        pairs = zip(self.values, (values.double(), aux["keep"].long()), strict=True)
        # On the CPU, which adds in one order; new tensors, for a state that waits to be saved keeps its own.
        self.values = Values(
            *[old.cpu().index_add(0, progress.drawn.cpu(), new.cpu()).to(old.device) for old, new in pairs]
        )

    def write(self, values: Values) -> None:
        """Writes the table, whole or not at all."""
        columns = {"index": self.dataset.indices, "given_label": self.dataset.train.labels}
        columns |= {"value": values.total, "times": values.times}
        files.write(self.run / "values.csv", outputs.csv(columns))

    def show(self, values: Values) -> None:
        """Writes the table and a picture, and prints both ends."""
        self.write(values)
        order = values.total.argsort(stable=True)
        order = order[values.times[order] > 0]
        ends = {"lowest": order, "highest": order.flip(0)}
        print(f"Values of {len(order):,} training images to the loss on the held-out images, in all watched steps:")
        (images, labels), index = self.dataset.train, self.dataset.indices
        print(f"{'':>9}{'index':>8}{'given label':>13}{'value':>12}{'times':>7}")
        for name, chosen in ends.items():
            for i in chosen[: self.SHOWN].tolist():
                value, times = values.total[i].item(), int(values.times[i])
                print(f"{name:>9}{index[i]:>8}{labels[i]:>13}{value:>12.4g}{times:>7}")
        pictures = []
        for name, chosen in ends.items():
            some = chosen[: outputs.WIDTH].tolist()
            captions = [f"{index[i]}: {labels[i]}\n{values.total[i].item():.3g}" for i in some]
            pictures += outputs.rows(f"{name} value (index: given label, value)", images[some], captions)
        print(f"Written: {self.run / 'values.csv'}")
        outputs.write_picture(self.run / "values.png", lambda: plots.gallery(pictures))
