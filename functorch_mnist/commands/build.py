"""From options to the pure functions that a command runs."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .. import data, layers, losses, models, optim, random, train
from ..models import Model, Params
from ..options import Train, UsageError
from .faults import refusing

PIXELS = 28 * 28


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


def origin(options: Train, dataset: data.Dataset) -> Origin:
    """The origin of a new run.

    Raises:
        UsageError: the training images are blank.
    """
    images = dataset.train.images
    with refusing(ValueError):
        return Origin(options, data.normalization(images), len(images), dataset.classes)


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


def schedule(options: Train, steps_per_epoch: int) -> optim.Schedule:
    """The run's learning rate over all epochs, as a function of the step.

    Raises:
        UsageError: numbers that do not go together.
    """
    steps = max(1, options.epochs * steps_per_epoch)
    schedules: dict[str, Callable[[], optim.Schedule]] = {
        "constant": lambda: optim.constant(options.lr),
        "cosine": lambda: optim.cosine(options.lr, steps=steps),
        "one-cycle": lambda: optim.one_cycle(options.lr, steps=steps, warmup=options.warmup),
        "step-decay": lambda: optim.step_decay(options.lr, every=steps_per_epoch),
    }
    with refusing(ValueError):
        return schedules[options.schedule]()


def optimizer(options: Train, steps_per_epoch: int) -> optim.Optimizer:
    """The run's optimizer, with its schedule over all epochs.

    Raises:
        UsageError: numbers that do not go together.
    """
    with refusing(ValueError):
        chosen = optim.sgd(
            options.lr if options.schedule == "constant" else schedule(options, steps_per_epoch),
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
