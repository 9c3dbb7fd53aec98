"""The command line's options: one dataclass per command. Read before torch is imported, so nothing here imports it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tyro

INTERRUPTED = 130
"""The exit status after Ctrl-C, as shells have it."""


WATCHES = ("noise-scale", "norms")
"""What a training run can record of sample gradients."""


class UsageError(Exception):
    """A user's mistake, told in one line."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a classifier, and print its accuracy on the test images."""

    recipe: Literal["article", "fast", "private"] = "article"
    """Named defaults for all other options: the article's, those that reach 99 % soonest, or the best private ones."""
    dataset: Literal["mnist", "fashion-mnist", "kmnist", "qmnist", "emnist-digits"] = "mnist"
    """Which data set; all but mnist are downloaded once."""
    data_dir: Path | None = None
    """Read the data set's four IDX files from this folder instead."""
    model: Literal["cnn", "mlp", "linear", "small-cnn", "scattering"] = "cnn"
    """Which model; scattering is a linear map of fixed wavelet features of the straightened image."""
    hidden: tuple[int, ...] = (128,)
    """Widths of the mlp's hidden layers."""
    activation: Literal["relu", "sigmoid", "tanh"] = "relu"
    """Activation of the cnns and the mlp."""
    dropout: tuple[float, float] = (0.25, 0.5)
    """The cnn's dropout rates: of channels after pooling, and of units before the last layer."""
    loss: Literal["cross-entropy", "mse"] = "cross-entropy"
    """Cross-entropy, or the squared error of the probabilities."""
    label_smoothing: float = 0.0
    """Part of the cross-entropy's target that is spread over all classes."""
    epochs: int = 1
    """How often each training image is seen."""
    batch_size: int = 64
    """Images per step."""
    lr: float = 0.01
    """Learning rate, the highest one of a schedule."""
    schedule: Literal["constant", "cosine", "one-cycle", "step-decay"] = "constant"
    """Learning rate over training; step-decay divides it by 10 after each epoch."""
    warmup: float = 0.3
    """Part of the training in which one-cycle goes up."""
    momentum: float = 0.9
    """Momentum of SGD."""
    dampening: float = 0.0
    """Dampening of SGD's momentum."""
    weight_decay: float = 0.0
    """Weight decay of SGD."""
    nesterov: bool = False
    """Nesterov's form of momentum."""
    max_norm: float | None = None
    """Scale the mean gradient down to this norm where it is larger."""
    average: float = 0.0
    """Keep a moving average of the parameters with this decay, and test that; 0 keeps none."""
    copies: int = 0
    """Average each image's loss over so many randomly shifted copies; 0 takes the image as it is."""
    shift: int = 2
    """Most pixels that a copy is shifted by."""
    private: bool = False
    """Train with differential privacy: clipped gradients of single images, with noise."""
    epsilon: float | None = None
    """Find the noise multiplier that spends this ε over all epochs."""
    noise_multiplier: float | None = None
    """Or give it: the noise's standard deviation over the sensitivity of a step."""
    delta: float = 1e-5
    """δ at which ε is told."""
    clipping: Literal["flat", "automatic", "global", "per-layer", "quantile"] = "flat"
    """How single gradients are clipped; with quantile the norm follows their median."""
    clip_norm: float = 1.0
    """The largest norm of a single image's gradient; with quantile the first."""
    sampling: Literal["poisson", "shuffled"] = "poisson"
    """Draw each image by a coin of its own, or cut shuffled epochs into batches, whose account is not amplified."""
    accountant: Literal["pld", "rdp", "rdp-old"] = "pld"
    """How ε is computed; pld needs the privacy extra."""
    noise_seed: int | None = None
    """Draw sampling and noise from this seed: a reproduction, which is not private."""
    seed: int = 0
    """Names all random streams: initial parameters, order of images, dropout; of a private run only what is public."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the forward and backward pass; parameters, loss and optimizer are always float32."""
    compile: Literal["on", "off"] = "off"
    """Compile the step: worth its start-up time in long runs."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to train."""
    threads: int | None = None
    """Number of CPU threads; torch's own choice by default."""
    watch: str | None = None
    """Record what sample gradients are like: noise-scale, norms, or both with a comma."""
    watch_every: int = 1
    """Steps from one record to the next."""
    out: Path | None = None
    """The run's folder, which must not hold a run yet; by default runs/ and the date and time."""
    resume: Path | None = None
    """Go on with the run in this folder, with its options."""
    save_every: int = 500
    """Steps between checkpoints; there is also one at the end."""
    keep: int = 3
    """How many checkpoints to keep."""


RECIPES: Mapping[str, Train] = MappingProxyType(
    {
        "article": Train(),
        "fast": Train(
            recipe="fast",
            dropout=(0.1, 0.25),
            epochs=2,
            lr=0.05,
            schedule="one-cycle",
            warmup=0.2,
            weight_decay=5e-4,
            precision="bfloat16",
        ),
        "private": Train(
            recipe="private",
            private=True,
            epsilon=2.93,
            model="scattering",
            epochs=40,
            batch_size=4096,
            lr=667.0,
            clip_norm=0.03,
        ),
    }
)
"""The defaults that `--recipe` chooses from."""

PRIVATE = (
    "epsilon", "noise_multiplier", "delta", "clipping", "clip_norm", "sampling", "accountant", "noise_seed",
)  # fmt: skip
"""The options that do nothing without `private`."""

CHANGEABLE = frozenset({"epochs", "device", "compile", "threads", "save_every", "keep", "resume", "data_dir"})
"""The options that a resumed run may change."""


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Print a run's accuracy on the test images, per class, and its confusion matrix."""

    run: tyro.conf.Positional[Path]
    """The run's folder."""
    dataset: Literal["mnist", "fashion-mnist", "kmnist", "qmnist", "emnist-digits"] | None = None
    """Which data set; by default the run's own."""
    data_dir: Path | None = None
    """Read the data set's four IDX files from this folder instead."""
    png: Path | None = None
    """Also draw the confusion matrix into this file (needs the plot extra)."""
    batch_size: int = 1000
    """Images per call."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute."""


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Print the digit, and its probability, for image files or for a range of test images."""

    run: tyro.conf.Positional[Path]
    """The run's folder."""
    images: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Image files of any kind that Pillow reads: one digit each, dark on light or light on dark."""
    test: tuple[int, int] | None = None
    """First and last (not included) of a range of test images."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute."""


SCORES = ("loss", "el2n", "grand", "margin", "self-influence", "forgetting")
"""The scores of a training example, in the order in which they are shown."""


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What the commands that go over the training images have in common."""

    run: tyro.conf.Positional[Path]
    """The run's folder."""
    images: int | None = None
    """Take only so many of the first training images."""
    data_dir: Path | None = None
    """Read the data set's four IDX files from this folder instead."""
    out: Path | None = None
    """Where the results go; by default into the run's folder."""
    compile: Literal["on", "off"] = "off"
    """Compile the passes: worth its start-up time for many checkpoints."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute."""
    threads: int | None = None
    """Number of CPU threads; torch's own choice by default."""


@dataclass(frozen=True, kw_only=True)
class Scores(Analysis):
    """Score every training image: a table, histograms and the images with the highest and lowest scores."""

    scores: str = "loss,el2n,grand,margin"
    """Which, with commas: loss, el2n, grand, margin, self-influence, forgetting."""
    checkpoints: Literal["newest", "all"] = "newest"
    """Score at the newest checkpoint, or at all that the run keeps: scores are then means over them."""


@dataclass(frozen=True, kw_only=True)
class Mislabelled(Analysis):
    """Rank the training images by how likely their label is wrong; with --flip, plant wrong labels and find them."""

    flip: float | None = None
    """Train anew with this part of the labels flipped, and say how many of the flips each score finds."""
    seed: int = 0
    """Names which labels are flipped."""
    scores: str = "loss,el2n,grand,margin,self-influence"
    """Rank by these, with commas: loss, el2n, grand, margin, self-influence, forgetting."""
    top: int = 20
    """How many of the most suspicious images are listed and shown."""


@dataclass(frozen=True, kw_only=True)
class Influence(Analysis):
    """Find the training images that helped and hurt most on a test image."""

    test: int
    """The number of the test image."""
    method: Literal["tracin", "dot", "cosine"] = "tracin"
    """TracIn over all checkpoints that the run keeps, or the dot or cosine of gradients at the newest."""
    top: int = 10
    """How many images of each kind are listed and shown."""


@dataclass(frozen=True, kw_only=True)
class NoiseScale(Analysis):
    """Print the gradient noise scale during training, with error bars, and what it says of the batch size."""

    images: int | None = 4096
    """Estimate it at each checkpoint from so many of the first training images."""
    windows: int = 20
    """Parts of the training over which the records of train --watch noise-scale are averaged."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Print how a model's per-sample gradients are taken, and what that costs; dropout is off."""

    model: Literal["cnn", "mlp", "linear", "small-cnn", "scattering"] = "cnn"
    """Which model."""
    hidden: tuple[int, ...] = (128,)
    """Widths of the mlp's hidden layers."""
    activation: Literal["relu", "sigmoid", "tanh"] = "relu"
    """Activation of the cnns and the mlp."""
    batch_size: int = 64
    """Images per batch, for the costs."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the forward and backward pass."""
    override: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Take a parameter another way, as NAME=WAY, such as conv2.weight=gram; may be given again."""

    @property
    def training(self) -> Train:
        """The run whose model this is."""
        return Train(
            model=self.model,
            hidden=self.hidden,
            activation=self.activation,
            batch_size=self.batch_size,
            precision=self.precision,
        )


@dataclass(frozen=True, kw_only=True)
class Account:
    """Compute what private training spends (ε), the noise it needs or the steps it may make, from the other two."""

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


def to_json(options: Train) -> dict[str, Any]:
    """The options as JSON values; `from_json` is the way back."""
    values = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def from_json(values: Mapping[str, Any]) -> Train:
    """The options that `to_json` wrote.

    Raises:
        UsageError: a name is missing or unknown, or a value is of the wrong kind or fails `check`.
    """
    kinds = get_type_hints(Train)
    if set(values) != set(kinds):
        raise UsageError(
            f"The run's options must be those of this version. Missing {sorted(set(kinds) - set(values))}, "
            f"unknown {sorted(set(values) - set(kinds))}."
        )
    options = Train(**{name: _restored(name, value, kinds[name]) for name, value in values.items()})
    check(options)
    return options


def _restored(name: str, value: Any, kind: Any) -> Any:
    """The value in the type that the dataclass declares."""
    if NoneType in get_args(kind):
        if value is None:
            return None
        kind = get_args(kind)[0]
    parts = get_args(kind)
    if get_origin(kind) is Literal:
        good = value in parts
    elif get_origin(kind) is tuple and isinstance(value, list):
        parts = parts[:1] * len(value) if parts[-1] is ... else parts
        good = len(value) == len(parts)
        value = tuple(_restored(name, item, part) for item, part in zip(value, parts, strict=False))
    elif kind is float:
        good = type(value) in (int, float)
    elif kind is Path:
        good = isinstance(value, str)
        value = Path(value) if good else value
    else:
        good = type(value) is kind
    if not good:
        wanted = kind.__name__ if isinstance(kind, type) else kind
        raise UsageError(f"The run's option {name} must be {wanted}. Found {value!r:.80}.")
    return value


_RULES: tuple[tuple[str, Callable[[float], bool], tuple[str, ...]], ...] = (
    ("at least 0 and below 2**31", lambda v: 0 <= v < 2**31, ("epochs",)),
    (
        "at least 1 and below 2**31",
        lambda v: 1 <= v < 2**31,
        ("hidden", "batch_size", "save_every", "keep", "watch_every"),
    ),
    ("at least 0 and below 2**63", lambda v: 0 <= v < 2**63, ("seed",)),
    ("from 1 to 1024", lambda v: 1 <= v <= 1024, ("threads",)),  # torch crashes at some number above
    ("at least 0 and below 2**63", lambda v: 0 <= v < 2**63, ("noise_seed",)),
    ("from 0 to 64", lambda v: 0 <= v <= 64, ("copies",)),
    ("from 1 to 27", lambda v: 1 <= v <= 27, ("shift",)),
    ("from 0 to 1", lambda v: 0 <= v <= 1, ("label_smoothing", "dampening")),
    ("at least 0 and below 1", lambda v: 0 <= v < 1, ("dropout", "average")),
    ("above 0 and below 1", lambda v: 0 < v < 1, ("warmup", "delta")),
    ("above 0 and below 1e4", lambda v: 0 < v < 1e4, ("epsilon", "noise_multiplier")),
    ("above 0 and below 1e38", lambda v: 0 < v < 1e38, ("max_norm", "clip_norm")),  # float32 ends at 3.4e38
    ("at least 0 and below 1e38", lambda v: 0 <= v < 1e38, ("lr", "momentum", "weight_decay")),
)
"""What a number must be, in words and as a function that NaN fails, and the options it is for."""

_ONLY_WITH: Mapping[str, tuple[str, tuple[str, ...]]] = MappingProxyType(
    {
        "hidden": ("model", ("mlp",)),
        "activation": ("model", ("cnn", "mlp", "small-cnn")),
        "dropout": ("model", ("cnn",)),
        "label_smoothing": ("loss", ("cross-entropy",)),
        "warmup": ("schedule", ("one-cycle",)),
    }
)


_ANALYSIS_RULES: tuple[tuple[str, Callable[[float], bool], tuple[str, ...]], ...] = (
    ("at least 1", lambda v: v >= 1, ("images", "windows")),
    ("from 1 to 100", lambda v: 1 <= v <= 100, ("top",)),
    ("at least 0", lambda v: v >= 0, ("test",)),
    ("at least 0 and below 2**63", lambda v: 0 <= v < 2**63, ("seed",)),
    ("above 0 and below 1", lambda v: 0 < v < 1, ("flip",)),
    ("from 1 to 1024", lambda v: 1 <= v <= 1024, ("threads",)),
)


def check_analysis(options: Analysis) -> None:
    """Refuses what can be refused before torch is imported.

    Raises:
        UsageError: a number is out of its range, or a score is unknown.
    """
    for rule, holds, limited in _ANALYSIS_RULES:
        for name in limited:
            value = getattr(options, name, None)
            if value is not None and not holds(value):
                raise UsageError(f"--{name} must be {rule}. Found {value!s:.80}.")
    scores = getattr(options, "scores", None)
    if scores is not None and not listed("--scores", scores, SCORES):
        raise UsageError(f"--scores must name one of {', '.join(SCORES)} at least. Found none.")


_ACCOUNT_RULES: tuple[tuple[str, Callable[[float], bool], tuple[str, ...]], ...] = (
    ("above 0 and below 1e4", lambda v: 0 < v < 1e4, ("epsilon", "noise_multiplier")),
    ("above 0 and below 1", lambda v: 0 < v < 1, ("delta",)),
    ("at least 1 and below 2**31", lambda v: 1 <= v < 2**31, ("batch_size", "examples", "epochs", "steps")),
)


def check_account(options: Account) -> None:
    """Refuses what can be refused before torch is imported.

    Raises:
        UsageError: a number is out of its range, or not one of ε, noise and length is missing.
    """
    for rule, holds, limited in _ACCOUNT_RULES:
        for name in limited:
            value = getattr(options, name)
            if value is not None and not holds(value):
                raise UsageError(f"--{name.replace('_', '-')} must be {rule}. Found {value!s:.80}.")
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
    if options.sampling == "shuffled" and options.accountant != Account.accountant:
        raise UsageError("--accountant has no effect with --sampling shuffled, whose account is exact.")


def check(options: Train) -> None:
    """Refuses what can be refused before torch is imported.

    Raises:
        UsageError: a number is out of its range, or an option has no effect beside the others.
    """
    for rule, holds, names in _RULES:
        for name in names:
            value = getattr(options, name)
            values = value if isinstance(value, tuple) else (value,)
            if not all(v is None or holds(v) for v in values):
                raise UsageError(f"--{name.replace('_', '-')} must be {rule}. Found {value!s:.80}.")
    for name, (other, values) in _ONLY_WITH.items():
        if chosen_of(options, name) and getattr(options, other) not in values:
            raise UsageError(f"--{name.replace('_', '-')} has no effect with --{other} {getattr(options, other)}.")

    if options.copies and options.model == "scattering":
        raise UsageError("--copies has no effect with --model scattering, whose features are computed once.")
    if not options.copies and chosen_of(options, "shift"):
        raise UsageError("--shift has no effect without --copies.")
    if options.private:
        _check_private(options)
    else:
        for name in PRIVATE:
            if chosen_of(options, name):
                raise UsageError(f"--{name.replace('_', '-')} has no effect without --private.")
    if options.watch is None and options.watch_every != 1:
        raise UsageError("--watch-every has no effect without --watch.")
    if options.watch is not None:
        watches = listed("--watch", options.watch, WATCHES)
        if not watches:
            raise UsageError(f"--watch must name one of {', '.join(WATCHES)} at least. Found none.")
        if "noise-scale" in watches and options.batch_size < 2:
            raise UsageError("--watch noise-scale needs a --batch-size of 2 at least. Found 1.")


def chosen_of(options: Train, name: str) -> bool:
    """Whether an option is neither the article's nor its recipe's."""
    value = getattr(options, name)
    return all(value != getattr(one, name) for one in (RECIPES["article"], RECIPES[options.recipe]))


def _check_private(options: Train) -> None:
    if (options.epsilon is None) == (options.noise_multiplier is None):
        found = "neither" if options.epsilon is None else "both"
        raise UsageError(f"--private needs one of --epsilon and --noise-multiplier. Found {found}.")
    if options.watch is not None:
        raise UsageError("--watch records single gradients without noise, which --private must not. Leave one out.")
    if options.sampling == "shuffled" and chosen_of(options, "accountant"):
        raise UsageError("--accountant has no effect with --sampling shuffled, whose account is exact.")


def listed(option: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    """The names in a list with commas, each once.

    Raises:
        UsageError: one is unknown.
    """
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for name in found:
        if name not in known:
            raise UsageError(f"{option} must be of {', '.join(known)}. Found {name!r:.80}.")
    return found


def check_resumed(options: Train, saved: Train) -> None:
    """Refuses to go on with a run under options that would make it another run.

    Raises:
        UsageError: an option that is not in `CHANGEABLE` differs.
    """
    for name in differences(options, saved):
        new, old = getattr(options, name), getattr(saved, name)
        raise UsageError(f"A resumed run keeps its --{name.replace('_', '-')}, which is {old}. Found {new}.")


def differences(options: Train, others: Train) -> list[str]:
    """The names of the options that differ and make two runs of one."""
    names = [field.name for field in fields(Train) if field.name not in CHANGEABLE]
    return [name for name in names if getattr(options, name) != getattr(others, name)]
