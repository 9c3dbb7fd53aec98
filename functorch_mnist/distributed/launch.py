"""Starting the processes of one machine, by torch's launcher."""

import logging
import signal
import sys
from collections.abc import Sequence

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, start_processes

from .attendance import undisturbed
from .joined import prefix


class LaunchError(Exception):
    """A process has ended without telling why."""


def launch(arguments: Sequence[str], *, processes: int) -> int:
    """Runs `python` with some arguments in several processes, until all have ended.

    Args:
        arguments: such as `("-m", "functorch_mnist", "train")`.
        processes: how many, at least 1.

    Returns:
        The exit status: the first that is not 0, or 128 and the signal that this process was given.

    Raises:
        LaunchError: a process was killed before it could tell, and no other has told of it.

    Guarantees: where one fails, the others are asked to stop, and killed where they have not after 30 s.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what it says is said in one line here
    store = dist.TCPStore("127.0.0.1", 0, processes, True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "launched",
    }  # fmt: skip
    ranks = range(processes)
    started = start_processes(
        "functorch_mnist",
        sys.executable,
        {rank: tuple(arguments) for rank in ranks},
        {rank: {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in ranks},
        DefaultLogsSpecs(),
    )
    try:
        result = started.wait(period=0.05)
    except SignalException as asked:
        number = signal.Signals(asked.sigval)
        with undisturbed():
            started.close(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)
        return 128 + number
    if result is None or not result.failures:
        return 0
    first = min(result.failures.values(), key=lambda failure: failure.timestamp)
    if first.exitcode < 0 and not store.check([f"{prefix(shared)}/told"]):
        names = ", ".join(str(rank) for rank, one in sorted(result.failures.items()) if one.exitcode == first.exitcode)
        raise LaunchError(
            f"{'Process' if len(names) == 1 else 'Processes'} {names} of {processes} must not be killed. "
            f"Found {signal.Signals(-first.exitcode).name}."
        )
    return 128 - first.exitcode if first.exitcode < 0 else first.exitcode
