"""Passes over a data set that can be interrupted and resumed: numbers of each example, chunk by chunk."""

import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .. import checkpoint, tree
from ..checkpoint import JSON
from ..distributed import World, all_gather, broadcast, check_agreed, digest
from ..distributed.attendance import deferred_signals
from ..tree import Tree
from .processes import SAME

CHUNK = 512
"""Examples taken at a time."""
SAVE_EVERY = 15.0
"""Seconds between two saves of what is done."""

Columns = dict[str, Tensor]
Compute = Callable[..., Mapping[str, Tensor]]
"""`compute(number of the pass, *rows) -> {name: (rows,)}`: of each example, whatever the others are."""


def passes(
    compute: Compute,
    examples: Sequence[Tensor],
    columns: Mapping[str, torch.dtype],
    *,
    count: int,
    given: Tree,
    folder: Path,
    config: Mapping[str, JSON],
    world: World,
) -> Columns:
    """The numbers of each example in each of some passes: columns (count, N).

    Args:
        compute: gets chunks of one size; the last is filled up with its first row, whose numbers are dropped.
        examples: tensors (N, …), at least one example.
        columns: the names that `compute` returns, and their types.
        count: how many passes, at least 1.
        given: the tensors that the numbers depend on besides the examples, such as parameters.
        folder: where what is done is kept until all is. What was computed from something else is dropped.
        config: what else the numbers depend on.
        world: the processes, each of which takes one chunk of each round; the first one keeps what is done.

    Raises:
        KeyboardInterrupt: Ctrl-C, after what is done has been saved; it says how to resume.
    """
    total = len(examples[0])
    size = min(CHUNK, total)
    state: Columns = {name: torch.zeros((count, total), dtype=dtype) for name, dtype in columns.items()}
    config = {**config, "digest": digest((given, list(examples)))}
    check_agreed(world, "Starting", SAME, data=str(config["digest"]))
    done = 0
    if world.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)  # reported before the work, if it cannot be
        done, state = _kept(folder, config, state)
    shared = tree.map(lambda x: x.to(world.device), (state, torch.tensor([done])))
    state, before = tree.map(Tensor.cpu, broadcast(world, shared))
    done, saved_at = int(before), time.monotonic()
    with bar(total=count * total, done=done, unit=" examples", silent=world.rank > 0) as progress:
        try:
            while done < count * total:
                number, start = divmod(done, total)
                chunks = [slice(at, min(at + size, total)) for at in range(start, total, size)][: world.size]
                found = _computed(compute, number, examples, chunks, size, columns, world)
                rows = slice(start, chunks[-1].stop)
                for name, column in state.items():
                    column[number, rows] = found[name].to(column)
                done += rows.stop - rows.start
                progress.update(rows.stop - rows.start)
                if time.monotonic() - saved_at > SAVE_EVERY and world.rank == 0:
                    checkpoint.save(folder, state, step=done, config=config, keep=1)
                    saved_at = time.monotonic()
        except KeyboardInterrupt:
            if done and world.rank == 0:
                with deferred_signals():
                    checkpoint.save(folder, state, step=done, config=config, keep=1)
            raise KeyboardInterrupt(
                f"Interrupted after {done:,} of {count * total:,} examples. The same command goes on from there."
            ) from None
    return state


def _computed(
    compute: Compute,
    number: int,
    examples: Sequence[Tensor],
    chunks: Sequence[slice],
    size: int,
    columns: Mapping[str, torch.dtype],
    world: World,
) -> Columns:
    """The numbers of the examples of at most as many chunks as there are processes, each process's its own."""
    sizes = [rows.stop - rows.start for rows in chunks] + [0] * (world.size - len(chunks))
    if sizes[world.rank]:
        found = compute(number, *[_filled(x[chunks[world.rank]], size) for x in examples])
        mine = {name: found[name][: sizes[world.rank]].to(kind) for name, kind in columns.items()}
    else:
        mine = {name: torch.zeros(0, dtype=kind, device=world.device) for name, kind in columns.items()}
    return all_gather(world, mine, sizes)


def bar(*, total: int, unit: str = "it", done: int = 0, form: str | None = None, silent: bool = False) -> "tqdm[Any]":
    """A progress bar on a terminal, and nothing elsewhere."""
    size = shutil.get_terminal_size()  # 80 x 24 where a terminal does not say, and tqdm would show nothing
    silent = silent or not sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=done,
        unit=unit,
        disable=silent,
        bar_format=form,
        ncols=size.columns,
        nrows=size.lines,
    )


def forget(folder: Path) -> None:
    """Drops what was kept, once it is used."""
    shutil.rmtree(folder, ignore_errors=True)


def _kept(folder: Path, config: Mapping[str, JSON], start: Columns) -> tuple[int, Columns]:
    """How many examples are done, and their numbers; those of another config do not count."""
    for path in reversed(checkpoint.steps(folder)):
        try:
            if checkpoint.read_manifest(path)["config"] == config:
                found = checkpoint.load(path, start)
                print(f"Resuming after {found.step:,} examples.", flush=True)
                return found.step, found.state
        except checkpoint.CheckpointError as error:
            print(f"Passed over a damaged file: {error}")
    forget(folder)
    return 0, start


def _filled(rows: Tensor, size: int) -> Tensor:
    missing = size - len(rows)
    return rows if not missing else torch.cat([rows, rows[:1].expand(missing, *rows.shape[1:])])
