"""From options to the pure functions that a command runs."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .. import data, layers, models, optim, privacy, random, train
from .. import losses as losses_of
from ..models import Model, Params
from ..options import Train, UsageError
from .faults import refusing

SIDE = 28
FEATURES = 81 * 7 * 7
"""Scattering features of an image, of two scales and eight angles; they are divided by their root, to length 1."""
NORM_GROUPS = 27
"""In which they are normalised: by the image alone."""
PUBLIC_PIXELS = (0.1307, 0.3081)
"""Mean and standard deviation of pixels that are customary for MNIST, whatever the data set."""


class Classifier(NamedTuple):
    """What a run trains, as pure functions of images as they are stored."""

    init: Callable[[Tensor], Params]
    """`init(key) -> params`."""
    outputs: Callable[..., Tensor]
    """`outputs(params, images (..., 1, 28, 28) uint8, key=None) -> (..., classes)`, whose softmax is the answer.

    It takes what `inputs` makes of images as well."""
    inputs: Callable[[Tensor], Tensor]
    """What does not change in training, computed once: images to what `outputs` would make of them first."""
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
    """The origin of a new run; a private one takes fixed statistics of pixels, for the images' own would tell of them.

    Raises:
        UsageError: the training images are blank.
    """
    images = dataset.train.images
    with refusing(ValueError):
        pixels = PUBLIC_PIXELS if options.private else data.normalization(images)
    return Origin(options, pixels, len(images), dataset.classes)


def classifier(begun: Origin) -> Classifier:
    """The run's model and loss."""
    options, (mean, std), _, classes = begun
    model = _model(options, classes)
    apply = train.in_precision(model.apply, getattr(torch, options.precision))
    if options.model == "scattering":
        filters = models.scattering_filters(SIDE, SIDE, scale=2, angles=8)

        def inputs(images: Tensor) -> Tensor:
            features = models.scattering(data.upright(images[..., 0, :, :].float() / 255), filters)
            return layers.group_norm(features, NORM_GROUPS).flatten(-3) / math.sqrt(FEATURES)
    else:

        def inputs(images: Tensor) -> Tensor:
            return data.normalize(images, mean, std)

    def outputs(params: Params, images: Tensor, key: Tensor | None = None) -> Tensor:
        return apply(params, images if images.is_floating_point() else inputs(images), key)

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        if options.loss == "mse":
            return losses_of.mse(outputs.softmax(-1), losses_of.one_hot(labels, classes))
        return losses_of.cross_entropy(outputs, labels, label_smoothing=options.label_smoothing)

    return Classifier(model.init, outputs, inputs if options.model == "scattering" else lambda images: images, loss)


def _model(options: Train, classes: int) -> Model:
    activation = layers.ACTIVATIONS[options.activation]
    if options.model == "cnn":
        return models.cnn(activation=activation, dropout=options.dropout)
    if options.model == "small-cnn":
        return models.small_cnn(activation=activation)
    if options.model == "scattering":
        return models.linear(FEATURES, classes, bias=False)
    hidden = options.hidden if options.model == "mlp" else ()
    flat = models.mlp((SIDE * SIDE, *hidden, classes), activation=activation)
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
    if options.max_norm is not None:
        chosen = optim.clip_by_global_norm(chosen, max_norm=options.max_norm)
    return optim.averaging(chosen, decay=options.average) if options.average else chosen


def tested(options: Train, state: train.State) -> Params:
    """The parameters that are tested: their average, where one is kept."""
    params: Params = state.optimizer.average if options.average else state.params
    return params


def losses(made: Classifier, options: Train) -> Callable[..., Tensor]:
    """`losses(params, images (..., 1, 28, 28), labels (...), keys (..., 2)) -> (...)`: what training makes small."""

    def losses_fn(params: Params, images: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
        if not options.copies:
            return made.loss(made.outputs(params, images, keys), labels)
        shift_keys, keys = random.split(random.split(keys, options.copies)).unbind(-2)  # (..., copies, 2)
        copies = images.unsqueeze(-4).expand(*keys.shape[:-1], *images.shape[-3:])
        outputs = made.outputs(params, data.shifted(copies, shift_keys, pixels=options.shift), keys)
        return made.loss(outputs, labels.unsqueeze(-1).expand(keys.shape[:-1])).mean(-1)

    return losses_fn


def clipping(options: Train) -> privacy.Clipping:
    """The run's clipping rule."""
    norm = options.clip_norm
    rules: dict[str, Callable[[], privacy.Clipping]] = {
        "flat": lambda: privacy.Flat(norm),
        "automatic": lambda: privacy.Automatic(norm),
        "global": lambda: privacy.Global(norm),
        "per-layer": lambda: privacy.PerLayer(norm),
        "quantile": lambda: privacy.Quantile(0.5, count_deviation=options.batch_size / 20, initial=norm),
    }
    return rules[options.clipping]()


def start(options: Train, made: Classifier, chosen: optim.Optimizer, where: torch.device) -> Saved:
    """The state before the first step, drawn from the seed; also the template of the run's checkpoints.

    Raises:
        UsageError: there is no memory for it.
    """
    init_key, train_key = random.split(random.key(options.seed, device=where)).unbind(0)
    with refusing(RuntimeError, "The model must fit in memory. Found: "):
        state = train.init_state(made.init(init_key), chosen, train_key)
    if options.private:
        state = state._replace(estimator=clipping(options).init())
    return Saved(state, torch.zeros((), dtype=torch.float64, device=where))
