"""The options of the commands that look at a run, and of `plan`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from .train import Train, check
from .words import RUN, Rule, Shown, UsageError, check_picture, check_ranges, listed, range_of

SCORES = ("loss", "el2n", "grand", "margin", "self-influence", "forgetting")
"""The scores of a training example, in the order in which they are shown."""


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Print a run's accuracy on the test images, per class, and its confusion matrix."""

    run: Annotated[Path, RUN]
    """The run's folder."""
    dataset: Literal["mnist", "fashion-mnist", "kmnist", "qmnist", "emnist-digits"] | None = None
    """Which data set; by default the run's own."""
    data_dir: Annotated[Path | None, Shown("FOLDER")] = None
    """Read the data set's four IDX files from this folder instead."""
    png: Annotated[Path | None, Shown("FILE")] = None
    """Also draw the confusion matrix into this file: .png, .pdf or .svg."""
    batch_size: int = 1000
    """Images per call."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute."""


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Print the three likeliest digits, with their probabilities, of image files or test images."""

    run: Annotated[Path, RUN]
    """The run's folder."""
    images: Annotated[tuple[Path, ...], Shown("IMAGE", positional=True)] = ()
    """Image files of any kind that Pillow reads: one digit each, dark on light or light on dark."""
    test: Annotated[str | None, Shown("N|START:STOP")] = None
    """Or the number of a test image, or a range of them, such as 0:100, its end not included."""
    save_inputs: Annotated[Path | None, Shown("FOLDER")] = None
    """Also save what the network sees of each image into this folder, as a PNG file."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute."""


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What the commands that go over the training images have in common."""

    run: Annotated[Path, RUN]
    """The run's folder."""
    images: int | None = None
    """Take only the first N of the run's training images, in the order of the data set."""
    data_dir: Annotated[Path | None, Shown("FOLDER")] = None
    """Read the data set's four IDX files from this folder instead."""
    out: Annotated[Path | None, Shown("FOLDER")] = None
    """Where the results go; by default into the run's folder."""
    compile: Literal["on", "off"] = "off"
    """Compile the passes: worth its start-up time for many checkpoints."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute."""
    threads: int | None = None
    """CPU threads of each process; by default torch's own choice, or its fraction of the cores."""
    processes: int = 1
    """Compute in N processes on this machine, with the same result; torchrun starts its own."""
    timeout: int = 120
    """Seconds that a process waits for another one before the command ends."""


@dataclass(frozen=True, kw_only=True)
class Scores(Analysis):
    """Score every training image: a table, histograms and the images with the highest and lowest scores."""

    scores: Annotated[str, Shown("NAMES")] = "loss,el2n,grand,margin"
    """Which, with commas: loss, el2n, grand, margin, self-influence, forgetting."""
    checkpoints: Literal["newest", "all"] = "newest"
    """Score at the newest checkpoint, or at all that the run keeps: scores are then means over them."""


@dataclass(frozen=True, kw_only=True)
class Mislabelled(Analysis):
    """Rank the training images by how likely their label is wrong; with --label-noise, flip some and find them."""

    label_noise: float | None = None
    """Train again with this fraction of the labels flipped, and report the recall of each score."""
    seed: int = 0
    """Names which labels are flipped."""
    scores: Annotated[str, Shown("NAMES")] = "loss,el2n,grand,margin,self-influence"
    """Rank by these, with commas: loss, el2n, grand, margin, self-influence, forgetting."""
    top: int = 20
    """How many of the most suspicious images are listed and shown."""


@dataclass(frozen=True, kw_only=True)
class Store(Analysis):
    """Store projected gradients of the training images on disk, for influence --store; resumes where it stopped."""

    features: int = 512
    """Dimensions of a projected gradient: more are nearer to the exact gradients."""
    projection: Literal["principal", "random"] = "principal"
    """Along the principal directions of some gradients, or along random ones."""
    checkpoints: Literal["newest", "all"] = "newest"
    """Of the newest checkpoint, or of all that the run keeps, with their learning rates as weights, for TracIn."""
    precision: Literal["float16", "float32"] = "float16"
    """Of the numbers on disk; half precision errs by one part in 2,000 of a gradient at most."""
    seed: int = 0
    """Names the random directions."""


@dataclass(frozen=True, kw_only=True)
class Influence(Analysis):
    """Rank the training images by their influence on a test image, or with a store on many."""

    test: Annotated[str, Shown("N|START:STOP")]
    """The number of the test image; with --store also a range of them, such as 0:100, its end not included."""
    store: Annotated[Path | None, Shown("FOLDER")] = None
    """Read the gradients from this folder, made by the command store, instead of computing them."""
    method: Literal["tracin", "dot", "cosine", "inverse"] | None = None
    """TracIn over all checkpoints that the run or the store keeps (the default), the dot or cosine of gradients at the
    newest, or with --store an influence function: the dot after the damped inverse of their second moment."""
    top: int = 10
    """How many images of each kind are listed and shown."""

    @property
    def tests(self) -> tuple[int, int]:
        """The first test image, and the first after the last.

        Raises:
            UsageError: they are no numbers, or none.
        """
        return range_of("--test", self.test)


@dataclass(frozen=True, kw_only=True)
class NoiseScale(Analysis):
    """Print the gradient noise scale during training, with error bars, and what it says of the batch size."""

    images: int | None = 4096
    """Estimate it at each checkpoint from the first N of the run's training images, in the order of the data set."""
    windows: int = 20
    """Windows of the training over which the records of train --watch noise-scale are averaged."""


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
    override: Annotated[tuple[str, ...], Shown("NAME=WAY", repeated=True)] = ()
    """Take a parameter another way, as NAME=WAY, such as conv2.weight=gram; may be repeated."""
    tune: bool = False
    """Time the ways on this machine and keep the fastest for `train`, in the user's cache folder."""
    compile: Literal["on", "off"] = "off"
    """Whether what is timed is compiled, as for runs with --compile on."""
    threads: int | None = None
    """CPU threads; by default torch's own choice."""

    @property
    def training(self) -> Train:
        """The run whose model this is."""
        return Train(
            model=self.model,
            hidden=self.hidden,
            activation=self.activation,
            batch_size=self.batch_size,
            precision=self.precision,
            compile=self.compile,
            threads=self.threads,
        )


_RULES: tuple[Rule, ...] = (
    ("at least 1", lambda v: v >= 1, ("images", "windows")),
    ("from 1 to 100", lambda v: 1 <= v <= 100, ("top",)),
    ("at least 8", lambda v: v >= 8, ("features",)),
    ("at least 0 and below 2**63", lambda v: 0 <= v < 2**63, ("seed",)),
    ("above 0 and below 1", lambda v: 0 < v < 1, ("label_noise",)),
    ("from 1 to 1024", lambda v: 1 <= v <= 1024, ("threads", "processes")),
    ("from 1 to 86400", lambda v: 1 <= v <= 86400, ("timeout",)),
)


def check_evaluate(options: Evaluate) -> None:
    """Refuses what can be refused before torch is imported.

    Raises:
        UsageError: there is no batch, or the picture cannot be written.
    """
    check_ranges(options, (("at least 1", lambda v: v >= 1, ("batch_size",)),))
    check_picture(options.png)


def check_predict(options: Predict) -> None:
    """Refuses what can be refused before torch is imported.

    Raises:
        UsageError: there are no images, or both files and a range.
    """
    if bool(options.images) == (options.test is not None):
        raise UsageError("predict needs image files, or test images by --test, such as --test 0:10, and not both.")
    if options.test is not None:
        range_of("--test", options.test)


def check_plan(options: Plan) -> None:
    """Refuses what can be refused before torch is imported.

    Raises:
        UsageError: a number is out of its range, or an option has no effect with the others.
    """
    check(options.training)
    for name in ("compile", "threads"):
        if not options.tune and getattr(options, name) != getattr(Plan(), name):
            raise UsageError(f"--{name} has no effect without --tune.")


def check_analysis(options: Analysis) -> None:
    """Refuses what can be refused before torch is imported.

    Raises:
        UsageError: a number is out of its range, a score is unknown, or an option does not fit the others.
    """
    check_ranges(options, _RULES)
    if isinstance(options, Influence):
        start, stop = options.tests
        if options.store is None and (stop - start > 1 or options.method == "inverse"):
            what = "--method inverse" if options.method == "inverse" else "A range of test images"
            raise UsageError(f"{what} needs a --store. Make one with: functorch-mnist store {options.run}")
        if options.store is not None and options.images is not None:
            raise UsageError("--images has no effect with --store, which has its own.")
    if isinstance(options, Scores | Mislabelled):
        listed("--scores", options.scores, SCORES, least=1)
