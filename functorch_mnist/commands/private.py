"""The private side of `train`: what a run may spend, what it has spent, and what of it is not private."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import checkpoint, data, optim, privacy, random, run_folder, tree
from .. import train as training
from ..checkpoint import JSON
from ..distributed import World, digest
from ..options import Train, UsageError
from . import build
from .build import Classifier, Saved
from .faults import refusing
from .mechanisms import mechanism_of

LEDGER = "ledger"
"""Where a checkpoint's config holds what was spent."""


def steps_per_epoch(options: Train, examples: int) -> int:
    """Steps in which each example is expected once."""
    return max(1, round(examples / options.batch_size))


class Private:
    """A run's mechanism, its account and its training loop."""

    def __init__(
        self, options: Train, examples: data.Split, made: Classifier, optimizer: optim.Optimizer, world: World
    ) -> None:
        """Finds the noise, where the options give a budget.

        Raises:
            UsageError: the numbers do not go together, or the accountant is not installed.
        """
        self.options, self.made, self.optimizer, self.world = options, made, optimizer, world
        self.clipping = build.clipping(options)
        self.digest, self.example = digest(list(examples)), [x[0] for x in examples]
        total = self.total = len(examples.labels)
        self.per_epoch = steps_per_epoch(options, total)
        self.steps = options.epochs * self.per_epoch
        self.secret = privacy.Secret(options.noise_seed)
        self.accountant: privacy.Accountant = "gaussian" if options.sampling == "shuffled" else options.accountant

        mechanism = mechanism_of(options, examples=total, steps=self.steps)
        with refusing(ImportError), refusing(ValueError):
            sigma = options.noise_multiplier
            if sigma is None:
                if options.epsilon is None:
                    raise UsageError("--private needs one of --epsilon and --noise-multiplier. Found neither.")
                sigma = privacy.calibrated(
                    mechanism,
                    budget=options.epsilon,
                    delta=options.delta,
                    steps=max(1, self.steps),
                    accountant=self.accountant,
                )
            self.mechanism = mechanism(sigma)
            self.clipping.deviations(sigma)
            # without what tells of single images: a run's checkpoint may be published
            self.entry = privacy.Entry(self.mechanism, repr(self.clipping), f"{options.dataset}, {total:,} images", 0)
            self.epsilon(1)  # refuses an accountant that is not there, before anything is written

    def epsilon(self, steps: int) -> float:
        """What so many steps spend, with all that the run has spent beside."""
        return self.ledger(steps).epsilon(delta=self.options.delta, accountant=self.accountant)

    def ledger(self, steps: int) -> privacy.Ledger:
        """What has run after so many steps."""
        return privacy.Ledger((replace(self.entry, steps=steps),))

    def resume(self, folder: Path, config: Mapping[str, JSON], step: int) -> None:
        """Goes on with the account of a run at a checkpoint, and counts what its folder tells of later steps.

        Raises:
            UsageError: it was another mechanism, or the checkpoint does not say.
        """
        with refusing(ValueError):
            (before,) = privacy.Ledger.from_json(config.get(LEDGER)).entries or (None,)
        now = replace(self.entry, steps=step)
        kept = now if before is None else replace(before, before=(), start=0)
        known = run_folder.read_unpublished(folder).get("data")
        if before is None or kept != now or known != self.digest:
            other = "other images" if known else f"no {run_folder.UNPUBLISHED}, which tells of the images"
            what = "no account" if before is None else _difference(kept, now) or other
            raise UsageError(
                "A private run goes on with the sampling, noise, clipping and data that its account is of. "
                f"Found {what}."
            )
        seen = [record["step"] for record in run_folder.read_metrics(folder)]
        saved = [int(path.name.removeprefix("step-")) for path in checkpoint.steps(folder / run_folder.CHECKPOINTS)]
        self.entry = before if self.secret.reproduction else before.resumed(step, seen=max([step, *seen, *saved]))

    def hidden(self, folder: Path, step: int, loss: float) -> None:
        """Writes what goes with a checkpoint and is of single images: beside it, for it may be published."""
        losses = {**run_folder.read_unpublished(folder).get("losses", {}), str(step): loss}
        run_folder.write_unpublished(folder, {"data": self.digest, "losses": losses})

    def loss_at(self, folder: Path, step: int) -> float:
        """The sum of the losses of the epoch up to a checkpoint."""
        return float(run_folder.read_unpublished(folder).get("losses", {}).get(str(step), 0.0))

    @cached_property
    def step(self) -> training.PrivateStep:
        """The run's step."""
        device = self.example[0].device
        params = tree.map(lambda p: p.to(device), self.made.init(random.key(0)))
        loss_fn = build.fastest(
            build.losses(self.made, self.options), params, *self.example, random.key(0).to(device),
            options=self.options, batch_size=privacy.chunk_sizes(self.mechanism, self.total)[-1],
        )  # fmt: skip
        with refusing(ValueError):
            step = training.make_private_step(
                loss_fn, self.optimizer, clipping=self.clipping, mechanism=self.mechanism, examples=self.total,
                world=self.world,
            )  # fmt: skip
        return step.compiled() if self.options.compile == "on" else step

    def fit(self, saved: Saved, examples: Iterable[Tensor], callbacks: Iterable[Any]) -> training.State:
        """The state after all epochs."""
        return training.fit_private(
            self.step,
            saved.state,
            tuple(examples),
            secret=self.secret,
            steps=self.steps,
            loss=saved.loss,
            callbacks=callbacks,
        )

    def start_line(self) -> str:
        """What is about to be spent."""
        return (
            f"Private training: noise multiplier {self.mechanism.noise_multiplier:g}, "
            f"{self.mechanism.share * self.total:g} images expected of a step, {self.steps:,} steps: "
            f"ε = {self.epsilon(self.steps):.3f} at δ = {self.options.delta:g}."
        )

    def summary(self, steps: int) -> str:
        """What was spent, by whom it is counted, and what it does not cover."""
        spent = f"ε = {self.epsilon(steps):.3f} at δ = {self.options.delta:g}"
        lines = [
            f"Privacy spent in {steps:,} steps: {spent}, by the {ACCOUNTANTS[self.accountant]}.",
            f"Neighbouring data sets: {self.mechanism.relation}. Sampling: {self.mechanism.sampling}.",
            f"Clipping: {self.clipping!r}. Noise multiplier: {self.mechanism.noise_multiplier:g}.",
            f"Not private, so not to be published: the losses shown, metrics.jsonl and {run_folder.UNPUBLISHED}. Not "
            "counted: other runs on these images, such as a search for options; functorch-mnist account RUN RUN counts "
            "several together.",
        ]
        if self.entry.before:
            lines.append(
                f"Counted part by part, each with a secret of its own: {spans(replace(self.entry, steps=steps))}."
            )
        if self.options.images is not None:
            lines.append("Only the chosen images are protected: one more in the data set may change which are chosen.")
        if self.secret.reproduction:
            lines[0] = (
                f"NOT PRIVATE: sampling and noise are those of --noise-seed {self.options.noise_seed}, which anybody "
                f"can draw again. With a fresh secret these {steps:,} steps would spend {spent}, by the "
                f"{ACCOUNTANTS[self.accountant]}."
            )
        return "\n".join(lines)

    def record(self, steps: int) -> dict[str, JSON]:
        """The account as a record of `metrics.jsonl`."""
        return {
            "kind": "privacy",
            "step": steps,
            "epsilon": self.epsilon(steps),
            "delta": self.options.delta,
            "accountant": self.accountant,
            "private": not self.secret.reproduction,
            **{key: value for key, value in self.ledger(steps).to_json()[0].items() if key != "steps"},
        }


ACCOUNTANTS: Mapping[privacy.Accountant, str] = {
    "pld": "privacy loss distribution of dp-accounting",
    "rdp": "Rényi accountant, improved conversion",
    "rdp-old": "Rényi accountant, old conversion",
    "gaussian": "exact account of the Gaussian mechanism",
}
"""In words."""


def spans(entry: privacy.Entry) -> str:
    """The steps of an entry's parts, in words."""
    every = [*entry.before, (entry.start, entry.steps)]
    return ", ".join(f"steps {first + 1:,} to {end:,}" for first, end in every if end > first)


def _difference(before: privacy.Entry, now: privacy.Entry) -> str:
    names = ("mechanism", "clipping", "data", "steps")
    return "; ".join(
        f"{name} {getattr(now, name)}, which was {getattr(before, name)}"
        for name in names
        if getattr(now, name) != getattr(before, name)
    )
