"""How well scores of single examples detect labels that were flipped, on two scales.

    thousand   dattri's protocol: the first 1,000 images of MNIST, a tenth of the labels flipped, an MLP, 20 epochs
    whole      all 60,000 images, a tenth of the labels flipped, the tutorial's CNN with dropout, 2 epochs

A ranking's AUC is how likely a flipped label has a higher score than a right one; a tenth of all examples checked is as
many as there are flipped labels. The MLP's width, learning rate and momentum are those of the highest mean AUC of any
score on seeds of their own; the seeds that are reported take no part in the choice. A seed gives the initial
parameters, the order of examples, the flips and the dropout.

The value during training is in-run data Shapley, of `train.gradient_with_data_values`: one run for each kind of
validation images, whose gradient is a moving average over draws of a few. The lower the value, the more suspect.

    clean validation    1,000 images with right labels that are not trained on: on the small scale the next training
                        images, on the large one, which leaves none, test images
    noisy validation    the training images themselves, flipped labels and all: no right label is known

and, on the small scale, to the clean images of each class alone: a wrong label hurts the class of its image. The draws
and the average of the large scale were chosen on seed 50, which is not reported.

Reference: Deng et al., "dattri: a library for efficient data attribution", NeurIPS 2024. Value: Wang et al., "Data
Shapley in one training run", ICLR 2025.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_mnist import attribution, data, losses, models, optim, per_sample, random, train

from . import markdown

QUESTION = "How well do scores of single examples detect wrong labels?"

CLASSES, PART, BATCH_SIZE = 10, 0.1, 64
MEAN, DEVIATION = 0.1307, 0.3081
CHECKED = (0.1, 0.2, 0.3)
CONTROL = "random"
BY_CLASS = "one class's"


class Setting(NamedTuple):
    """How an MLP is trained."""

    hidden: int
    lr: float
    momentum: float


class Valuing(NamedTuple):
    """How values are found."""

    draw: int
    """Validation images whose gradient is taken at a time."""
    smoothing: float
    """Decay of the moving average of such gradients."""
    every: int
    """Steps from one to the next."""
    second: bool
    """Whether also of second order, which needs one in each step."""
    classes: bool
    """Whether also to the validation images of each class: a run for each."""


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
    validation: int
    """Clean validation images."""


FULL = Sizes(
    images=1_000,
    epochs=20,
    settings=tuple(itertools.starmap(Setting, itertools.product((128, 256, 512), (0.01, 0.05, 0.1), (0.0, 0.9)))),
    choosing=(100, 101, 102),
    seeds=(0, 1, 2, 3, 4),
    whole_images=60_000,
    whole_epochs=2,
    whole_seeds=(0, 1),
    validation=1_000,
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
    validation=100,
)
WHOLE_LR, WHOLE_MOMENTUM = 0.01, 0.9
THOUSAND_VALUING = Valuing(64, 0.98, 1, second=True, classes=True)
WHOLE_VALUING = Valuing(8, 0.98, 1, second=False, classes=False)


def run(*, quick: bool, progress: Callable[[str], object]) -> dict[str, Any]:
    """The record: what was tried, and of each seed the AUC of each score and the part of the flips that it finds."""
    sizes = QUICK if quick else FULL
    mnist = data.load("mnist")
    examples, count = mnist.train, sizes.images
    some, clean = _some(examples, 0, count), _some(examples, count, count + sizes.validation)
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
        thousand.append({"seed": seed, **_thousand(some, chosen, sizes.epochs, seed, clean)})
        progress(f"thousand: seed {seed}, {_best_of(thousand[-1])}")
    many, clean, whole = _some(examples, 0, sizes.whole_images), _some(mnist.test, 0, sizes.validation), []
    for seed in sizes.whole_seeds:
        whole.append({"seed": seed, **_whole(many, sizes.whole_epochs, seed, clean)})
        progress(f"whole: seed {seed}, {_best_of(whole[-1])}")
    common = {"flipped": PART, "batch_size": BATCH_SIZE, "clean_validation": sizes.validation}
    return {
        "thousand": {
            "settings": {
                "images": sizes.images,
                "epochs": sizes.epochs,
                **common,
                "model": "mlp",
                **chosen._asdict(),
                "valuing": THOUSAND_VALUING._asdict(),
            },
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
                "valuing": WHOLE_VALUING._asdict(),
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
        heads = ["score", "AUC", *[f"detected, {100 * checked:.0f} % inspected" for checked in CHECKED]]
        names = sorted(seeds[0]["scores"], key=lambda name: -fmean(_aucs(seeds, name)))
        rows = [
            [
                name,
                _spread(_aucs(seeds, name), 1, 4),
                *[
                    _spread([one["scores"][name]["detected"][place] for one in seeds], 100, 1) + " %"
                    for place in range(len(CHECKED))
                ],
            ]
            for name in names
        ]
        title = f"Flipped labels detected, {part['settings']['images']:,} images, {_counted(len(seeds), 'seed')}"
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


def _some(examples: data.Split, first: int, stop: int) -> data.Split:
    return data.Split(*[rows[first:stop] for rows in examples])


def _thousand(
    examples: data.Split, setting: Setting, epochs: int, seed: int, clean: data.Split | None = None
) -> dict[str, Any]:
    """The record of one seed on the small scale."""
    model = models.mlp([examples.images[0].numel(), setting.hidden, CLASSES])

    def outputs(params: models.Params, images: Tensor, keys: Tensor | None = None) -> Tensor:
        outputs: Tensor = model.apply(params, data.normalize(images, MEAN, DEVIATION).flatten(-3), keys)
        return outputs

    return _trained(model.init, outputs, examples, setting.lr, setting.momentum, epochs, seed, clean, THOUSAND_VALUING)


def _whole(examples: data.Split, epochs: int, seed: int, clean: data.Split) -> dict[str, Any]:
    """The record of one seed on the large scale."""
    model = models.cnn()

    def outputs(params: models.Params, images: Tensor, keys: Tensor | None = None) -> Tensor:
        outputs: Tensor = model.apply(params, data.normalize(images, MEAN, DEVIATION), keys)
        return outputs

    return _trained(model.init, outputs, examples, WHOLE_LR, WHOLE_MOMENTUM, epochs, seed, clean, WHOLE_VALUING)


def _trained(
    init: Callable[[Tensor], models.Params],
    outputs: Callable[..., Tensor],
    examples: data.Split,
    lr: float,
    momentum: float,
    epochs: int,
    seed: int,
    clean: data.Split | None,
    how: Valuing,
) -> dict[str, Any]:
    """The record of one seed: trained on flipped labels, scored after each epoch; with clean images, valued as well."""
    init_key, train_key, flip_key, control_key = random.split(random.key(seed), 4).unbind()
    labels, flipped = attribution.label_noise(examples.labels, CLASSES, key=flip_key, fraction=PART)
    optimizer = optim.sgd(lr, momentum=momentum)

    def losses_fn(params: models.Params, images: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
        return losses.cross_entropy(outputs(params, images, keys), labels)

    checkpoints: list[attribution.Scores] = []

    def score(at: train.Progress) -> None:
        if at.epoch_ended:
            found = attribution.scores(outputs, at.state.params, examples.images, labels=labels, chunk_size=512)
            checkpoints.append(found)

    def fitted(
        estimator: train.Estimator,
        callback: Callable[[train.Progress], None],
        renewing: train.Estimator | None = None,
    ) -> None:
        train.fit(
            train.make_step(estimator, optimizer),
            train.init_state(init(init_key), optimizer, train_key, renewing),
            (examples.images, labels),
            epochs=epochs,
            batch_size=BATCH_SIZE,
            watch=None if renewing is None else train.Watch(train.make_step(renewing, optimizer), how.every),
            callbacks=(callback,),
        )

    fitted(train.batch_gradient(losses_fn), score)
    correct = torch.stack([one.prediction for one in checkpoints]) == labels
    by_epoch, rankings = _rankings(checkpoints, correct, lr)
    if clean is not None:
        loss_fn = per_sample.prepare(losses_fn, init(init_key), examples.images[0], labels[0], random.key(0))

        def validation_loss(params: models.Params, image: Tensor, label: Tensor) -> Tensor:
            return losses.cross_entropy(outputs(params, image), label)

        for kind, validation in {"clean": clean, "noisy": data.Split(examples.images, labels)}.items():
            valuing = partial(
                train.gradient_with_data_values, loss_fn, validation, validation_loss=validation_loss,
                validation_batch=how.draw, ema_decay=how.smoothing,
            )  # fmt: skip
            valuer, order = _Valuer(len(labels), lr), 2 if how.second and kind == "clean" else 1
            fitted(valuing(refresh=False), valuer, valuing(order=order))
            for name, rows in valuer.by_epoch(kind).items():
                by_epoch[name], rankings[name] = rows, rows[-1]
        if how.classes:
            by_class = []
            for label in range(CLASSES):
                chosen = clean.labels == label
                valuing = partial(
                    train.gradient_with_data_values, loss_fn, data.Split(*[x[chosen] for x in clean]),
                    validation_loss=validation_loss, validation_batch=how.draw, ema_decay=how.smoothing,
                )  # fmt: skip
                valuer = _Valuer(len(labels), lr)
                fitted(valuing(refresh=False), valuer, valuing())
                by_class.append(valuer.by_epoch(BY_CLASS)[f"data value, {BY_CLASS} validation, first order"])
            name = "data value, clean validation, class hurt most"
            by_epoch[name] = torch.stack(by_class).amax(0)
            rankings[name] = by_epoch[name][-1]
    rankings[CONTROL] = random.uniform(control_key, (len(labels),))
    return {
        "accuracy_on_right_labels": (correct[-1] & ~flipped).sum().item() / (~flipped).sum().item(),
        "fitted_flips": (correct[-1] & flipped).sum().item() / flipped.sum().item(),
        "scores": {
            name: {
                "auc": attribution.auc(ranking, flipped),
                "detected": [attribution.recall_at(ranking, flipped, checked) for checked in CHECKED],
            }
            for name, ranking in rankings.items()
        },
        "by_epoch": {name: [attribution.auc(row, flipped) for row in rows] for name, rows in by_epoch.items()},
    }


class _Valuer:
    """Adds up the values of a run's steps: of first order, and of second where there is one."""

    def __init__(self, examples: int, lr: float) -> None:
        self.lr, self.totals, self.ends = lr, torch.zeros(2, examples, dtype=torch.float64), list[Tensor]()
        self.orders = 1

    def __call__(self, progress: train.Progress) -> None:
        aux = dict(progress.aux)
        second = train.data_values(aux, lr=self.lr)
        self.orders = 1 + (aux.pop("gradient_hessian_gradient", None) is not None)
        self.totals[:, progress.drawn] += torch.stack([train.data_values(aux, lr=self.lr), second]).double()
        if progress.epoch_ended:
            self.ends.append(self.totals.clone())

    def by_epoch(self, kind: str) -> dict[str, Tensor]:
        """By name, the suspicion (T, N) at each epoch's end."""
        orders = ("first", "second")[: self.orders]
        return {
            f"data value, {kind} validation, {order} order": -torch.stack([ends[place] for ends in self.ends])
            for place, order in enumerate(orders)
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
