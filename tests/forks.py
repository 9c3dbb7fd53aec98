"""Processes that are forked from one that has imported the package: each starts in milliseconds, not in seconds of CPU.

For what several processes do together. How a program starts and what it imports is tested in programs of their own.
"""

import functools
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

FORKS = multiprocessing.get_context("forkserver")


@functools.cache
def ready():
    """Starts the process that is forked, once: it has imported the package and what that imports, and runs nothing."""
    path = os.pathsep.join(folder for folder in sys.path if folder)
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=path):
        forkserver.set_forkserver_preload(["worlds", "torch._dynamo", "functorch_mnist.cli"])
        forkserver.ensure_running()


def run(arguments, environment, folder):
    """What `python …` does in a new process of this environment, which writes what it prints to files."""
    os.setsid()
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


class Forked:
    """`subprocess.Popen([sys.executable, *arguments], env=environment)`, its output captured as text."""

    def __init__(self, arguments, environment):
        ready()
        self.folder = tempfile.mkdtemp()
        given = list(map(str, arguments)), dict(environment), self.folder
        self.process = FORKS.Process(target=run, args=given, daemon=True)
        self.process.start()

    @property
    def pid(self):
        return self.process.pid

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def kill(self):
        self.process.kill()

    def communicate(self, timeout=None):
        """All that it has printed to both streams, once it has ended; to be called once."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked process", timeout)
        files = [Path(self.folder, name) for name in ("out", "err")]
        texts = tuple([file.read_text() if file.exists() else "" for file in files])
        shutil.rmtree(self.folder)
        return texts
