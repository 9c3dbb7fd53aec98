"""The options of `train`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from .words import Rule, UsageError, check_ranges, flag, listed, named, number_of

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
    """Defaults of all other options: the tutorial's, those that reach 99 % soonest, the most accurate, or the best
    private ones."""
    dataset: Literal["mnist", "fashion-mnist", "kmnist", "qmnist", "emnist-digits"] = "mnist"
    """Which data set; all but mnist are downloaded once."""
    data_dir: Path | None = None
    """Read the data set's four IDX files from this folder instead."""
    train_size: int | None = None
    """Train on so many training images only, drawn by the seed."""
    hold_out: int = 0
    """Keep so many training images apart, the same for all seeds; their accuracy is printed after each epoch."""
    imbalance: str | None = None
    """Keep only a part of a class's training images, as CLASS=PART with commas, such as 8=0.01,9=0.01."""
    deskew: bool = False
    """First deskew each image by its own moments, as --model scattering always does."""
    model: Literal["cnn", "mlp", "linear", "small-cnn", "scattering"] = "cnn"
    """Which model; scattering is a linear map of fixed features: of wavelets over the deskewed image, what tells
    random glyphs apart."""
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
    focal_gamma: float = 0.0
    """Focal loss: weigh an image's cross-entropy by (1 - its class's probability) to this power."""
    class_weights: str | None = None
    """Weigh the loss of each class: balanced, effective (by its effective number of images), or numbers with commas."""
    logit_adjustment: float = 0.0
    """Train on outputs to which so many times the logarithm of each class's share of the images is added."""
    sampler: Literal["shuffled", "balanced"] = "shuffled"
    """Each image once in an epoch, or each class as often as the others."""
    augment: str | None = None
    """Change images at random, each time anew, as NAME=STRENGTH with commas: shift (pixels), rotate (degrees), scale
    (part), shear (pixels per pixel), elastic (pixels), erase (part of the side)."""
    mixup: float = 0.0
    """Mix each image and its label with another's, by a share drawn from a beta distribution of this parameter."""
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
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """What makes steps of gradients."""
    momentum: float = 0.9
    """Momentum of SGD, or the decay of Adam's mean."""
    beta2: float = 0.999
    """Decay of Adam's mean square."""
    dampening: float = 0.0
    """Dampening of SGD's momentum."""
    weight_decay: float = 0.0
    """Weight decay: added to the gradient, but for adamw, which takes it off the parameters."""
    nesterov: bool = False
    """Nesterov's form of momentum."""
    max_norm: float | None = None
    """Scale the mean gradient down to this norm where it is larger."""
    ema_decay: float = 0.0
    """Keep a moving average of the parameters with this decay, and test that; 0 keeps none."""
    swa_start: float | None = None
    """Instead, average the parameters of the epochs' ends from this part of the training on (stochastic weight
    averaging)."""
    patience: int | None = None
    """End after so many epochs without a higher accuracy on held-out images, and keep the best epoch's parameters."""
    tune: str | None = None
    """First improve these by gradients through a short training: lr, momentum, weight-decay, with commas; a decay of 0
    begins at 1e-4."""
    tune_steps: int = 200
    """Steps of the training that is differentiated."""
    tune_rounds: int = 15
    """How often it is made."""
    augment_multiplicity: int = 0
    """Average each image's loss over so many randomly shifted copies; 0 takes the image as it is."""
    max_shift: int = 2
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
    noise: str = "independent"
    """Or correlated over steps: banded:B (BandMF, with cyclic Poisson sampling), bisr:B, or cgd:LAMBDA."""
    accountant: Literal["pld", "rdp", "rdp-old"] = "pld"
    """How ε is computed; pld needs the privacy extra."""
    audit: int = 0
    """Plant so many canaries, such as 1000, and print the lower bound on ε that they have shown; 0 for none."""
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
    """CPU threads of each process; by default torch's own choice, or its part of the cores; 1 with --shards."""
    processes: int = 1
    """Train in so many processes on this machine, with the same result; torchrun starts its own."""
    shards: int | None = None
    """Sum each batch in so many parts, a power of two, in a fixed order: 1, 2, 4, … processes end bit for bit alike."""
    timeout: int = 120
    """Seconds that a process waits for another one before the run ends."""
    watch: str | None = None
    """Record what sample gradients are like: noise-scale, norms, or both with a comma; or, alone, value: what each
    training image was worth to the loss on held-out images."""
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


def check(options: Train) -> None:
    """Refuses what can be refused before torch is imported.

    Raises:
        UsageError: a number is out of its range, or an option has no effect beside the others.
    """
    check_ranges(options, _RULES)
    for name, (other, values) in _ONLY_WITH.items():
        if chosen_of(options, name) and getattr(options, other) not in values:
            raise UsageError(f"{flag(name)} has no effect with {flag(other)} {getattr(options, other)}.")

    if options.augment_multiplicity and options.model == "scattering":
        raise UsageError(
            "--augment-multiplicity has no effect with --model scattering, whose features are computed once."
        )
    if not options.augment_multiplicity and chosen_of(options, "max_shift"):
        raise UsageError("--max-shift has no effect without --augment-multiplicity.")
    if options.shards is not None and options.shards % options.processes:
        raise UsageError(f"--processes must divide --shards {options.shards}. Found {options.processes}.")
    if options.optimizer != "sgd" and options.momentum >= 1:
        raise UsageError(f"--momentum must be below 1 with --optimizer {options.optimizer}. Found {options.momentum}.")
    _check_parts(options)
    _check_tuning(options)
    if options.private:
        _check_private(options)
    else:
        for name in PRIVATE:
            if chosen_of(options, name):
                raise UsageError(f"{flag(name)} has no effect without --private.")
    if options.watch is None and options.watch_every != 1:
        raise UsageError("--watch-every has no effect without --watch.")
    if options.watch is not None:
        watches = listed("--watch", options.watch, WATCHES)
        if not watches:
            raise UsageError(f"--watch must name one of {', '.join(WATCHES)} at least. Found none.")
        if "noise-scale" in watches and options.batch_size < 2:
            raise UsageError("--watch noise-scale needs a --batch-size of 2 at least. Found 1.")
        if "value" in watches and len(watches) > 1:
            raise UsageError(f"--watch value is of steps of its own. Found {options.watch} together. Leave it alone.")
        if "value" in watches and not options.hold_out:
            raise UsageError("--watch value needs held-out images. Found none. Set --hold-out, such as 5000.")


def augmentation(options: Train) -> dict[str, float]:
    """The strengths that `--augment` names."""
    return {} if options.augment is None else named("--augment", options.augment, most=100.0, known=AUGMENTATIONS)


def cut_classes(options: Train) -> dict[int, float]:
    """The parts of classes that `--imbalance` names."""
    parts = {} if options.imbalance is None else named("--imbalance", options.imbalance, most=1.0)
    return {int(name): part for name, part in parts.items()}


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


def _check_parts(options: Train) -> None:
    """What is told of images and classes."""
    cut_classes(options)
    given_weights(options)
    changed = [flag(name) for name in ("augment", "mixup") if getattr(options, name)]
    if options.focal_gamma and options.label_smoothing:
        raise UsageError("--focal-gamma has no smoothed labels. Found --label-smoothing as well. Leave one out.")
    if augmentation(options) and options.model == "scattering":
        raise UsageError("--augment has no effect with --model scattering, whose features are computed once.")
    if options.mixup and options.model == "scattering":
        raise UsageError("--mixup has no effect with --model scattering, whose features are computed once.")
    if options.augment_multiplicity and changed:
        raise UsageError(
            f"--augment-multiplicity is of shifted images. Found {' and '.join(changed)} as well. Leave one out."
        )
    if options.mixup and options.loss != "cross-entropy":
        raise UsageError("--mixup mixes losses of labels: it needs --loss cross-entropy.")
    if options.ema_decay and options.swa_start is not None:
        raise UsageError("--ema-decay and --swa-start are two averages. Found both. Leave one out.")


def _check_tuning(options: Train) -> None:
    if options.patience is not None and not options.hold_out:
        raise UsageError("--patience needs held-out images. Found none. Set --hold-out, such as 5000.")
    if options.tune is None:
        for name in ("tune_steps", "tune_rounds"):
            if chosen_of(options, name):
                raise UsageError(f"{flag(name)} has no effect without --tune.")
        return
    names = listed("--tune", options.tune, TUNED)
    if not names:
        raise UsageError(f"--tune must name one of {', '.join(TUNED)} at least. Found none.")
    if not options.hold_out:
        raise UsageError("--tune needs held-out images. Found none. Set --hold-out, such as 5000.")
    if "lr" in names and options.lr < 1e-30:
        raise UsageError(f"--tune lr begins at --lr, which must be 1e-30 at least. Found {options.lr}.")
    if "weight-decay" in names and 0 < options.weight_decay < 1e-30:
        raise UsageError(
            f"--tune begins at --weight-decay, which must be 0 or 1e-30 at least. Found {options.weight_decay}."
        )
    if "momentum" in names and options.momentum >= 1:
        raise UsageError(f"--tune momentum begins at --momentum, which must be below 1. Found {options.momentum}.")
    if options.sampler == "balanced":
        raise UsageError("--tune differentiates shuffled batches. Found --sampler balanced. Leave one out.")


def check_noise(noise: str, sampling: str) -> None:
    """Refuses a `--noise` that is none.

    Raises:
        UsageError: it is none, or does not go with the sampling.
    """
    kind, parameter = noise_of(noise)
    if kind == "banded" and sampling == "shuffled":
        raise UsageError("--noise banded samples by coins. Found --sampling shuffled. Leave one out, or take bisr.")
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


def chosen_of(options: Train, name: str) -> bool:
    """Whether an option is neither the tutorial's nor its recipe's."""
    value = getattr(options, name)
    return all(value != getattr(one, name) for one in (RECIPES["tutorial"], RECIPES[options.recipe]))


def _check_private(options: Train) -> None:
    if (options.epsilon is None) == (options.noise_multiplier is None):
        found = "neither" if options.epsilon is None else "both"
        raise UsageError(f"--private needs one of --epsilon and --noise-multiplier. Found {found}.")
    if options.watch is not None:
        raise UsageError("--watch records single gradients without noise, which --private must not. Leave one out.")
    for name in ("hold_out", "imbalance", "class_weights", "logit_adjustment", "mixup", "tune"):
        if chosen_of(options, name):
            raise UsageError(f"{flag(name)} uses more of the images than private steps do. Leave it or --private out.")
    if options.sampler == "balanced":
        raise UsageError("--sampler balanced uses the classes' counts, which --private must not. Leave one out.")
    check_noise(options.noise, options.sampling)
    if options.sampling == "shuffled" and chosen_of(options, "accountant"):
        raise UsageError("--accountant has no effect with --sampling shuffled, whose account is exact.")
