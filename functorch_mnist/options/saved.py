"""The options of a run as its folder keeps them, and what of them a resumed run may change."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

from .sweep import Compare, Sweep, check_compare, check_sweep
from .train import CHANGEABLE, Train, check
from .words import UsageError, flag

Search: TypeAlias = Sweep | Compare
"""The options of a command that trains many runs and looks for the best."""


def to_json(options: Train | Search) -> dict[str, Any]:
    """The options as JSON values; `from_json` or `search_from_json` is the way back."""

    def value(one: Any) -> Any:
        if isinstance(one, Mapping):
            return {name: value(part) for name, part in one.items()}
        return str(one) if isinstance(one, Path) else list(one) if isinstance(one, tuple) else one

    command = {} if isinstance(options, Train) else {"command": command_of(options)}
    return {**command, **value(asdict(options))}


def command_of(options: Search) -> str:
    """The name of the command that has these options."""
    return "sweep" if isinstance(options, Sweep) else "compare"


def from_json(values: Mapping[str, Any]) -> Train:
    """The options that `to_json` wrote.

    Raises:
        UsageError: a name is missing or unknown, or a value is of the wrong kind or fails `check`.
    """
    options: Train = _read(values, Train)
    check(options)
    return options


def search_from_json(values: Mapping[str, Any]) -> Search:
    """The options that `to_json` wrote of a sweep or comparison.

    Raises:
        UsageError: as `from_json`.
    """
    kind = {"sweep": Sweep, "compare": Compare}.get(str(values.get("command")))
    if kind is None or not isinstance(values.get("training"), Mapping):
        raise UsageError("The options of a sweep or comparison must name its command and those of training.")
    own = {name: value for name, value in values.items() if name != "command"}
    options: Search = _read(own | {"training": _read(values["training"], Train)}, kind)
    if isinstance(options, Sweep):
        check_sweep(options)
    else:
        check_compare(options)
    return options


def _read(values: Mapping[str, Any], kind: type) -> Any:
    """The dataclass of these values."""
    kinds = get_type_hints(kind)
    if set(values) != set(kinds):
        raise UsageError(
            f"The run's options must be those of this version. Missing {sorted(set(kinds) - set(values))}, "
            f"unknown {sorted(set(values) - set(kinds))}."
        )
    return kind(**{name: _restored(name, value, kinds[name]) for name, value in values.items()})


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
    """Refuses to resume a run under options that would make it another run.

    Raises:
        UsageError: an option that is not in `CHANGEABLE` differs.
    """
    for name in differences(options, saved):
        new, old = getattr(options, name), getattr(saved, name)
        raise UsageError(f"A resumed run keeps its {flag(name)}, which is {old}. Found {new}.")


def search_differences(options: Search, others: Search) -> list[str]:
    """The names of the options that differ and make two sweeps of one."""
    if type(options) is not type(others):
        return ["command"]
    names = [field.name for field in fields(options) if field.name not in ("training", "vmapped_runs")]
    return [name for name in names if getattr(options, name) != getattr(others, name)] + [
        name
        for name in [*differences(options.training, others.training), "epochs"]
        if name != "out" and getattr(options.training, name) != getattr(others.training, name)
    ]


def differences(options: Train, others: Train) -> list[str]:
    """The names of the options that differ and make two runs of one."""
    names = [field.name for field in fields(Train) if field.name not in CHANGEABLE]
    return [name for name in names if getattr(options, name) != getattr(others, name)]
