"""The gradient noise scale of the tutorial's CNN over one epoch of MNIST, estimated in three ways.

    examples     at one point, from the gradients of single examples: `statistics.noise_scale`
    two sizes    at the same point, from the mean gradients of small and large batches: `statistics.two_batch_sizes`
    steps        over the epoch, from what training's own batches show: `train.gradient_with_noise`

The first two see disjoint images, so their errors are independent, and they must agree within these. The third depends
on what an average is: with t the steps, the ratio of means Σ_t tr Σ_t / Σ_t |E ∇_t|² weighs a step by its |E ∇|², most
at the start; the mean of the ratios of windows weighs all parts of the epoch alike.

Reference: McCandlish et al., "An empirical model of large-batch training", 2018, appendix A.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_mnist import data, losses, models, optim, random, statistics, train, tree

from . import markdown

QUESTION = "Do two estimators of the gradient noise scale agree along an epoch, and what is the epoch's average?"

LR, MOMENTUM, BATCH_SIZE = 0.01, 0.9, 64
MEAN, DEVIATION = 0.1307, 0.3081
AGREE = 2.0
"""Estimates agree within this many combined standard errors."""
PUBLISHED = {
    "average": 900,
    "reference": "McCandlish et al., 2018: MNIST, average over training, about 900",
    "reproduction": 876,
    "reproduced": "an independent one, read second-hand: batch 128, lr 0.01, one epoch, a network with batch norm",
}
NOTES = [
    "The ratio of means weighs each step by its square gradient norm, so the start of the epoch counts most.",
    "The mean of the ratios of windows counts all parts of the epoch alike; shorter windows have more noise and, for a "
    "ratio is convex in its denominator, a mean that is too large.",
    "A window or a moment whose |E ∇|² is estimated below zero has no finite ratio and is left out of these means.",
    "The first estimate takes the same examples at all moments, and the arms share them, so their z are not "
    "independent of each other; the error of a ratio is a rough one where its denominator is near zero, those of tr Σ "
    "and |E ∇|² are not.",
    "The error of the ratio of means holds the change along the epoch too, for it takes steps as alike.",
    "The published average is of another network, so it is a size to compare with and nothing to reach.",
]


class Sizes(NamedTuple):
    """How much is computed."""

    images: int
    """Of each set at the most, from its start."""
    moments: int
    """Points of the epoch, from before its first step to after its last."""
    sampled: int
    """Examples of the first estimate."""
    pairs: int
    """Pairs of batches of the second."""
    small: int
    large: int
    every: int
    """Steps between those that are watched."""
    windows: tuple[int, ...]
    """Into how many windows the epoch is divided."""


FULL = Sizes(60_000, 10, 2_048, 200, 8, 256, 4, (5, 10, 20))
QUICK = Sizes(2_000, 3, 256, 40, 4, 32, 2, (2, 4))


def run(*, quick: bool, progress: Callable[[str], object]) -> dict[str, Any]:
    """The record: for dropout off and on, the estimates at each moment and at each watched step."""
    sizes = QUICK if quick else FULL
    loaded = data.load("mnist")
    examples, test = (data.Split(*[rows[: sizes.images] for rows in split]) for split in (loaded.train, loaded.test))
    return {
        "settings": {
            **sizes._asdict(),
            "windows": list(sizes.windows),
            "model": "cnn",
            "init_key": 0,
            "order_key": 1,
            "lr": LR,
            "momentum": MOMENTUM,
            "batch_size": BATCH_SIZE,
            "epochs": 1,
            "agree_within": AGREE,
        },
        "published": PUBLISHED,
        "notes": NOTES,
        "arms": {
            name: _arm(name, keyed, sizes, examples, test, progress)
            for name, keyed in (("dropout off", False), ("dropout on", True))
        },
    }


def table(record: dict[str, Any]) -> dict[str, str]:
    """The estimates at each moment, an arm a table, and the averages over the epoch."""
    settings, arms = record["settings"], record["arms"]
    found = {}
    for name, arm in arms.items():
        heads = ["step", f"from {settings['sampled']:,} examples"]
        heads += [f"from {settings['pairs']} pairs of {settings['small']} and {settings['large']}"]
        heads += ["z", "z of tr Σ", "z of |E ∇|²"]
        rows = [
            [str(one["step"]), _shown(one["examples"]), _shown(one["two_sizes"]),
             *[_number(one["z"][part], "+.2f") for part in ("scale", "trace", "square_norm")]]
            for one in arm["moments"]
        ]  # fmt: skip
        found[f"Noise scale at moments of the epoch, {name}"] = markdown(heads, rows)
    heads = ["epoch", "scale", "tr Σ", "|E ∇|²"]
    rows = [
        [name, *[_within(arm["moments"], part, settings["agree_within"]) for part in ("scale", "trace", "square_norm")]]
        for name, arm in arms.items()
    ]
    found[f"Moments at which both estimates agree within {settings['agree_within']:g} combined errors"] = markdown(
        heads, rows
    )
    averages = {name: _averages(arm) for name, arm in arms.items()}
    rows = [[label, *[each[label] for each in averages.values()]] for label in next(iter(averages.values()))]
    rows.append(["published, another network", *[f"about {record['published']['average']}" for _ in arms]])
    found["Average noise scale of the epoch"] = markdown(["average", *averages], rows)
    return found


def _averages(arm: Mapping[str, Any]) -> dict[str, str]:
    """The averages of an arm, by what they are."""
    steps, moments = arm["steps"], [one["examples"]["scale"] for one in arm["moments"]]
    shown = {
        "ratio of means over the steps watched": _shown(steps["average"]),
        "the same without the epoch's first tenth": _shown(steps["average_of_the_rest"]),
    }
    for one in steps["windows"]:
        finite = [scale for scale in one["scales"] if scale is not None]
        missing = len(one["scales"]) - len(finite)
        note = f", {missing} without a finite ratio left out" if missing else ""
        shown[f"mean of the ratios of {one['windows']} windows"] = f"{_number(one['mean'], '.0f')}{note}"
    finite = [scale for scale in moments if scale is not None]
    for label, of in (("mean", fmean), ("median", median)):
        shown[f"{label} over {len(moments)} moments, from examples"] = _number(of(finite) if finite else None, ".0f")
    return shown


def _within(moments: Sequence[Mapping[str, Any]], part: str, most: float) -> str:
    """At how many moments the estimates agree."""
    scores = [one["z"][part] for one in moments if one["z"][part] is not None]
    return f"{sum(abs(z) <= most for z in scores)} of {len(scores)}"


def _arm(
    name: str,
    keyed: bool,
    sizes: Sizes,
    examples: data.Split,
    test: data.Split,
    progress: Callable[[str], object],
) -> dict[str, Any]:
    """The record of one epoch, with dropout or without."""
    model, optimizer = models.cnn(), optim.sgd(LR, momentum=MOMENTUM)

    def outputs(params: models.Params, images: Tensor, keys: Tensor | None = None) -> Tensor:
        outputs: Tensor = model.apply(params, data.normalize(images, MEAN, DEVIATION), keys)
        return outputs

    def loss_fn(params: models.Params, images: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
        return losses.cross_entropy(outputs(params, images, keys if keyed else None), labels)

    per_epoch = data.steps_per_epoch(len(examples.labels), BATCH_SIZE)
    wanted = [round(part * per_epoch / (sizes.moments - 1)) for part in range(sizes.moments)]
    state = train.init_state(model.init(random.key(0)), optimizer, random.key(1))
    points, seen = {0: state.params}, list[tuple[int, float, float]]()

    def keep(at: train.Progress) -> None:
        if at.step in wanted:
            points[at.step] = at.state.params
        if "trace" in at.aux:
            seen.append((at.step, at.aux["trace"].item(), at.aux["square_norm"].item()))

    state = train.fit(
        train.make_step(train.batch_gradient(loss_fn), optimizer),
        state,
        examples,
        epochs=1,
        batch_size=BATCH_SIZE,
        watch=train.Watch(train.make_step(train.gradient_with_noise(loss_fn), optimizer), sizes.every),
        callbacks=(keep,),
    )
    result = train.evaluate(outputs, losses.cross_entropy, state.params, *test)
    progress(f"{name}: trained, {100 * result.accuracy:.2f} % of the test images right")
    subset_key, keys_key, order_key = random.split(random.key(2), 3).unbind()
    drawn = random.permutation(subset_key, len(examples.labels))
    chosen, rest = drawn[: sizes.sampled], drawn[sizes.sampled :]
    moments = []
    for step in wanted:
        keys = random.split(random.fold_in(keys_key, step), len(examples.labels))
        rows = (*examples, keys)
        single = statistics.noise_scale(loss_fn, points[step], *[x[chosen] for x in rows], chunk_size=512)
        order = rest[random.permutation(random.fold_in(order_key, step), len(rest))]
        paired = _two_sizes(loss_fn, points[step], rows, order, sizes)
        moments.append(
            {"step": step, "examples": _record(single), "two_sizes": _record(paired), "z": _scores(single, paired)}
        )
        progress(f"{name}: step {step}, {single} and {paired}")
    return {"accuracy": result.accuracy, "moments": moments, "steps": _over_steps(seen, sizes.windows)}


def _two_sizes(
    loss_fn: Callable[..., Tensor], params: models.Params, rows: Sequence[Tensor], order: Tensor, sizes: Sizes
) -> statistics.NoiseScale:
    """The estimate from pairs of batches, no two of which share an example."""
    estimator = train.batch_gradient(loss_fn)

    def square(index: Tensor) -> Tensor:
        sums, _ = estimator(params, *[x[index] for x in rows])
        return tree.dot(sums, sums).double() / len(index) ** 2

    pairs = order[: sizes.pairs * (sizes.small + sizes.large)].view(sizes.pairs, -1)
    small = torch.stack([square(pair[: sizes.small]) for pair in pairs])
    large = torch.stack([square(pair[sizes.small :]) for pair in pairs])
    traces, square_norms = statistics.two_batch_sizes(small, large, small_size=sizes.small, large_size=sizes.large)
    return statistics.mean_noise_scale(traces, square_norms)


def _over_steps(seen: Sequence[tuple[int, float, float]], windows: Sequence[int]) -> dict[str, Any]:
    """The watched steps, their average and the ratios of windows."""
    steps, traces, square_norms = zip(*seen, strict=True)
    rows = torch.tensor([traces, square_norms], dtype=torch.float64)
    parts = []
    for count in windows:
        scales = [_finite(statistics.mean_noise_scale(*part).scale) for part in rows.tensor_split(count, dim=1)]
        finite = [scale for scale in scales if scale is not None]
        parts.append(
            {"windows": count, "mean": fmean(finite) if finite else None, "scales": scales},
        )
    return {
        "average": _record(statistics.mean_noise_scale(*rows)),
        "average_of_the_rest": _record(statistics.mean_noise_scale(*rows[:, len(steps) // 10 :])),
        "windows": parts,
        "step": list(steps),
        "trace": list(traces),
        "square_norm": list(square_norms),
    }


def _scores(a: statistics.NoiseScale, b: statistics.NoiseScale) -> dict[str, float | None]:
    """How far two estimates are apart, in their combined standard errors."""
    return {
        "scale": _finite((b.scale - a.scale) / math.hypot(a.error, b.error)),
        "trace": _finite((b.trace - a.trace) / math.hypot(a.trace_error, b.trace_error)),
        "square_norm": _finite((b.square_norm - a.square_norm) / math.hypot(a.square_norm_error, b.square_norm_error)),
    }


def _record(found: statistics.NoiseScale) -> dict[str, float | int | None]:
    return {name: _finite(value) for name, value in found._asdict().items()}


def _finite(value: float) -> float | None:
    """The number, or none for what JSON cannot hold."""
    return value if math.isfinite(value) else None


def _shown(found: Mapping[str, Any]) -> str:
    error = None if found["error"] is None else float(f"{found['error']:.2g}")
    return f"{_number(found['scale'], '.4g')} ± {_number(error, 'g')}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
