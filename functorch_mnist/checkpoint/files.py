"""A file or a folder on the disk: read without trust, written to last."""

import os
import stat
from pathlib import Path


class CheckpointError(Exception):
    """A checkpoint cannot be written or read; the message names the file and the fault."""


def read(file: Path, limit: int) -> bytes:
    """The bytes of a regular file, read once; CheckpointError if there are more than `limit`, or it is no such file."""
    try:
        # Asks what was opened, not what is to be opened: no gap in which it could be exchanged.
        with open(file, "rb", opener=_open) as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise CheckpointError(f"{file}: must be a regular file.")
            data = stream.read(limit + 1)
    except OSError as error:
        raise CheckpointError(f"{file}: must be a regular file that can be read, no link. {error}.") from error
    if len(data) > limit:
        raise CheckpointError(f"{file}: must have at most {limit} bytes. Found more.")
    return data


def _open(path: str, flags: int) -> int:
    """Opens without following a link or waiting for the writer of a pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def show(text: str) -> str:
    """`text` from a file, safe and short enough for a message."""
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 120 else text[:120] + "…"


def write(file: Path, data: bytes) -> None:
    """Writes a new file and waits until its bytes are on the disk."""
    with open(file, "xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def sync(folder: Path) -> None:
    """Waits until the folder's entries are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make(folder: Path) -> None:
    """Makes the folder and what is missing above it, and waits until they are on the disk."""
    missing = [part for part in (folder, *folder.parents) if not part.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for part in missing:
        sync(part.parent)
