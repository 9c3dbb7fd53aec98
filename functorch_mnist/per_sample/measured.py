"""What was measured of ways to take sample gradients: a readable file under the user's cache folder.

A record says of one op, on one machine, how long each way took. Files are read without trust, and replaced whole.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import warnings
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import machine

Place = Mapping[str, Any]
"""What times depend on: machine, versions, precision, and the op with its sizes."""

FORMAT = 1
LIMIT = 2**24
"""Bytes of the largest file that is read."""


def default_file() -> Path:
    """`functorch_mnist/ways.json` in `$XDG_CACHE_HOME`, or in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "functorch_mnist" / "ways.json"


def here(device: torch.device) -> dict[str, Any]:
    """The machine, and the versions that run on it."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    try:
        own = metadata.version("functorch-mnist")
    except metadata.PackageNotFoundError:  # run where it lies
        own = ""
    versions = {"torch": torch.__version__, "functorch-mnist": own}
    return {"processor": gpu or machine.processor(), "threads": torch.get_num_threads(), **versions}


def read(file: Path) -> list[dict[str, Any]]:
    """The records; none where there is no file, or it is damaged, which is said as a warning."""
    try:
        with open(file, "rb") as stream:
            found = json.loads(stream.read(LIMIT + 1))
        records = found["records"] if found["format"] == FORMAT else None
        if not isinstance(records, list) or not all(_is_record(record) for record in records):
            raise ValueError
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        warnings.warn(f"{file} cannot be read as measured ways and is ignored.", stacklevel=2)
        return []
    return records


def _is_record(record: Any) -> bool:
    times = record.get("milliseconds") if isinstance(record, dict) else None
    return isinstance(times, dict) and all(isinstance(t, (int, float)) and 0 < t < math.inf for t in times.values())


def find(records: list[dict[str, Any]], place: Place, *, near: float = 1) -> dict[str, float] | None:
    """The milliseconds of each way in a place, or of a batch up to `near` times as large or small; else none."""
    found: list[tuple[float, dict[str, float]]] = []
    for record in records:
        if all(record.get(name) == value for name, value in place.items() if name != "batch"):
            batch = record.get("batch")
            if isinstance(batch, int) and batch > 0:
                apart = max(batch / place["batch"], place["batch"] / batch)
                found += [(apart, record["milliseconds"])] if apart <= near else []
    return min(found, key=lambda pair: pair[0])[1] if found else None


def add(file: Path, place: Place, times: Mapping[str, float]) -> None:
    """Adds a record, in place of an older one of the same place; the file is replaced in one move.

    Raises:
        OSError: the file cannot be written; the one before is as it was.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said when it was read
        records = read(file)
    kept = [record for record in records if find([record], place) is None]
    text = json.dumps({"format": FORMAT, "records": [*kept, {**place, "milliseconds": dict(times)}]}, indent=1)
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.name, suffix=".new")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text + "\n")
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
