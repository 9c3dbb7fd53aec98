"""The options of a run as its folder keeps them, and what of them a resumed run may change."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .train import CHANGEABLE, Train, check
from .words import UsageError, flag


def to_json(options: Train) -> dict[str, Any]:
    """The options as JSON values; `from_json` is the way back."""
    values = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def from_json(values: Mapping[str, Any]) -> Train:
    """The options that `to_json` wrote.

    Raises:
        UsageError: a name is missing or unknown, or a value is of the wrong kind or fails `check`.
    """
    kinds = get_type_hints(Train)
    if set(values) != set(kinds):
        raise UsageError(
            f"The run's options must be those of this version. Missing {sorted(set(kinds) - set(values))}, "
            f"unknown {sorted(set(values) - set(kinds))}."
        )
    options = Train(**{name: _restored(name, value, kinds[name]) for name, value in values.items()})
    check(options)
    return options


def _restored(name: str, value: Any, kind: Any) -> Any:
    """The value in the type that the dataclass declares."""
    if NoneType in get_args(kind):
        if value is None:
            return None
        kind = get_args(kind)[0]
    parts = get_args(kind)
    if get_origin(kind) is Literal:
        good = value in parts
    elif get_origin(kind) is tuple and isinstance(value, list):
        parts = parts[:1] * len(value) if parts[-1] is ... else parts
        good = len(value) == len(parts)
        value = tuple(_restored(name, item, part) for item, part in zip(value, parts, strict=False))
    elif kind is float:
        good = type(value) in (int, float)
    elif kind is Path:
        good = isinstance(value, str)
        value = Path(value) if good else value
    else:
        good = type(value) is kind
    if not good:
        wanted = kind.__name__ if isinstance(kind, type) else kind
        raise UsageError(f"The run's option {name} must be {wanted}. Found {value!r:.80}.")
    return value


def check_resumed(options: Train, saved: Train) -> None:
    """Refuses to go on with a run under options that would make it another run.

    Raises:
        UsageError: an option that is not in `CHANGEABLE` differs.
    """
    for name in differences(options, saved):
        new, old = getattr(options, name), getattr(saved, name)
        raise UsageError(f"A resumed run keeps its {flag(name)}, which is {old}. Found {new}.")


def differences(options: Train, others: Train) -> list[str]:
    """The names of the options that differ and make two runs of one."""
    names = [field.name for field in fields(Train) if field.name not in CHANGEABLE]
    return [name for name in names if getattr(options, name) != getattr(others, name)]
