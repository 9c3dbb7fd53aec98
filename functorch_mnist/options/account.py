"""The options of `account`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from .train import check_noise, private_steps_per_epoch
from .words import Rule, Shown, UsageError, check_picture, check_ranges, flag


@dataclass(frozen=True, kw_only=True)
class Account:
    """Compute ε, the noise multiplier or the number of steps of private training from the other two; or compose what
    several runs have spent."""

    runs: Annotated[tuple[Path, ...], Shown("RUN", positional=True)] = ()
    """Folders of private runs on the same images: their ledgers are composed into one ε."""
    epsilon: float | None = None
    """The budget ε."""
    delta: float = 1e-5
    """δ at which ε is reported."""
    noise_multiplier: float | None = None
    """The noise's standard deviation over the sensitivity of a step."""
    batch_size: int = 256
    """Images per step; the expected number with Poisson sampling."""
    examples: int = 60_000
    """Training images."""
    epochs: int | None = None
    """How often each training image is seen, in expectation with Poisson sampling."""
    steps: int | None = None
    """Or the number of steps."""
    sampling: Literal["poisson", "shuffled"] = "poisson"
    """Poisson sampling, or batches of shuffled epochs, which are accounted for without amplification."""
    noise: Annotated[str, Shown("NOISE")] = "independent"
    """Independent noise, or correlated over steps: banded:B (BandMF, cyclic Poisson sampling), bisr:B, cgd:LAMBDA."""
    accountant: Literal["pld", "rdp", "rdp-old"] = "pld"
    """How ε is computed: privacy loss distributions, or Rényi DP."""
    png: Annotated[Path | None, Shown("FILE")] = None
    """Also draw ε over the epochs into this file: .png, .pdf or .svg."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which each example is expected once."""
        return private_steps_per_epoch(self.batch_size, self.examples)

    @property
    def all_steps(self) -> int | None:
        """As `epochs` or `steps` says; None where neither is given."""
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
    check_picture(options.png)
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
    count = sum(value is not None for value in given.values())
    if count != 2:
        raise UsageError(f"account takes two of {', '.join(given)}, and computes the third. Found {count} of them.")
    check_noise(options.noise, options.sampling)
    if options.sampling == "shuffled" and options.accountant != Account.accountant:
        raise UsageError("--accountant has no effect with --sampling shuffled, whose account is exact.")
