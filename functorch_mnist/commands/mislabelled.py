"""`mislabelled`: the training images whose labels are most likely wrong, and how well scores detect planted ones."""

import hashlib
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .. import attribution, data, plots, random, run_folder
from ..distributed import World, digest
from ..options import SCORES, Mislabelled, Train, UsageError, listed
from . import outputs, restore
from .passes import forget
from .processes import processes
from .scores import PARTIAL, Scored, scores_of
from .sources import Parts, first_images
from .train import run as train_run

_INSPECTED = (0.1, 0.2, 0.3)
"""The fractions of the examples inspected at which the fraction of the flipped labels detected is printed."""
_ALL = 2**31 - 1
"""Checkpoints to keep."""


def mislabelled(options: Mislabelled) -> int:
    """Ranks the data set's labels, or trains again on labels with noise and detects it."""
    with processes(options) as world:
        return _mislabelled(options, world)


def _mislabelled(options: Mislabelled, world: World) -> int:
    run = restore.trained(options.run, world.device)
    names = listed("--scores", options.scores, SCORES)
    dataset = first_images(restore.training_images(run, options.data_dir, world.device), options.images)
    (images, labels), clean = dataset.train, dataset._replace(held_out=None)
    if options.label_noise is None:
        folder = options.out or options.run / "mislabelled"
        scored = _scored(options, options.run, names, clean, folder, world)
        return 0 if world.rank else _rank(options, folder, clean, scored)
    noisy, flipped = attribution.label_noise(
        labels, dataset.classes, key=random.key(options.seed, device=world.device), fraction=options.label_noise
    )
    if not flipped.any() or flipped.all():
        raise UsageError(
            f"--label-noise must flip some of {len(labels)} labels and not all. Found {options.label_noise}."
        )
    name = f"label-noise-{options.label_noise:g}-of-{len(labels)}-seed-{options.seed}"
    folder = options.out or options.run / "mislabelled" / name
    wanted = _options(run.options, len(images), options)
    # Named after all that it depends on, so that no training on other labels is taken for it.
    same = replace(wanted, device="cpu", compile="off", threads=None, timeout=120)
    training = folder / f"training-{hashlib.sha256((digest((images, noisy)) + repr(same)).encode()).hexdigest()[:12]}"
    noised = clean._replace(train=data.Split(images, noisy))
    status = train_run(
        replace(wanted, resume=training if run_folder.exists(training) else None),
        noised,
        training,
        again="the same command",
        world=world,
    )
    if status:
        return status
    scored = _scored(options, training, names, noised, folder, world)
    return 0 if world.rank else _detect(options, folder, clean, noisy.cpu(), scored)


def _options(trained: Train, count: int, options: Mislabelled) -> Train:
    """Those of training as the run was trained, with a checkpoint of each epoch."""
    return replace(
        trained,
        save_every=data.steps_per_epoch(count, min(trained.batch_size, count)),
        keep=_ALL,
        out=None,
        resume=None,
        data_dir=None,
        device=options.device,
        compile=options.compile,
        threads=options.threads,
        processes=1,
        timeout=options.timeout,
        shards=None,
        watch=None,
        watch_every=1,
        train_size=None,
        hold_out=0,
        patience=None,
        imbalance=None,
        tune=None,
    )


def _scored(
    options: Mislabelled, folder: Path, names: tuple[str, ...], dataset: Parts, out: Path, world: World
) -> Scored:
    """The scores over the checkpoints of the run in a folder; with label noise, over those at the ends of epochs."""
    run = restore.trained(folder, world.device)
    points = restore.points(folder, run, world.device)
    config = restore.to_config(run.begun) | {"images": len(dataset.indices)}
    if options.label_noise is not None:  # Ctrl-C may have left others
        per_epoch = data.steps_per_epoch(run.begun.examples, min(run.begun.options.batch_size, run.begun.examples))
        points = [point for point in points if point.step % per_epoch == 0]
        config |= {"label_noise": options.label_noise, "seed": options.seed}
    return scores_of(run, points, *dataset.train, names, options=options, folder=out, config=config, world=world)


def _suspicion(scored: Scored) -> dict[str, Tensor]:
    """The scores, turned so that they are high where a label may be wrong."""
    return {name: -score if name == "margin" else score for name, score in scored.scores.items()}


def _detect(options: Mislabelled, folder: Path, dataset: Parts, noisy: Tensor, scored: Scored) -> int:
    """Writes and prints how many of the flipped labels each score detects."""
    original = dataset.train.labels.cpu()
    flipped = original != noisy
    columns = {"index": dataset.indices, "original_label": original, "given_label": noisy, "flipped": flipped.long()}
    outputs.write_csv(folder / "scores.csv", columns | {"predicted": scored.predicted} | scored.scores)
    chance = random.uniform(random.fold_in(random.key(options.seed), 1), (len(noisy),))
    ranked = _suspicion(scored) | {"random": chance}
    print(f"\n{int(flipped.sum()):,} of {len(noisy):,} labels are flipped. Detected when inspecting the first")
    print(f"{'':>15}  {'AUC':>6}" + "".join(f"{fraction:>8.0%}" for fraction in _INSPECTED))
    for name, score in ranked.items():
        recalls = "".join(f"{attribution.recall_at(score, flipped, fraction):>8.1%}" for fraction in _INSPECTED)
        print(f"{name:>15}  {attribution.auc(score, flipped):>6.4f}{recalls}")
    grid = [i / 100 for i in range(101)]
    curves = {name: (grid, [attribution.recall_at(s, flipped, part) for part in grid]) for name, s in ranked.items()}
    print()
    outputs.write_picture(folder / "detection.png", lambda: plots.detection(curves))
    forget(folder / PARTIAL)
    return 0


def _rank(options: Mislabelled, folder: Path, dataset: Parts, scored: Scored) -> int:
    """Writes and prints the labels from the most suspicious on."""
    (images, labels), index = dataset.train, dataset.indices
    labels = labels.cpu()
    # The mean rank over the scores: they are in different units, and each alone has its own mistakes.
    ranks = torch.stack([attribution.ranks(score) for score in _suspicion(scored).values()])
    order = ranks.mean(0).argsort(descending=True, stable=True)
    columns = {"index": index, "given_label": labels, "predicted": scored.predicted, **scored.scores}
    columns = {"rank": torch.arange(1, len(order) + 1)} | {name: column[order] for name, column in columns.items()}
    outputs.write_csv(folder / "suspicious.csv", columns)
    top = order[: options.top].tolist()
    names = list(scored.scores)
    print(f"\nThe most suspicious of {len(labels):,} labels, by the mean rank of {', '.join(names)}:")
    print(f"{'index':>8}{'given label':>13}{'predicted':>11}" + "".join(f"{name:>16}" for name in names))
    for i in top:
        values = "".join(f"{score[i].item():>16.4g}" for score in scored.scores.values())
        print(f"{index[i]:>8}{labels[i]:>13}{scored.predicted[i]:>11}{values}")
    print()
    captions = [f"{index[i]}: {labels[i]}\npredicted {scored.predicted[i]}" for i in top]
    pictures = outputs.rows("most suspicious (index: given label, predicted label)", images[top], captions)
    outputs.write_picture(folder / "suspicious.png", lambda: plots.gallery(pictures))
    forget(folder / PARTIAL)
    return 0
