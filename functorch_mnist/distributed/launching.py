"""Starting the processes of one machine, by torch's launcher."""

import logging
import signal
import sys
import tempfile
from collections.abc import Sequence

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, start_processes

from .attendance import deferred_signals
from .joining import prefix


class LaunchError(Exception):
    """A process was killed, and none has reported why."""


def launch(arguments: Sequence[str], *, processes: int) -> int:
    """Runs `python` with some arguments in several processes of this machine, until all have ended.

    Args:
        arguments: such as `("-m", "functorch_mnist", "train")`.
        processes: the number of processes, at least 1.

    Returns:
        The exit status: that of the process that reported what happened, else the first that is not 0; 128 plus the
        number of a signal.

    Raises:
        LaunchError: a process was killed, and no other has reported it.
        KeyboardInterrupt: this process was asked to stop, and none of those started has reported where it stands.

    Guarantees: where one fails, the others are asked to stop, and killed after 30 s.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what it says is said in one line here
    store = dist.TCPStore("127.0.0.1", 0, processes, True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "launched",
    }  # fmt: skip
    ranks, told = range(processes), f"{prefix(shared)}/told"
    with tempfile.TemporaryDirectory() as logs:  # where torch would leave a folder of its own
        started = start_processes(
            "functorch_mnist",
            sys.executable,
            {rank: tuple(arguments) for rank in ranks},
            {rank: {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in ranks},
            DefaultLogsSpecs(logs),
        )
        try:
            result = started.wait(period=0.05)
        except SignalException as asked:
            number = signal.Signals(asked.sigval)
            with deferred_signals():
                started.close(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)
            if not store.check([told]):
                raise KeyboardInterrupt from None
            return 128 + number
    if result is None or not result.failures:
        return 0
    first = min(result.failures.values(), key=lambda failure: failure.timestamp)
    if first.exitcode < 0 and not store.check([told]):
        raise LaunchError(
            f"Process {first.local_rank} of {processes} was killed, by {signal.Signals(-first.exitcode).name}. "
            "The others have been stopped."
        )
    teller = int(store.get(told)) if store.check([told]) else first.local_rank
    status = result.failures.get(teller, first).exitcode
    return 128 - status if status < 0 else status
