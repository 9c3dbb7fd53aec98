"""`mislabelled`: the training images whose labels are most likely wrong, and how well scores detect planted ones."""

import hashlib
from collections.abc import Mapping
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

_INSPECTED = (0.05, 0.1, 0.2, 0.3)
"""The fractions of the examples inspected at which the fraction of the flipped labels detected is printed."""
_EPOCHS = 10
"""The epochs that are advised at least, for scores that are means over them."""
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
    scored = scores_of(run, points, *dataset.train, names, options=options, folder=out, config=config, world=world)
    if len(points) == 1 and options.label_noise is None:
        trained = run.begun.options
        per_epoch = data.steps_per_epoch(run.begun.examples, min(trained.batch_size, run.begun.examples))
        print(
            f"This run keeps 1 checkpoint; train with --epochs {max(trained.epochs, _EPOCHS)} --save-every {per_epoch} "
            f"--keep {max(trained.epochs, _EPOCHS)} to average scores over epochs, which detects more."
        )
    return scored


def _suspicion(scored: Scored) -> dict[str, Tensor]:
    """The scores, turned so that they are high where a label may be wrong."""
    return {name: -score if name == "margin" else score for name, score in scored.scores.items()}


def _mean_rank(scored: Scored) -> Tensor:
    """(N,) float64: the mean over the scores of each label's rank, where 1 is the most suspicious.

    The scores are in different units, and each alone has its own mistakes."""
    return torch.stack([attribution.ranks(-score) for score in _suspicion(scored).values()]).mean(0)


def _print_top(top: list[int], columns: Mapping[str, Tensor], scored: Scored, mean_rank: Tensor) -> None:
    """Prints a table of the most suspicious labels.

    Args:
        top: their places.
        columns: (N,) each: integers, shown before the scores.
        scored: the scores.
        mean_rank: (N,).
    """
    names = [f"{name} ({'low' if name == 'margin' else 'high'})" for name in scored.scores]
    print(f"\nThe {len(top)} most suspicious of {len(mean_rank):,} labels, by the mean rank over the scores.")
    print("In brackets: which end of a score is suspicious.")
    widths = [len(name) + 2 for name in (*columns, *names)]
    heads = [f"{name:>{width}}" for name, width in zip((*columns, *names), widths, strict=True)]
    print("".join([*heads[: len(columns)], f"{'mean rank':>11}", *heads[len(columns) :]]))
    for i in top:
        integers = [f"{column[i].item():>{width}}" for column, width in zip(columns.values(), widths, strict=False)]
        scores = zip(scored.scores.values(), widths[len(columns) :], strict=True)
        values = [f"{score[i].item():>{width}.4g}" for score, width in scores]
        print("".join([*integers, f"{mean_rank[i].item():>11.1f}", *values]))
    print()


def _detect(options: Mislabelled, folder: Path, dataset: Parts, noisy: Tensor, scored: Scored) -> int:
    """Writes and prints how many of the flipped labels each score detects."""
    original = dataset.train.labels.cpu()
    flipped = original != noisy
    columns = {"index": dataset.indices, "original_label": original, "given_label": noisy, "flipped": flipped.long()}
    columns |= {"predicted": scored.predicted}
    mean_rank = _mean_rank(scored)
    outputs.write_csv(folder / "scores.csv", columns | {"mean_rank": mean_rank} | scored.scores)
    chance = random.uniform(random.fold_in(random.key(options.seed), 1), (len(noisy),))
    ranked = _suspicion(scored) | {"random": chance}
    print(f"\n{int(flipped.sum()):,} of {len(noisy):,} labels are flipped. Detected when inspecting the first")
    print(f"{'':>15}  {'AUC':>6}" + "".join(f"{fraction:>8.0%}" for fraction in _INSPECTED))
    for name, score in ranked.items():
        recalls = "".join(f"{attribution.recall_at(score, flipped, fraction):>8.1%}" for fraction in _INSPECTED)
        print(f"{name:>15}  {attribution.auc(score, flipped):>6.4f}{recalls}")
    grid = [i / 100 for i in range(101)]
    curves = {name: (grid, [attribution.recall_at(s, flipped, part) for part in grid]) for name, s in ranked.items()}
    shown = {name.replace("_", " "): column for name, column in columns.items() if name != "flipped"}
    _print_top(mean_rank.argsort(stable=True)[: options.top].tolist(), shown, scored, mean_rank)
    outputs.write_picture(folder / "detection.png", lambda: plots.detection(curves))
    forget(folder / PARTIAL)
    return 0


def _rank(options: Mislabelled, folder: Path, dataset: Parts, scored: Scored) -> int:
    """Writes and prints the labels from the most suspicious on."""
    (images, labels), index = dataset.train, dataset.indices
    labels = labels.cpu()
    mean_rank = _mean_rank(scored)
    order = mean_rank.argsort(stable=True)
    shown = {"index": index, "given label": labels, "predicted": scored.predicted}
    columns = {name.replace(" ", "_"): column for name, column in shown.items()}
    columns |= {"mean_rank": mean_rank, **scored.scores}
    columns = {"rank": torch.arange(1, len(order) + 1)} | {name: column[order] for name, column in columns.items()}
    outputs.write_csv(folder / "suspicious.csv", columns)
    top = order[: options.top].tolist()
    _print_top(top, shown, scored, mean_rank)
    captions = [f"{index[i]}: {labels[i]}\npredicted {scored.predicted[i]}" for i in top]
    pictures = outputs.rows("most suspicious (index: given label, predicted label)", images[top], captions)
    outputs.write_picture(folder / "suspicious.png", lambda: plots.gallery(pictures))
    forget(folder / PARTIAL)
    return 0
