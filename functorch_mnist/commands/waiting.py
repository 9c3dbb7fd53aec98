"""What a command says while it computes: compiling, and work of some parts, are never silent."""

import sys
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")

SAY_EVERY = 10.0
"""Seconds between two lines of work that goes on."""


def say(text: str) -> None:
    """Prints a line at once, above a progress bar where there is one."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def slowly(parts: Sequence[T], what: str, *, unit: str, of: int) -> Iterator[T]:
    """The parts, one by one; says what is done with them, how far it is every 10 seconds, and how long it took.

    Args:
        parts: of the work.
        what: is done, such as `Computing features`.
        unit: of the work.
        of: how many units a part holds.
    """
    began = said = time.monotonic()
    total = len(parts) * of
    say(f"{what}: about {total:,} {unit}.")
    for done, part in enumerate(parts):
        if time.monotonic() - said > SAY_EVERY:
            said = time.monotonic()
            say(f"{what}: {done * of:,} of {total:,} after {said - began:.0f} s.")
        yield part
    say(f"{what} took {time.monotonic() - began:.1f} s.")


class Compiling:
    """Says when torch compiles and how long it took, and adds up the seconds; within a `with`."""

    def __init__(self, what: str, *, enabled: bool) -> None:
        """Of what is compiled; without `enabled` it does nothing, and does not import the compiler."""
        self.what, self.enabled = what, enabled
        self.seconds, self.graphs, self._began = 0.0, 0, 0.0

    def __enter__(self) -> "Compiling":
        if self.enabled:
            from torch._dynamo.callback import callback_handler

            callback_handler.register_start_callback(self._start)
            callback_handler.register_end_callback(self._end)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.enabled:
            from torch._dynamo.callback import callback_handler

            callback_handler.remove_start_callback(self._start)
            callback_handler.remove_end_callback(self._end)

    def _start(self, _: Any) -> None:
        self._began = time.monotonic()
        self.graphs += 1
        say(f"Compiling {self.what}, graph {self.graphs}: this may take a minute.")

    def _end(self, _: Any) -> None:
        took = time.monotonic() - self._began
        self.seconds += took
        say(f"Compiled in {took:.1f} s.")
