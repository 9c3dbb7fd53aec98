"""The options of `train`."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

from .words import Rule, Shown, UsageError, check_ranges, flag, listed, named, number_of

AUGMENTATIONS = ("shift", "rotate", "scale", "shear", "elastic", "erase")
"""What images can be changed by."""

TUNED = ("lr", "momentum", "weight-decay")
"""What gradients through training can improve."""

WATCHES = ("noise-scale", "norms", "value")
"""What a training run can record of sample gradients."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a classifier, and print its accuracy on the test images."""

    recipe: Literal["tutorial", "fast", "best", "private"] = "tutorial"
    """Defaults of all other options: the tutorial's, the fastest to 99 %, the most accurate, the best private ones."""
    dataset: Literal["mnist", "fashion-mnist", "kmnist", "qmnist", "emnist-digits"] = "mnist"
    """Which data set; all but mnist are downloaded once."""
    data_dir: Annotated[Path | None, Shown("FOLDER")] = None
    """Read the data set's four IDX files from this folder instead."""
    train_size: int | None = None
    """Train on N training images only, drawn at random by the seed."""
    hold_out: int = 0
    """Hold out N training images, the same for all seeds; their accuracy is printed after each epoch."""
    imbalance: Annotated[str | None, Shown("CLASS=FRACTION,…")] = None
    """Keep only a fraction of some classes' training images, such as 8=0.01,9=0.01."""
    sampler: Literal["shuffled", "balanced"] = "shuffled"
    """Each image once per epoch, or each class equally often."""
    deskew: bool = False
    """First deskew each image by its own moments, as --model scattering always does."""
    augment: Annotated[str | None, Shown("NAME=STRENGTH,…")] = None
    """Change images at random at each step: shift (pixels), rotate (degrees), scale (fraction), shear (pixels per
    pixel), elastic (pixels), erase (fraction of the side)."""
    mixup: float = 0.0
    """Mix each image and its label with another's, with weights from a beta distribution of this parameter."""
    augment_multiplicity: int = 0
    """Average each image's loss over N randomly shifted copies; 0 takes the image as it is."""
    max_shift: int = 2
    """The largest shift of such a copy, in pixels."""
    model: Literal["cnn", "mlp", "linear", "small-cnn", "scattering"] = "cnn"
    """Which model; scattering is a linear map of fixed features: discriminants, of random glyphs, of the wavelet
    scattering of the deskewed image."""
    hidden: tuple[int, ...] = (128,)
    """Widths of the mlp's hidden layers."""
    activation: Literal["relu", "sigmoid", "tanh"] = "relu"
    """Activation of the cnns and the mlp."""
    dropout: tuple[float, float] = (0.25, 0.5)
    """The cnn's dropout rates: of channels after pooling, and of units before the last layer."""
    loss: Literal["cross-entropy", "mse"] = "cross-entropy"
    """Cross-entropy, or the squared error of the probabilities."""
    label_smoothing: float = 0.0
    """Fraction of the cross-entropy's target that is spread over all classes."""
    focal_gamma: float = 0.0
    """γ of the focal loss: weigh an image's cross-entropy by (1 - its class's probability) to this power."""
    class_weights: Annotated[str | None, Shown("WEIGHTS")] = None
    """Weigh the loss of each class: balanced, effective (by its effective number of images), or ten numbers with
    commas."""
    logit_adjustment: float = 0.0
    """τ of logit adjustment: add τ times the logarithm of each class's frequency to the outputs in training."""
    epochs: int = 1
    """How often each training image is seen."""
    batch_size: int = 64
    """Images per step."""
    lr: float = 0.01
    """Learning rate, the highest one of a schedule."""
    schedule: Literal["constant", "cosine", "one-cycle", "step-decay"] = "constant"
    """Learning rate over training; step-decay divides it by 10 after each epoch."""
    warmup: float = 0.3
    """Fraction of the training in which one-cycle goes up."""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """The optimizer."""
    momentum: float = 0.9
    """Momentum of SGD, or β1 of Adam."""
    beta2: float = 0.999
    """β2 of Adam."""
    dampening: float = 0.0
    """Dampening of SGD's momentum."""
    weight_decay: float = 0.0
    """Weight decay: an L2 penalty's gradient, or decoupled with adamw."""
    nesterov: bool = False
    """Nesterov's form of momentum."""
    max_norm: float | None = None
    """Clip the mean gradient to this norm."""
    ema_decay: float = 0.0
    """Decay of an exponential moving average (EMA) of the parameters, which is then what is tested; 0 keeps none."""
    swa_start: float | None = None
    """Stochastic weight averaging (SWA): average the parameters of the epochs' ends from this fraction of the training
    on."""
    patience: int | None = None
    """Early stopping: end after N epochs without a higher held-out accuracy, and keep the best epoch's parameters."""
    seed: int = 0
    """Names all random streams: initial parameters, order of images, dropout; of a private run only what is public."""
    private: bool = False
    """DP-SGD: train with differential privacy, by clipped per-sample gradients and noise."""
    epsilon: float | None = None
    """The budget: calibrate the noise multiplier so that all epochs together spend this ε."""
    noise_multiplier: float | None = None
    """Or give it: the noise's standard deviation over the sensitivity of a step."""
    delta: float = 1e-5
    """δ at which ε is reported."""
    clipping: Literal["flat", "automatic", "global", "per-layer", "quantile"] = "flat"
    """How per-sample gradients are clipped; with quantile the clipping norm follows their median norm."""
    clip_norm: float = 1.0
    """The clipping norm: the largest norm of a per-sample gradient; with quantile the first one."""
    sampling: Literal["poisson", "shuffled"] = "poisson"
    """Poisson sampling, or batches of shuffled epochs, which are accounted for without amplification."""
    noise: Annotated[str, Shown("NOISE")] = "independent"
    """Independent noise, or correlated over steps: banded:B (BandMF, cyclic Poisson sampling), bisr:B, cgd:LAMBDA."""
    accountant: Literal["pld", "rdp", "rdp-old"] = "pld"
    """How ε is computed: privacy loss distributions, or Rényi DP."""
    audit: int = 0
    """Audit the run with N canaries, such as 1000, and print the lower bound on ε that they show; 0 for none."""
    noise_seed: int | None = None
    """Draw sampling and noise from this seed: a reproduction, which is not private."""
    tune: Annotated[str | None, Shown("NAMES")] = None
    """First tune these by hypergradients through a short training: lr, momentum, weight-decay, with commas; a weight
    decay of 0 begins at 1e-4."""
    tune_steps: int = 200
    """Steps of the training that is differentiated."""
    tune_rounds: int = 15
    """How often it is made."""
    out: Annotated[Path | None, Shown("FOLDER")] = None
    """The run's folder, which must not hold a run yet; by default runs/ and the date and time."""
    resume: Annotated[Path | None, Shown("RUN")] = None
    """Resume the run in this folder, with its options."""
    save_every: int = 500
    """Steps between checkpoints; there is also one at the end."""
    keep: int = 3
    """How many checkpoints to keep."""
    watch: Annotated[str | None, Shown("NAMES")] = None
    """Record per-sample gradients: noise-scale, norms, or both with a comma; or, alone, value: what each training image
    was worth to the held-out loss."""
    watch_every: int = 1
    """Steps from one record to the next."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the forward and backward pass; parameters, loss and optimizer are always float32."""
    compile: Literal["on", "off"] = "off"
    """Compile the step: worth its start-up time in long runs."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to train."""
    threads: int | None = None
    """CPU threads of each process; by default torch's own choice, or its fraction of the cores; 1 with --shards."""
    processes: int = 1
    """Train in N processes on this machine, with the same result; torchrun starts its own."""
    shards: int | None = None
    """Sum each batch in N parts, a power of two, in a fixed order: 1, 2, 4, … processes end bit for bit alike."""
    timeout: int = 120
    """Seconds that a process waits for another one before the run ends."""


RECIPES: Mapping[str, Train] = MappingProxyType(
    {
        "tutorial": Train(),
        "fast": Train(
            recipe="fast",
            deskew=True,
            dropout=(0.0, 0.1),
            batch_size=128,
            lr=0.1,
            schedule="one-cycle",
            weight_decay=5e-4,
            precision="bfloat16",
        ),
        "best": Train(
            recipe="best",
            dropout=(0.0, 0.25),
            deskew=True,
            augment="shift=1,rotate=5,scale=0.1,shear=0.05,elastic=0.7",
            epochs=30,
            lr=0.02,
            schedule="one-cycle",
            warmup=0.2,
            weight_decay=5e-4,
            ema_decay=0.999,
            precision="bfloat16",
            compile="on",
        ),
        "private": Train(
            recipe="private",
            private=True,
            epsilon=2.93,
            model="scattering",
            epochs=32,
            batch_size=7500,
            lr=29300.0,
            momentum=0.0,
            ema_decay=0.9,
            clip_norm=0.01,
        ),
    }
)
"""The defaults that `--recipe` chooses from."""

PRIVATE = (
    "epsilon", "noise_multiplier", "delta", "clipping", "clip_norm", "sampling", "noise", "accountant", "audit",
    "noise_seed",
)  # fmt: skip
"""The options that do nothing without `private`."""

CHANGEABLE = frozenset(
    {"epochs", "device", "compile", "threads", "processes", "timeout", "save_every", "keep", "resume", "data_dir"}
)
"""The options that a resumed run may change."""


_POWERS = tuple(2**n for n in range(11))

_RULES: tuple[Rule, ...] = (
    ("at least 0 and below 2**31", lambda v: 0 <= v < 2**31, ("epochs",)),
    (
        "at least 1 and below 2**31",
        lambda v: 1 <= v < 2**31,
        ("hidden", "batch_size", "save_every", "keep", "watch_every"),
    ),
    ("at least 0 and below 2**63", lambda v: 0 <= v < 2**63, ("seed",)),
    ("from 1 to 1024", lambda v: 1 <= v <= 1024, ("threads", "processes")),  # torch crashes at some number above
    ("a power of two up to 1024", lambda v: v in _POWERS, ("shards",)),
    ("from 1 to 86400", lambda v: 1 <= v <= 86400, ("timeout",)),
    ("at least 0 and below 2**63", lambda v: 0 <= v < 2**63, ("noise_seed",)),
    ("from 0 to 64", lambda v: 0 <= v <= 64, ("augment_multiplicity",)),
    ("0, or from 20 to 100000", lambda v: v == 0 or 20 <= v <= 100_000, ("audit",)),
    ("from 1 to 27", lambda v: 1 <= v <= 27, ("max_shift",)),
    ("at least 1", lambda v: v >= 1, ("train_size", "patience")),
    ("at least 0", lambda v: v >= 0, ("hold_out",)),
    ("from 1 to 100000", lambda v: 1 <= v <= 100_000, ("tune_steps", "tune_rounds")),
    ("from 0 to 10", lambda v: 0 <= v <= 10, ("focal_gamma", "logit_adjustment")),
    ("0 or from 0.05 to 100", lambda v: v == 0 or 0.05 <= v <= 100, ("mixup",)),
    ("from 0 to 1", lambda v: 0 <= v <= 1, ("label_smoothing", "dampening")),
    ("at least 0 and below 1", lambda v: 0 <= v < 1, ("dropout", "ema_decay", "swa_start", "beta2")),
    ("above 0 and below 1", lambda v: 0 < v < 1, ("warmup", "delta")),
    ("above 0 and below 1e4", lambda v: 0 < v < 1e4, ("epsilon", "noise_multiplier")),
    ("above 0 and below 1e38", lambda v: 0 < v < 1e38, ("max_norm", "clip_norm")),  # float32 ends at 3.4e38
    ("at least 0 and below 1e38", lambda v: 0 <= v < 1e38, ("lr", "momentum", "weight_decay")),
)
_ONLY_WITH: Mapping[str, tuple[str, tuple[str, ...]]] = MappingProxyType(
    {
        "hidden": ("model", ("mlp",)),
        "activation": ("model", ("cnn", "mlp", "small-cnn")),
        "dropout": ("model", ("cnn",)),
        "deskew": ("model", ("cnn", "mlp", "linear", "small-cnn")),
        "label_smoothing": ("loss", ("cross-entropy",)),
        "focal_gamma": ("loss", ("cross-entropy",)),
        "logit_adjustment": ("loss", ("cross-entropy",)),
        "dampening": ("optimizer", ("sgd",)),
        "nesterov": ("optimizer", ("sgd",)),
        "beta2": ("optimizer", ("adam", "adamw")),
        "warmup": ("schedule", ("one-cycle",)),
    }
)
_NEEDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"augment_multiplicity": ("max_shift",), "tune": ("tune_steps", "tune_rounds"), "watch": ("watch_every",),
     "private": PRIVATE}
)  # fmt: skip
"""The options that do nothing without another one."""
_SHOW_MORE = ("hold_out", "imbalance", "class_weights", "logit_adjustment", "mixup", "tune")
"""What uses more of the images than private steps do."""
_CONFLICTS: tuple[tuple[Callable[[Train], object], str], ...] = (
    *(
        (
            lambda o, name=name: o.model == "scattering" and getattr(o, name),
            f"{flag(name)} has no effect with --model scattering, whose features are computed once.",
        )
        for name in ("augment_multiplicity", "augment", "mixup")
    ),
    (
        lambda o: o.shards is not None and o.shards % o.processes,
        "--processes must divide --shards {o.shards}. Found {o.processes}.",
    ),
    (
        lambda o: o.optimizer != "sgd" and o.momentum >= 1,
        "--momentum must be below 1 with --optimizer {o.optimizer}. Found {o.momentum}.",
    ),
    (
        lambda o: o.focal_gamma and o.label_smoothing,
        "--focal-gamma has no smoothed labels. Found --label-smoothing as well. Leave one out.",
    ),
    *(
        (
            lambda o, name=name: o.augment_multiplicity and getattr(o, name),
            f"--augment-multiplicity is of shifted images. Found {flag(name)} as well. Leave one out.",
        )
        for name in ("augment", "mixup")
    ),
    (
        lambda o: o.mixup and o.loss != "cross-entropy",
        "--mixup mixes losses of labels: it needs --loss cross-entropy. Found --loss {o.loss}.",
    ),
    (
        lambda o: o.ema_decay and o.swa_start is not None,
        "--ema-decay and --swa-start are two averages. Found both. Leave one out.",
    ),
    (
        lambda o: o.patience is not None and not o.hold_out,
        "--patience needs held-out images. Found none. Set --hold-out, such as 5000.",
    ),
    (
        lambda o: o.tune is not None and not o.hold_out,
        "--tune needs held-out images. Found none. Set --hold-out, such as 5000.",
    ),
    (
        lambda o: "lr" in tuned_names(o) and o.lr < 1e-30,
        "--tune lr begins at --lr, which must be 1e-30 at least. Found {o.lr}.",
    ),
    (
        lambda o: "weight-decay" in tuned_names(o) and 0 < o.weight_decay < 1e-30,
        "--tune begins at --weight-decay, which must be 0 or 1e-30 at least. Found {o.weight_decay}.",
    ),
    (
        lambda o: "momentum" in tuned_names(o) and o.momentum >= 1,
        "--tune momentum begins at --momentum, which must be below 1. Found {o.momentum}.",
    ),
    (
        lambda o: o.tune is not None and o.sampler == "balanced",
        "--tune differentiates shuffled batches. Found --sampler balanced. Leave one out.",
    ),
    (
        lambda o: o.private and o.epsilon is None and o.noise_multiplier is None,
        "--private needs one of --epsilon and --noise-multiplier. Found neither.",
    ),
    (
        lambda o: o.private and o.epsilon is not None and o.noise_multiplier is not None,
        "--private needs one of --epsilon and --noise-multiplier. Found both.",
    ),
    (
        lambda o: o.private and o.watch is not None,
        "--watch records per-sample gradients without noise, which --private must not. Leave one out.",
    ),
    *(
        (
            lambda o, name=name: o.private and chosen_of(o, name),
            f"{flag(name)} uses more of the images than private steps do. Leave it or --private out.",
        )
        for name in _SHOW_MORE
    ),
    (
        lambda o: o.private and o.sampler == "balanced",
        "--sampler balanced uses the classes' counts, which --private must not. Leave one out.",
    ),
    (
        lambda o: o.private and o.sampling == "shuffled" and chosen_of(o, "accountant"),
        "--accountant has no effect with --sampling shuffled, whose account is exact.",
    ),
    (
        lambda o: "noise-scale" in watched(o) and o.batch_size < 2,
        "--watch noise-scale needs a --batch-size of 2 at least. Found 1.",
    ),
    (
        lambda o: "value" in watched(o) and len(watched(o)) > 1,
        "--watch value makes steps of its own. Found {o.watch} together. Leave it alone.",
    ),
    (
        lambda o: "value" in watched(o) and not o.hold_out,
        "--watch value needs held-out images. Found none. Set --hold-out, such as 5000.",
    ),
)
"""What does not go together, and what is said of it."""


def check(options: Train) -> None:
    """Refuses what can be refused before torch is imported.

    Raises:
        UsageError: a number is out of its range, or an option has no effect with the others.
    """
    check_ranges(options, _RULES)
    for name, (other, values) in _ONLY_WITH.items():
        if chosen_of(options, name) and getattr(options, other) not in values:
            raise UsageError(f"{flag(name)} has no effect with {flag(other)} {getattr(options, other)}.")
    for other, names in _NEEDS.items():
        for name in names:
            if not getattr(options, other) and chosen_of(options, name):
                raise UsageError(f"{flag(name)} has no effect without {flag(other)}.")
    augmentation(options), class_fractions(options), given_weights(options)  # which refuse what they cannot read
    for fault, message in _CONFLICTS:
        if fault(options):
            raise UsageError(message.format(o=options))
    if options.private:
        check_noise(options.noise, options.sampling)


def tuned_names(options: Train) -> tuple[str, ...]:
    """What `--tune` names."""
    return () if options.tune is None else listed("--tune", options.tune, TUNED, least=1)


def watched(options: Train) -> tuple[str, ...]:
    """What `--watch` names."""
    return () if options.watch is None else listed("--watch", options.watch, WATCHES, least=1)


def augmentation(options: Train) -> dict[str, float]:
    """The strengths that `--augment` names."""
    return {} if options.augment is None else named("--augment", options.augment, most=100.0, known=AUGMENTATIONS)


def class_fractions(options: Train) -> dict[int, float]:
    """The fractions of classes that `--imbalance` keeps."""
    fractions = {} if options.imbalance is None else named("--imbalance", options.imbalance, most=1.0)
    return {int(name): fraction for name, fraction in fractions.items()}


def given_weights(options: Train) -> tuple[float, ...] | None:
    """The numbers of `--class-weights`; None where a word or nothing stands there."""
    if options.class_weights in (None, "balanced", "effective"):
        return None
    texts = str(options.class_weights).split(",")
    if len(texts) != 10:
        raise UsageError(
            f"--class-weights must be balanced, effective or a number for each of 10 classes. "
            f"Found {options.class_weights!r:.80}."
        )
    return tuple(number_of("--class-weights", text, least=0.0, most=1e6) for text in texts)


def check_noise(noise: str, sampling: str) -> None:
    """Refuses a `--noise` that is none.

    Raises:
        UsageError: it is none, or does not go with the sampling.
    """
    kind, parameter = noise_of(noise)
    if kind == "banded" and sampling == "shuffled":
        raise UsageError(
            "--noise banded takes Poisson sampling. Found --sampling shuffled. Leave one out or take bisr."
        )
    if kind in ("bisr", "cgd") and sampling != "shuffled":
        raise UsageError(f"--noise {kind} takes batches in a fixed order. Add --sampling shuffled, or take banded.")
    if kind in ("banded", "bisr") and not 1 <= parameter <= 64:
        raise UsageError(f"--noise {kind} takes from 1 to 64 bands. Found {parameter:g}.")
    if kind == "cgd" and not 0 <= parameter < 1:
        raise UsageError(f"--noise cgd takes a λ of at least 0 and below 1. Found {parameter:g}.")


def noise_of(noise: str) -> tuple[str, float]:
    """The kind of a `--noise`, and its number of bands or λ; 0 for independent noise.

    Raises:
        UsageError: it is none.
    """
    if noise == "independent":
        return noise, 0.0
    kind, _, number = noise.partition(":")
    try:
        parameter = float(number) if kind == "cgd" else int(number)
    except ValueError:
        parameter = math.nan
    if kind not in ("banded", "bisr", "cgd") or math.isnan(parameter):
        raise UsageError(f"--noise must be independent, or like banded:8, bisr:8 or cgd:0.9. Found {noise!r}.")
    return kind, parameter


def private_steps_per_epoch(batch_size: int, examples: int) -> int:
    """Steps in which each example is expected once."""
    return max(1, round(examples / batch_size))


def chosen_of(options: Train, name: str) -> bool:
    """Whether an option is neither the tutorial's nor its recipe's."""
    value = getattr(options, name)
    return all(value != getattr(one, name) for one in (RECIPES["tutorial"], RECIPES[options.recipe]))
