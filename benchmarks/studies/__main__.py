"""Experiments whose results are not times, study by study.

    python -m benchmarks.studies mislabelled --quick

Each study prints its tables and writes its record, `study-NAME.json`, whole or not at all. A quick one is a look, not a
result: it is written only where --out says so.
"""

import json
import os
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from functorch_mnist import allocator

from .. import results
from ..command import Parser
from . import NAMES, PREFIX, load


def main() -> int:
    parser = Parser("python -m benchmarks.studies", __doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a look, not a result")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"where records go (default: {results.RESULTS})")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch (default: torch's own choice)")
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(NAMES))
    if unknown:
        parser.error(f"no study is named {', '.join(unknown)}. There are {', '.join(NAMES)}.")
    cores = os.cpu_count() or 1
    if options.threads is not None:
        if not 1 <= options.threads <= cores:
            parser.error(f"--threads must be from 1 to {cores}, the cores there are. Found {options.threads}.")
        torch.set_num_threads(options.threads)
    allocator.keep_freed_memory()
    folder = None if options.quick and options.out is None else options.out or results.RESULTS
    for name in dict.fromkeys(options.names or NAMES):
        _answer(name, options.quick, folder)
    return 0


def _answer(name: str, quick: bool, folder: Path | None) -> None:
    """Runs a study, prints its tables and writes its record where there is a folder."""
    study = load(name)
    head = {
        "study": name,
        "question": study.QUESTION,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "quick": quick,
        "machine": results.machine(),
    }
    print(f"{name}: {study.QUESTION}", flush=True)
    record = study.run(quick=quick, progress=lambda line: print(f"  {line}", file=sys.stderr, flush=True))
    for title, table in study.table(record).items():
        print(f"\n{title}\n\n{table}")
    if folder is not None:
        print(f"\nWritten to {_write({**head, **record}, folder / f'{PREFIX}{name}.json')}")
    sys.stdout.flush()


def _write(record: Mapping[str, Any], path: Path) -> Path:
    """Writes a record in place of the one before."""
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".partial")
    whole.write_text(text, encoding="utf-8")
    whole.replace(path)
    return path


if __name__ == "__main__":
    sys.exit(main())
