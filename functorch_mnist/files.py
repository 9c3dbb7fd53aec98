"""Files that are written whole or not at all. Nothing here imports torch."""

import os
import secrets
from pathlib import Path


def write(path: Path, data: bytes) -> None:
    """Writes a file so that a reader finds the old or the new one, never a part.

    Raises:
        OSError: it cannot be written; it names the file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")  # others may write it too
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
