"""`mislabelled`: the training images whose labels are most likely wrong, and how well planted ones are found."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .. import attribution, data, plots, random, run_folder
from ..options import SCORES, Mislabelled, Train, UsageError, listed
from . import build, restore
from .passes import forget
from .restore import Trained
from .scoring import row, scored, suspicion, write_csv, write_picture
from .train import prepare
from .train import run as train_run

_CHECKED = (0.1, 0.2, 0.3)
"""The parts of all examples after which the flips found are printed."""
_SHOWN = 12
"""Images in a row of the gallery."""
_ALL = 2**31 - 1
"""Checkpoints to keep."""


def mislabelled(options: Mislabelled) -> int:
    """Ranks the labels as they are, or plants wrong ones, trains anew and looks for them."""
    prepare(options.threads)
    where = build.device(options.device)
    run = restore.trained(options.run, where)
    names = listed("--scores", options.scores, SCORES)
    dataset = restore.training_images(run, options.data_dir, where)
    images, labels = (rows[: options.images] for rows in dataset.train)
    if options.flip is None:
        return _real(options, run, names, images, labels)
    planted, flipped = attribution.planted(
        labels, dataset.classes, key=random.key(options.seed, device=where), part=options.flip
    )
    if not flipped.any() or flipped.all():
        raise UsageError(f"--flip must flip some of {len(labels)} labels and not all. Found {options.flip}.")
    folder = options.out or options.run / "mislabelled" / f"flip-{options.flip:g}-of-{len(labels)}-seed-{options.seed}"
    changed = data.Dataset(data.Split(images, planted), dataset.test, dataset.classes)
    status = _train(run.options, changed, folder / "training", options)
    if status:
        return status
    return _planted(options, folder, names, changed, flipped.cpu())


def _train(trained: Train, dataset: data.Dataset, folder: Path, options: Mislabelled) -> int:
    """Trains as the run was trained, on other labels; keeps a checkpoint of each epoch."""
    count = len(dataset.train.images)
    per_epoch = data.steps_per_epoch(count, min(trained.batch_size, count))
    wanted = replace(
        trained,
        save_every=per_epoch,
        keep=_ALL,
        out=folder,
        resume=folder if run_folder.exists(folder) else None,
        device=options.device,
        compile=options.compile,
        watch=None,
        watch_every=1,
    )
    return train_run(wanted, dataset, folder, again="the same command")


def _planted(options: Mislabelled, folder: Path, names: tuple[str, ...], dataset: data.Dataset, flipped: Tensor) -> int:
    where = dataset.train.images.device
    run = restore.trained(folder / "training", where)
    images, labels = dataset.train
    per_epoch = data.steps_per_epoch(len(images), min(run.begun.options.batch_size, len(images)))
    points = [  # not those that Ctrl-C has left
        point for point in restore.points(folder / "training", run, where) if point.step % per_epoch == 0
    ]
    config = restore.to_config(run.begun) | {"flip": options.flip, "seed": options.seed}
    kept = folder / ".partial"
    print(f"Scoring {len(images):,} training images at {len(points)} checkpoints.", flush=True)
    found = scored(run, points, images, labels, names, compile=options.compile == "on", folder=kept, config=config)
    labels = labels.cpu()
    columns = {"index": torch.arange(len(labels)), "label": labels, "flipped": flipped.long()}
    write_csv(folder / "scores.csv", columns | {"prediction": found.prediction} | found.scores)
    random_score = random.uniform(random.key(options.seed + 1), (len(labels),))
    ranked = {name: suspicion(name, score) for name, score in found.scores.items()} | {"random": random_score}
    print(f"\n{int(flipped.sum()):,} of {len(labels):,} labels are flipped. Found when checking the first")
    print(f"{'':>15}  {'AUC':>6}" + "".join(f"{part:>8.0%}" for part in _CHECKED))
    for name, score in ranked.items():
        shares = "".join(f"{attribution.found(score, flipped, part):>8.1%}" for part in _CHECKED)
        print(f"{name:>15}  {attribution.auc(score, flipped):>6.4f}{shares}")
    grid = [i / 100 for i in range(101)]
    curves = {name: (grid, [attribution.found(s, flipped, part) for part in grid]) for name, s in ranked.items()}
    print()
    write_picture(folder / "found.png", lambda: plots.found(curves))
    forget(kept)
    return 0


def _real(options: Mislabelled, run: Trained, names: tuple[str, ...], images: Tensor, labels: Tensor) -> int:
    points = restore.points(options.run, run, images.device)
    folder = options.out or options.run / "mislabelled"
    kept = folder / ".partial"
    config = restore.to_config(run.begun) | {"images": len(images)}
    print(f"Scoring {len(images):,} training images at {len(points)} checkpoints.", flush=True)
    found = scored(run, points, images, labels, names, compile=options.compile == "on", folder=kept, config=config)
    labels = labels.cpu()
    ranked = {name: suspicion(name, score) for name, score in found.scores.items()}
    # The mean rank over the scores: they are in different units, and each alone has its own mistakes.
    ranks = torch.stack([score.argsort(descending=True, stable=True).argsort() for score in ranked.values()])
    order = ranks.double().mean(0).argsort(stable=True)
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
    rows = []
    for start in range(0, len(top), _SHOWN):
        chosen = top[start : start + _SHOWN]
        captions = [f"{i}: {labels[i]}\ngiven {found.prediction[i]}" for i in chosen.tolist()]
        rows.append(row("" if start else "most suspicious (index: label, class given)", chosen, images, captions))
    write_picture(folder / "suspicious.png", lambda: plots.gallery(rows))
    forget(kept)
    return 0
