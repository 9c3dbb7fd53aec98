"""A command in one or more processes: entering the world, what all must have in common, and who speaks."""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from typing import Any

import torch

from .. import allocator, data, distributed
from ..distributed import World, check_agreed
from ..distributed.agreement import code, digest_of
from ..options import Analysis, Train
from ..tree import Tree
from . import sources

_OWN = frozenset({"data_dir", "out", "resume", "run", "processes", "timeout", "threads"})
"""Options that may differ between processes: paths of a machine, and how it is used."""
SAME = "Start all of them with the same command, data and version."


def launched(options: Train | Analysis, arguments: Sequence[str]) -> int:
    """The exit status of a command in as many processes of this machine as its options say.

    Raises:
        UsageError: there is no such device.
        LaunchError, KeyboardInterrupt: as from `distributed.launch`.
    """
    sources.device(options.device)
    return distributed.launch(arguments, processes=options.processes)


@contextmanager
def processes(options: Train | Analysis, command: Any = None) -> Iterator[World]:
    """The world that a command computes in; all but the first process print nothing.

    Args:
        options: say the device, the threads and how long others are waited for.
        command: all options, where there are more.

    Raises:
        UsageError: there is no such device.
        JoinError, LostError, EndedError: as from `distributed.joined`.
        DisagreementError: the processes have other versions or options.
    """
    sources.device(options.device)
    shards = options.shards if isinstance(options, Train) else None
    allocator.keep_freed_memory()
    with distributed.joined(device=options.device, shards=shards, timeout=options.timeout) as world:
        one = 1 if world.shards and options.threads is None else options.threads  # bits depend on it
        threads = distributed.bind_cores(world, one)
        if world.size > 1:  # one alone need not read its own sources
            check_agreed(world, "Starting", SAME, version=code())
            wanted = repr((type(command or options).__name__, _without_own(asdict(command or options))))
            bits = threads if world.shards else None
            check_agreed(world, "Starting", SAME, options=digest_of(wanted), threads=digest_of(repr(bits)))
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if world.rank else sys.stdout):
            try:
                yield world
            except BaseException:
                if world.size > 1:  # a launcher stops all where one fails: this one shall report its own fault
                    for number in (signal.SIGINT, signal.SIGTERM):
                        signal.signal(number, signal.SIG_IGN)
                raise


def _without_own(values: Any) -> Any:
    return {name: _without_own(v) if isinstance(v, dict) else v for name, v in values.items() if name not in _OWN}


def load(options: Train, world: World) -> data.Dataset:
    """The run's data set on this process's device; the first process downloads it, if it must be."""
    if world.rank == 0:
        found = sources.load(options.dataset, options.data_dir, world.device)
    wait(world)
    return found if world.rank == 0 else sources.load(options.dataset, options.data_dir, world.device)


def check_data(world: World, values: Tree) -> None:
    """Refuses data that are not the same on all processes.

    Raises:
        DisagreementError: they are not.
    """
    if world.size > 1:
        check_agreed(world, "Starting", SAME, data=distributed.digest(values))


def wait(world: World) -> None:
    """Waits until all processes have come here."""
    distributed.all_reduce(world, torch.zeros(1, device=world.device))
