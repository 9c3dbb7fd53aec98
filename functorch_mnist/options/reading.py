"""From the command line to the options of a command: the fields of its dataclass as arguments of argparse, by topic."""

import argparse
import ast
import inspect
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from .train import Train
from .words import Shown, UsageError, flag, nearest

TOPICS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "model": ("recipe", "model", "hidden", "activation", "dropout"),
        "data": (
            "dataset", "data_dir", "images", "train_size", "hold_out", "imbalance", "sampler", "deskew", "augment",
            "mixup", "augment_multiplicity", "max_shift", "examples",
        ),
        "optimisation": (
            "loss", "label_smoothing", "focal_gamma", "class_weights", "logit_adjustment", "epochs", "steps",
            "batch_size", "lr", "schedule", "warmup", "optimizer", "momentum", "beta2", "dampening", "weight_decay",
            "nesterov", "max_norm", "ema_decay", "swa_start", "patience", "seed",
        ),
        "privacy": (
            "private", "epsilon", "noise_multiplier", "delta", "clipping", "clip_norm", "sampling", "noise",
            "accountant", "audit", "noise_seed",
        ),
        "tuning": ("tune", "tune_steps", "tune_rounds"),
        "output": ("out", "png", "save_inputs", "top", "resume", "save_every", "keep", "watch", "watch_every"),
        "machine": ("precision", "compile", "device", "threads", "processes", "shards", "timeout"),
    }
)  # fmt: skip
"""The groups of the help, in order; what is in none is the command's own, and comes first."""

_KINDS: Mapping[type, tuple[str, str]] = MappingProxyType(
    {int: ("N", "a whole number"), float: ("X", "a number"), Path: ("PATH", "a path"), str: ("TEXT", "a text")}
)
"""How the help shows a value of a type, and what it must be."""


class _Parser(argparse.ArgumentParser):
    """One that raises, where argparse would print and exit."""

    def error(self, message: str) -> Any:
        raise UsageError(f"{message[:1].upper()}{message[1:]}. See {self.prog} --help.")


def read(command: str, kind: type, arguments: Sequence[str]) -> dict[str, Any]:
    """The options of a command that are given, by the names of their fields; those of `train` too, where it takes them.

    Raises:
        UsageError: there is no such option, or a value cannot be read.
        SystemExit: help was asked for and is printed.
    """
    parser = _parser(command, kind)
    try:
        given, rest = parser.parse_known_intermixed_args(arguments)
    except argparse.ArgumentError as error:
        raise UsageError(f"{error.argument_name}: {error.message}. See {parser.prog} --help.") from error
    if rest:
        name, known = rest[0].partition("=")[0], [text for action in parser._actions for text in action.option_strings]
        what = "option" if name.startswith("-") else "argument"
        raise UsageError(
            f"{command} has no {what} {name!r:.80}.{nearest(name, known) or f' See {parser.prog} --help.'}"
        )
    return {name: tuple(value) if isinstance(value, list) else value for name, value in vars(given).items()}


def _parser(command: str, kind: type) -> _Parser:
    width = min(shutil.get_terminal_size().columns, 110)
    parser = _Parser(
        prog=f"functorch-mnist {command}",
        description=inspect.getdoc(kind),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=width),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        exit_on_error=False,
        add_help=False,
    )
    own = [field for field in fields(kind) if field.name != "training"]
    shared = fields(Train) if len(own) < len(fields(kind)) else ()
    positionals = parser.add_argument_group("arguments")
    first = parser.add_argument_group("options")
    titled = {title: parser.add_argument_group(title) for title in TOPICS}
    groups = {name: titled[title] for title, names in TOPICS.items() for name in names}
    hints = get_type_hints(kind, include_extras=True)
    for field in own:
        shown = _shown(hints[field.name])
        group = positionals if shown.positional else groups.get(field.name, first)
        _add(group, field, hints[field.name], help_=_described(kind, field))
    for field in shared:
        _add(first, field, get_type_hints(Train, include_extras=True)[field.name], help_=argparse.SUPPRESS)
    first.add_argument("-h", "--help", action="help", help="Show this help.")
    parser.usage = _usage(parser.prog, own, hints)
    return parser


def _usage(prog: str, own: Sequence[Field[Any]], hints: Mapping[str, Any]) -> str:
    """The first line of the help."""
    words = [prog]
    for field in own:
        shown = _shown(hints[field.name])
        if shown.positional:
            words.append(shown.value if field.default is MISSING else f"[{shown.value} ...]")
        elif field.default is MISSING:
            words.append(f"{flag(field.name)} {shown.value}")
    return " ".join([*words, "[OPTIONS]"])


def _shown(hint: Any) -> Shown:
    """What the annotation of a field says of its help."""
    marks = [mark for mark in get_args(hint)[1:] if isinstance(mark, Shown)] if get_origin(hint) is Annotated else []
    return marks[0] if marks else Shown("")


def _add(group: Any, field: "Field[Any]", hint: Any, *, help_: str) -> None:
    """Adds a field to a parser's group of arguments."""
    shown = _shown(hint)
    kind = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    if NoneType in get_args(kind):
        kind = get_args(kind)[0]
    if kind is bool:
        group.add_argument(flag(field.name), action=argparse.BooleanOptionalAction, help=help_)
        return
    several = get_origin(kind) is tuple
    parts = get_args(kind) if several else ()
    one = parts[0] if several else kind
    choices = get_args(one) if get_origin(one) is Literal else ()
    value = shown.value or ("{" + ",".join(choices) + "}" if choices else _KINDS[one][0])
    more: dict[str, Any] = {}
    if shown.repeated:
        more = {"action": "append"}
    elif several:
        more = {"nargs": "*" if parts[-1] is ... else len(parts)}
    if field.default is MISSING and not shown.positional:
        more["required"] = True
    name = field.name if shown.positional else flag(field.name)
    group.add_argument(name, type=_reader(name, one, choices), metavar=value, help=help_, **more)


def _reader(name: str, kind: Any, choices: Sequence[str]) -> Callable[[str], Any]:
    """What reads a value.

    Raises:
        UsageError: from what it returns, for a text that is no such value.
    """

    def value(text: str) -> Any:
        if choices:
            if text not in choices:
                raise UsageError(f"{name} must be {', '.join(choices)}. Found {text!r:.80}.{nearest(text, choices)}")
            return text
        try:
            return kind(text)
        except ValueError as error:
            raise UsageError(f"{name} must be {_KINDS[kind][1]}. Found {text!r:.80}.") from error

    return value


def _described(kind: type, field: "Field[Any]") -> str:
    """The help of a field: its docstring, and its default where that says something."""
    default = field.default
    text = _docstrings(kind)[field.name].rstrip(".")
    if default is MISSING or not default:  # none is off
        return text.replace("%", "%%")
    values = default if isinstance(default, tuple) else (default,)
    return f"{text} (default: {' '.join(map(str, values))})".replace("%", "%%")


@cache
def _docstrings(kind: type) -> dict[str, str]:
    """The strings under the fields of a dataclass and of its bases."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        module = ast.parse(inspect.getsource(sys.modules[base.__module__]))
        (body,) = [node.body for node in module.body if isinstance(node, ast.ClassDef) and node.name == base.__name__]
        for field, text in pairwise(body):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                    texts[name] = " ".join(words.split())
    return texts
