"""What the options of all commands have in common: a user's mistake, ranges of numbers, lists with commas."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

INTERRUPTED = 130
"""The exit status after Ctrl-C, as shells have it."""

Rule: TypeAlias = tuple[str, Callable[[float], bool], tuple[str, ...]]
"""What a number must be, in words and as a function that NaN fails, and the options it is for."""


class UsageError(Exception):
    """A user's mistake, told in one line."""


def flag(name: str) -> str:
    """An option as it is typed."""
    return f"--{name.replace('_', '-')}"


def check_ranges(options: Any, rules: Sequence[Rule]) -> None:
    """Refuses numbers that are out of their range; what an option has not, or leaves open, is not checked.

    Raises:
        UsageError: one is.
    """
    for rule, holds, names in rules:
        for name in names:
            value = getattr(options, name, None)
            values = value if isinstance(value, tuple) else (value,)
            if not all(v is None or holds(v) for v in values):
                raise UsageError(f"{flag(name)} must be {rule}. Found {value!s:.80}.")


def listed(option: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    """The names in a list with commas, each once.

    Raises:
        UsageError: one is unknown.
    """
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for name in found:
        if name not in known:
            raise UsageError(f"{option} must be of {', '.join(known)}. Found {name!r:.80}.")
    return found
