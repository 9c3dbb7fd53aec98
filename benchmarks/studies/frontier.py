"""How accurate a private classifier of MNIST is at ε = 0.5, 1, 2, 2.93 and 8, and what moves it.

    frontier     the recipe `private` at each ε, three seeds, trained on all 60,000 images: the 10,000 test images
    changes      one change at a time from the recipe at ε = 1, on a held-out sixth of the training images
    published    what others report, with their accountants and sampling

    python -m benchmarks.studies.frontier       draws the picture of the committed record

The options were chosen on the held-out images; the learning rate is in proportion to ε. The search is not accounted
for. Sampling is Poisson, neighbours differ by one example added or removed, δ = 1e-5, ε is that of `pld`. A seed gives
the draws and the noise: it makes a reproduction, which is not private.

The changes, about a hundred runs of a linear map of fixed features, are made with the clipped sum in closed form: an
example's gradient is (p - y) xᵀ, of norm |p - y| |x|. Each change has the best of three learning rates by the first
seed; its noise is what the budget asks for on 60,000 images, though 50,000 are trained on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_mnist import data, layers, losses, models, optim, privacy, random, train
from functorch_mnist.commands import build
from functorch_mnist.options import RECIPES

from . import markdown

QUESTION = "How accurate is a private classifier of MNIST at each ε, and what moves it?"

EPSILONS, DELTA, EXAMPLES = (0.5, 1.0, 2.0, 2.93, 8.0), 1e-5, 60_000
SEEDS = (0, 1, 2)
RECIPE = RECIPES["private"]
CHANGED_AT = 1.0
"""The ε of the changes."""
RATE = 1e4
"""Learning rate at ε = 1; in proportion to ε, as the recipe's is, the noise in the weights is the same at each ε."""
RATES = (0.5, 1.0, 2.0)
"""Learning rates that a change is tried at, as multiples of its own."""


class Setting(NamedTuple):
    """A run of a linear map of fixed features."""

    features: str = "discriminants"
    directions: int = build.FEATURES
    """How many of the features, where they are discriminants."""
    batch_size: int = RECIPE.batch_size
    """Expected."""
    epochs: int = RECIPE.epochs
    path_length: float = RATE * RECIPE.clip_norm * RECIPE.epochs * EXAMPLES / RECIPE.batch_size
    """An upper bound on how far the weights move: learning rate times clipping norm times steps."""
    max_norm: float = RECIPE.clip_norm
    automatic: bool = False
    momentum: float = 0.0
    average: float = RECIPE.ema_decay
    """Decay of the average of the parameters; 0 for none."""
    decreasing: bool = False
    """Whether the learning rate goes down to 0, as a cosine, from twice its mean."""
    smoothing: float = 0.0
    """Of labels."""
    squared: bool = False
    """Whether the loss is the squared error of the probabilities."""
    bands: int = 1
    """Of the noise's correlation over steps, BandMF with cyclic Poisson sampling; 1 for independent noise."""
    shrunk: bool = False
    """Whether released weights are shrunk to what exceeds the noise, feature by feature."""


CHANGES: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "scattering features, before discriminants": {"features": "scattering", "path_length": 36e3},
    "the same less the glyphs' mean": {"features": "centred", "path_length": 36e3},
    "64 discriminants": {"directions": 64},
    "128 discriminants": {"directions": 128},
    "256 discriminants": {"directions": 256},
    "discriminants of pixels, without wavelets": {"features": "pixels"},
    "images not deskewed": {"features": "skewed"},
    "wavelets of three scales": {"features": "three scales"},
    "half the epochs": {"epochs": RECIPE.epochs // 2},
    "twice the epochs": {"epochs": RECIPE.epochs * 2},
    "half the batch": {"batch_size": RECIPE.batch_size // 2},
    "all images in each step": {"batch_size": EXAMPLES, "epochs": 100},
    "no EMA of parameters": {"average": 0.0},
    "EMA of parameters, 0.97": {"average": 0.97},
    "noise correlated in 4 bands": {"bands": 4},
    "noise correlated in 8 bands": {"bands": 8},
    "momentum 0.9": {"momentum": 0.9},
    "cosine learning rate, twice as high at first": {"decreasing": True},
    "clipping at 0.1": {"max_norm": 0.1},
    "clipping at 0.003": {"max_norm": 0.003},
    "automatic clipping": {"automatic": True},
    "label smoothing 0.1": {"smoothing": 0.1, "path_length": 12e3},
    "squared error of probabilities": {"squared": True, "path_length": 8e3},
    "weights shrunk by their noise": {"shrunk": True},
}
"""What is changed, and where it needs another path length, that."""


class Published(NamedTuple):
    """What others report."""

    epsilon: float
    accuracy: float
    """In %."""
    method: str
    account: str
    sampling: str
    """What the account takes it to be."""
    source: str


_PAPER = "as reported in DPSUR, table 2"
PUBLISHED = (
    Published(1.16, 94.63, "Opacus' example, CNN", "RDP, old", "Poisson", "Opacus, examples/mnist_README.md"),
    Published(2.91, 96.78, "Opacus' example, CNN", "RDP, old", "Poisson", "Opacus, examples/mnist_README.md"),
    Published(6.86, 97.09, "Opacus' example, CNN", "RDP, old", "Poisson", "Opacus, examples/mnist_README.md"),
    Published(2.92, 96.6, "TF Privacy's tutorial, CNN", "RDP, old", "Poisson, runs shuffled",
              "TensorFlow Privacy, tutorials/README"),
    Published(2.93, 98.1, "tempered sigmoids", "RDP, old", "Poisson", "Papernot et al., AAAI 2021"),
    Published(1.0, 97.06, "tempered sigmoids", "RDP", "Poisson", _PAPER),
    Published(2.0, 97.87, "tempered sigmoids", "RDP", "Poisson", _PAPER),
    Published(3.0, 98.22, "tempered sigmoids", "RDP", "Poisson", _PAPER),
    Published(2.93, 98.7, "ScatterNet, linear", "RDP", "Poisson", "Tramèr, Boneh, ICLR 2021"),
    Published(1.0, 97.78, "ScatterNet", "RDP", "Poisson", _PAPER),
    Published(2.0, 98.39, "ScatterNet", "RDP", "Poisson", _PAPER),
    Published(3.0, 98.32, "ScatterNet", "RDP", "Poisson", _PAPER),
    Published(1.0, 97.93, "DPSUR", "RDP, disputed", "Poisson", "DPSUR, table 2; disputed by arXiv 2606.04384"),
    Published(2.0, 98.70, "DPSUR", "RDP, disputed", "Poisson", "DPSUR, table 2; disputed by arXiv 2606.04384"),
    Published(3.0, 98.88, "DPSUR", "RDP, disputed", "Poisson", "DPSUR, table 2; disputed by arXiv 2606.04384"),
    Published(4.0, 98.95, "DPSUR", "RDP, disputed", "Poisson", "DPSUR, table 2; disputed by arXiv 2606.04384"),
)  # fmt: skip
"""All at δ = 1e-5."""


def run(*, quick: bool, progress: Callable[[str], object]) -> dict[str, Any]:
    """The record: the accuracy of each run."""
    epsilons, seeds = ((1.0,), (0,)) if quick else (EPSILONS, SEEDS)
    images, test, _ = data.load("mnist")
    rows, changes = [], []
    prepared, final = (build.classifier(_origin()).inputs(split.images) for split in (images, test))
    for epsilon in epsilons:
        for seed in seeds:
            rows.append(_row(epsilon, seed, data.Split(prepared, images.labels), data.Split(final, test.labels), quick))
            progress(json.dumps(rows[-1]))
    for name in list(CHANGES)[: 2 if quick else None]:
        changes.append(_change(name, prepared, images, seeds))
        progress(json.dumps(changes[-1]))
    return {
        "budget": {"delta": DELTA, "accountant": "pld", "sampling": "Poisson", "relation": "one example more or less"},
        "frontier": rows,
        "changes": changes,
    }


def _change(name: str, prepared: Tensor, images: data.Split, seeds: Sequence[int]) -> dict[str, Any]:
    """The runs of one change: those that its learning rate is chosen by, and the best with each seed."""
    setting = Setting()._replace(**CHANGES[name])
    if setting.features == "discriminants":
        features = _of_length_one(prepared[:, : setting.directions])
    else:
        features = _features(setting.features, images.images)
    held_out, kept = random.permutation(random.key(2024), EXAMPLES).split((10_000, EXAMPLES - 10_000))
    splits = [data.Split(features[rows].bfloat16(), images.labels[rows]) for rows in (kept, held_out)]
    tried = {
        rate: _closed_form(setting._replace(path_length=rate * setting.path_length), *splits, seed=seeds[0])
        for rate in RATES
    }
    best = max(tried, key=lambda rate: tried[rate])
    chosen = setting._replace(path_length=best * setting.path_length)
    found = [tried[best], *(_closed_form(chosen, *splits, seed=seed) for seed in seeds[1:])]
    return {"change": name, "setting": chosen._asdict(), "tried": list(tried.values()), "accuracy": found}


def _origin(**changes: Any) -> build.Origin:
    return build.Origin(replace(RECIPE, **changes), build.PUBLIC_PIXELS, EXAMPLES, 10)


def _row(epsilon: float, seed: int, examples: data.Split, test: data.Split, quick: bool) -> dict[str, Any]:
    """One run of the recipe, on features of all training images, and what it spends."""
    rate = RECIPE.batch_size / EXAMPLES
    steps = (1 if quick else RECIPE.epochs) * round(1 / rate)
    sigma = _noise(rate, steps, epsilon)
    params = _trained(_origin(epsilon=epsilon, lr=RATE * epsilon), examples, privacy.Poisson(rate, sigma), steps, seed)
    outputs = build.classifier(_origin()).outputs
    accuracy = train.evaluate(outputs, losses.cross_entropy, params, *test).accuracy
    spent = privacy.epsilon(privacy.Poisson(rate, sigma), steps=steps, delta=DELTA)
    return {
        "epsilon": epsilon, "seed": seed, "accuracy": 100 * accuracy, "spent": spent, "noise_multiplier": sigma,
        "steps": steps,
    }  # fmt: skip


def _trained(
    begun: build.Origin, examples: data.Split, mechanism: privacy.Poisson, steps: int, seed: int
) -> models.Params:
    """The parameters after the private steps of a run, as the command makes them."""
    options, made = begun.options, build.classifier(begun)
    clipping, optimizer = build.clipping(options), build.optimizer(options, round(1 / mechanism.rate))
    step = train.make_private_step(
        build.losses(made, options), optimizer, clipping=clipping, mechanism=mechanism, examples=len(examples.labels)
    )
    start = train.init_private_state(made.init(random.key(seed)), optimizer, random.key(seed), clipping)
    state = train.fit_private(step, start, examples, secret=privacy.Secret(seed), steps=steps)
    averaged: models.Params = state.optimizer.average
    return averaged


@cache
def _noise(rate: float, steps: int, epsilon: float, bands: int = 1) -> float:
    """What spends the budget, on all training images."""
    return privacy.calibrated(
        lambda sigma: privacy.BandMF(rate, sigma, bands, steps), budget=epsilon, delta=DELTA, steps=steps
    )


def _closed_form(setting: Setting, examples: data.Split, test: data.Split, *, seed: int) -> float:
    """The accuracy of one run, in %; products are of bfloat16 numbers, their sums of float32."""
    draws = torch.Generator().manual_seed(seed)
    rate = setting.batch_size / EXAMPLES
    steps = round(setting.epochs / rate)
    sigma = _noise(rate, steps, CHANGED_AT, setting.bands)
    strategy = privacy.banded(setting.bands, steps)
    total, size = examples.images.shape
    targets = losses.one_hot(examples.labels, 10) * (1 - setting.smoothing) + setting.smoothing / 10
    lengths = torch.linalg.vector_norm(examples.images, dim=1, dtype=torch.float32)
    norm = 1.0 if setting.automatic else setting.max_norm
    optimizer: optim.Optimizer = optim.sgd(
        optim.cosine(2 * setting.path_length / steps / norm, steps=steps) if setting.decreasing
        else setting.path_length / steps / norm * (1 - setting.momentum),
        momentum=setting.momentum,
    )  # fmt: skip
    if setting.average:
        optimizer = optim.exponential_moving_average(optimizer, decay=setting.average)
    weights = torch.zeros(10, size)
    state = optimizer.init(weights)
    group = torch.randint(setting.bands, (total,), generator=draws) if setting.bands > 1 else torch.zeros(total)
    past: list[Tensor] = []
    for step in range(steps):
        joins = torch.rand(total, generator=draws) < setting.bands * rate
        drawn = torch.nonzero(joins & (group == step % setting.bands)).squeeze(1)
        x = examples.images[drawn]
        errors = (x @ weights.T.to(x.dtype)).float().softmax(1) - targets[drawn]
        if setting.squared:
            p = errors + targets[drawn]
            errors = p * (errors - (p * errors).sum(1, keepdim=True))
        norms = torch.linalg.vector_norm(errors, dim=1) * lengths[drawn]
        factors = 1 / (norms + 0.01) if setting.automatic else norm / norms.clamp(min=norm)
        past = [torch.randn(10, size, generator=draws), *past[: setting.bands - 1]]
        correlated = sum(weight * z for weight, z in zip(strategy.weights(step), past, strict=False))
        noise = sigma * norm * strategy.sensitivity(1) * correlated
        sums = ((errors * factors[:, None]).T.to(x.dtype) @ x).float()
        weights, state = optimizer.update(weights, state, (sums + noise) / (rate * total))
    found = state.average if setting.average else weights
    if setting.shrunk:
        noisy = (
            sigma * setting.path_length / steps / (rate * total)
        ) ** 2 * steps  # of a weight, were no noise averaged out
        found = found * (1 - noisy / found.square().mean(0)).clamp(min=0)
    return 100 * float(((test.images @ found.T.to(test.images.dtype)).argmax(1) == test.labels).float().mean())


def _of_length_one(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features, dim=1)


def _features(kind: str, images: Tensor) -> Tensor:
    """Other features of images (N, 1, 28, 28) than the recipe's, of length 1 or less."""
    glyphs = data.glyphs(random.key(0), build.CLASSES, build.HANDS, size=build.SIDE)
    if kind in ("scattering", "centred"):
        plain = _plain["deskewed"]
        mean = plain(glyphs).mean((0, 1)) if kind == "centred" else torch.zeros(())
        return torch.cat([_of_length_one(plain(part[:, 0].float() / 255) - mean) for part in images.split(1000)])
    plain = _plain[kind]
    found = models.discriminants(plain(glyphs), count=build.FEATURES, shrinkage=build.SHRINKAGE)
    return torch.cat([models.discriminated(plain(part[:, 0].float() / 255), found) for part in images.split(1000)])


def _wavelets(images: Tensor, *, scale: int = 2) -> Tensor:
    """Scattering features, normalised in 27 groups of channels, or one of each channel."""
    images = torch.nn.functional.pad(images, (2, 2, 2, 2)) if scale > 2 else images
    found = models.scattering(images, _filters(images.shape[-1], scale))
    return layers.group_norm(found, build.NORM_GROUPS if scale == 2 else 31).flatten(-3)


@cache
def _filters(side: int, scale: int) -> models.Filters:
    return models.scattering_filters(side, side, scale=scale)


_plain: Mapping[str, Callable[[Tensor], Tensor]] = {
    "deskewed": lambda images: _wavelets(data.deskewed(images)),
    "skewed": _wavelets,
    "pixels": lambda images: data.deskewed(images).flatten(-2),
    "three scales": lambda images: _wavelets(data.deskewed(images), scale=3),
}


def table(record: dict[str, Any]) -> dict[str, str]:
    """Tables in Markdown: the frontier, the changes and what others report."""
    return {
        "Frontier": _frontier_table(record["frontier"]),
        "Changes": _change_table(record["changes"]),
        "Published": markdown(
            ("method", "ε as published", "test %", "accountant", "sampling", "source"),
            [[p.method, f"{p.epsilon:g}", f"{p.accuracy:g}", p.account, p.sampling, p.source] for p in PUBLISHED],
        ),
    }


def _frontier_table(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = []
    for epsilon in dict.fromkeys(row["epsilon"] for row in rows):
        of = [row for row in rows if row["epsilon"] == epsilon]
        cells.append([
            f"{epsilon:g}", f"{of[0]['spent']:.3f}", f"{of[0]['noise_multiplier']:g}", str(of[0]["steps"]),
            _spread([row["accuracy"] for row in of]), " ".join(f"{row['accuracy']:.2f}" for row in of),
        ])  # fmt: skip
    return markdown(("ε at most", "ε, PLD", "noise multiplier", "steps", "test %", "seeds"), cells)


def _change_table(rows: Sequence[Mapping[str, Any]]) -> str:
    base = fmean(rows[0]["accuracy"])
    return markdown(
        ("change", "held-out %", "gain", "path length"),
        [
            [row["change"], _spread(row["accuracy"]), f"{fmean(row['accuracy']) - base:+.2f}",
             f"{row['setting']['path_length']:.3g}"]
            for row in rows
        ],
    )  # fmt: skip


def _spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")
