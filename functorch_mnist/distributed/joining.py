"""Joining the world of processes that a launcher has started, and leaving it, also after a failure of another process.

The environment is torchrun's: `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR`, `MASTER_PORT`. Without it there is a
single process, and nothing is opened.
"""

import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from .attendance import HEARD, Attendance, Ended, Left, deferred_signals
from .world import World

SECONDS = 120.0
"""The default timeout, in seconds."""


class JoinError(Exception):
    """The processes could not join: one is missing, or the environment or the address is wrong."""


class _Place(NamedTuple):
    """What the launcher says of this process."""

    rank: int
    size: int
    local_rank: int
    address: str
    port: int
    hosted: bool
    """Whether the launcher holds the store; else process 0 does."""


@contextmanager
def joined(*, device: str = "cpu", shards: int | None = None, timeout: float = SECONDS) -> Iterator[World]:
    """A context with the world of the processes that a launcher, such as torchrun, has started.

    Args:
        device: "cpu", or "cuda" for the GPU of the local rank.
        shards: S, a power of two, for sums that are the same bits for any number of processes, see `World`.
        timeout: seconds to wait for other processes: to join, and in each sum.

    Raises:
        JoinError: within `timeout`: the environment is not whole, the shards do not fit, the port is in use, the
            address does not answer, or processes are missing; it names them.
        LostError: a process is gone, or keeps the others waiting for longer than `timeout`; it names it. One process
            raises it; the others raise `EndedError`.
        EndedError: another process has ended with an error, which it has reported itself.

    Guarantees: no process waits longer than `timeout` and a few seconds for one that does not come.

    Example:
        >>> with joined() as world:  # without a launcher
        ...     world.size
        1
    """
    place = _place()
    if place is None:
        yield World(device=torch.device(device), shards=shards)
        return
    where = torch.device("cuda", place.local_rank) if device == "cuda" else torch.device(device)
    try:
        World(place.rank, place.size, where, "to be joined", shards)  # refuses before anything is opened
    except ValueError as error:
        raise JoinError(str(error)) from error
    limit = timedelta(seconds=timeout)
    store = _store(place, limit)
    attendance = Attendance(store, _client(place, limit), place.rank, place.size, hosted=place.hosted)
    try:
        _wait_for_all(attendance, timeout)
        if where.type == "cuda":
            torch.cuda.set_device(where)
        try:
            dist.init_process_group(
                "nccl" if where.type == "cuda" else "gloo",
                store=dist.PrefixStore("group", store), rank=place.rank, world_size=place.size, timeout=limit,
            )  # fmt: skip
            yield World(place.rank, place.size, where, dist.group.WORLD.group_name, shards)  # type: ignore[union-attr]
        except Ended:
            raise
        except GeneratorExit:  # Ctrl-C between the world's coming and its first use
            attendance.leave(Left.INTERRUPTED)
            raise
        except BaseException as error:
            with deferred_signals():
                ended = attendance.explained(error)
                if place.rank == 0 and not place.hosted:
                    time.sleep(HEARD)  # the store goes with this process
                if ended is not error:
                    raise ended from error
                raise
        attendance.leave(Left.DONE)
        dist.destroy_process_group()
    finally:
        attendance.close()


def _place() -> _Place | None:
    """What the environment says; none where no launcher has started this process."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if not {"RANK", "WORLD_SIZE"} & os.environ.keys():
        return None
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise JoinError(f"A launcher must set {', '.join(names)}. Found no {', '.join(missing)}.")
    try:
        rank, size, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
    except ValueError as error:
        raise JoinError(f"RANK, WORLD_SIZE, LOCAL_RANK and MASTER_PORT must be numbers. Found: {error}.") from error
    if not 0 <= rank < size or not 0 < port < 2**16:
        raise JoinError(f"RANK must be from 0, below WORLD_SIZE, MASTER_PORT a port. Found {rank}, {size}, {port}.")
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return _Place(rank, size, local_rank, os.environ["MASTER_ADDR"], port, hosted)


def _store(place: _Place, timeout: timedelta) -> dist.Store:
    """The store by which the processes meet.

    Raises:
        JoinError: it cannot be opened.
    """
    hosts = place.rank == 0 and not place.hosted
    if hosts:
        try:
            with socket.socket() as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                trial.bind(("", place.port))
        except OSError as error:
            raise JoinError(
                f"Process 0 must be able to open port {place.port}. Found: {error.strerror}. "
                "Is another run using it? Set another MASTER_PORT for all."
            ) from error
    try:
        opened: dist.Store = dist.TCPStore(
            place.address, place.port, place.size, hosts, timeout=timeout, wait_for_workers=False
        )
    except (RuntimeError, ValueError) as error:
        raise JoinError(
            f"Process {place.rank} must reach {place.address}:{place.port} within {timeout.total_seconds():g} s. Found "
            "no answer. Is process 0 running there, and the port open?"
        ) from error
    return _prefixed(opened)


def _client(place: _Place, timeout: timedelta) -> dist.Store:
    """A second connection, for the thread that says that this process is alive."""
    return _prefixed(dist.TCPStore(place.address, place.port, place.size, False, timeout=timeout))


def _prefixed(store: dist.Store) -> dist.Store:
    return dist.PrefixStore(prefix(os.environ), store)


def prefix(environment: Mapping[str, str]) -> str:
    """What the keys of a run begin with: another run that has the same address by mistake has others."""
    run = environment.get("TORCHELASTIC_RUN_ID", environment.get("SLURM_JOB_ID", ""))
    return f"functorch_mnist/{run}/{environment.get('TORCHELASTIC_RESTART_COUNT', 0)}"


def _wait_for_all(attendance: Attendance, seconds: float) -> None:
    missing = attendance.wait_for_all(seconds)
    if missing:
        word = "process" if len(missing) == 1 else "processes"
        raise JoinError(
            f"All {attendance.size} processes must come within {seconds:g} s. Found no {word} "
            f"{', '.join(map(str, missing))}. Is the number of processes the same for all, and each of them started?"
        )
