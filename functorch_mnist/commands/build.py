"""From options to the pure functions that a command runs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .. import checkpoint, data, layers, losses, models, optim, random, run_folder, train
from ..models import Model, Params
from ..options import Train, UsageError

PIXELS = 28 * 28


class Classifier(NamedTuple):
    """What a run trains, as pure functions of images as they are stored."""

    init: Callable[[Tensor], Params]
    """`init(key) -> params`."""
    outputs: Callable[..., Tensor]
    """`outputs(params, images (..., 1, 28, 28) uint8, key=None) -> (..., classes)`, whose softmax is the answer."""
    loss: Callable[[Tensor, Tensor], Tensor]
    """`loss(outputs (..., classes), labels (...)) -> (...)`."""


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
    parts = (data.Split(split.images.to(where), split.labels.to(where)) for split in (dataset.train, dataset.test))
    return data.Dataset(*parts, dataset.classes)


def classifier(options: Train, pixels: Sequence[float], classes: int) -> Classifier:
    """The run's model and loss.

    Args:
        options: of the run.
        pixels: mean and standard deviation of the training images.
        classes: K.
    """
    mean, std = pixels
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
    try:
        if options.model == "cnn":
            return models.cnn(activation=activation, dropout=options.dropout)
        hidden = options.hidden if options.model == "mlp" else ()
        flat = models.mlp((PIXELS, *hidden, classes), activation=activation)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return Model(flat.init, lambda params, x, key=None: flat.apply(params, x.flatten(-3), key))


def optimizer(options: Train, steps_per_epoch: int) -> optim.Optimizer:
    """The run's optimizer, with its schedule over all epochs.

    Raises:
        UsageError: numbers that do not go together.
    """
    steps = max(1, options.epochs * steps_per_epoch)
    try:
        schedules: dict[str, Callable[[], float | optim.Schedule]] = {
            "constant": lambda: options.lr,
            "cosine": lambda: optim.cosine(options.lr, steps=steps),
            "one-cycle": lambda: optim.one_cycle(options.lr, steps=steps, warmup=options.warmup),
            "step-decay": lambda: optim.step_decay(options.lr, every=steps_per_epoch),
        }
        chosen = optim.sgd(
            schedules[options.schedule](),
            momentum=options.momentum,
            dampening=options.dampening,
            weight_decay=options.weight_decay,
            nesterov=options.nesterov,
        )
        if options.max_norm is None:
            return chosen
        return optim.clip_by_global_norm(chosen, max_norm=options.max_norm)
    except ValueError as error:
        raise UsageError(str(error)) from error


def start(options: Train, made: Classifier, chosen: optim.Optimizer, where: torch.device) -> Saved:
    """The state before the first step, drawn from the seed; also the template of the run's checkpoints."""
    init_key, train_key = random.split(random.key(options.seed, device=where)).unbind(0)
    state = train.init_state(made.init(init_key), chosen, train_key)
    return Saved(state, torch.zeros((), dtype=torch.float64, device=where))


def trained(run: Path, where: torch.device) -> tuple[Classifier, Params, int]:
    """The classifier of a run, its newest good parameters and the number of classes, for use after training.

    Raises:
        UsageError: there is no run.
        CheckpointError: it has no good checkpoint.
    """
    options = run_folder.read_config(run)
    newest = checkpoint.read_manifest(_newest(run))["config"]
    pixels, classes = newest["pixels"], newest["classes"]
    made = classifier(options, pixels, classes)
    template = start(options, made, optimizer(options, steps_per_epoch=1), where)
    found, faults = checkpoint.latest(run / run_folder.CHECKPOINTS, template)
    for fault in faults:
        print(f"Passed over a damaged checkpoint: {fault}")
    return made, found.state.state.params, classes


def _newest(run: Path) -> Path:
    found = checkpoint.steps(run / run_folder.CHECKPOINTS)
    if not found:
        raise checkpoint.CheckpointError(f"{run} must hold a checkpoint. Found none. Has the run been started?")
    return found[-1]
