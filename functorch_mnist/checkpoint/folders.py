"""The folders of one run: their names, and the turns of their writers."""

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .files import CheckpointError

_NAME = re.compile(r"(?:\.old-)?step-([0-9]{8}|[1-9][0-9]{8,})")
_TEMPORARY = re.compile(r"\.tmp-step-[0-9]{8,}-[0-9a-f]{8}")


def steps(folder: str | os.PathLike[str]) -> list[Path]:
    """The folders of the checkpoints in `folder`, by step, lowest first; empty if there is no such folder.

    They are recognised by their name, which a folder gets once it is complete; they are not opened. Links are left out.

    Args:
        folder: where the checkpoints of one run are.

    Returns:
        Paths of checkpoints, for `load`.

    Raises:
        CheckpointError: `folder` cannot be listed.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from functorch_mnist.checkpoint import save
        >>> with TemporaryDirectory() as folder:
        ...     paths = [save(folder, {}, step=step, config={}, keep=2) for step in (10, 20, 30)]
        ...     [path.name for path in steps(folder)]
        ['step-00000020', 'step-00000030']
    """
    folder = Path(folder)
    found: dict[int, Path] = {}
    try:
        # Sorted, so that `.old-step-…` yields to `step-…`.
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            step = step_of(entry.name)
            if step is not None and entry.is_dir(follow_symlinks=False):
                found[step] = folder / entry.name
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{folder}: must be a folder of checkpoints. {error}.") from error
    return [found[step] for step in sorted(found)]


def step_of(name: str) -> int | None:
    """The step that a checkpoint's folder is named after."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def final(folder: Path, step: int) -> Path:
    """Where a complete checkpoint is."""
    return folder / f"step-{step:08d}"


def aside(path: Path) -> Path:
    """Where the checkpoint `path` is while it is being replaced."""
    return path.parent / f".old-{path.name}"


def temporary(path: Path) -> Path:
    """A new name, in the same folder, for what is not yet or no longer the checkpoint `path`."""
    return path.parent / f".tmp-{path.name.removeprefix('.old-')}-{os.urandom(4).hex()}"


def hide(path: Path) -> None:
    """Takes its name from a checkpoint, so that none is seen half-removed; the end of the turn removes its files."""
    os.rename(path, temporary(path))


@contextmanager
def turn(folder: Path) -> Iterator[None]:
    """The turn of one writer, with what is temporary removed before and after.

    The lock is let go when the writer dies: so any temporary folder found is a dead one's.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        _tidy(folder)
        try:
            yield
        finally:
            _tidy(folder)
    finally:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # not left to `close`: a forked process may hold the descriptor too
        os.close(descriptor)


def _tidy(folder: Path) -> None:
    """Removes what is temporary; a checkpoint that was set aside for one that never came gets its name back."""
    for entry in list(os.scandir(folder)):
        if entry.name.startswith(".old-") and step_of(entry.name) is not None:
            path = folder / entry.name.removeprefix(".old-")
            with suppress(OSError):  # the next save tries again, and until then `steps` finds it where it is
                if os.path.lexists(path):
                    hide(folder / entry.name)
                else:
                    os.rename(entry, path)
    for entry in list(os.scandir(folder)):
        if _TEMPORARY.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry, ignore_errors=True)
