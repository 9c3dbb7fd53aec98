"""What a run has saved, read back: its origin and its newest good state."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checkpoint, data, run_folder
from ..models import Params
from ..options import Train, UsageError, differences, from_json, to_json
from . import build, sources
from .build import Classifier, Origin, Saved
from .sources import Parts


class Trained(NamedTuple):
    """A run, as `evaluate` and `predict` need it."""

    made: Classifier
    params: Params
    """The newest good ones, or those of the best epoch."""
    options: Train
    begun: Origin


class Point(NamedTuple):
    """A run's parameters at one moment of its training."""

    step: int
    params: Params
    key: Tensor
    """(2,): the root of the run's random streams."""
    lr: float
    """The learning rate of the step before."""


def to_config(begun: Origin) -> dict[str, Any]:
    """The origin as a checkpoint's config."""
    return begun._asdict() | {
        "options": to_json(begun.options),
        "normalization": list(begun.normalization),
        "counts": list(begun.counts),
    }


def from_config(config: Mapping[str, Any]) -> Origin:
    """The way back.

    Raises:
        UsageError: the config is not one that `to_config` makes.
    """
    try:
        mean, std = config["normalization"]
        normalization = float(mean), float(std)
        counts = tuple(int(count) for count in config["counts"])
        examples, classes = int(config["examples"]), int(config["classes"])
        return Origin(from_json(config["options"]), normalization, examples, classes, counts)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UsageError(f"A run's checkpoint must say what the run began with. Found: {error!r}.") from error


def newest_origin(run: Path) -> Origin:
    """The origin in the newest checkpoint of a run whose manifest is good.

    Raises:
        CheckpointError: there is no checkpoint, or none has a good manifest.
        UsageError: the checkpoint is not of a run of this version.
    """
    return from_config(newest_config(run))


def newest_config(run: Path) -> Mapping[str, Any]:
    """The config of the newest checkpoint of a run whose manifest is good.

    Raises:
        CheckpointError: there is no checkpoint, or none has a good manifest.
    """
    faults = []
    for path in reversed(checkpoint.steps(run / run_folder.CHECKPOINTS)):
        try:
            config = checkpoint.read_manifest(path)["config"]
            return config if isinstance(config, Mapping) else {}
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
    newest, faults = checkpoint.latest(run / run_folder.CHECKPOINTS, template)
    for fault in faults:
        print(f"Passed over a damaged checkpoint: {fault}")
    return newest


def trained(run: Path, where: torch.device) -> Trained:
    """A run for use after training.

    Raises:
        UsageError: there is no run.
        CheckpointError: it has no good checkpoint.
    """
    options = run_folder.read_config(run)
    begun = newest_origin(run)
    made = build.classifier(begun)
    optimizer = build.optimizer(begun.options, steps_per_epoch=1)
    template = build.start(begun.options, made, optimizer, where, examples=begun.examples)
    return Trained(made, build.tested(begun.options, newest(run, template).state), options, begun)


def points(run: Path, trained: Trained, where: torch.device) -> list[Point]:
    """All checkpoints of a run that are good, in order; says which ones it passes over.

    Args:
        run: its folder.
        trained: the run.
        where: the device.
    """
    options = trained.begun.options
    per_epoch = data.steps_per_epoch(trained.begun.examples, min(options.batch_size, trained.begun.examples))
    template = build.start(
        options, trained.made, build.optimizer(options, per_epoch), where, examples=trained.begun.examples
    )
    good = []
    for path in checkpoint.steps(run / run_folder.CHECKPOINTS):
        try:
            one = checkpoint.load(path, template)
        except checkpoint.CheckpointError as error:
            print(f"Passed over a damaged checkpoint: {error}")
            continue
        rate = build.schedule(from_config(one.config).options, per_epoch)  # a resumed run may have had another
        lr = float(rate(torch.tensor(max(0, one.step - 1))))
        state = one.state.state
        good.append(Point(one.step, build.current(options, state), state.key, lr))
    return good


def loss_of(trained: Trained) -> Callable[[Params, Tensor, Tensor], Tensor]:
    """The run's training loss of one image and its label, without dropout."""

    def loss_fn(params: Params, image: Tensor, label: Tensor) -> Tensor:
        return trained.made.loss(trained.made.outputs(params, image), label)

    return loss_fn


def training_images(trained: Trained, folder: Path | None, where: torch.device) -> Parts:
    """The images that a run was trained on, on a device.

    Raises:
        UsageError: the data set has other training images, or the run's folder is of two runs.
    """
    differing = [name for name in differences(trained.options, trained.begun.options) if name != "out"]
    if differing:
        raise UsageError(
            f"The run's config.json and its checkpoints must be of one run. Found different {', '.join(differing)}."
        )
    dataset = sources.load(trained.options.dataset, folder or trained.options.data_dir, where)
    parts = sources.divided(trained.begun.options, dataset)
    begun = build.origin(trained.begun.options, parts)
    if begun[1:] != trained.begun[1:]:
        raise UsageError(
            f"The run's {trained.begun.examples} training images are needed. Found other {begun.examples}. "
            "Is --data-dir the right one?"
        )
    return parts
