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

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_mnist import allocator, cli, data, layers, losses, models, optim, privacy, random, run_folder, train
from functorch_mnist.models import Params

from . import markdown

QUESTION = "What accuracy does differential privacy cost, and what helps?"

MEAN, DEVIATION = 0.1307, 0.3081
DELTA, EPSILON, EXAMPLES = 1e-5, 2.93, 60_000
LONG = 12
"""The least number of epochs for which compiling pays."""


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
    features: str = ""
    """Fixed ones, with a linear map; without, the 26k CNN."""


class Job(NamedTuple):
    """One run to make."""

    name: str
    setting: Setting
    seed: int
    held_out: bool
    """Whether to train on five sixths of the training images and test on the others."""


class Result(NamedTuple):
    """The result of a run."""

    name: str
    setting: dict[str, Any]
    seed: int
    held_out: bool
    accuracy: float
    """In %."""


class Row(NamedTuple):
    """A published result."""

    setting: Setting
    published: float
    """Mean of the test accuracy in %."""
    deviation: float


PUBLISHED = {
    "15 epochs, σ 1.3": Row(Setting(1.3, 240, 15, 0.25, 1.5), 94.63, 0.34),
    "60 epochs, σ 1.1": Row(Setting(1.1, 240, 60, 0.15, 1.0), 96.78, 0.21),
    "45 epochs, σ 0.7": Row(Setting(0.7, 240, 45, 0.25, 1.5), 97.09, 0.17),
}
BASE = Setting(0.0, 512, 5, 0.0)
"""Of the techniques: 5 epochs of 512 images; the noise is what the budget asks for."""
TECHNIQUES: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "none: ReLU, flat clipping at 1": ({}, (1.0, 2.0, 4.0)),
    "tanh": ({"activation": "tanh"}, (1.0, 2.0, 4.0)),
    "tempered sigmoid, scale 1.58, temperature 3, offset 0.71": ({"activation": "tempered"}, (1.0, 2.0, 4.0)),
    "automatic clipping": ({"automatic": True}, (1.0, 2.0, 4.0)),
    "momentum 0.9": ({"momentum": 0.9}, (0.1, 0.2, 0.4)),
    "EMA of parameters, 0.98": ({"average": 0.98}, (1.0, 2.0, 4.0)),
    "twice the steps": ({"epochs": 10}, (1.0, 2.0, 4.0)),
    "four times the batch, at larger rates": ({"batch_size": 2048}, (1.0, 2.0, 4.0)),
    "two shifted copies of each image": ({"copies": 2}, (1.0, 2.0, 4.0)),
    "scattering features, a linear map": ({"features": "scattering"}, (4.0, 8.0, 16.0)),
    "the same of deskewed images": ({"features": "deskewed scattering"}, (4.0, 8.0, 16.0)),
}
"""What is changed, and the learning rates to choose from, times the clipping norm."""
CHOOSING = 100
"""The seed of the choice."""


def published(seeds: Sequence[int]) -> list[Job]:
    """The runs of the published rows."""
    return [Job(name, row.setting, seed, False) for seed in seeds for name, row in PUBLISHED.items()]


def candidates() -> list[Job]:
    """The runs that the techniques' learning rates are chosen by."""
    found = []
    for name, (changes, rates) in TECHNIQUES.items():
        for rate in rates:
            setting = BASE._replace(lr=rate, **changes)
            if setting.features:  # of length 1 and less, with a clipping norm to match
                setting = setting._replace(max_norm=0.03, lr=round(rate / 0.03, 1))
            found.append(Job(name, setting._replace(noise_multiplier=_noise(setting)), CHOOSING, True))
    return found


def chosen(results: Sequence[Result], seeds: Sequence[int]) -> list[Job]:
    """The runs to report: each technique at the best of its learning rates."""
    best: dict[str, Result] = {}
    for result in results:
        if result.held_out and (result.name not in best or result.accuracy > best[result.name].accuracy):
            best[result.name] = result
    return [Job(name, Setting(**one.setting), seed, False) for seed in seeds for name, one in best.items()]


def _noise(setting: Setting) -> float:
    """What spends the budget, on all training images."""
    rate = setting.batch_size / EXAMPLES
    return privacy.calibrated(
        lambda sigma: privacy.Poisson(rate, sigma), budget=EPSILON, delta=DELTA, steps=round(setting.epochs / rate)
    )


def made(job: Job) -> Result:
    """Makes one run, on one thread."""
    torch.set_num_threads(1)
    allocator.keep_freed_memory()
    return Result(job.name, job.setting._asdict(), job.seed, job.held_out, _accuracy(job))


def _accuracy(job: Job) -> float:
    """The accuracy of one run, in %."""
    setting = job.setting
    images, test, _ = data.load("mnist")
    if job.held_out:
        order = random.permutation(random.key(2024), len(images.labels))
        kept, others = order[10_000:], order[:10_000]
        images, test = (data.Split(images.images[rows], images.labels[rows]) for rows in (kept, others))
    if setting.features:
        model = models.linear(81 * 49, 10, bias=False)
        images, test = (data.Split(_features(split.images, setting.features), split.labels) for split in (images, test))
    else:
        model = models.small_cnn(activation=_ACTIVATIONS[setting.activation])

    def outputs(params: Params, x: Tensor) -> Tensor:
        outputs: Tensor = model.apply(params, x if setting.features else data.normalize(x, MEAN, DEVIATION))
        return outputs

    def loss_fn(params: Params, image: Tensor, label: Tensor, key: Tensor) -> Tensor:
        if not setting.copies:
            return losses.cross_entropy(outputs(params, image), label)
        keys = random.split(key, setting.copies)
        copies = data.shifted(image.expand(setting.copies, *image.shape), keys, pixels=2)
        return losses.cross_entropy(outputs(params, copies), label.expand(setting.copies)).mean()

    clipping = privacy.Automatic(setting.max_norm) if setting.automatic else privacy.Flat(setting.max_norm)
    mechanism = privacy.Poisson(setting.batch_size / len(images.labels), setting.noise_multiplier)
    steps = round(setting.epochs / mechanism.rate)
    optimizer = optim.sgd(setting.lr, momentum=setting.momentum)
    if setting.average:
        optimizer = optim.exponential_moving_average(optimizer, decay=setting.average)
    step = train.make_private_step(
        loss_fn, optimizer, clipping=clipping, mechanism=mechanism, examples=len(images.labels)
    )
    state = train.fit_private(
        step.compiled() if setting.epochs >= LONG and not setting.features else step,
        train.init_private_state(model.init(random.key(job.seed)), optimizer, random.key(job.seed), clipping),
        images,
        secret=privacy.Secret(job.seed),
        steps=steps,
    )
    params = state.optimizer.average if setting.average else state.params
    return 100 * train.evaluate(outputs, losses.cross_entropy, params, *test).accuracy


def _features(images: Tensor, kind: str) -> Tensor:
    """The recipe's features of images, deskewed or not."""
    filters = models.scattering_filters(28, 28)
    parts = []
    for part in images.split(1000):
        pixels = part[:, 0].float() / 255
        pixels = data.deskewed(pixels) if kind.startswith("deskewed") else pixels
        parts.append(layers.group_norm(models.scattering(pixels, filters), 27).flatten(1) / 63)
    return torch.cat(parts)


def _tempered(x: Tensor) -> Tensor:
    return layers.tempered_sigmoid(x, scale=1.58, temperature=3.0, offset=0.71)


_ACTIVATIONS = {**layers.ACTIVATIONS, "tempered": _tempered}


def recipe(seed: int, epochs: int | None = None) -> dict[str, Any]:
    """One run of the recipe as the command makes it: its accuracy in %, its ε and its wall time."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        start = time.perf_counter()
        more = [] if epochs is None else ["--epochs", str(epochs)]
        status = cli.main(
            ["train", "--recipe", "private", "--noise-seed", str(seed), "--seed", str(seed), "--out", str(run), *more]
        )
        seconds = time.perf_counter() - start
        if status:
            raise RuntimeError(f"the recipe's run failed with status {status}")
        records = {record["kind"]: record for record in run_folder.read_metrics(run)}
    test, account = records["test"], records["privacy"]
    return {
        "seed": seed,
        "accuracy": 100 * test["correct"] / test["total"],
        "epsilon": account["epsilon"],
        "delta": account["delta"],
        "accountant": account["accountant"],
        "mechanism": account["mechanism"],
        "seconds": seconds,
        "threads": torch.get_num_threads(),
    }


def run(*, quick: bool, progress: Callable[[str], object]) -> dict[str, Any]:
    """The record: each run's setting and accuracy. Runs are made in parallel, one on each core."""
    seeds = (0,) if quick else (0, 1, 2)
    rows = [recipe(seed, epochs=1 if quick else None) for seed in seeds]
    if quick:
        return record([], rows)
    results = _all(published(seeds) + candidates(), progress)
    return record(results + _all(chosen(results, seeds[:2]), progress), rows)


def record(results: Sequence[Result], recipes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What is written of runs that have been made."""
    return {
        "budget": {"epsilon": EPSILON, "delta": DELTA, "accountant": "pld", "sampling": "Poisson"},
        "runs": [result._asdict() for result in results],
        "recipe": list(recipes),
    }


def _all(jobs: Sequence[Job], progress: Callable[[str], object]) -> list[Result]:
    results = []
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(made, job) for job in jobs]):
            result = done.result()
            results.append(result)
            progress(json.dumps(result._asdict(), ensure_ascii=False))
    return results


def table(record: dict[str, Any]) -> dict[str, str]:
    """Tables in Markdown: the published rows, the techniques and the recipe."""
    runs = [Result(**one) for one in record["runs"]]
    tables = {"Recipe": _recipe_table(record["recipe"])}
    if runs:
        tables = {"Published": _published_table(runs), "Techniques": _technique_table(runs), **tables}
    return tables


def _published_table(runs: Sequence[Result]) -> str:
    rows = []
    for name, row in PUBLISHED.items():
        found = [one.accuracy for one in runs if one.name == name and not one.held_out]
        mechanism = privacy.Poisson(row.setting.batch_size / EXAMPLES, row.setting.noise_multiplier)
        steps = round(row.setting.epochs / mechanism.rate)
        accountants: tuple[privacy.Accountant, ...] = ("rdp-old", "rdp", "pld")
        spent = [privacy.epsilon(mechanism, steps=steps, delta=DELTA, accountant=one) for one in accountants]
        distance = (fmean(found) - row.published) / row.deviation
        rows.append([
            name, *(f"{epsilon:.2f}" for epsilon in spent), f"{row.published:.2f} ± {row.deviation:.2f}",
            _spread(found), f"{distance:+.1f}",
        ])  # fmt: skip
    heads = (
        "setting",
        "ε, old RDP",
        "ε, improved RDP",
        "ε, PLD",
        "published %",
        "measured %",
        "difference, published deviations",
    )
    return markdown(heads, rows)


def _technique_table(runs: Sequence[Result]) -> str:
    rows = []
    for name in TECHNIQUES:
        tried = [one for one in runs if one.name == name and one.held_out]
        best = max(tried, key=lambda one: one.accuracy)
        found = [one.accuracy for one in runs if one.name == name and not one.held_out]
        setting = Setting(**best.setting)
        rows.append([
            name, f"{setting.noise_multiplier:g}", f"{setting.lr * setting.max_norm:.3g}", f"{best.accuracy:.2f}",
            _spread(found),
        ])  # fmt: skip
    return markdown(("change", "noise multiplier", "lr times clipping norm", "held-out %", "test %"), rows)


def _recipe_table(rows: Sequence[dict[str, Any]]) -> str:
    cells = [
        [
            str(row["seed"]),
            f"{row['accuracy']:.2f}",
            f"{row['epsilon']:.3f}",
            f"{row['mechanism']['noise_multiplier']:g}",
            f"{row['seconds']:.0f}",
        ]
        for row in rows
    ]
    cells.append(["all", _spread([row["accuracy"] for row in rows]), "", "", ""])
    return markdown(("seed", "test %", "ε, PLD", "noise multiplier", "seconds, 2 cores"), cells)


def _spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")
