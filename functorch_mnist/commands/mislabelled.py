"""`mislabelled`: the training images whose labels are most likely wrong, and how well planted ones are found."""

import hashlib
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .. import attribution, data, plots, random, run_folder
from ..distributed import World, digest
from ..options import SCORES, Mislabelled, Train, UsageError, listed
from . import restore
from .passes import forget
from .processes import processes
from .restore import Trained
from .scoring import rows, scored, suspicion, write_csv, write_picture
from .sources import Parts
from .train import run as train_run

_CHECKED = (0.1, 0.2, 0.3)
"""The parts of all examples after which the flips found are printed."""
_ALL = 2**31 - 1
"""Checkpoints to keep."""


def mislabelled(options: Mislabelled) -> int:
    """Ranks the labels as they are, or plants wrong ones, trains anew and looks for them."""
    with processes(options) as world:
        return _mislabelled(options, world)


def _mislabelled(options: Mislabelled, world: World) -> int:
    where = world.device
    run = restore.trained(options.run, where)
    names = listed("--scores", options.scores, SCORES)
    dataset = restore.training_images(run, options.data_dir, where)
    images, labels = (part[: options.images] for part in dataset.train)
    if options.label_noise is None:
        return _real(options, run, names, images, labels, world)
    planted, flipped = attribution.label_noise(
        labels, dataset.classes, key=random.key(options.seed, device=where), part=options.label_noise
    )
    if not flipped.any() or flipped.all():
        raise UsageError(
            f"--label-noise must flip some of {len(labels)} labels and not all. Found {options.label_noise}."
        )
    folder = (
        options.out
        or options.run / "mislabelled" / f"flip-{options.label_noise:g}-of-{len(labels)}-seed-{options.seed}"
    )
    changed = Parts(data.Split(images, planted), None, dataset.test, dataset.classes)
    wanted = _options(run.options, changed, options)
    # Named after all that it hangs on, so that no training on other labels is taken for it.
    same = replace(wanted, device="cpu", compile="off", threads=None, timeout=120)
    name = digest((images, planted)) + repr(same)
    training = folder / f"training-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    status = train_run(
        replace(wanted, resume=training if run_folder.exists(training) else None),
        changed,
        training,
        again="the same command",
        world=world,
    )
    return status or _planted(options, folder, training, names, changed, flipped.cpu(), world)


def _options(trained: Train, dataset: Parts, options: Mislabelled) -> Train:
    """Those of training as the run was trained, with a checkpoint of each epoch."""
    count = len(dataset.train.images)
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


def _planted(
    options: Mislabelled,
    folder: Path,
    training: Path,
    names: tuple[str, ...],
    dataset: Parts,
    flipped: Tensor,
    world: World,
) -> int:
    """Looks for the flips with the scores over the training."""
    run = restore.trained(training, dataset.train.images.device)
    images, labels = dataset.train
    per_epoch = data.steps_per_epoch(len(images), min(run.begun.options.batch_size, len(images)))
    points = [  # not those that Ctrl-C has left
        point for point in restore.points(training, run, images.device) if point.step % per_epoch == 0
    ]
    config = restore.to_config(run.begun) | {"flip": options.label_noise, "seed": options.seed}
    kept = folder / ".partial"
    print(f"Scoring {len(images):,} training images at {len(points)} checkpoint{'s'[: len(points) > 1]}.", flush=True)
    found = scored(
        run, points, images, labels, names, compile=options.compile == "on", folder=kept, config=config, world=world
    )
    if world.rank:
        return 0
    labels = labels.cpu()
    columns = {"index": torch.arange(len(labels)), "label": labels, "flipped": flipped.long()}
    write_csv(folder / "scores.csv", columns | {"prediction": found.prediction} | found.scores)
    random_score = random.uniform(random.fold_in(random.key(options.seed), 1), (len(labels),))
    ranked = {name: suspicion(name, score) for name, score in found.scores.items()} | {"random": random_score}
    print(f"\n{int(flipped.sum()):,} of {len(labels):,} labels are flipped. Found when checking the first")
    print(f"{'':>15}  {'AUC':>6}" + "".join(f"{part:>8.0%}" for part in _CHECKED))
    for name, score in ranked.items():
        shares = "".join(f"{attribution.recall_at(score, flipped, part):>8.1%}" for part in _CHECKED)
        print(f"{name:>15}  {attribution.auc(score, flipped):>6.4f}{shares}")
    grid = [i / 100 for i in range(101)]
    curves = {name: (grid, [attribution.recall_at(s, flipped, part) for part in grid]) for name, s in ranked.items()}
    print()
    write_picture(folder / "found.png", lambda: plots.found(curves))
    forget(kept)
    return 0


def _real(
    options: Mislabelled, run: Trained, names: tuple[str, ...], images: Tensor, labels: Tensor, world: World
) -> int:
    points = restore.points(options.run, run, images.device)
    folder = options.out or options.run / "mislabelled"
    kept = folder / ".partial"
    config = restore.to_config(run.begun) | {"images": len(images)}
    print(f"Scoring {len(images):,} training images at {len(points)} checkpoint{'s'[: len(points) > 1]}.", flush=True)
    found = scored(
        run, points, images, labels, names, compile=options.compile == "on", folder=kept, config=config, world=world
    )
    if world.rank:
        return 0
    labels = labels.cpu()
    ranked = {name: suspicion(name, score) for name, score in found.scores.items()}
    # The mean rank over the scores: they are in different units, and each alone has its own mistakes.
    ranks = torch.stack([attribution.ranks(score) for score in ranked.values()])
    order = ranks.mean(0).argsort(descending=True, stable=True)
    columns = {"rank": torch.arange(len(order)), "index": order, "label": labels[order]}
    columns |= {"prediction": found.prediction[order]} | {name: score[order] for name, score in found.scores.items()}
    write_csv(folder / "suspicious.csv", columns)
    top = order[: options.top]
    print(f"\nThe most suspicious of {len(labels):,} labels, by the mean rank of {', '.join(names)}:")
    print(f"{'index':>8}{'label':>7}{'given':>7}" + "".join(f"{name:>16}" for name in names))
    for i in top.tolist():
        values = "".join(f"{found.scores[name][i].item():>16.4g}" for name in names)
        print(f"{i:>8}{labels[i].item():>7}{found.prediction[i].item():>7}{values}")
    print()
    captions = [f"{i}: {labels[i]}\ngiven {found.prediction[i]}" for i in top.tolist()]
    pictures = rows("most suspicious (index: label, class given)", top.tolist(), images, captions)
    write_picture(folder / "suspicious.png", lambda: plots.gallery(pictures))
    forget(kept)
    return 0
