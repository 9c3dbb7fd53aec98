"""The private side of `train`: what a run may spend, what it has spent, and what of it is not private."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import checkpoint, data, optim, privacy, random, run_folder, tree
from .. import train as training
from ..checkpoint import JSON
from ..checkpoint.folders import step_of
from ..distributed import World, digest
from ..options import Train, UsageError, private_steps_per_epoch
from . import build
from .build import Classifier, Saved
from .faults import refusing
from .mechanisms import mechanism_of
from .waiting import say

LEDGER = "ledger"
"""Where a checkpoint's config holds what was spent."""
_CANARIES = 2**31
"""Folded into a run's key for the choice of canaries: no step has this number."""


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
        self.digest = digest(list(examples))
        total = self.total = len(examples.labels)
        self.per_epoch = private_steps_per_epoch(options.batch_size, total)
        self.steps = options.epochs * self.per_epoch
        self.secret = privacy.Secret(options.noise_seed)
        self.scores: dict[int, Tensor] = {}
        """Of the canaries, after the last two steps."""
        self.bound: privacy.LowerBound | None = None
        """What they have shown of ε."""
        self.accountant: privacy.Accountant = "gaussian" if options.sampling == "shuffled" else options.accountant

        mechanism = mechanism_of(options, examples=total, steps=self.steps)
        with refusing(ValueError):
            sigma = options.noise_multiplier
            if sigma is None:
                if options.epsilon is None:
                    raise UsageError("--private needs one of --epsilon and --noise-multiplier. Found neither.")
                say(f"Calibrating the noise multiplier for ε = {options.epsilon:g} over {self.steps:,} steps.")
                sigma = privacy.calibrated(
                    mechanism,
                    budget=options.epsilon,
                    delta=options.delta,
                    steps=max(1, self.steps),
                    accountant=self.accountant,
                )
            self.mechanism = mechanism(sigma)
            self.clipping.deviations(sigma)
            if options.audit and tree.leaves(self.clipping.init()):
                raise UsageError(f"--audit needs a clipping norm that stays. Found --clipping {options.clipping}.")
            # without what tells of single images: a run's checkpoint may be published
            data = f"{options.dataset}, {total:,} images" + (f", {options.audit:,} canaries" if options.audit else "")
            self.entry = privacy.Entry(self.mechanism, repr(self.clipping), data, 0)
            self.epsilon(1)  # refuses an accountant that is not there, before anything is written

    def epsilon(self, steps: int) -> float:
        """The ε after that many steps, with all that the run has spent besides."""
        return self.ledger(steps).epsilon(delta=self.options.delta, accountant=self.accountant)

    def ledger(self, steps: int) -> privacy.Ledger:
        """The ledger after that many steps."""
        return privacy.Ledger((replace(self.entry, steps=steps),))

    def resume(self, folder: Path, config: Mapping[str, JSON], step: int) -> None:
        """Resumes the account of a run at a checkpoint, and counts the later steps that its folder shows.

        Raises:
            UsageError: it was another mechanism, or the checkpoint does not say.
        """
        with refusing(ValueError):
            (before,) = privacy.Ledger.from_json(config.get(LEDGER)).entries or (None,)
        now = replace(self.entry, steps=step)
        kept = now if before is None else replace(before, before=(), start=0)
        known = run_folder.read_unpublished(folder).get("data")
        if before is None or kept != now or known != self.digest:
            other = "other images" if known else f"no {run_folder.UNPUBLISHED}, which identifies the images"
            what = "no account" if before is None else _difference(kept, now) or other
            raise UsageError(
                "A resumed private run keeps the sampling, noise, clipping and data that its account is of. "
                f"Found {what}."
            )
        seen = [record["step"] for record in run_folder.read_metrics(folder)]
        saved = [step_of(path.name) or 0 for path in checkpoint.steps(folder / run_folder.CHECKPOINTS)]
        self.entry = before if self.secret.reproduction else before.resumed(step, seen=max([step, *seen, *saved]))

    def hidden(self, folder: Path, step: int, loss: float) -> None:
        """Writes what belongs to a checkpoint and depends on single images: next to it, for it may be published."""
        before = run_folder.read_unpublished(folder)
        losses = {**before.get("losses", {}), str(step): loss}
        values: dict[str, Any] = {"data": self.digest, "losses": losses}
        if step in self.scores:
            scores = {**before.get("scores", {}), str(step): self.scores[step].tolist()}
            values["scores"] = {at: scores[at] for at in sorted(scores, key=int)[-self.options.keep :]}
        run_folder.write_unpublished(folder, values)

    def restored(self, saved: Saved, folder: Path, step: int) -> Saved:
        """A checkpoint with what was written next to it: the losses of its epoch and the scores of its canaries."""
        hidden = run_folder.read_unpublished(folder)
        scores = hidden.get("scores", {}).get(str(step))
        self.scores = {} if scores is None else {step: torch.tensor(scores)}
        return saved._replace(loss=saved.loss + float(hidden.get("losses", {}).get(str(step), 0.0)))

    def fit(self, saved: Saved, examples: Iterable[Tensor], callbacks: Iterable[Any]) -> None:
        """Makes the steps of all epochs; with `audit`, among canaries that callbacks do not see."""
        rows, state, optimizer = tuple(examples), saved.state, self.optimizer
        loss_fn: Callable[..., Tensor] = build.losses(self.made, self.options)
        planted = None
        if self.options.audit:
            with refusing(ValueError):
                planted = training.plant_canaries(
                    loss_fn, state.params, optimizer, rows, clipping=self.clipping, mechanism=self.mechanism,
                    canaries=self.options.audit, key=random.fold_in(state.key, _CANARIES),
                )  # fmt: skip
            loss_fn, optimizer, rows = planted.loss_fn, planted.optimizer, planted.examples
            scores = self.scores.get(int(state.step), torch.zeros(self.options.audit))
            canaries = training.CanaryState(state.optimizer, scores.to(state.key.device))
            state = state._replace(params=planted.params._replace(model=state.params), optimizer=canaries)
            callbacks = [self._without_canaries(callback) for callback in callbacks]
        total = len(rows[-1])
        loss_fn = build.fastest(
            loss_fn, state.params, *[x[0] for x in rows], state.key, options=self.options,
            batch_size=privacy.chunk_sizes(self.mechanism, total)[-1],
        )  # fmt: skip
        with refusing(ValueError):
            step = training.make_private_step(
                loss_fn, optimizer, clipping=self.clipping, mechanism=self.mechanism, examples=total, world=self.world
            )
        step = step.compiled() if self.options.compile == "on" else step
        state = training.fit_private(
            step, state, rows, secret=self.secret, steps=self.steps, loss=saved.loss, callbacks=callbacks
        )
        if planted is not None:
            self.bound = planted.lower_bound(state, delta=self.options.delta)

    def _without_canaries(self, callback: Callable[[training.Progress], Any]) -> Callable[[training.Progress], Any]:
        """The callback as it is without an audit."""
        expected = self.mechanism.sampling_rate * self.total

        def call(progress: training.Progress) -> Any:
            state = progress.state
            before = {step: scores for step, scores in self.scores.items() if step == progress.step - 1}
            self.scores = {**before, progress.step: state.optimizer.scores}
            plain = state._replace(params=state.params.model, optimizer=state.optimizer.optimizer)
            seen = round(expected * ((progress.step - 1) % self.per_epoch + 1))
            return callback(progress._replace(state=plain, examples=seen))

        return call

    def start_line(self) -> str:
        """What is about to be spent."""
        return (
            f"Private training: noise multiplier {self.mechanism.noise_multiplier:g}, "
            f"{self.mechanism.sampling_rate * self.total:g} images expected per step, {self.steps:,} steps: "
            f"ε = {self.epsilon(self.steps):.3f} at δ = {self.options.delta:g}."
        )

    def summary(self, steps: int) -> str:
        """What was spent, by which accountant, and what it does not cover."""
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
            lines.append(f"Counted part by part, each with its own secret: {spans(replace(self.entry, steps=steps))}.")
        if self.options.train_size is not None:
            lines.append("Only the chosen images are protected: one more in the data set may change which are chosen.")
        if self.bound is not None:
            lines.append(self._audit())
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
            **({} if self.bound is None else {"audit": self.bound._asdict()}),
            **{key: value for key, value in self.ledger(steps).to_json()[0].items() if key != "steps"},
        }

    def _audit(self) -> str:
        """The lower bound on ε that the canaries show."""
        assert self.bound is not None  # there was an audit
        line = (
            f"Audit of this run with {self.options.audit:,} canaries: at a confidence of 95 % ε is at least "
            f"{self.bound.epsilon:.3f}; {self.bound.gaussian:.3f} where it is a Gaussian mechanism; "
            f"{self.bound.independent:.3f} where, besides, canaries are independent."
        )
        spent = self.epsilon(self.steps)
        if max(self.bound.epsilon, self.bound.gaussian, self.bound.independent) > spent:
            line += f" THIS IS MORE THAN THE {spent:.3f} ACCOUNTED: what ran is not what is accounted for."
        return line


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
