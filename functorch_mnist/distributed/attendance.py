"""Detection of lost processes: each process writes a heartbeat to the store, twice a second, in its own thread.

Where a collective fails, its message does not say why. Which process is gone or late is detected here: a process
without a heartbeat is gone or stopped; one with a heartbeat that is not waiting as the others are does something else.
"""

import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum

import torch.distributed as dist

from .sums import WAITING

_BEAT = 0.5
"""Seconds between two heartbeats."""
_SILENT = 3.0
"""Seconds without a heartbeat after which a process counts as gone."""
HEARD = 2.0
"""Seconds in which all other processes have read why one leaves."""

_TOLD = "Another process has ended, and has reported why."


class Ended(Exception):
    """Base class: this process ends because of another process."""


class LostError(Ended):
    """A process is gone, or keeps the others waiting."""


class EndedError(Ended):
    """Another process has ended with an error, which it has reported itself."""


class Left(StrEnum):
    """Why a process has left."""

    DONE = "done"
    INTERRUPTED = "interrupted"
    FAILED = "failed"
    WAITING = "waiting"
    """It has waited in vain, and asks who is missing."""


class Attendance:
    """This process's place among the others."""

    def __init__(self, store: dist.Store, client: dist.Store, rank: int, size: int, *, hosted: bool) -> None:
        """Says that this process is there.

        Args:
            store: of all.
            client: another connection to it, for the thread alone.
            rank, size: of this process.
            hosted: whether the launcher holds the store: where it is gone, this process stops as by Ctrl-C.
        """
        self.store, self.rank, self.size, self.hosted = store, rank, size, hosted
        self._closed = threading.Event()
        self._heard: dict[int, str] = {}
        store.set(f"who/{rank}", f"pid {os.getpid()} on {socket.gethostname()}")
        client.set(f"beat/{rank}", "0")
        self._thread = threading.Thread(target=self._beat, args=(client,), daemon=True)
        self._thread.start()

    def _beat(self, client: dist.Store) -> None:
        count = 0
        while not self._closed.wait(_BEAT):
            count += 1
            try:
                client.set(f"beat/{self.rank}", str(count))
                self._heard |= self._asked(client)
            except RuntimeError:  # who holds the store is gone
                if self.hosted and not self._closed.is_set():
                    os.kill(os.getpid(), signal.SIGTERM)
                return

    def close(self) -> None:
        """Ends the thread: one that is in torch's store when Python ends would abort the process."""
        self._closed.set()
        self._thread.join(_SILENT)

    def wait_for_all(self, seconds: float) -> list[int]:
        """The ranks that have not come within so many seconds."""
        deadline = time.monotonic() + seconds
        while True:
            missing = [rank for rank in range(self.size) if not self.store.check([f"who/{rank}"])]
            if not missing or time.monotonic() > deadline:
                return missing
            time.sleep(0.1)

    def leave(self, why: Left) -> None:
        """Says why this process leaves."""
        with suppress(RuntimeError):
            self.store.set(f"left/{self.rank}", why.value)
            self.store.set("left", "")

    def explained(self, error: BaseException) -> BaseException:
        """What this process ends with, where it ends with an error: its own one, or who else has caused it."""
        interrupted = isinstance(error, KeyboardInterrupt)
        notes = " ".join([*([str(error)] if interrupted else []), *getattr(error, "__notes__", [])])
        if not interrupted and not is_collective_error(error):
            self.leave(Left.FAILED)
            return error if self._first() else EndedError(_TOLD)
        self.leave(Left.INTERRUPTED if interrupted else Left.WAITING)
        with suppress(RuntimeError):
            self.store.set(f"order/{self.rank}", str(self.store.add("order", 1)))
        lost = self._lost(blames=not interrupted)
        if lost:
            return LostError(f"{lost} {notes}".strip()) if self._first() else EndedError(_TOLD)
        whys = self._whys()
        if interrupted or Left.INTERRUPTED in whys.values():
            told = notes if interrupted else f"Interrupted. {notes}"
            return EndedError(_TOLD) if self.rank or (told and not self._first()) else KeyboardInterrupt(told)
        if Left.FAILED in whys.values():
            return EndedError(_TOLD)
        return LostError(f"{self._late()} {notes}".strip()) if self._first() else EndedError(_TOLD)

    def _first(self) -> bool:
        """Whether this process is the first that has something to tell."""
        try:
            return bool(self.store.compare_set("told", "", str(self.rank)) == str(self.rank).encode())
        except RuntimeError:
            return True

    def _whys(self) -> dict[int, str]:
        """Why others have left, those that have; also where the store has gone with one of them since."""
        with suppress(RuntimeError):
            return self._heard | self._asked(self.store)
        return dict(self._heard)

    def _asked(self, store: dist.Store) -> dict[int, str]:
        if not store.check(["left"]):
            return {}
        others = [rank for rank in range(self.size) if rank != self.rank]
        return {rank: store.get(f"left/{rank}").decode() for rank in others if store.check([f"left/{rank}"])}

    def _lost(self, *, blames: bool) -> str:
        """Who is gone, or does not come though this one has waited and `blames` it, in words; else nothing."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        try:
            before = {rank: self.store.get(f"beat/{rank}") for rank in others}
            deadline = time.monotonic() + _SILENT
            while time.monotonic() < deadline and len(self._whys()) < len(others):
                time.sleep(0.1)
            absent = [rank for rank in others if rank not in self._whys()]
            silent = [rank for rank in absent if self.store.get(f"beat/{rank}") == before[rank]]
            if silent:
                return f"{self._named(silent)} gone or stopped: nothing was heard of it for {_SILENT:g} s."
            if blames and absent and Left.INTERRUPTED not in self._whys().values():
                return f"{self._named(absent)} not going on, while the others wait."
        except RuntimeError:
            if self._heard.get(0) not in (Left.FAILED, Left.INTERRUPTED):
                return "Process 0, or the launcher that holds the store, is gone."
        return ""

    def _late(self) -> str:
        """Who has come last to where all have waited for each other in vain."""
        try:
            orders = {rank: int(self.store.get(f"order/{rank}")) for rank in range(self.size)}
        except RuntimeError:
            return "The connection to another process is lost."
        return f"{self._named([max(orders, key=orders.__getitem__)])} late: the others have waited for it in vain."

    def _named(self, ranks: list[int]) -> str:
        names = [f"{rank} of {self.size} ({self.store.get(f'who/{rank}').decode()})" for rank in ranks]
        return f"Process {names[0]} is" if len(names) == 1 else f"Processes {' and '.join(names)} are"


def is_collective_error(error: BaseException) -> bool:
    """Whether an error comes from torch's collectives, eager or compiled.

    Args:
        error: as caught.
    """
    for frame in traceback.extract_tb(error.__traceback__):
        if "/torch/distributed/" in frame.filename or "_c10d_functional" in (frame.line or "") or frame.name == WAITING:
            return isinstance(error, RuntimeError)
    return False


@contextmanager
def deferred_signals() -> Iterator[None]:
    """A context in which SIGINT and SIGTERM are ignored, so that a shutdown in progress is not interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
