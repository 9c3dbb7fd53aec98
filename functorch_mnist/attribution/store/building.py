"""From examples to the files of a store, part by part.

A part is computed from its examples alone, always in chunks of one size, and written whole. So a killed build leaves
whole parts, the next build resumes after them, and the bits depend neither on interruptions nor on the number of
processes. The manifest, written last, makes a store of them.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import batch as batches
from ...arguments import check_params
from ...distributed import SINGLE_PROCESS, World, all_gather, digest
from ...per_sample import Plan as SamplePlan
from ...per_sample import factored
from ...tree import Tree
from ..projections import Projection
from . import manifest
from .manifest import BEGUN, NAME, Checkpoint, Examples, File, Part, Plan, StoreError
from .numbers import blocks, features, rounded
from .queries import Store, load, read_maps

Compile = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]
"""`compile(fn) -> fn`, such as `train.compiled`."""


def _as_it_is(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return call


def _silent(_count: int) -> None:
    """Reports no progress."""


def build(
    folder: Path,
    loss_fn: Callable[..., Tensor],
    checkpoints: Sequence[Tree],
    *examples: Tensor,
    projection: Projection,
    weights: Sequence[float] | None = None,
    about: str = "",
    dtype: torch.dtype = torch.float16,
    rows: int = 4096,
    chunk_size: int = 512,
    plan: SamplePlan | None = None,
    compile: Compile = _as_it_is,
    progress: Callable[[int], object] = _silent,
    world: World = SINGLE_PROCESS,
) -> Store:
    """Builds a gradient store: computes projected gradients of examples and writes them to a folder.

    A build that was killed is resumed.

    Args:
        folder: of the store, created if it does not exist.
        loss_fn: `loss_fn(params, *example) -> ()`, pure.
        checkpoints: a list of the parameters at C checkpoints of training, at least one.
        examples: tensors (N, …), at least one example.
        projection: of these parameters, from `attribution.projection` or `principal_projection`. Where the gradients of
            a parameter are outer products, as of a linear layer at one position, a pair of vectors is stored if it
            takes less space.
        weights: (C,), the factor of each checkpoint's inner products, such as its learning rate for TracIn; by default
            1.
        about: a description of what is differentiated and projected; a store with another description is another one.
        dtype: float16 or float32. Each example's features are scaled by their largest, so that float16 has a relative
            error of 2^-11 in the large ones; `Store.error` bounds that of all.
        rows: examples in a file, at least 1.
        chunk_size: examples computed at a time, at least 1.
        plan: how `per_sample` computes each parameter; by default the cheapest way.
        compile: `compile(fn) -> fn`, applied to the computation of a chunk, such as `train.compiled`.
        progress: called with the number of examples done, after each part.
        world: the processes, all with the same examples and a folder that all can write, which divide the parts.

    Returns:
        The store. An existing one of the same examples, parameters and settings is opened.

    Raises:
        StoreError: the folder holds another store, or one that is being built; features are not finite.
        ValueError: examples, checkpoints, the projection or a number does not fit.
        TypeError: the parameters of a checkpoint are a module.
        OSError: a file cannot be written.

    Guarantees: the same bits however often a build was killed, for every number of processes.

    Cost: one backward pass per checkpoint; memory of a chunk and of a part.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from functorch_mnist import random
        >>> from functorch_mnist.attribution import projection
        >>> params, x = torch.zeros(3), torch.eye(3)
        >>> maps = projection(params, key=random.key(0), size=3)
        >>> with TemporaryDirectory() as folder:
        ...     store = build(Path(folder), torch.dot, [params], x, projection=maps)
        ...     store.top(store.features(torch.dot, [params], x[1:2]), 1).indices
        tensor([[1]])

    Reference: Choe et al., "What is your data worth to GPT?", 2024 (projected gradients on disk).
    """
    for params in checkpoints:
        check_params("store.build", params)
    count = batches.check("store.build", examples, None)
    given = [1.0] * len(checkpoints) if weights is None else [float(w) for w in weights]
    if not checkpoints or len(given) != len(checkpoints) or not all(math.isfinite(w) for w in given):
        raise ValueError(
            f"store.build: at least one checkpoint, and a finite weight for each. "
            f"Found {len(checkpoints)} and weights {given}."
        )
    if count < 1 or min(rows, chunk_size) < 1 or dtype not in (torch.float16, torch.float32):
        raise ValueError(
            f"store.build: examples, rows and chunk_size must be at least 1, dtype float16 or float32. "
            f"Found {count}, {rows}, {chunk_size}, {dtype}."
        )
    found = blocks(loss_fn, checkpoints[0], examples, projection)
    maps = [_array(m) for pair in projection.maps for m in pair]
    names = [f"maps/{i}-{side}.npy" for i in range(len(projection.maps)) for side in ("left", "right")]
    plan_ = Plan(
        about,
        str(dtype).removeprefix("torch."),
        rows,
        found,
        tuple(Checkpoint(digest(params), w) for params, w in zip(checkpoints, given, strict=True)),
        tuple(_file(name, data) for name, data in zip(names, maps, strict=True)),
        (Examples(count, digest(list(examples))),),
    )
    if (folder / NAME).exists():
        there = load(folder)
        if there.plan != plan_:
            raise StoreError(
                f"{folder} holds another store. Found {_difference(there.plan, plan_)}. Choose another folder."
            )
        return there
    _begin(folder, plan_, world, dict(zip(names, maps, strict=True)))
    return _finish(
        folder, plan_, (), loss_fn, checkpoints, examples, projection, chunk_size, plan, compile, progress, world
    )


def append(
    folder: Path,
    loss_fn: Callable[..., Tensor],
    checkpoints: Sequence[Tree],
    *examples: Tensor,
    chunk_size: int = 512,
    plan: SamplePlan | None = None,
    compile: Compile = _as_it_is,
    progress: Callable[[int], object] = _silent,
    world: World = SINGLE_PROCESS,
) -> Store:
    """Appends examples to a store, with its projection and settings. Their indices follow those of the stored ones.

    An append that was killed is resumed.

    Args:
        folder: of the store.
        loss_fn, checkpoints: those of the store.
        examples: tensors (N, …), at least one example.
        chunk_size, plan, compile, progress, world: as in `build`.

    Returns:
        The store with the new examples.

    Raises:
        StoreError: there is no store, it is damaged, or it has other checkpoints.
        ValueError: the examples do not fit.
    """
    if batches.check("store.append", examples, None) < 1:
        raise ValueError("store.append: at least one example. Found none.")
    there = load(folder)
    there.check_checkpoints(checkpoints)
    new = Examples(len(examples[0]), digest(list(examples)))
    if there.plan.examples[-1] == new and len(there.plan.examples) > 1:
        return there
    plan_ = replace(there.plan, examples=(*there.plan.examples, new))
    _begin(folder, plan_, world, {})
    return _finish(
        folder, plan_, there.parts, loss_fn, checkpoints, examples, there.projection, chunk_size, plan, compile,
        progress, world,
    )  # fmt: skip


def begun_projection(folder: Path) -> Projection | None:
    """The projection of a store that exists or whose build was begun, to resume it.

    Args:
        folder: of the store.

    Returns:
        The projection, or None where there is no store.

    Raises:
        StoreError: it is damaged.
    """
    for name in (NAME, BEGUN):
        if (folder / name).exists():
            return read_maps(folder, manifest.decode(folder / name)[0])
    return None


def _begin(folder: Path, plan: Plan, world: World, maps: Mapping[str, bytes]) -> None:
    """Writes the projection and the plan of the build, or checks them against what was begun."""
    if (folder / BEGUN).exists():
        begun, _ = manifest.decode(folder / BEGUN)
        if begun != plan:
            raise StoreError(
                f"{folder} holds another store that is being built. Found {_difference(begun, plan)}. "
                f"Finish that one, remove it, or choose another folder."
            )
    elif world.rank == 0:
        for name, data in maps.items():
            manifest.write(folder / name, data)
        manifest.write(folder / BEGUN, manifest.encode(plan, ()))
    _wait(world)


def _finish(
    folder: Path,
    plan: Plan,
    before: tuple[Part, ...],
    loss_fn: Callable[..., Tensor],
    checkpoints: Sequence[Tree],
    examples: tuple[Tensor, ...],
    projection: Projection,
    chunk_size: int,
    sample_plan: SamplePlan | None,
    compile: Compile,
    progress: Callable[[int], object],
    world: World,
) -> Store:
    """Makes the parts that are missing, then the manifest."""

    def one(params: Tree, maps: Tree, mask: Tensor, *batch: Tensor) -> Tensor:
        part = factored(loss_fn, params, *batch, mask=mask, plan=sample_plan)
        return features(part.wide(), Projection(maps), plan.blocks)

    call = compile(one)
    places = list(_places(plan, len(examples[0])))
    mine: list[File] = []
    for checkpoint, first, rows in places[world.rank :: world.size]:
        path = folder / str(checkpoint) / f"{first:09d}.npy"
        if path.exists():
            mine.append(manifest.described(path))
        else:
            values = _computed(call, checkpoints[checkpoint], projection, [x[rows] for x in examples], chunk_size)
            if not values.isfinite().all():
                raise StoreError(
                    f"{folder}: features must be finite. Found others at checkpoint {checkpoint}, examples {first} "
                    f"to {first + len(values) - 1}. Has the run diverged?"
                )
            mine.append(manifest.write(path, _array(rounded(values, plan.row))))
        progress(rows.stop - rows.start)
    parts = _together(world, places, mine)
    if world.rank == 0:
        manifest.write(folder / NAME, manifest.encode(plan, (*before, *parts)))
        for left in (folder / BEGUN, *folder.rglob(".*.tmp")):  # by a build that was killed
            left.unlink(missing_ok=True)
    _wait(world)
    return load(folder)


def _places(plan: Plan, count: int) -> Iterator[tuple[int, int, slice]]:
    """The checkpoint, the number of the first example, and the rows of what is built now, of each part."""
    start = plan.count - count
    for checkpoint in range(len(plan.checkpoints)):
        for at in range(0, count, plan.rows):
            yield checkpoint, start + at, slice(at, min(at + plan.rows, count))


def _computed(
    call: Callable[..., Tensor], params: Tree, projection: Projection, examples: Sequence[Tensor], size: int
) -> Tensor:
    """The numbers (n, F) of some examples, in chunks of one size: the last is filled up and masked."""
    parts = []
    for chunk in batches.chunks("store.build", examples, None, size):
        with torch.no_grad():
            parts.append(chunk.unpadded(call(params, projection.maps, chunk.keep(), *chunk.batch)))
    return torch.cat(parts)


def _together(world: World, places: Sequence[tuple[int, int, slice]], mine: Sequence[File]) -> list[Part]:
    """The parts of all processes, in order."""
    shares = [len(places[rank :: world.size]) for rank in range(world.size)]
    rows = torch.tensor([[file.size, *bytes.fromhex(file.sha256)] for file in mine], dtype=torch.int64)
    found = all_gather(world, rows.view(-1, 33).to(world.device), shares).tolist()
    ranked = [number for rank in range(world.size) for number in range(rank, len(places), world.size)]
    parts: list[Part] = []
    for _, (size, *digits) in sorted(zip(ranked, found, strict=True)):
        checkpoint, first, part = places[len(parts)]
        name = f"{checkpoint}/{first:09d}.npy"
        parts.append(Part(checkpoint, first, part.stop - part.start, File(name, size, bytes(digits).hex())))
    return parts


def _wait(world: World) -> None:
    """Until all processes are here."""
    all_gather(world, torch.zeros(1, dtype=torch.int64, device=world.device))


def _array(values: Any) -> bytes:
    """A file of NumPy's."""
    buffer = io.BytesIO()
    np.save(buffer, values.detach().cpu().numpy() if isinstance(values, Tensor) else values, allow_pickle=False)
    return buffer.getvalue()


def _file(name: str, data: bytes) -> File:
    return File(name, len(data), hashlib.sha256(data).hexdigest())


def _difference(found: Plan, wanted: Plan) -> str:
    """In what two plans differ, by the names of their fields."""
    names = [field.name for field in fields(Plan) if getattr(found, field.name) != getattr(wanted, field.name)]
    return f"other {', '.join(names)}"
