"""Commands as arms: every call is a process of its own, from its start to its end."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from .measure import Work


def run(*arguments: str, variables: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A new Python that has ended well, with what it has printed.

    Args:
        arguments: its command line.
        variables: set in its environment, besides those of this process.

    Raises:
        RuntimeError: it ended with another status than 0.
    """
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, **(variables or {})},
    )
    if done.returncode:
        last = (done.stderr.splitlines() or [""])[-1]
        raise RuntimeError(f"status {done.returncode}, {last}\npython {' '.join(arguments)}\n{done.stderr}")
    return done


def accuracy(*arguments: str, **values: object) -> float:
    """The accuracy in percent that a command prints of the test images.

    Args:
        arguments: Python's, in which the values are put in, and for `{folder}` an empty one.
        values: by name.

    Raises:
        RuntimeError: it did not end well, or printed no accuracy.
    """
    with tempfile.TemporaryDirectory() as folder:
        filled = [part.format(folder=folder, **values) for part in arguments]
        printed = run(*filled).stdout
    found = re.search(r"test images: ([0-9.]+)%", printed)
    if found is None:
        raise RuntimeError(f"python {' '.join(filled)}: a program must end with an accuracy. Found {printed!r}.")
    return float(found[1])


class Program:
    """A command that trains and ends with an accuracy on the test images; each call has the next seed."""

    def __init__(self, *arguments: str) -> None:
        """Takes Python's arguments, in which `{seed}` and `{folder}`, an empty one, are put in at each call."""
        self.arguments, self.accuracies = arguments, list[float]()

    def call(self) -> None:
        """Runs the command with the next seed.

        Raises:
            RuntimeError: it did not end well, or printed no accuracy.
        """
        self.accuracies.append(accuracy(*self.arguments, seed=len(self.accuracies)))

    def work(self) -> Work:
        """The command as work, whose outputs are the last accuracy in percent."""
        return Work(self.call, lambda: self.accuracies[-1])
