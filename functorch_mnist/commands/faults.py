"""Faults that one line can report."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from .. import tree
from ..options import UsageError
from ..tree import Tree


class DivergedError(Exception):
    """A number is no longer finite."""


@contextmanager
def refusing(kind: type[Exception], rule: str = "") -> Iterator[None]:
    """Reports another library's error, where the user's options cause it, as the user's mistake in one line."""
    try:
        yield
    except kind as error:
        raise UsageError(f"{rule}{first_line(error)}") from error


def first_line(error: Exception) -> str:
    """What the error says, without what torch adds for its developers."""
    return str(error).partition("\n")[0]


@contextmanager
def saying_warnings() -> Iterator[None]:
    """Prints each of this library's warnings in one line on stderr."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for text in dict.fromkeys(str(warning.message) for warning in caught if warning.category is UserWarning):
        print(f"functorch-mnist: {text.partition(chr(10))[0]}", file=sys.stderr)


def check_finite(values: Tree, what: str, remedy: str = "Lower --lr, or set --max-norm.") -> None:
    """Refuses NaN and infinity.

    Raises:
        DivergedError: there is one.
    """
    if not all(bool(leaf.isfinite().all()) for leaf in tree.leaves(values)):
        raise DivergedError(f"{what} must be finite. Found NaN or infinity. {remedy}")
