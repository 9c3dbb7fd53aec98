"""Kills while a store of gradients is built: at random moments, with signal 9, and the build is resumed.

A store of the gradients of all training images is built once without interruption. Then the build is started from
scratch, repeatedly, killed at a random moment of the last six tenths of such a build's time, when it has started up,
and run again. All files must end with the bytes of the uninterrupted build.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from functorch_mnist import random

from . import markdown

QUESTION = "Does a store whose build is killed at random moments end as one that nothing stopped?"

KILLS = 20
TRAINING = ("train", "--model", "mlp", "--hidden", "32", "--train-size", "20000")
STORING = ("--features", "128", "--checkpoints", "all")


def run(*, quick: bool, progress: Callable[[str], object]) -> dict[str, Any]:
    """The record: when each build was killed, what it had made, and whether it ended alike."""
    images = "1000" if quick else "20000"
    options = (*STORING, *(("--images", images) if quick else ()))
    training = (*TRAINING[:-1], images)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _command(*training, "--save-every", "50", "--out", folder / "run").wait()
        start = time.monotonic()
        _built(folder, "whole", options)
        life = time.monotonic() - start
        expected = _contents(folder / "whole")
        kills = []
        for number in range(2 if quick else KILLS):
            progress(f"kill {number + 1}")
            after = (0.4 + 0.6 * float(random.uniform(random.fold_in(random.key(0), number), ()))) * life
            process = _command("store", folder / "run", *options, "--out", folder / str(number))
            time.sleep(after)
            process.send_signal(signal.SIGKILL)
            process.wait()
            parts = len(list((folder / str(number)).rglob("?/*.npy")))
            finished = (folder / str(number) / "manifest.json").exists()
            _built(folder, str(number), options)
            equal = _contents(folder / str(number)) == expected
            kills.append({"after_s": after, "parts": parts, "finished": finished, "equal": equal})
    return {"study": "store_kills", "life": life, "parts": len(expected), "kills": kills}


def _built(folder: Path, name: str, options: tuple[str, ...]) -> None:
    """Builds a store, or resumes its build.

    Raises:
        RuntimeError: the command has failed.
    """
    if _command("store", folder / "run", *options, "--out", folder / name).wait():
        raise RuntimeError(f"the build of {name} failed.")


def _command(*arguments: Any) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-m", "functorch_mnist", *map(str, arguments)]
    return subprocess.Popen(line, stdout=subprocess.DEVNULL)


def _contents(folder: Path) -> dict[str, bytes]:
    """All files of a store."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def table(record: dict[str, Any]) -> dict[str, str]:
    """The outcomes of the kills, in one table."""
    kills = record["kills"]
    rows = [
        ["builds killed", str(len(kills))],
        ["  before the first part", str(sum(not kill["parts"] for kill in kills))],
        [
            "  between the first part and the last file",
            str(sum(kill["parts"] > 0 and not kill["finished"] for kill in kills)),
        ],
        ["  after all", str(sum(kill["finished"] for kill in kills))],
        ["ended as the uninterrupted build, every file to the byte", str(sum(kill["equal"] for kill in kills))],
    ]
    return {"kills": markdown(["a build of a store", "count"], rows)}
