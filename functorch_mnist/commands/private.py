"""The private side of `train`: what a run may spend, what it has spent, and what of it is not private."""

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from torch import Tensor

from .. import data, optim, privacy, random, tree
from .. import train as training
from ..checkpoint import JSON
from ..distributed import World, digest
from ..options import Train, UsageError
from . import build
from .build import Classifier, Saved
from .faults import refusing

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
        self.data, self.example = digest(list(examples)), [x[0] for x in examples]
        total = self.total = len(examples.labels)
        self.per_epoch = steps_per_epoch(options, total)
        self.steps = options.epochs * self.per_epoch
        self.secret = privacy.Secret(options.noise_seed)
        self.accountant: privacy.Accountant = "gaussian" if options.sampling == "shuffled" else options.accountant

        def mechanism(sigma: float) -> privacy.Mechanism:
            if options.sampling == "shuffled":
                return privacy.Shuffled(self.per_epoch, sigma)
            return privacy.Poisson(min(options.batch_size, total) / total, sigma)

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
            self.epsilon(1)  # refuses an accountant that is not there, before anything is written
        self.expected = privacy.expected_examples(self.mechanism, total)

    def epsilon(self, steps: int) -> float:
        """What so many steps spend."""
        return privacy.epsilon(self.mechanism, steps=steps, delta=self.options.delta, accountant=self.accountant)

    def ledger(self, steps: int) -> privacy.Ledger:
        """What has run after so many steps."""
        return privacy.Ledger(self.mechanism, repr(self.clipping), self.data, steps)

    def check_resumed(self, config: Mapping[str, JSON], step: int) -> None:
        """Refuses to go on with a run that was another mechanism.

        Raises:
            UsageError: it was, or the checkpoint does not say.
        """
        with refusing(ValueError):
            before = privacy.Ledger.from_json(config.get(LEDGER))
        if before != self.ledger(step):
            raise UsageError(
                "A private run goes on with the sampling, noise, clipping and data that its account is of. "
                f"Found {_difference(before, self.ledger(step))}."
            )

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
                loss_fn,
                self.optimizer,
                clipping=self.clipping,
                noise_multiplier=self.mechanism.noise_multiplier,
                expected=self.expected,
                world=self.world,
            )
        return step.compiled() if self.options.compile == "on" else step

    def fit(self, saved: Saved, examples: Iterable[Tensor], callbacks: Iterable[Any]) -> training.State:
        """The state after all epochs."""
        return training.fit_private(
            self.step,
            saved.state,
            tuple(examples),
            mechanism=self.mechanism,
            secret=self.secret,
            steps=self.steps,
            loss=saved.loss,
            callbacks=callbacks,
            world=self.world,
        )

    def start_line(self) -> str:
        """What is about to be spent."""
        return (
            f"Private training: noise multiplier {self.mechanism.noise_multiplier:g}, "
            f"{self.expected:g} images expected of a step, {self.steps:,} steps: "
            f"ε = {self.epsilon(self.steps):.3f} at δ = {self.options.delta:g}."
        )

    def summary(self, steps: int) -> str:
        """What was spent, by whom it is counted, and what it does not cover."""
        spent = f"ε = {self.epsilon(steps):.3f} at δ = {self.options.delta:g}"
        lines = [
            f"Privacy spent in {steps:,} steps: {spent}, by the {ACCOUNTANTS[self.accountant]}.",
            f"Neighbouring data sets: {self.mechanism.relation}. Sampling: {self._sampling()}.",
            f"Clipping: {self.clipping!r}. Noise multiplier: {self.mechanism.noise_multiplier:g}.",
            "Not private, so not to be published: the losses shown and those in metrics.jsonl. Not counted: other runs "
            "on these images, such as a search for options.",
        ]
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
            **{key: value for key, value in self.ledger(steps).to_json().items() if key != "steps"},
        }

    def _sampling(self) -> str:
        if isinstance(self.mechanism, privacy.Poisson):
            return f"Poisson, each image with a chance of {self.mechanism.rate:.6g} in each step"
        return f"shuffled batches, each image once in {self.per_epoch:,} steps, without amplification"


ACCOUNTANTS: Mapping[privacy.Accountant, str] = {
    "pld": "privacy loss distribution of dp-accounting",
    "rdp": "Rényi accountant, improved conversion",
    "rdp-old": "Rényi accountant, old conversion",
    "gaussian": "exact account of the Gaussian mechanism",
}
"""In words."""


def _difference(before: privacy.Ledger, now: privacy.Ledger) -> str:
    names = ("mechanism", "clipping", "data", "steps")
    return "; ".join(
        f"{name} {getattr(now, name)}, which was {getattr(before, name)}"
        for name in names
        if getattr(now, name) != getattr(before, name)
    )
