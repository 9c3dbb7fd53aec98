"""What the options of all commands have in common: a user's mistake, ranges of numbers, lists with commas, paths."""

import difflib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

INTERRUPTED = 130
"""The exit status after Ctrl-C, as shells have it."""

Rule: TypeAlias = tuple[str, Callable[[float], bool], tuple[str, ...]]
"""What a number must be, in words and as a function that NaN fails, and the options it is for."""


class Shown(NamedTuple):
    """How the help shows an option's value: part of the annotation of its field."""

    value: str
    positional: bool = False
    repeated: bool = False
    """Each time it is given adds a value."""


RUN = Shown("RUN", positional=True)


class UsageError(Exception):
    """A user's mistake, reported in one line."""


def flag(name: str) -> str:
    """An option as it is typed."""
    return f"--{name.replace('_', '-')}"


def nearest(text: str, known: Iterable[str]) -> str:
    """The known name that a mistyped one is probably meant to be, as a question; nothing where none is near."""
    near = difflib.get_close_matches(text, list(known), 1, 0.5)
    return f" Did you mean {near[0]}?" if near else ""


def check_ranges(options: Any, rules: Sequence[Rule]) -> None:
    """Refuses numbers that are out of their range; options that are absent or None are not checked.

    Raises:
        UsageError: one is.
    """
    for rule, holds, names in rules:
        for name in names:
            value = getattr(options, name, None)
            values = value if isinstance(value, tuple) else (value,)
            if not all(v is None or holds(v) for v in values):
                raise UsageError(f"{flag(name)} must be {rule}. Found {value!s:.80}.")


def check_picture(path: Path | None) -> None:
    """Refuses a picture that cannot be written: before the work whose result it would show.

    Raises:
        UsageError: its name has no ending that says PNG, PDF or SVG, or its folder is not there or cannot be written.
    """
    if path is None:
        return
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise UsageError(f"--png must be a file that ends with .png, .pdf or .svg. Found {path}.")
    if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        fault = "a folder" if path.is_dir() else "a folder that cannot be written"
        raise UsageError(f"--png must be a file in a folder that is there. Found {path}: {fault}.")


def listed(option: str, text: str, known: Sequence[str], *, least: int = 0) -> tuple[str, ...]:
    """The names in a list with commas, each once.

    Raises:
        UsageError: one is unknown, or there are fewer than `least`.
    """
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for name in names:
        if name not in known:
            raise UsageError(f"{option} must be of {', '.join(known)}. Found {name!r:.80}.")
    if len(names) < least:
        raise UsageError(f"{option} must name one of {', '.join(known)} at least. Found none.")
    return names


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
    numbers: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = (piece.strip() for piece in part.partition("="))
        if name not in names or name in numbers:
            raise UsageError(f"{option} takes each of {', '.join(names)} once. Found {part!r:.80}.")
        numbers[name] = number_of(option, number, least=0.0, most=most)
    if not numbers:
        raise UsageError(f"{option} must hold a NAME=NUMBER at least. Found {text!r:.80}.")
    return numbers


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


def range_of(option: str, text: str) -> tuple[int, int]:
    """The first number of `N` or `START:STOP`, and the first after the last.

    Raises:
        UsageError: they are no numbers, or there is none between them.
    """
    first, colon, last = text.partition(":")
    if not first.isdecimal() or (colon and not last.isdecimal()):
        raise UsageError(f"{option} must be a number from 0, or a range such as 0:100. Found {text}.")
    start, stop = int(first), int(last) if colon else int(first) + 1
    if start >= stop:
        raise UsageError(f"{option} must be a range with a test image in it. Found {text}.")
    return start, stop
