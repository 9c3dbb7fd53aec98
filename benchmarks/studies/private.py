"""What accuracy differential privacy costs on MNIST, and what helps.

    published    the three private rows of Opacus' MNIST example, its model and settings, at its noise multipliers
    techniques   one change at a time from a base, each with a learning rate of its own, at one budget
    recipe       `functorch-mnist train --recipe private`

The learning rates of the techniques are those of the highest accuracy on a held-out sixth of the training images, on a
seed of their own; the search is not accounted for. Reported are the 10,000 test images, after training on all 60,000.
Sampling is Poisson, neighbours differ by one example added or removed, δ = 1e-5. A seed gives the initial parameters,
the draws and the noise: it makes a reproduction, which is not private.

Reference: Opacus, examples/mnist_README.md, https://github.com/pytorch/opacus.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_mnist import allocator, data, layers, losses, models, optim, privacy, random, train
from functorch_mnist.models import Model, Params

from . import markdown

QUESTION = "What accuracy does differential privacy cost, and what helps?"

MEAN, DEVIATION = 0.1307, 0.3081
DELTA = 1e-5


class Setting(NamedTuple):
    """A private training run."""

    noise_multiplier: float
    batch_size: int
    """Expected."""
    epochs: int
    lr: float
    max_norm: float = 1.0
    activation: str = "relu"
    momentum: float = 0.0
    automatic: bool = False
    average: float = 0.0
    """Decay of the average of the parameters; 0 for none."""
    copies: int = 0
    """Shifted copies of an example whose losses are averaged; 0 for the image as it is."""
    schedule: str = "constant"


class Job(NamedTuple):
    """One run to make."""

    name: str
    setting: Setting
    seed: int
    held_out: bool
    """Whether to train on five sixths of the training images and test on the others."""


PUBLISHED = {
    "15 epochs, σ 1.3": (Setting(1.3, 240, 15, 0.25, 1.5), 94.63, 0.34),
    "60 epochs, σ 1.1": (Setting(1.1, 240, 60, 0.15, 1.0), 96.78, 0.21),
    "45 epochs, σ 0.7": (Setting(0.7, 240, 45, 0.25, 1.5), 97.09, 0.17),
}
"""Name, setting, and the published mean and deviation of the test accuracy in %."""


def accuracy(job: Job) -> float:
    """The accuracy of one run, in %."""
    setting = job.setting
    images, test, _ = data.load("mnist")
    if job.held_out:
        order = random.permutation(random.key(2024), len(images.labels))
        kept, others = order[10_000:], order[:10_000]
        images, test = (data.Split(images.images[rows], images.labels[rows]) for rows in (kept, others))
    model = models.small_cnn(activation=layers.ACTIVATIONS[setting.activation])

    def outputs(params: Params, x: Tensor) -> Tensor:
        return model.apply(params, data.normalize(x, MEAN, DEVIATION))

    def loss_fn(params: Params, image: Tensor, label: Tensor, key: Tensor) -> Tensor:
        if not setting.copies:
            return losses.cross_entropy(outputs(params, image), label)
        keys = random.split(key, setting.copies)
        copies = data.shifted(image.expand(setting.copies, *image.shape), keys, pixels=2)
        return losses.cross_entropy(outputs(params, copies), label.expand(setting.copies)).mean()

    clipping = privacy.Automatic(setting.max_norm) if setting.automatic else privacy.Flat(setting.max_norm)
    mechanism = privacy.Poisson(setting.batch_size / len(images.labels), setting.noise_multiplier)
    steps = round(setting.epochs / mechanism.rate)
    rate = optim.cosine(setting.lr, steps=steps) if setting.schedule == "cosine" else setting.lr
    optimizer = optim.sgd(rate, momentum=setting.momentum)
    if setting.average:
        optimizer = optim.averaging(optimizer, decay=setting.average)
    step = train.make_private_step(
        loss_fn, optimizer, clipping=clipping, noise_multiplier=setting.noise_multiplier, expected=setting.batch_size
    ).compiled()
    state = train.fit_private(
        step,
        train.init_private_state(model.init(random.key(job.seed)), optimizer, random.key(job.seed), clipping),
        images,
        mechanism=mechanism,
        secret=privacy.Secret(job.seed),
        steps=steps,
        clipping=clipping,
        chunk_sizes=(min(setting.batch_size, 256), 16),
    )
    params = state.optimizer.average if setting.average else state.params
    return 100 * train.evaluate(outputs, losses.cross_entropy, params, *test).accuracy
