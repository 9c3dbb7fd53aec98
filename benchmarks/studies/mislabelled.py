"""How well scores of single examples find labels that were flipped, on two scales.

    thousand   dattri's protocol: the first 1,000 images of MNIST, a tenth of the labels flipped, an MLP, 20 epochs
    whole      all 60,000 images, a tenth of the labels flipped, the tutorial's CNN with dropout, 2 epochs

A ranking's AUC is how likely a flipped label has a higher score than a right one; a tenth of all examples checked is as
many as there are flipped labels. The MLP's width, learning rate and momentum are those of the highest mean AUC of any
score on seeds of their own; the seeds that are reported take no part in the choice. A seed gives the initial
parameters, the order of examples, the flips and the dropout.

Reference: Deng et al., "dattri: a library for efficient data attribution", NeurIPS 2024.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_mnist import attribution, data, losses, models, optim, random, train

from . import markdown

QUESTION = "How well do scores of single examples find wrong labels?"

CLASSES, PART, BATCH_SIZE = 10, 0.1, 64
MEAN, DEVIATION = 0.1307, 0.3081
CHECKED = (0.1, 0.2, 0.3)
CONTROL = "random"


class Setting(NamedTuple):
    """How an MLP is trained."""

    hidden: int
    lr: float
    momentum: float


class Sizes(NamedTuple):
    """How much is computed."""

    images: int
    """Of the small scale."""
    epochs: int
    settings: tuple[Setting, ...]
    """Those to choose from."""
    choosing: tuple[int, ...]
    """The seeds that the setting is chosen on."""
    seeds: tuple[int, ...]
    whole_images: int
    whole_epochs: int
    whole_seeds: tuple[int, ...]


FULL = Sizes(
    images=1_000,
    epochs=20,
    settings=tuple(itertools.starmap(Setting, itertools.product((128, 256, 512), (0.01, 0.05, 0.1), (0.0, 0.9)))),
    choosing=(100, 101, 102),
    seeds=(0, 1, 2, 3, 4),
    whole_images=60_000,
    whole_epochs=2,
    whole_seeds=(0, 1),
)
QUICK = Sizes(
    images=300,
    epochs=5,
    settings=(Setting(64, 0.05, 0.0), Setting(64, 0.05, 0.9)),
    choosing=(100,),
    seeds=(0, 1),
    whole_images=3_000,
    whole_epochs=2,
    whole_seeds=(0,),
)
WHOLE_LR, WHOLE_MOMENTUM = 0.01, 0.9


def run(*, quick: bool, progress: Callable[[str], object]) -> dict[str, Any]:
    """The record: what was tried, and of each seed the AUC of each score and the part of the flips that it finds."""
    sizes = QUICK if quick else FULL
    examples = data.load("mnist").train
    some = data.Split(*[rows[: sizes.images] for rows in examples])
    tried = []
    for setting in sizes.settings:
        runs = [_thousand(some, setting, sizes.epochs, seed) for seed in sizes.choosing]
        aucs = {name: fmean(one["scores"][name]["auc"] for one in runs) for name in runs[0]["scores"]}
        best = max(aucs, key=aucs.__getitem__)
        tried.append({**setting._asdict(), "seeds": list(sizes.choosing), "best": best, "mean_auc": aucs})
        progress(f"thousand: {setting}, {best} has an AUC of {aucs[best]:.4f}")
    chosen = sizes.settings[max(range(len(tried)), key=lambda i: tried[i]["mean_auc"][tried[i]["best"]])]
    thousand = []
    for seed in sizes.seeds:
        thousand.append({"seed": seed, **_thousand(some, chosen, sizes.epochs, seed)})
        progress(f"thousand: seed {seed}, {_best_of(thousand[-1])}")
    many, whole = data.Split(*[rows[: sizes.whole_images] for rows in examples]), []
    for seed in sizes.whole_seeds:
        whole.append({"seed": seed, **_whole(many, sizes.whole_epochs, seed)})
        progress(f"whole: seed {seed}, {_best_of(whole[-1])}")
    common = {"flipped": PART, "batch_size": BATCH_SIZE}
    return {
        "thousand": {
            "settings": {"images": sizes.images, "epochs": sizes.epochs, **common, "model": "mlp", **chosen._asdict()},
            "tried": tried,
            "seeds": thousand,
        },
        "whole": {
            "settings": {
                "images": sizes.whole_images,
                "epochs": sizes.whole_epochs,
                **common,
                "model": "cnn",
                "lr": WHOLE_LR,
                "momentum": WHOLE_MOMENTUM,
                "dropout": True,
            },
            "seeds": whole,
        },
    }


def table(record: dict[str, Any]) -> dict[str, str]:
    """The scores on both scales, best first, how their AUC changes with the epochs, and the settings tried."""
    found = {}
    for scale in ("thousand", "whole"):
        part = record[scale]
        seeds = part["seeds"]
        heads = ["score", "AUC", *[f"found, {100 * checked:.0f} % checked" for checked in CHECKED]]
        names = sorted(seeds[0]["scores"], key=lambda name: -fmean(_aucs(seeds, name)))
        rows = [
            [
                name,
                _spread(_aucs(seeds, name), 1, 4),
                *[
                    _spread([one["scores"][name]["found"][place] for one in seeds], 100, 1) + " %"
                    for place in range(len(CHECKED))
                ],
            ]
            for name in names
        ]
        title = f"Flipped labels found, {part['settings']['images']:,} images, {_counted(len(seeds), 'seed')}"
        found[title] = markdown(heads, rows)
        heads = ["epoch", *seeds[0]["by_epoch"]]
        rows = [
            [str(epoch + 1), *[f"{fmean(one['by_epoch'][name][epoch] for one in seeds):.4f}" for name in heads[1:]]]
            for epoch in range(part["settings"]["epochs"])
        ]
        found[f"Mean AUC at the end of an epoch, {part['settings']['images']:,} images"] = markdown(heads, rows)
    tried = record["thousand"]["tried"]
    heads = ["hidden units", "lr", "momentum", "best score", "its mean AUC", "of the loss at the end"]
    rows = [
        [str(one["hidden"]), f"{one['lr']:g}", f"{one['momentum']:g}", one["best"],
         f"{one['mean_auc'][one['best']]:.4f}", f"{one['mean_auc']['loss, end']:.4f}"]
        for one in tried
    ]  # fmt: skip
    found[f"Settings tried, {_counted(len(tried[0]['seeds']), 'other seed')}"] = markdown(heads, rows)
    return found


def _thousand(examples: data.Split, setting: Setting, epochs: int, seed: int) -> dict[str, Any]:
    """The record of one seed on the small scale."""
    model = models.mlp([examples.images[0].numel(), setting.hidden, CLASSES])

    def outputs(params: models.Params, images: Tensor, keys: Tensor | None = None) -> Tensor:
        outputs: Tensor = model.apply(params, data.normalize(images, MEAN, DEVIATION).flatten(-3), keys)
        return outputs

    return _trained(model.init, outputs, examples, setting.lr, setting.momentum, epochs, seed)


def _whole(examples: data.Split, epochs: int, seed: int) -> dict[str, Any]:
    """The record of one seed on the large scale."""
    model = models.cnn()

    def outputs(params: models.Params, images: Tensor, keys: Tensor | None = None) -> Tensor:
        outputs: Tensor = model.apply(params, data.normalize(images, MEAN, DEVIATION), keys)
        return outputs

    return _trained(model.init, outputs, examples, WHOLE_LR, WHOLE_MOMENTUM, epochs, seed)


def _trained(
    init: Callable[[Tensor], models.Params],
    outputs: Callable[..., Tensor],
    examples: data.Split,
    lr: float,
    momentum: float,
    epochs: int,
    seed: int,
) -> dict[str, Any]:
    """The record of one seed: trained on flipped labels, scored after each epoch."""
    init_key, train_key, flip_key, control_key = random.split(random.key(seed), 4).unbind()
    labels, flipped = attribution.planted(examples.labels, CLASSES, key=flip_key, part=PART)
    optimizer = optim.sgd(lr, momentum=momentum)

    def losses_fn(params: models.Params, images: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
        return losses.cross_entropy(outputs(params, images, keys), labels)

    checkpoints: list[attribution.Scores] = []

    def score(at: train.Progress) -> None:
        if at.epoch_ended:
            found = attribution.scores(outputs, at.state.params, examples.images, labels=labels, chunk_size=512)
            checkpoints.append(found)

    train.fit(
        train.make_step(train.batch_gradient(losses_fn), optimizer),
        train.init_state(init(init_key), optimizer, train_key),
        (examples.images, labels),
        epochs=epochs,
        batch_size=BATCH_SIZE,
        callbacks=(score,),
    )
    correct = torch.stack([one.prediction for one in checkpoints]) == labels
    by_epoch, rankings = _rankings(checkpoints, correct, lr)
    rankings[CONTROL] = random.uniform(control_key, (len(labels),))
    return {
        "accuracy_on_right_labels": (correct[-1] & ~flipped).sum().item() / (~flipped).sum().item(),
        "fitted_flips": (correct[-1] & flipped).sum().item() / flipped.sum().item(),
        "scores": {
            name: {
                "auc": attribution.auc(ranking, flipped),
                "found": [attribution.found(ranking, flipped, checked) for checked in CHECKED],
            }
            for name, ranking in rankings.items()
        },
        "by_epoch": {name: [attribution.auc(row, flipped) for row in rows] for name, rows in by_epoch.items()},
    }


def _rankings(
    checkpoints: Sequence[attribution.Scores], correct: Tensor, lr: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Scores (T, N) at each checkpoint, and rankings (N,), by name; the higher, the more suspect."""
    by_epoch = {
        "loss": torch.stack([one.loss for one in checkpoints]),
        "EL2N": torch.stack([one.el2n for one in checkpoints]),
        "GraNd": torch.stack([one.grand for one in checkpoints]),
        "negative margin": -torch.stack([one.margin for one in checkpoints]),
    }
    rankings = {f"{name}, end": rows[-1] for name, rows in by_epoch.items()}
    rankings |= {f"{name}, mean over epochs": rows.mean(0) for name, rows in by_epoch.items()}
    rates = torch.full((len(checkpoints),), lr)
    rankings["self-influence over epochs"] = attribution.self_influence(by_epoch["GraNd"], rates)
    rankings["forgetting events"] = attribution.forgetting_events(correct)
    return by_epoch, rankings


def _best_of(one: Mapping[str, Any]) -> str:
    best = max(one["scores"], key=lambda name: one["scores"][name]["auc"])
    return f"{best} has an AUC of {one['scores'][best]['auc']:.4f}"


def _aucs(seeds: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [one["scores"][name]["auc"] for one in seeds]


def _spread(values: Sequence[float], scale: float, digits: int) -> str:
    """The mean, and with more than one value their standard deviation."""
    mean = f"{scale * fmean(values):.{digits}f}"
    return f"{mean} ± {scale * stdev(values):.{digits}f}" if len(values) > 1 else mean


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' if count > 1 else ''}"
