"""`store`: the projected gradients of the training images on disk, with the images' indices in the data set."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import attribution, files, random
from .. import train as training
from ..attribution.store import begun_projection, build
from ..distributed import World, broadcast, check_agreed, digest
from ..models import Params
from ..options import Store
from . import outputs, restore
from .passes import bar
from .processes import SAME, processes
from .sources import first_images

_DIRECTIONS = 2048
"""Training images, evenly spaced, whose gradients the principal directions are of."""
_CHUNK = 256
INDEX = "index.npy"
"""The file in a store's folder of the index in the data set of each row's image: (N,) int64."""


def store(options: Store) -> int:
    """Builds the store, or resumes the build, and prints what it holds."""
    with processes(options) as world:
        return _store(options, world)


def _store(options: Store, world: World) -> int:
    run = restore.trained(options.run, world.device)
    points = restore.points(options.run, run, world.device)
    if options.checkpoints == "newest":
        points = points[-1:]
    dataset = first_images(restore.training_images(run, options.data_dir, world.device), options.images)
    images, labels = dataset.train
    check_agreed(world, "Starting", SAME, data=digest(([point.params for point in points], images, labels)))
    loss_fn = restore.loss_of(run)
    folder = options.out or options.run / "store"
    if world.rank == 0:
        outputs.check_writable(folder)
    maps = broadcast(world, _projection(options, folder, loss_fn, points[-1].params, images, labels))
    checkpoints = outputs.plural(len(points), "checkpoint")
    print(f"Gradients of {len(images):,} training images at {checkpoints}.", flush=True)
    total = len(points) * len(images)
    with bar(total=total, unit=" gradients", silent=world.rank > 0) as progress:
        try:
            built = build(
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
            raise KeyboardInterrupt("Interrupted. The same command resumes after the parts that are there.") from None
    if world.rank == 0:
        array = io.BytesIO()
        np.save(array, dataset.indices.numpy(), allow_pickle=False)
        files.write(folder / INDEX, array.getvalue())
    print(
        f"{len(built):,} images, {built.plan.width:,} features each, {built.bytes / 1e6:,.1f} MB in {folder}. "
        f"Try: functorch-mnist influence {options.run} --store {folder} --test 0:10"
    )
    return 0


def _projection(
    options: Store, folder: Path, loss_fn: Callable[..., Tensor], params: Params, images: Tensor, labels: Tensor
) -> attribution.Projection:
    """That of the folder, where a store is there or was begun; else a new one."""
    begun = begun_projection(folder)
    if begun is not None:
        return begun
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
