"""`store`: the projected gradients of all training images, on disk."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .. import attribution, random
from .. import train as training
from ..attribution.store import begun_projection, build
from ..distributed import World, broadcast, check_agreed, digest
from ..models import Params
from ..options import Store
from . import restore
from .passes import bar
from .processes import SAME, processes

_DIRECTIONS = 2048
"""Training images, evenly spaced, whose gradients the principal directions are of."""
_CHUNK = 256


def store(options: Store) -> int:
    """Builds the store, or goes on with it, and says what it holds."""
    with processes(options) as world:
        return _store(options, world)


def _store(options: Store, world: World) -> int:
    run = restore.trained(options.run, world.device)
    points = restore.points(options.run, run, world.device)
    if options.checkpoints == "newest":
        points = points[-1:]
    train = restore.training_images(run, options.data_dir, world.device).train
    images, labels = (part[: options.images] for part in train)
    check_agreed(world, "Starting", SAME, data=digest(([point.params for point in points], images, labels)))
    loss_fn = restore.loss_of(run)
    folder = options.out or options.run / "store"
    if world.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)  # told before the work, if it cannot be
    maps = broadcast(world, _projection(options, folder, loss_fn, points[-1].params, images, labels))
    print(
        f"Gradients of {len(images):,} training images at {len(points)} checkpoint{'s'[: len(points) > 1]}.", flush=True
    )
    total = len(points) * len(images)
    with bar(total=total, unit=" gradients", silent=world.rank > 0) as progress:
        try:
            found = build(
                folder,
                loss_fn,
                [point.params for point in points],
                images,
                labels,
                projection=maps,
                weights=[point.lr for point in points] if options.checkpoints == "all" else None,
                about=f"training loss without dropout, {options.features} features, {_directions(options)}",
                dtype={"float16": torch.float16, "float32": torch.float32}[options.precision],
                chunk_size=_CHUNK,
                compile=training.compiled if options.compile == "on" else lambda call: call,
                progress=progress.update,
                world=world,
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt("Interrupted. The same command goes on after the parts that are there.") from None
    print(
        f"{len(found):,} images, {found.plan.width:,} numbers each, {found.bytes / 1e6:,.1f} MB in {folder}. "
        f"Now: functorch-mnist influence {options.run} --store {folder} --test 0:10"
    )
    return 0


def _projection(
    options: Store, folder: Path, loss_fn: Callable[..., Tensor], params: Params, images: Tensor, labels: Tensor
) -> attribution.Projection:
    """That of the folder, where a store is there or was begun; else a new one."""
    there = begun_projection(folder)
    if there is not None:
        return there
    if options.projection == "random":
        return _random(options, params)
    step = max(1, len(images) // _DIRECTIONS)
    some = images[::step][:_DIRECTIONS], labels[::step][:_DIRECTIONS]
    print(f"Principal directions of the gradients of {len(some[0]):,} training images.", flush=True)
    return attribution.principal_projection(loss_fn, params, *some, size=options.features, chunk_size=_CHUNK)


def _random(options: Store, params: Params) -> attribution.Projection:
    """The largest one with as many features at most."""
    key, best = random.key(options.seed), 1
    low, high = 1, options.features
    while low <= high:
        middle = (low + high) // 2
        if attribution.projection(params, key=key, size=middle).size <= options.features:
            best, low = middle, middle + 1
        else:
            high = middle - 1
    return attribution.projection(params, key=key, size=best)


def _directions(options: Store) -> str:
    return "principal directions" if options.projection == "principal" else f"random directions {options.seed}"
