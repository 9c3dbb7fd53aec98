"""Kills at random moments: one of four processes is killed with signal 9 while a run trains, and the run is resumed.

A run of the MLP on some images, `--shards 4`, is made once by one process without interruption. Then it is started by
four processes, repeatedly; at a random moment between their start and the end of such a run, one of them, chosen at
random, is killed. All others must end by themselves, the folder must hold complete files only, and the run, resumed by
1, 2 or 4 processes, must end with the bytes of the uninterrupted run.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from functorch_mnist import checkpoint, random

from . import markdown

QUESTION = "Does a run whose processes are killed at random moments end as one that nothing stopped?"

PROCESSES, KILLS, TIMEOUT = 4, 30, 20
OPTIONS = (
    "--model", "mlp", "--hidden", "32", "--train-size", "4000", "--epochs", "4", "--save-every", "20", "--shards", "4",
    "--timeout", str(TIMEOUT),
)  # fmt: skip


def run(*, quick: bool, progress: Callable[[str], object]) -> dict[str, Any]:
    """The record: each kill, what came of it, and how long the others took to end."""
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        _finished(_begun("--out", whole))
        expected = _end(whole)
        begun = time.monotonic()
        _finished(_begun("--out", Path(folder) / "timed", "--processes", PROCESSES))
        life = time.monotonic() - begun
        kills = []
        for number in range(2 if quick else KILLS):
            progress(f"kill {number + 1}")
            kills.append(_kill(Path(folder) / f"{number}", number, life, expected))
    return {"study": "kills", "processes": PROCESSES, "life": life, "options": list(OPTIONS), "kills": kills}


def _kill(run: Path, number: int, life: float, expected: bytes) -> dict[str, Any]:
    """One kill and what came of it."""
    moment, rank = random.uniform(random.fold_in(random.key(0), number), (2,)).tolist()
    after, rank = 1.0 + moment * (life - 1.5), int(rank * PROCESSES)
    process = _begun("--out", run, "--processes", PROCESSES)
    time.sleep(after)
    victim = _ranks(process).get(rank)
    if victim is not None:
        os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    _, err = process.communicate(timeout=10 * TIMEOUT)
    seconds = time.monotonic() - killed
    steps = checkpoint.steps(run / "checkpoints") if (run / "checkpoints").exists() else []
    saved = int(steps[-1].name.rpartition("-")[2]) if steps else 0
    litter = [path.name for path in run.rglob("*.tmp*")] if run.exists() else []
    more = (1, 2, 4)[number % 3]
    if run.exists() and (run / "config.json").exists():
        _finished(_begun("--resume", run, "--processes", more, options=()))
    else:
        _finished(_begun("--out", run, "--processes", more))
    return {
        "rank": rank, "after_s": after, "hit": victim is not None, "status": process.returncode, "ended_s": seconds,
        "lines": err.splitlines(), "saved_step": saved, "resumed_by": more, "equal": _end(run) == expected,
        "litter": litter,
    }  # fmt: skip


def _begun(*arguments: Any, options: tuple[str, ...] = OPTIONS) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "functorch_mnist", "train", *options, *map(str, arguments)]
    return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _finished(process: subprocess.Popen[str]) -> None:
    """Waits for a run that must end well.

    Raises:
        RuntimeError: it has not.
    """
    _, err = process.communicate(timeout=30 * TIMEOUT)
    if process.returncode:
        raise RuntimeError(f"a run ended with {process.returncode}: {err}")


def _ranks(process: subprocess.Popen[str]) -> dict[int, int]:
    """The processes that a command has started, by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == process.pid:
                variables = dict(x.partition("=")[::2] for x in (path / "environ").read_text().split("\0"))
                found[int(variables["RANK"])] = int(path.name)
        except (OSError, KeyError):
            continue
    return found


def _end(run: Path) -> bytes:
    """The bytes of a run's newest checkpoint."""
    return (checkpoint.steps(run / "checkpoints")[-1] / "state.safetensors").read_bytes()


def table(record: dict[str, Any]) -> dict[str, str]:
    """The outcomes of the kills, in one table."""
    kills = record["kills"]
    hit = [kill for kill in kills if kill["hit"]]
    training = [kill for kill in hit if kill["saved_step"]]
    slowest = max(kill["ended_s"] for kill in hit)
    rows = [
        ["random moments and processes", str(len(kills))],
        ["a process was killed", str(len(hit))],
        ["  after a checkpoint, and before the last", str(len(training))],
        ["ended as the uninterrupted run, to the byte", str(sum(kill["equal"] for kill in kills))],
        ["one line that names the failed process", str(sum(len(kill["lines"]) == 1 for kill in hit))],
        ["partially written files", str(sum(len(kill["litter"]) for kill in kills))],
        ["seconds until all processes ended, at most", f"{slowest:.1f}"],
    ]
    return {"kills": markdown(["of 4 processes, one is killed", "count"], rows)}
