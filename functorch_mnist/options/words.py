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


def named(option: str, text: str, *, most: float, known: Sequence[str] | None = None) -> dict[str, float]:
    """The numbers in a list of NAME=NUMBER with commas.

    Args:
        option: as it is typed.
        text: the list.
        most: numbers are from 0 to this.
        known: the names there are; without, whole numbers from 0 to 9, the classes.

    Raises:
        UsageError: the list is empty, or an entry cannot be read, is there twice or has an unknown name.
    """
    names = tuple(map(str, range(10))) if known is None else tuple(known)
    found: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = (piece.strip() for piece in part.partition("="))
        if name not in names or name in found:
            raise UsageError(f"{option} takes each of {', '.join(names)} once. Found {part!r:.80}.")
        found[name] = number_of(option, number, least=0.0, most=most)
    if not found:
        raise UsageError(f"{option} must hold a NAME=NUMBER at least. Found {text!r:.80}.")
    return found


def number_of(option: str, text: str, *, least: float, most: float) -> float:
    """The number in a part of an option.

    Raises:
        UsageError: it is none, or not from `least` to `most`.
    """
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not least <= value <= most:
        raise UsageError(f"{option} takes numbers from {least:g} to {most:g}. Found {text!r:.80}.")
    return value
