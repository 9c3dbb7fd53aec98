"""Results: JSON files that are added and never overwritten, with all that a reader needs to judge the numbers."""

import json
import os
import platform
import subprocess
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from .limits import Rates
from .measure import Axis, Comparison, Cost, Missing, Setup, Timing

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "torch", "torchvision", "numpy", "functorch-mnist", "opacus", "backpack-for-pytorch", "jax", "jax-privacy",
    "transformers", "timm",
)  # fmt: skip


class Result:
    """The file of one run of one question. It is whole after each comparison, so a run that stops loses none."""

    def __init__(self, question: str, setup: Setup, machine: dict[str, Any], folder: Path = RESULTS) -> None:
        now = datetime.now(UTC)
        self.comparisons: list[Comparison] = []
        self._head = {
            "question": question, "time": now.isoformat(timespec="seconds"), "machine": machine,
            "setup": setup._asdict(),
        }  # fmt: skip
        self._folder, self._stem = folder, f"{question}-{now.strftime('%Y%m%d-%H%M%S')}"
        self.path: Path | None = None

    def add(self, comparison: Comparison) -> Path:
        """Adds a comparison to the file, which the first one makes."""
        self.comparisons.append(comparison)
        self.path = self.path or _new_file(self._folder, self._stem)
        record = {**self._head, "cases": [_record(one) for one in self.comparisons]}
        whole = self.path.with_suffix(".partial")
        whole.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        whole.replace(self.path)
        return self.path


def read(path: Path) -> tuple[list[Comparison], Rates]:
    """The comparisons of a result, and what its machine does in a second."""
    record = json.loads(path.read_text(encoding="utf-8"))
    return [_comparison(case) for case in record["cases"]], Rates(**record["machine"]["rates"])


def machine() -> dict[str, Any]:
    """Processor, versions and commit: what a number cannot be read without."""
    import torch

    from functorch_mnist import machine as cpu

    return {
        "processor": cpu.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": _commit(),
    }


def _new_file(folder: Path, stem: str) -> Path:
    """A file that did not exist, empty."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(1000):
        path = folder / f"{stem}{f'-{number}' if number else ''}.json"
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            continue
        return path
    raise FileExistsError(f"{folder} holds a thousand results of one second.")


def _record(comparison: Comparison) -> dict[str, Any]:
    return {
        "name": comparison.case,
        "settings": dict(comparison.settings),
        "costs": {precision: cost._asdict() for precision, cost in comparison.costs.items()},
        "axis": comparison.axis and list(comparison.axis),
        "reference": comparison.reference.name,
        "arms": [
            {
                **asdict(timing),
                "median": timing.median,
                "quartiles": list(timing.quartiles),
                "ratio": comparison.ratio(timing),
                "interval": list(comparison.interval(timing)),
            }
            for timing in comparison.timings
        ],
        "missing": [one._asdict() for one in comparison.missing],
    }


def _comparison(record: dict[str, Any]) -> Comparison:
    return Comparison(
        record["name"],
        [Timing(**{name: arm[name] for name in Timing.__dataclass_fields__}) for arm in record["arms"]],
        [Missing(**one) for one in record["missing"]],
        record["settings"],
        {precision: Cost(**cost) for precision, cost in record["costs"].items()},
        record["axis"] and Axis(*record["axis"]),
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
