"""The images that a command works on: loaded, on a device, and divided as a run's options say."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .. import data, random
from ..options import Train, UsageError, cut_classes
from .faults import refusing

HELD_OUT = 2024
"""The seed of the choice of held-out images: one for all runs, so that they can be compared."""


class Parts(NamedTuple):
    """A data set as a run uses it."""

    train: data.Split
    held_out: data.Split | None
    test: data.Split
    classes: int

    @property
    def judging(self) -> data.Split:
        """The held-out images, for what cannot do without."""
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
    """The data set as a run uses it: some images held out, some cut away, some drawn.

    Raises:
        UsageError: there are not as many images as asked for.
    """
    train, held_out = dataset.train, None
    where, total = train.images.device, len(train.labels)
    if options.hold_out:
        if options.hold_out >= total:
            raise UsageError(f"--hold-out must be below the {total} training images. Found {options.hold_out}.")
        order = random.permutation(random.key(HELD_OUT, device=where), total)
        held_out = _of(train, order[: options.hold_out].sort().values)
        train = _of(train, order[options.hold_out :].sort().values)
    cut_key, draw_key = random.split(random.fold_in(random.key(options.seed, device=where), HELD_OUT)).unbind(0)
    cut = cut_classes(options)
    if cut:
        with refusing(ValueError):
            train = data.imbalanced(train, cut, key=cut_key)
    if options.train_size is not None:
        if options.train_size > len(train.labels):
            raise UsageError(
                f"--train-size must be at most {len(train.labels)}, all there are. Found {options.train_size}."
            )
        train = _of(train, random.permutation(draw_key, len(train.labels))[: options.train_size].sort().values)
    if not len(train.labels):
        raise UsageError("There must be a training image. Found none after --imbalance.")
    return Parts(train, held_out, dataset.test, dataset.classes)


def _of(split: data.Split, which: Tensor) -> data.Split:
    return data.Split(split.images[which], split.labels[which])
