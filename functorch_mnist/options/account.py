"""The options of `account`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from .train import check_noise
from .words import Rule, UsageError, check_ranges, flag


@dataclass(frozen=True, kw_only=True)
class Account:
    """Compute what private training spends (ε), the noise it needs or the steps it may make, from the other two; or
    what the runs in some folders have spent together."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Folders of private runs on the same images: their ledgers are composed into one ε."""
    epsilon: float | None = None
    """ε that may be spent."""
    delta: float = 1e-5
    """δ at which ε is told."""
    noise_multiplier: float | None = None
    """The noise's standard deviation over the sensitivity of a step."""
    batch_size: int = 256
    """Images per step, expected ones if they are sampled."""
    examples: int = 60_000
    """Training images."""
    epochs: int | None = None
    """How often each training image is seen, expected if they are sampled."""
    steps: int | None = None
    """Or how many steps are made."""
    sampling: Literal["poisson", "shuffled"] = "poisson"
    """Each image by a coin of its own in each step, or batches of a shuffled epoch, for which nothing is claimed."""
    noise: str = "independent"
    """Or correlated over steps: banded:B (BandMF, with cyclic Poisson sampling), bisr:B, or cgd:LAMBDA."""
    accountant: Literal["pld", "rdp", "rdp-old"] = "pld"
    """How ε is computed; pld needs the privacy extra."""
    png: Path | None = None
    """Also draw ε over the epochs into this file (needs the plot extra)."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which each example is expected once."""
        return max(1, round(self.examples / self.batch_size))

    @property
    def all_steps(self) -> int | None:
        """What `epochs` or `steps` says; None where neither is given."""
        return self.steps if self.epochs is None else self.epochs * self.steps_per_epoch


_RULES: tuple[Rule, ...] = (
    ("above 0 and below 1e4", lambda v: 0 < v < 1e4, ("epsilon", "noise_multiplier")),
    ("above 0 and below 1", lambda v: 0 < v < 1, ("delta",)),
    ("at least 1 and below 2**31", lambda v: 1 <= v < 2**31, ("batch_size", "examples", "epochs", "steps")),
)


def check_account(options: Account) -> None:
    """Refuses what can be refused before torch is imported.

    Raises:
        UsageError: a number is out of its range, or not one of ε, noise and length is missing.
    """
    check_ranges(options, _RULES)
    if options.runs:
        for name in ("epsilon", "noise_multiplier", "epochs", "steps", "png"):
            if getattr(options, name) is not None:
                raise UsageError(f"{flag(name)} has no effect on the ledgers of folders. Leave it or the folders out.")
        for name in ("batch_size", "examples", "sampling", "noise"):
            if getattr(options, name) != getattr(Account, name):
                raise UsageError(f"{flag(name)} has no effect on the ledgers of folders. Leave it or the folders out.")
        return
    if options.batch_size > options.examples:
        raise UsageError(f"--batch-size must be at most --examples, {options.examples}. Found {options.batch_size}.")
    if options.epochs is not None and options.steps is not None:
        raise UsageError("account takes one of --epochs and --steps. Found both.")
    given = {
        "--epsilon": options.epsilon,
        "--noise-multiplier": options.noise_multiplier,
        "--epochs or --steps": options.all_steps,
    }
    found = [name for name, value in given.items() if value is not None]
    if len(found) != 2:
        raise UsageError(f"account takes two of {', '.join(given)}, and finds the third. Found {len(found)} of them.")
    check_noise(options.noise, options.sampling)
    if options.sampling == "shuffled" and options.accountant != Account.accountant:
        raise UsageError("--accountant has no effect with --sampling shuffled, whose account is exact.")
