"""The files that commands write: tables as CSV, pictures as PNG. A folder is tried before the work that fills it."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from .. import files, plots

WIDTH = 12
"""Images in a row of a gallery."""
_MAX_HEADER = 500
"""Characters of a replaced table's first line that are read."""


def check_writable(folder: Path) -> None:
    """Makes a folder if it is not there and writes a nameless file into it.

    Raises:
        OSError: it cannot be made, or nothing can be written there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def write(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all, and prints its path.

    Raises:
        OSError: it cannot be written.
    """
    files.write(path, data)
    print(f"Written: {path}", flush=True)


def write_csv(path: Path, columns: Mapping[str, Tensor]) -> None:
    """Writes columns (N,) under their names, and prints the path; says so where that replaces a table, and which.

    Raises:
        OSError: it cannot be written.
    """
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            before = file.readline(_MAX_HEADER).strip().replace(",", ", ")
        print(f"Replacing {path}, which had the columns {before}.")
    write(path, csv(columns))


def write_picture(path: Path, draw: Callable[[], bytes]) -> None:
    """Draws and writes a picture, and prints its path.

    Raises:
        OSError: it cannot be written.
    """
    write(path, draw())


def rows(title: str, images: Tensor, captions: Sequence[str]) -> list[plots.Row]:
    """Rows of a gallery that show images (n, 1, 28, 28), `WIDTH` in each; the first row has the title."""
    return [
        plots.Row("" if start else title, images[start : start + WIDTH].squeeze(1), captions[start : start + WIDTH])
        for start in range(0, len(images), WIDTH)
    ]


def csv(columns: Mapping[str, Tensor]) -> bytes:
    """Columns (N,) as the lines of a CSV file, the first with their names."""
    lists = [column.tolist() for column in columns.values()]
    lines = [",".join(columns), *(",".join(map(_cell, row)) for row in zip(*lists, strict=True))]
    return ("\n".join(lines) + "\n").encode()


def plural(count: int, noun: str) -> str:
    """A count with its noun, such as `1 checkpoint` or `3 checkpoints`."""
    return f"{count:,} {noun}{'s'[: count != 1]}"


def _cell(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.7g}"
