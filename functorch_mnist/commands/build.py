"""From options to the pure functions that a command runs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checkpoint, data, layers, losses, models, optim, random, run_folder, train, tree
from ..models import Model, Params
from ..options import Train, UsageError, from_json, to_json
from ..tree import Tree

PIXELS = 28 * 28


class DivergedError(Exception):
    """A number is no longer finite."""


class Classifier(NamedTuple):
    """What a run trains, as pure functions of images as they are stored."""

    init: Callable[[Tensor], Params]
    """`init(key) -> params`."""
    outputs: Callable[..., Tensor]
    """`outputs(params, images (..., 1, 28, 28) uint8, key=None) -> (..., classes)`, whose softmax is the answer."""
    loss: Callable[[Tensor, Tensor], Tensor]
    """`loss(outputs (..., classes), labels (...)) -> (...)`."""


class Origin(NamedTuple):
    """What a run began with and keeps: the config of its checkpoints."""

    options: Train
    pixels: tuple[float, float]
    """Mean and standard deviation of the training images."""
    examples: int
    """How many training images there are."""
    classes: int


class Trained(NamedTuple):
    """A run, as `evaluate` and `predict` need it."""

    made: Classifier
    params: Params
    """The newest good ones."""
    options: Train
    classes: int


class Saved(NamedTuple):
    """What a checkpoint of a run holds."""

    state: train.State
    loss: Tensor
    """The `Progress.loss` that goes with the state."""


def device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        UsageError: it is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda needs a GPU that torch can use. Found none. Use --device cpu.")
    return torch.device(name)


def load(name: str, folder: Path | None, where: torch.device) -> data.Dataset:
    """A data set on a device."""
    dataset = data.load(name, folder=folder)

    def moved(split: data.Split) -> data.Split:
        return data.Split(split.images.to(where), split.labels.to(where))

    return data.Dataset(moved(dataset.train), moved(dataset.test), dataset.classes)


@contextmanager
def refusing(kind: type[Exception], rule: str = "") -> Iterator[None]:
    """Tells another library's error, where the user's wishes cause it, as the user's mistake in one line."""
    try:
        yield
    except kind as error:
        raise UsageError(f"{rule}{first_line(error)}") from error


def first_line(error: Exception) -> str:
    """What the error says, without what torch adds for its developers."""
    return str(error).partition("\n")[0]


def check_finite(values: Tree, what: str) -> None:
    """Refuses NaN and infinity.

    Raises:
        DivergedError: there is one.
    """
    if not all(bool(leaf.isfinite().all()) for leaf in tree.leaves(values)):
        raise DivergedError(f"{what} must be finite. Found NaN or infinity. Lower --lr, or set --max-norm.")


def origin(options: Train, dataset: data.Dataset) -> Origin:
    """The origin of a new run.

    Raises:
        UsageError: the training images are blank.
    """
    images = dataset.train.images
    with refusing(ValueError):
        return Origin(options, data.normalization(images), len(images), dataset.classes)


def to_config(begun: Origin) -> dict[str, Any]:
    """The origin as a checkpoint's config."""
    return begun._asdict() | {"options": to_json(begun.options), "pixels": list(begun.pixels)}


def from_config(config: Mapping[str, Any]) -> Origin:
    """The way back.

    Raises:
        UsageError: the config is not one that `to_config` makes.
    """
    try:
        mean, std = config["pixels"]
        pixels = float(mean), float(std)
        return Origin(from_json(config["options"]), pixels, int(config["examples"]), int(config["classes"]))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UsageError(f"A run's checkpoint must say what the run began with. Found: {error!r}.") from error


def newest_origin(run: Path) -> Origin:
    """The origin in the newest checkpoint of a run whose manifest is good.

    Raises:
        CheckpointError: there is no checkpoint, or none has a good manifest.
        UsageError: the checkpoint is not of a run of this version.
    """
    faults = []
    for path in reversed(checkpoint.steps(run / run_folder.CHECKPOINTS)):
        try:
            return from_config(checkpoint.read_manifest(path)["config"])
        except checkpoint.CheckpointError as error:
            faults.append(error)
    if faults:
        raise faults[0]
    raise checkpoint.CheckpointError(f"{run} must hold a checkpoint. Found none. Has the run been started?")


def newest(run: Path, template: Saved) -> checkpoint.Checkpoint:
    """The newest good checkpoint of a run; says which ones it passes over.

    Raises:
        CheckpointError: there is none.
    """
    found, faults = checkpoint.latest(run / run_folder.CHECKPOINTS, template)
    for fault in faults:
        print(f"Passed over a damaged checkpoint: {fault}")
    return found


def classifier(begun: Origin) -> Classifier:
    """The run's model and loss."""
    options, (mean, std), _, classes = begun
    model = _model(options, classes)
    apply = train.in_precision(model.apply, getattr(torch, options.precision))

    def outputs(params: Params, images: Tensor, key: Tensor | None = None) -> Tensor:
        return apply(params, data.normalize(images, mean, std), key)

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        if options.loss == "mse":
            return losses.mse(outputs.softmax(-1), losses.one_hot(labels, classes))
        return losses.cross_entropy(outputs, labels, label_smoothing=options.label_smoothing)

    return Classifier(model.init, outputs, loss)


def _model(options: Train, classes: int) -> Model:
    activation = layers.ACTIVATIONS[options.activation]
    if options.model == "cnn":
        return models.cnn(activation=activation, dropout=options.dropout)
    hidden = options.hidden if options.model == "mlp" else ()
    flat = models.mlp((PIXELS, *hidden, classes), activation=activation)
    return Model(flat.init, lambda params, x, key=None: flat.apply(params, x.flatten(-3), key))


def optimizer(options: Train, steps_per_epoch: int) -> optim.Optimizer:
    """The run's optimizer, with its schedule over all epochs.

    Raises:
        UsageError: numbers that do not go together.
    """
    steps = max(1, options.epochs * steps_per_epoch)
    schedules: dict[str, Callable[[], float | optim.Schedule]] = {
        "constant": lambda: options.lr,
        "cosine": lambda: optim.cosine(options.lr, steps=steps),
        "one-cycle": lambda: optim.one_cycle(options.lr, steps=steps, warmup=options.warmup),
        "step-decay": lambda: optim.step_decay(options.lr, every=steps_per_epoch),
    }
    with refusing(ValueError):
        chosen = optim.sgd(
            schedules[options.schedule](),
            momentum=options.momentum,
            dampening=options.dampening,
            weight_decay=options.weight_decay,
            nesterov=options.nesterov,
        )
    return chosen if options.max_norm is None else optim.clip_by_global_norm(chosen, max_norm=options.max_norm)


def start(options: Train, made: Classifier, chosen: optim.Optimizer, where: torch.device) -> Saved:
    """The state before the first step, drawn from the seed; also the template of the run's checkpoints.

    Raises:
        UsageError: there is no memory for it.
    """
    init_key, train_key = random.split(random.key(options.seed, device=where)).unbind(0)
    with refusing(RuntimeError, "The model must fit in memory. Found: "):
        state = train.init_state(made.init(init_key), chosen, train_key)
    return Saved(state, torch.zeros((), dtype=torch.float64, device=where))


def trained(run: Path, where: torch.device) -> Trained:
    """A run for use after training.

    Raises:
        UsageError: there is no run.
        CheckpointError: it has no good checkpoint.
        DivergedError: its parameters are not finite.
    """
    options = run_folder.read_config(run)
    begun = newest_origin(run)
    made = classifier(begun)
    template = start(begun.options, made, optimizer(begun.options, steps_per_epoch=1), where)
    found = newest(run, template)
    params: Params = found.state.state.params
    check_finite(params, f"The parameters in {found.path}")
    return Trained(made, params, options, begun.classes)
