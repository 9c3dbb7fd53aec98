"""The images that a command works on: loaded, on a device, and divided as a run's options say."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .. import data, random
from ..options import Train, UsageError, class_fractions
from .faults import refusing

HELD_OUT = 2024
"""The seed of the draw of held-out images: one for all runs, so that they can be compared."""


class Parts(NamedTuple):
    """A data set as a run uses it."""

    train: data.Split
    held_out: data.Split | None
    test: data.Split
    classes: int
    indices: Tensor
    """(N,) int64 on the CPU: the place of each image of `train` among the data set's own training images."""

    @property
    def judging(self) -> data.Split:
        """The held-out images, where they are required."""
        if self.held_out is None:
            raise UsageError("There must be held-out images. Found none. Set --hold-out, such as 5000.")
        return self.held_out


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


def divided(options: Train, dataset: data.Dataset) -> Parts:
    """The data set as a run uses it: some images held out, some classes thinned out, some images drawn.

    Raises:
        UsageError: there are not as many images as asked for.
    """
    where, total = dataset.train.images.device, len(dataset.train.labels)
    index, held_out = torch.arange(total, device=where), None
    if options.hold_out:
        if options.hold_out >= total:
            raise UsageError(f"--hold-out must be below the {total} training images. Found {options.hold_out}.")
        order = random.permutation(random.key(HELD_OUT, device=where), total)
        held_out = _of(dataset.train, order[: options.hold_out].sort().values)
        index = order[options.hold_out :].sort().values
    imbalance_key, draw_key = random.split(random.fold_in(random.key(options.seed, device=where), HELD_OUT)).unbind(0)
    if fractions := class_fractions(options):
        with refusing(ValueError):
            index, _ = data.imbalanced(data.Split(index, dataset.train.labels[index]), fractions, key=imbalance_key)
    if options.train_size is not None:
        if options.train_size > len(index):
            raise UsageError(f"--train-size must be at most {len(index)}, all there are. Found {options.train_size}.")
        index = index[random.permutation(draw_key, len(index))[: options.train_size].sort().values]
    if not len(index):
        raise UsageError("There must be a training image. Found none after --imbalance.")
    return Parts(_of(dataset.train, index), held_out, dataset.test, dataset.classes, index.cpu())


def first_images(parts: Parts, count: int | None) -> Parts:
    """The data set with only the first `count` training images, or with all."""
    train = data.Split(parts.train.images[:count], parts.train.labels[:count])
    return parts._replace(train=train, indices=parts.indices[:count])


def _of(split: data.Split, index: Tensor) -> data.Split:
    return data.Split(split.images[index], split.labels[index])
