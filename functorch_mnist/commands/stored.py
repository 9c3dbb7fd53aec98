"""`influence --store`: the training images that helped and hurt most on many test images, asked of a store."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .. import plots
from ..attribution.store import StoreError, Top, load
from ..attribution.store.queries import By
from ..distributed import World, digest
from ..options import Influence, UsageError
from . import restore
from .scoring import rows, write_csv, write_picture

_PICTURED, _SHOWN = 10, 8
"""Test images in a picture, and images beside each."""


def influence(options: Influence, folder: Path, world: World) -> int:
    """Writes influence.csv and a picture of every ten test images, and prints the first images of each end."""
    if world.size > 1:
        raise UsageError("influence --store computes in one process. Leave out --processes.")
    run = restore.trained(options.run, world.device)
    dataset = restore.training_images(run, options.data_dir, world.device)
    start, stop = options.tests
    if stop > len(dataset.test.images):
        raise UsageError(f"--test must be below {len(dataset.test.images)}. Found {options.test}.")
    store = load(folder)
    images, labels = (part[: len(store)] for part in dataset.train)
    if [one.digest for one in store.plan.examples] != [digest([images, labels])]:
        raise StoreError(f"{folder} must be of the run's {len(images):,} training images. Found others.")
    points = restore.points(options.run, run, world.device)
    several = len(store.plan.checkpoints) > 1
    points = points if several else points[-1:]
    method = options.method or ("tracin" if several else "dot")
    if method == "tracin" and not several:
        raise UsageError(
            f"TracIn needs the gradients of several checkpoints. Found one in {folder}. "
            f"Build with: functorch-mnist store {options.run} --checkpoints all --out {folder}-all"
        )
    by: By = "dot" if method == "tracin" else method
    tests, test_labels = (part[start:stop] for part in dataset.test)
    print(
        f"Influence of {len(store):,} training images on {len(tests):,} test image{'s'[: len(tests) > 1]}, "
        f"by {method} of {store.plan.width:,} numbers at {len(points)} checkpoint{'s'[: len(points) > 1]}.",
        flush=True,
    )
    queries = store.features(restore.loss_of(run), [point.params for point in points], tests, test_labels)
    count = min(options.top, len(store))
    helped, hurt = (store.top(queries, count, by=by, lowest=lowest) for lowest in (False, True))
    name = f"test-{start}" if stop == start + 1 else f"test-{start}-to-{stop - 1}"
    out = options.out or options.run / "influence" / f"{name}-{method}-stored"
    write_csv(out / "influence.csv", _table(start, test_labels, labels.cpu(), {1: helped, -1: hurt}))
    _print(start, test_labels, labels.cpu(), helped, hurt)
    for first in range(0, len(tests), _PICTURED):
        page = range(first, min(first + _PICTURED, len(tests)))
        pictures = _pictures(page, start, tests, test_labels, images, labels.cpu(), helped, hurt)
        write_picture(out / f"influence-{start + first:05d}.png", partial(plots.gallery, pictures))
    return 0


def _table(start: int, test_labels: Tensor, labels: Tensor, ends: dict[int, Top]) -> dict[str, Tensor]:
    """A row for each test image and training image: those that helped, from the first, then those that hurt."""
    columns: dict[str, list[Tensor]] = {
        name: [] for name in ("test", "test_label", "place", "index", "label", "influence")
    }
    for sign, top in ends.items():
        m, k = top.indices.shape
        at = torch.arange(m)[:, None].expand(m, k)
        keep = (sign * top.scores > 0).flatten()
        place = (sign * torch.arange(1, k + 1)).expand(m, k)
        values = (at + start, test_labels.cpu()[at], place, top.indices, labels[top.indices], top.scores)
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value.flatten()[keep])
    joined = {name: torch.cat(parts) for name, parts in columns.items()}
    order = (joined["test"] * 1000 - joined["place"].sign() * 500 + joined["place"].abs()).argsort(stable=True)
    return {name: column[order] for name, column in joined.items()}


def _print(start: int, test_labels: Tensor, labels: Tensor, helped: Top, hurt: Top) -> None:
    """The first training image of each end, for the first test images."""
    shown = min(len(test_labels), _PICTURED)
    for i in range(shown):
        told = []
        for title, sign, top in (("helped", 1, helped), ("hurt", -1, hurt)):
            index, score = int(top.indices[i, 0]), float(top.scores[i, 0])
            found = f"{index} (a {labels[index]}, {score:.3g})" if sign * score > 0 else "none"
            told.append(f"{title} most by {found}")
        print(f"Test image {start + i}, a {int(test_labels[i])}: {', '.join(told)}")
    if shown < len(test_labels):
        print(f"… and {len(test_labels) - shown:,} more in influence.csv")


def _pictures(
    page: Sequence[int],
    start: int,
    tests: Tensor,
    test_labels: Tensor,
    images: Tensor,
    labels: Tensor,
    helped: Top,
    hurt: Top,
) -> list[plots.Row]:
    """For each test image a row of it and those that helped, and a row of those that hurt."""
    found = []
    for i in page:
        for title, sign, top in (("helped", 1, helped), ("hurt", -1, hurt)):
            kept = [
                (int(j), float(s))
                for j, s in zip(top.indices[i, :_SHOWN], top.scores[i, :_SHOWN], strict=True)
                if sign * float(s) > 0
            ]
            chosen = [j for j, _ in kept]
            captions = [f"{j}: {labels[j]}\n{s:.3g}" for j, s in kept]
            row = rows("", chosen, images, captions)[0] if chosen else plots.Row("", images[:0].squeeze(1), [])
            caption = f"test {start + i}: {int(test_labels[i])}\n{title} most"
            shown = torch.cat([tests[i : i + 1].squeeze(1), row.images])
            found.append(row._replace(images=shown, captions=[caption, *row.captions]))
    return found
