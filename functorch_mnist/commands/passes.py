"""Passes over a data set that can be broken off and gone on with: numbers of each example, chunk by chunk."""

import hashlib
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
from ..tree import Tree
from .faults import undisturbed

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
) -> Columns:
    """What `compute` says of each example in each of some passes: columns (count, N).

    Args:
        compute: gets chunks of one size; the last is filled up with its first row, whose numbers are dropped.
        examples: tensors (N, …), at least one example.
        columns: the names that `compute` returns, and their types.
        count: how many passes, at least 1.
        given: the tensors that the numbers hang on besides the examples, such as parameters.
        folder: where what is done is kept until all is. What was computed from something else is dropped.
        config: what else the numbers hang on.

    Raises:
        KeyboardInterrupt: Ctrl-C, after what is done has been saved; it says how to go on.
    """
    total = len(examples[0])
    size = min(CHUNK, total)
    state: Columns = {name: torch.zeros((count, total), dtype=dtype) for name, dtype in columns.items()}
    config = {**config, "digest": digest((given, list(examples)))}
    folder.mkdir(parents=True, exist_ok=True)  # told before the work, if it cannot be
    done, state = _kept(folder, config, state)
    saved_at = time.monotonic()
    with bar(total=count * total, done=done, unit=" examples") as progress:
        try:
            while done < count * total:
                number, start = divmod(done, total)
                rows = slice(start, min(start + size, total))
                found = compute(number, *[_filled(x[rows], size) for x in examples])
                for name, column in state.items():
                    column[number, rows] = found[name][: rows.stop - rows.start].to(column)
                done += rows.stop - rows.start
                progress.update(rows.stop - rows.start)
                if time.monotonic() - saved_at > SAVE_EVERY:
                    checkpoint.save(folder, state, step=done, config=config, keep=1)
                    saved_at = time.monotonic()
        except KeyboardInterrupt:
            if done:
                with undisturbed():
                    checkpoint.save(folder, state, step=done, config=config, keep=1)
            raise KeyboardInterrupt(
                f"Interrupted after {done:,} of {count * total:,} examples. The same command goes on from there."
            ) from None
    return state


def bar(*, total: int, unit: str = "it", done: int = 0, form: str | None = None) -> "tqdm[Any]":
    """A progress bar on a terminal, and nothing elsewhere."""
    size = shutil.get_terminal_size()  # 80 x 24 where a terminal does not say, and tqdm would show nothing
    silent = not sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=done,
        unit=unit,
        disable=silent,
        bar_format=form,
        ncols=size.columns,
        nrows=size.lines,
    )


def digest(values: Tree) -> str:
    """A name of tensors' numbers: equal ones have equal names."""
    seen = hashlib.sha256()
    for leaf in tree.leaves(values):
        seen.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
        seen.update(
            leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() if leaf.numel() else b""
        )
    return seen.hexdigest()


def forget(folder: Path) -> None:
    """Drops what was kept, once it is used."""
    shutil.rmtree(folder, ignore_errors=True)


def _kept(folder: Path, config: Mapping[str, JSON], start: Columns) -> tuple[int, Columns]:
    """How many examples are done, and their numbers; those of another config do not count."""
    for path in reversed(checkpoint.steps(folder)):
        try:
            if checkpoint.read_manifest(path)["config"] == config:
                found = checkpoint.load(path, start)
                print(f"Going on after {found.step:,} examples.", flush=True)
                return found.step, found.state
        except checkpoint.CheckpointError as error:
            print(f"Passed over a damaged file: {error}")
    forget(folder)
    return 0, start


def _filled(rows: Tensor, size: int) -> Tensor:
    missing = size - len(rows)
    return rows if not missing else torch.cat([rows, rows[:1].expand(missing, *rows.shape[1:])])
