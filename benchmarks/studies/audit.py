"""Lower bounds on the ε of one private run, from canaries in it, and what the canaries cost.

    bounds    a linear model of 10,000 MNIST images and 1,000 canaries, at ε = 4, δ = 1e-5, for several sampling rates;
              the three lower bounds of `privacy.lower_bound` at 0.95, ten seeds each
    time      steps of the small CNN on 60,000 images with 1,000 canaries among them, and without, in turn

A seed gives which canaries are in, the Poisson samples and the noise. Nothing is chosen from the results: the number of
guesses is the library's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean, median
from typing import Any, NamedTuple

from torch import Tensor

from functorch_mnist import data, losses, models, optim, privacy, random, train
from functorch_mnist.models import Params

from . import markdown

QUESTION = "How much of its ε does one run with canaries show, and what do they cost?"

MEAN, DEVIATION = 0.1307, 0.3081
EPSILON, DELTA, CANARIES, CONFIDENCE = 4.0, 1e-5, 1000, 0.95
MAX_NORM, LR = 1.0, 0.5
BOUNDS = {
    "epsilon": "any mechanism",
    "gaussian": "Gaussian",
    "independent": "Gaussian, canaries independent",
}
"""The bounds, and in words what each supposes."""


class Setting(NamedTuple):
    """How often a canary may be drawn."""

    rate: float
    steps: int


class Sizes(NamedTuple):
    """How much is done."""

    images: int
    settings: tuple[Setting, ...]
    seeds: tuple[int, ...]
    batch_size: int
    """Expected, of the steps that are timed."""
    turns: int
    """Of each arm."""
    steps: int
    """Of a turn."""


FULL = Sizes(
    10_000, (Setting(1.0, 5), Setting(0.1, 100), Setting(0.02, 500), Setting(0.004, 250)), tuple(range(10)), 512, 20, 3
)
QUICK = Sizes(1000, (Setting(1.0, 5),), (0, 1), 64, 2, 1)


def run(*, quick: bool, progress: Callable[[str], object]) -> dict[str, Any]:
    """The record: each run's bounds, and the seconds of each turn."""
    sizes = QUICK if quick else FULL
    images = data.load("mnist").train
    some = data.Split(*[rows[: sizes.images] for rows in images])
    runs = []
    for setting in sizes.settings:
        sigma = privacy.calibrated(
            partial(privacy.Poisson, setting.rate), budget=EPSILON, delta=DELTA, steps=setting.steps
        )
        mechanism = privacy.Poisson(setting.rate, sigma)
        for seed in sizes.seeds:
            found = _bound(some, mechanism, setting.steps, seed)
            runs.append({**setting._asdict(), "noise_multiplier": sigma, "seed": seed, **found._asdict()})
            progress(f"rate {setting.rate:g}, seed {seed}: {found.independent:.2f} of {EPSILON:g}")
    seconds = _times(images, sizes)
    progress("timed")
    return {
        "settings": {
            "images": sizes.images, "canaries": CANARIES, "epsilon": EPSILON, "delta": DELTA, "confidence": CONFIDENCE,
            "max_norm": MAX_NORM, "lr": LR, "batch_size": sizes.batch_size, "timed_images": len(images.labels),
            "steps_of_a_turn": sizes.steps,
        },
        "runs": runs,
        "seconds": seconds,
    }  # fmt: skip


def _bound(images: data.Split, mechanism: privacy.Poisson, steps: int, seed: int) -> privacy.LowerBound:
    """The lower bounds of one run of a linear model."""
    model, clipping = models.linear(784, 10), privacy.Flat(MAX_NORM)
    planted = train.plant_canaries(
        _loss_fn(lambda params, x: model.apply(params, x.flatten())), model.init(random.key(0)), optim.sgd(LR), images,
        clipping=clipping, mechanism=mechanism, canaries=CANARIES, key=random.key(1000 + seed),
    )  # fmt: skip
    step = _step(planted.loss_fn, planted.optimizer, clipping, mechanism, planted.examples)
    state = train.init_private_state(planted.params, planted.optimizer, random.key(0), clipping)
    state = train.fit_private(step, state, planted.examples, secret=privacy.Secret(seed), steps=steps)
    return planted.lower_bound(state, delta=DELTA, confidence=CONFIDENCE)


def _times(images: data.Split, sizes: Sizes) -> dict[str, list[float]]:
    """The seconds of each turn, of which the first is left out: one arm, then the other."""
    model, clipping, optimizer = models.small_cnn(), privacy.Flat(MAX_NORM), optim.sgd(LR)
    mechanism = privacy.Poisson(sizes.batch_size / len(images.labels), 1.0)
    loss_fn, params = _loss_fn(model.apply), model.init(random.key(0))
    planted = train.plant_canaries(
        loss_fn, params, optimizer, images, clipping=clipping, mechanism=mechanism, canaries=CANARIES,
        key=random.key(1),
    )  # fmt: skip
    arms = {
        "without": (loss_fn, params, optimizer, tuple(images)),
        "with": (planted.loss_fn, planted.params, planted.optimizer, planted.examples),
    }
    steps = {name: _step(arm[0], arm[2], clipping, mechanism, arm[3]) for name, arm in arms.items()}
    states = {name: train.init_private_state(arm[1], arm[2], random.key(0), clipping) for name, arm in arms.items()}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(sizes.turns + 1):
        for name in list(arms)[:: 1 if turn % 2 else -1]:
            begun = time.perf_counter()
            states[name] = train.fit_private(
                steps[name], states[name], arms[name][3], secret=privacy.Secret(0), steps=(turn + 1) * sizes.steps,
            )  # fmt: skip
            seconds[name].append(time.perf_counter() - begun)
    return {name: of[1:] for name, of in seconds.items()}


def _step(
    loss_fn: Callable[..., Tensor],
    optimizer: optim.Optimizer,
    clipping: privacy.Clipping,
    mechanism: privacy.Poisson,
    examples: Sequence[Tensor],
) -> train.PrivateStep:
    return train.make_private_step(
        loss_fn, optimizer, clipping=clipping, mechanism=mechanism, examples=len(examples[0])
    )


def _loss_fn(apply: Callable[[Params, Tensor], Tensor]) -> Callable[..., Tensor]:
    def loss_fn(params: Params, image: Tensor, label: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001
        return losses.cross_entropy(apply(params, data.normalize(image, MEAN, DEVIATION)), label)

    return loss_fn


def table(record: dict[str, Any]) -> dict[str, str]:
    """The bounds of each sampling rate, and what canaries add to a step."""
    epsilon, runs = record["settings"]["epsilon"], record["runs"]
    heads = ["rate, steps", "noise multiplier", *BOUNDS.values(), f"above {epsilon:g}"]
    rows = []
    for setting in dict.fromkeys((one["rate"], one["steps"]) for one in runs):
        found = [one for one in runs if (one["rate"], one["steps"]) == setting]
        above = sum(one[name] > epsilon for one in found for name in BOUNDS)
        rows.append(
            [
                f"{setting[0]:g}, {setting[1]}",
                f"{found[0]['noise_multiplier']:g}",
                *[_spread([one[name] for one in found]) for name in BOUNDS],
                f"{above} of {len(BOUNDS) * len(found)}",
            ]
        )
    seconds, steps = record["seconds"], record["settings"]["steps_of_a_turn"]
    ratios = [a / b for a, b in zip(seconds["with"], seconds["without"], strict=True)]
    timed = [
        f"{record['settings']['batch_size']} of {record['settings']['timed_images']:,} images",
        *[f"{1e3 * median(seconds[name]) / steps:.1f}" for name in ("without", "with")],
        f"{median(ratios):.3f}",
        str(len(ratios)),
    ]
    return {
        f"Lower bounds on ε = {epsilon:g}": markdown(heads, rows),
        "Time of canaries": markdown(["a step of", "without, ms", "with, ms", "median ratio", "pairs"], [timed]),
    }


def _spread(values: Sequence[float]) -> str:
    """Mean, minimum and maximum."""
    return f"{fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})"
