"""The options of `sweep` and `compare`: many runs, and what they differ in."""

import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple

from .train import Train, check, chosen_of
from .words import Rule, Shown, UsageError, check_ranges, flag, listed, number_of

SWEPT = Train(hold_out=5000)
"""The defaults of a sweep's runs."""
COMPARED = Train(model="mlp", train_size=10_000, hold_out=5000, epochs=3)
"""The defaults of what is compared."""

OVER = ("lr", "momentum", "weight-decay", "label-smoothing", "dropout", "max-norm", "clip-norm", "noise-multiplier")
"""What the runs of a sweep can differ in, besides the seed."""
LOGARITHMIC = frozenset({"lr", "weight-decay", "max-norm", "clip-norm", "noise-multiplier"})
"""Those of which a range is drawn evenly in the logarithm."""
PRIVATE_OVER = frozenset({"clip_norm", "noise_multiplier"})
"""The options among them that make steps clipped and noisy."""

LOSSES = ("cross-entropy", "mse")
OPTIMIZERS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "sgd": {"optimizer": "sgd", "momentum": 0.0},
        "momentum": {"optimizer": "sgd", "momentum": 0.9},
        "nesterov": {"optimizer": "sgd", "momentum": 0.9, "nesterov": True},
        "adam": {"optimizer": "adam"},
        "adamw": {"optimizer": "adamw", "weight_decay": 0.01},
    }
)
"""The optimizers that are compared, as options of `train`; a weight decay above 0 that is given is that of all."""
SCHEDULES = ("constant", "cosine", "one-cycle", "step-decay")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Train many runs at once, and report which did best on held-out images.

    All options of train set what the runs have in common; see train --help. --hold-out is 5000 by default. The same
    command with --out resumes a sweep that was stopped. All runs have the images that --seed draws for --train-size and
    --imbalance."""

    over: Annotated[tuple[str, ...], Shown("NAME=VALUES", repeated=True)] = ()
    """What the runs differ in, as NAME=VALUE,VALUE or NAME=LOW:HIGH; may be repeated. NAME is lr, momentum,
    weight-decay, label-smoothing, dropout, max-norm, or for clipped and noisy steps clip-norm, noise-multiplier."""
    trials: int | None = None
    """Random search: draw N settings at random; without, a grid of all combinations of values."""
    seeds: int = 1
    """Train each setting with N seeds, from --seed on: error bars are over them."""
    vmapped_runs: Annotated[str, Shown("N|auto")] = "auto"
    """How many runs are vmapped, trained in one call; auto measures what is fastest."""
    halve_every: int | None = None
    """Successive halving: after each N epochs only the better settings continue."""
    halve_keep: float = 0.5
    """The fraction of the settings that continues."""
    training: Train = SWEPT


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Compare losses, optimizers and schedules, each at its own best learning rate on held-out images.

    All options of train set what the runs have in common; see train --help. The defaults here are --model mlp
    --train-size 10000 --hold-out 5000 --epochs 3."""

    losses: Annotated[str, Shown("NAMES")] = "cross-entropy,mse"
    """Which, with commas: cross-entropy, mse."""
    optimizers: Annotated[str, Shown("NAMES")] = "sgd,momentum,nesterov,adam,adamw"
    """Which, with commas: sgd, momentum, nesterov, adam, adamw."""
    schedules: Annotated[str, Shown("NAMES")] = "constant,one-cycle"
    """Which, with commas: constant, cosine, one-cycle, step-decay."""
    lrs: Annotated[str, Shown("NUMBERS")] = "0.0003,0.001,0.003,0.01,0.03,0.1,0.3,1"
    """The learning rates of which each takes its best."""
    seeds: int = 3
    """Train each run with N seeds, from --seed on: error bars are over them."""
    vmapped_runs: Annotated[str, Shown("N|auto")] = "auto"
    """How many runs are vmapped, trained in one call; auto measures what is fastest."""
    training: Train = COMPARED


class Axis(NamedTuple):
    """One thing that runs differ in."""

    name: str
    values: tuple[float, ...]
    """To choose from; of a range its two ends."""
    ranged: bool

    @property
    def field(self) -> str:
        """The name of the option."""
        return self.name.replace("-", "_")


_RULES: tuple[Rule, ...] = (
    ("from 1 to 1000", lambda v: 1 <= v <= 1000, ("seeds", "trials", "halve_every")),
    ("above 0 and below 1", lambda v: 0 < v < 1, ("halve_keep",)),
)
_UNUSED = (
    "private", "watch", "watch_every", "tune", "tune_steps", "tune_rounds", "resume", "save_every", "keep", "shards",
)  # fmt: skip


def axes(options: Sweep) -> tuple[Axis, ...]:
    """The axes that `--over` names.

    Raises:
        UsageError: it cannot be read.
    """
    every: dict[str, Axis] = {}
    for text in options.over:
        name, equals, values = (part.strip() for part in text.partition("="))
        if not equals or name not in OVER or name in every:
            raise UsageError(f"--over takes each of {', '.join(OVER)} once, as NAME=VALUES. Found {text!r:.80}.")
        ranged = ":" in values
        parts = [part for part in values.split(":" if ranged else ",") if part.strip()]
        numbers = tuple(number_of(f"--over {name}", part, least=0.0, most=1e38) for part in parts)
        if not numbers or len(set(map(_rounded, numbers))) != len(numbers):
            raise UsageError(f"--over {name} needs different numbers of float32. Found {values!r:.80}.")
        if ranged and (len(numbers) != 2 or numbers[0] > numbers[1] or (name in LOGARITHMIC and numbers[0] == 0)):
            above = ", above 0," if name in LOGARITHMIC else ""
            raise UsageError(f"--over {name} takes a range as LOW:HIGH{above} from low to high. Found {values!r:.80}.")
        every[name] = Axis(name, numbers, ranged)
    return tuple(every.values())


def set_to(options: Train, field: str, value: Any) -> Train:
    """The options with another value of what runs differ in; of dropout, channels have half the rate of units."""
    given: dict[str, Any] = {field: (value / 2, value) if field == "dropout" else value}
    return replace(options, **given)


def check_sweep(options: Sweep) -> None:
    """Refuses options of a sweep that do not go together.

    Raises:
        UsageError: with what to change.
    """
    check_ranges(options, _RULES)
    _check_many(options.training, options.vmapped_runs, options.seeds)
    swept = axes(options)
    if any(axis.ranged for axis in swept) and options.trials is None:
        raise UsageError("A range needs random search: set --trials, such as 20. Found a range without it.")
    if options.trials is not None and not any(axis.ranged for axis in swept):
        raise UsageError("--trials draws from a range, as in --over lr=0.01:1. Found none.")
    if options.halve_every is None and options.halve_keep != Sweep.halve_keep:
        raise UsageError("--halve-keep has no effect without --halve-every.")
    if not swept and options.seeds == 1:
        raise UsageError("sweep needs --over, such as --over lr=0.01,0.1, or several --seeds. Found neither.")
    for axis in swept:
        if chosen_of(options.training, axis.field):
            raise UsageError(f"--{axis.name} differs between the runs. Found {flag(axis.field)} as well: leave it out.")
        if axis.name == "label-smoothing" and (
            options.training.loss != "cross-entropy" or options.training.focal_gamma
        ):
            raise UsageError("--over label-smoothing needs --loss cross-entropy without --focal-gamma.")
        if axis.name == "momentum" and options.training.nesterov and 0 in axis.values:
            raise UsageError("--nesterov needs a momentum above 0. Found 0 in --over momentum.")
        for value in axis.values:
            if axis.field in PRIVATE_OVER:
                if axis.name == "clip-norm" and value == 0:
                    raise UsageError("--over clip-norm must be above 0. Found 0.")
                continue
            one = set_to(options.training, axis.field, value)
            check(replace(one, dropout=(value, value)) if axis.name == "dropout" else one)


def combinations(options: Compare) -> dict[tuple[str, str, str], Train]:
    """The runs that are compared but for their learning rates, by loss, optimizer and schedule.

    Raises:
        UsageError: a name is unknown, or there is none of a kind.
    """
    runs = {}
    for loss, optimizer, schedule in product(
        listed("--losses", options.losses, LOSSES, least=1),
        listed("--optimizers", options.optimizers, tuple(OPTIMIZERS), least=1),
        listed("--schedules", options.schedules, SCHEDULES, least=1),
    ):
        given: dict[str, Any] = {"loss": loss, "schedule": schedule, **OPTIMIZERS[optimizer]}
        if options.training.weight_decay:
            given.pop("weight_decay", None)
        runs[loss, optimizer, schedule] = replace(options.training, **given)
    return runs


def lrs(options: Compare) -> tuple[float, ...]:
    """The learning rates that `--lrs` lists.

    Raises:
        UsageError: it cannot be read.
    """
    numbers = tuple(number_of("--lrs", part, least=0.0, most=1e38) for part in options.lrs.split(",") if part.strip())
    if not numbers or len(set(map(_rounded, numbers))) != len(numbers):
        raise UsageError(f"--lrs needs different numbers of float32. Found {options.lrs!r:.80}.")
    return numbers


def check_compare(options: Compare) -> None:
    """Refuses options of a comparison that do not go together.

    Raises:
        UsageError: with what to change.
    """
    check_ranges(options, _RULES)
    _check_many(options.training, options.vmapped_runs, options.seeds)
    for name in ("loss", "optimizer", "schedule", "lr", "momentum", "nesterov", "dampening", "warmup"):
        if chosen_of(options.training, name):
            raise UsageError(f"{flag(name)} is what is compared. Leave it out.")
    lrs(options)
    for one in combinations(options).values():
        check(one)


def _rounded(value: float) -> float:
    """The number as float32."""
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded


def _check_many(training: Train, vmapped_runs: str, seeds: int) -> None:
    """What sweeps and comparisons ask of the options of their runs."""
    for name in _UNUSED:
        if chosen_of(training, name) or (name == "private" and training.private):
            raise UsageError(f"{flag(name)} is for single runs. Leave it out.")
    check(training)
    if not training.hold_out:
        raise UsageError("Runs are compared by held-out images. Found none. Set --hold-out, such as 5000.")
    if training.sampler == "balanced":
        raise UsageError("--sampler balanced is for single runs. Leave it out.")
    if training.seed + seeds > 2**63:
        raise UsageError(f"--seed and --seeds must end below 2**63. Found {training.seed} and {seeds}.")
    if not training.epochs:
        raise UsageError("--epochs must be at least 1. Found 0.")
    if vmapped_runs != "auto" and not (vmapped_runs.isdecimal() and 1 <= int(vmapped_runs) <= 1024):
        raise UsageError(f"--vmapped-runs must be auto or a number from 1 to 1024. Found {vmapped_runs!r:.80}.")
