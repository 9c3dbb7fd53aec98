"""`influence`: the most helpful and the most harmful training images of test images, by their gradients.

One test image is compared with the gradients of all training images, computed for it; many with those of a store.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import grad

from .. import data, per_sample, plots, statistics
from .. import train as training
from ..attribution.store import StoreError, Top, load
from ..attribution.store.queries import By
from ..distributed import World, digest
from ..models import Params
from ..options import Influence, UsageError
from ..tree import Tree
from . import outputs, restore
from .faults import check_finite
from .passes import forget, passes
from .processes import processes
from .restore import Trained
from .scores import PARTIAL
from .sources import Parts, first_images
from .store import INDEX

_PAGE = 10
"""Test images in a picture."""


class _Ends(NamedTuple):
    """The ends of the ranking of the training images for each of M test images."""

    helpful: Top
    """(M, k): from the largest influence."""
    harmful: Top
    """(M, k): from the smallest."""

    def end(self, i: int, sign: int, most: int | None = None) -> list[tuple[int, float]]:
        """The places and influences of the training images of one sign, for test image i, the strongest first."""
        top = self.helpful if sign > 0 else self.harmful
        pairs = zip(top.indices[i, :most].tolist(), top.scores[i, :most].tolist(), strict=True)
        return [(place, score) for place, score in pairs if sign * score > 0]


def influence(options: Influence) -> int:
    """Writes influence.csv and pictures, and prints both ends of the ranking."""
    with processes(options) as world:
        return _influence(options, world)


def _influence(options: Influence, world: World) -> int:
    if options.store is not None and world.size > 1:
        raise UsageError("influence --store computes in one process. Leave out --processes.")
    run = restore.trained(options.run, world.device)
    dataset = first_images(restore.training_images(run, options.data_dir, world.device), options.images)
    start, stop = options.tests
    if stop > len(dataset.test.images):
        raise UsageError(f"--test must be below {len(dataset.test.images)}. Found {options.test}.")
    tests = data.Split(*[rows[start:stop] for rows in dataset.test])
    if options.store is None:
        folder, ends = _computed(options, run, dataset, tests, world)
    else:
        folder, dataset, ends = _asked(options, options.store, run, dataset, tests)
    if world.rank:
        return 0
    predicted = training.predictions(run.made.outputs, run.params, tests.images).argmax(-1)
    _print(options, start, tests, predicted, run, dataset, ends)
    pages = range(0, len(tests.labels), _PAGE)
    for first in pages:
        page = range(first, min(first + _PAGE, len(tests.labels)))
        pictures = _pictures(page, start, tests, predicted, dataset, ends)
        name = f"influence-{start + first:05d}.png" if len(pages) > 1 or stop - start > 1 else "influence.png"
        outputs.write_picture(folder / name, partial(plots.gallery, pictures))
    forget(folder / PARTIAL)
    return 0


def _computed(options: Influence, run: Trained, dataset: Parts, tests: data.Split, world: World) -> tuple[Path, _Ends]:
    """The influence of each training image on one test image, written as a table."""
    test, method = options.tests[0], options.method or "tracin"
    points = restore.points(options.run, run, world.device)
    if method != "tracin":
        points = points[-1:]
    (images, labels), (image, label) = dataset.train, (rows[0] for rows in tests)
    loss_fn = restore.loss_of(run)

    def one_pass(params: Params, direction: Tree, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        quantity = statistics.cosines if method == "cosine" else per_sample.dot
        return {"influence": quantity(loss_fn, params, images, labels, direction=direction)}

    call = training.compiled(one_pass) if options.compile == "on" else one_pass
    folder = options.out or options.run / "influence" / f"test-{test}-{method}"
    if world.rank == 0:
        outputs.check_writable(folder)
    print(
        f"Influence of {len(images):,} training images on test image {test}, given label {int(label)}, "
        f"by {method} at {outputs.plural(len(points), 'checkpoint')}.",
        flush=True,
    )
    directions = [grad(loss_fn)(point.params, image, label) for point in points]
    columns = passes(
        lambda number, *part: call(points[number].params, directions[number], *part),
        (images, labels),
        {"influence": torch.float32},
        count=len(points),
        given=([point.params for point in points], directions),
        folder=folder / PARTIAL,
        config=restore.to_config(run.begun)
        | {
            "images": len(images),
            "test": test,
            "steps": [point.step for point in points],
            "method": method,
            "compile": options.compile,
        },
        world=world,
    )
    check_finite(columns, "The influences", "Has the run diverged?")
    lrs = torch.tensor([point.lr for point in points]) if method == "tracin" else torch.ones(1)
    influences = lrs @ columns["influence"]
    order = influences.argsort(descending=True, stable=True)
    if world.rank == 0:
        same = torch.ones_like(order)
        predicted = training.predictions(run.made.outputs, run.params, tests.images).argmax(-1)
        table = {
            "test_index": same * test,
            "test_label": same * int(label),
            "test_predicted": same * int(predicted),
            "rank": torch.arange(1, len(order) + 1),
            "index": dataset.indices[order],
            "given_label": labels.cpu()[order],
            "influence": influences[order],
        }
        outputs.write_csv(folder / "influence.csv", table)
    tops = (some[: options.top] for some in (order, order.flip(0)))
    return folder, _Ends(*[Top(influences[some][None], some[None]) for some in tops])


def _asked(options: Influence, at: Path, run: Trained, dataset: Parts, tests: data.Split) -> tuple[Path, Parts, _Ends]:
    """The ends of a store's ranking for each test image, written as a table."""
    store = load(at)
    dataset = first_images(dataset, len(store))
    if [one.digest for one in store.plan.examples] != [digest(list(dataset.train))]:
        raise StoreError(f"{at} must be of the run's {len(dataset.indices):,} training images. Found others.")
    _check_index(at, dataset.indices)
    several = len(store.plan.checkpoints) > 1
    points = restore.points(options.run, run, tests.images.device)
    points = points if several else points[-1:]
    method = options.method or ("tracin" if several else "dot")
    if method == "tracin" and not several:
        raise UsageError(
            f"TracIn needs the gradients of several checkpoints. Found one in {at}. "
            f"Build with: functorch-mnist store {options.run} --checkpoints all --out {at}-all"
        )
    start, stop = options.tests
    name = f"test-{start}" if stop == start + 1 else f"test-{start}-to-{stop - 1}"
    folder = options.out or options.run / "influence" / f"{name}-{method}-stored"
    outputs.check_writable(folder)
    print(
        f"Influence of {len(store):,} training images on {outputs.plural(len(tests.labels), 'test image')}, "
        f"by {method} of {store.plan.width:,} features at {outputs.plural(len(points), 'checkpoint')}.",
        flush=True,
    )
    queries = store.features(restore.loss_of(run), [point.params for point in points], *tests)
    by: By = "dot" if method == "tracin" else method
    count = min(options.top, len(store))
    ends = _Ends(*[store.top(queries, count, by=by, lowest=lowest) for lowest in (False, True)])
    outputs.write_csv(folder / "influence.csv", _table(start, tests, run, dataset, ends))
    return folder, dataset, ends


def _check_index(at: Path, index: Tensor) -> None:
    """Refuses a store whose rows are of other images of the data set; says so where a store does not name them.

    Raises:
        StoreError: it is of others.
    """
    path = at / INDEX
    if not path.exists():
        print(f"{at} does not hold the indices of its images in the data set (no {INDEX}); those of the run are used.")
        return
    try:
        kept = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} must be a file of NumPy's. Found: {error}.") from error
    if not np.array_equal(kept, index.numpy()):
        raise StoreError(f"{path} must hold the indices of the run's training images. Found others.")


def _table(start: int, tests: data.Split, run: Trained, dataset: Parts, ends: _Ends) -> dict[str, Tensor]:
    """A row for each test image and training image: the helpful ones, then the harmful, each from the strongest."""
    labels = dataset.train.labels.tolist()
    predicted = training.predictions(run.made.outputs, run.params, tests.images).argmax(-1).tolist()
    lines = [
        (start + i, int(label), predicted[i], rank, int(dataset.indices[place]), labels[place], influence)
        for i, label in enumerate(tests.labels.tolist())
        for sign in (1, -1)
        for rank, (place, influence) in enumerate(ends.end(i, sign), 1)
    ]
    columns = zip(*lines, strict=True) if lines else [()] * 7
    names = ("test_index", "test_label", "test_predicted", "rank", "index", "given_label", "influence")
    return {name: torch.tensor(column) for name, column in zip(names, columns, strict=True)}


def _print(
    options: Influence, start: int, tests: data.Split, predicted: Tensor, run: Trained, dataset: Parts, ends: _Ends
) -> None:
    """The strongest training images of each sign: a table of one test image, one of each sign for several."""
    images, labels = dataset.train
    shown = min(len(tests.labels), _PAGE)
    for i in range(shown):
        print(f"Test image {start + i}: given label {tests.labels[i]}, predicted label {predicted[i]}")
        for title, sign in (("helpful", 1), ("harmful", -1)):
            some = ends.end(i, sign, options.top if len(tests.labels) == 1 else 1)
            if not some:
                print(f"  most {title}: none")
                continue
            print(f"  most {title}:\n{'rank':>8}{'index':>8}{'given label':>13}{'predicted':>11}{'influence':>12}")
            own = training.predictions(run.made.outputs, run.params, images[[j for j, _ in some]]).argmax(-1).tolist()
            for rank, ((j, score), label) in enumerate(zip(some, own, strict=True), 1):
                print(f"{rank:>8}{dataset.indices[j]:>8}{labels[j]:>13}{label:>11}{score:>12.4g}")
    if shown < len(tests.labels):
        print(f"… and {len(tests.labels) - shown:,} more in influence.csv")


def _pictures(
    page: Sequence[int], start: int, tests: data.Split, predicted: Tensor, dataset: Parts, ends: _Ends
) -> list[plots.Row]:
    """For each test image a row of it and the most helpful training images, and a row of the most harmful."""
    (images, labels), index, rows = dataset.train, dataset.indices, list[plots.Row]()
    for i in page:
        for title, sign in (("helpful", 1), ("harmful", -1)):
            chosen = ends.end(i, sign, outputs.WIDTH - 1)
            shown = torch.cat([tests.images[i : i + 1], images[[place for place, _ in chosen]]])
            captions = [f"{index[j]}: {labels[j]}\n{score:.3g}" for j, score in chosen]
            heading = (
                f"most {title} for test {start + i}, given label {tests.labels[i]}, predicted {predicted[i]} "
                "(index: given label, influence)"
            )
            rows += outputs.rows(heading, shown, [f"test {start + i}: {tests.labels[i]}\nmost {title}", *captions])
    return rows
