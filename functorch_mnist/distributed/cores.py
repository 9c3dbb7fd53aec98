"""CPU cores, divided between the processes of a machine."""

import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from .agreement import digest_of
from .sums import all_gather
from .world import World


def bind_cores(world: World, threads: int | None = None) -> int:
    """Binds this process to its part of the machine's cores, with as many threads, so that processes do not compete.

    Args:
        world: the processes.
        threads: the number of threads; by default the number of this process's cores. Where it is larger, the process
            is not bound.

    Returns:
        The number of threads.

    Guarantees: cores are divided only between processes that may use the same ones, so that a division by the launcher
        is respected. A single process is not bound.
    """
    if world.size > 1:
        cores = sorted(os.sched_getaffinity(0))
        mine = bytes.fromhex(digest_of(f"{socket.gethostname()} {cores}"))
        row = torch.frombuffer(bytearray(mine), dtype=torch.uint8).to(world.device)[None]
        alike = (all_gather(world, row) == row).all(1).nonzero().squeeze(1).tolist()
        part = part_of(cores, alike.index(world.rank), len(alike))
        threads = threads or len(part)
        if threads <= len(part) and world.device.type == "cpu":
            for thread in Path("/proc/self/task").iterdir():  # torch has started some already
                with suppress(OSError):
                    os.sched_setaffinity(int(thread.name), part)
    if threads is not None:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def part_of(cores: Sequence[int], place: int, count: int) -> list[int]:
    """The place-th of `count` parts of some cores; one core, shared, where there are not as many.

    Example:
        >>> part_of([0, 1, 4, 5], 1, 2)
        [4, 5]
    """
    if len(cores) < count:
        return [cores[place % len(cores)]]
    return list(cores[place * len(cores) // count : (place + 1) * len(cores) // count])
