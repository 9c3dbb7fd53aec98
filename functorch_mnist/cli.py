"""The command line: reads the options, runs the command, and reports a user's mistake in one line.

torch is imported only when a command runs, so `--help` and wrong options answer at once.
"""

import io
import os
import shutil
import signal
import sys
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from importlib.metadata import version
from typing import Any

from . import options as opt
from . import run_folder

_PROG = "functorch-mnist"
_HELP = """usage: {prog} COMMAND [OPTIONS]

Train on MNIST and its relatives, look into the gradient of every single image, and train privately.

commands, in the order of use:
{commands}

options of a command, by topic:
  {prog} COMMAND --help

  {prog} --version

To begin:
  {prog} train --out runs/first
  {prog} evaluate runs/first
  {prog} predict runs/first --test 0:10"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status.

    Returns:
        0; 1 for a fault of files, data or numbers; 2 for what the user can put right on the command line; 130 after
        Ctrl-C. Each but 0 is reported in one line.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
        _quiet_torch()
    status = _answer(arguments, ends=argv is None)
    if argv is None and "RANK" in os.environ:
        with suppress(OSError):
            sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # threads of torch's sums may abort where Python ends
    return status


def _answer(arguments: list[str], *, ends: bool) -> int:
    """The exit status of a command; `ends`: whether the process ends with it."""
    signal.signal(signal.SIGTERM, _interrupt)  # a polite kill stops as Ctrl-C does
    _mend_streams()
    try:
        status = _run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt as stop:
        if "RANK" in os.environ and not str(stop):  # the launcher says it, once for all
            return opt.INTERRUPTED
        return _fail(str(stop) or "Interrupted.", opt.INTERRUPTED)
    except opt.UsageError as error:
        return _fail(str(error), 2)
    except OSError as error:
        _drop_output()
        if isinstance(error, BrokenPipeError):  # nobody reads on: end quietly
            return 1
        return _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}.", 1)
    finally:
        if ends:  # one more Ctrl-C would break off Python's own end
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    return status


def _run(arguments: list[str]) -> int:
    """Reads the options, imports torch and runs the command; the exit status."""
    try:
        options = _parse(arguments)
    except SystemExit:  # help is printed
        return 0
    with _held_signals():
        from . import commands  # imports torch
    try:
        if hasattr(options, "run"):
            options = replace(options, run=run_folder.run_of(options.run))
        one = getattr(options, "training", options)
        if getattr(one, "processes", 1) > 1 and "RANK" not in os.environ:  # which a launcher sets
            return commands.launched(one, ["-m", __package__, *arguments])
        return commands.COMMANDS[type(options)](options)
    except commands.TOLD:
        return 1
    except commands.FAULTS as error:
        return _fail(str(error), 1)


def _parse(arguments: Sequence[str]) -> Any:
    """The options of one command, checked.

    Raises:
        UsageError: what is wrong, with the nearest name for one that is unknown.
        SystemExit: help was asked for and is printed.
    """
    command, *rest = arguments or [""]
    if command in ("-h", "--help", "--version"):
        print(f"{_PROG} {version(_PROG)}" if command == "--version" else _help())
        raise SystemExit
    if command not in opt.COMMANDS:
        found = f"Found {command!r:.80}.{opt.nearest(command, opt.COMMANDS)}" if command else "Found none."
        raise opt.UsageError(f"The command must be one of {', '.join(opt.COMMANDS)}. {found} See {_PROG} --help.")
    kind, check = opt.COMMANDS[command]
    given = opt.read(command, kind, rest)
    if kind is opt.Train:
        options: Any = _training(given)
    else:
        options = _with_training(kind, given) if kind in (opt.Sweep, opt.Compare) else kind(**given)
    check(options)
    return options


def _training(given: Mapping[str, Any]) -> opt.Train:
    """The options of `train`: those of the resumed run or of the recipe, where they are not given."""
    if "resume" not in given:
        return replace(opt.RECIPES[given.get("recipe", "tutorial")], **given)
    saved = run_folder.read_config(given["resume"])
    options = replace(saved, **given)
    opt.check_resumed(options, saved)
    return options


def _with_training(kind: type, given: Mapping[str, Any]) -> Any:
    """The options of a command that trains many runs, the runs' among them."""
    own = {field.name for field in fields(kind)}
    recipe = opt.RECIPES[given.get("recipe", "tutorial")]
    base = replace(recipe, hold_out=recipe.hold_out or opt.SWEPT.hold_out)
    if kind is opt.Compare and recipe.recipe == "tutorial":
        base = opt.COMPARED
    training = replace(base, **{name: value for name, value in given.items() if name not in own})
    options = kind(**{name: value for name, value in given.items() if name in own}, training=training)
    return run_folder.resumed(options)


def _help() -> str:
    """All commands, in the order of use, and how to begin."""
    width = min(shutil.get_terminal_size().columns, 110)
    lines = []
    for name, (kind, _) in opt.COMMANDS.items():
        summary = " ".join((kind.__doc__ or "").partition("\n\n")[0].split())
        lines += textwrap.wrap(f"{name:<13}{summary}", width, initial_indent="  ", subsequent_indent=" " * 15)
    return _HELP.format(prog=_PROG, commands="\n".join(lines))


def _quiet_torch() -> None:
    """Keeps torch's advice to its developers out of the terminal; `python -W` and PYTHONWARNINGS bring it back."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module=r"torch(\.|$)")


@contextmanager
def _held_signals() -> Iterator[None]:
    """Lets Ctrl-C wait: torch's import swallows it, or aborts."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _mend_streams() -> None:
    """Takes a stream that the caller has closed for one that nobody reads, and prints what a terminal cannot show."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (for the rest of the process)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    """Sends what cannot be written nowhere, or Python would complain about it once more at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _fail(message: str, status: int) -> int:
    print(f"functorch-mnist: {' '.join(line.strip() for line in message.splitlines())}", file=sys.stderr)
    return status
