"""The command line: reads the options, runs the command, and tells a user's mistake in one line.

torch is imported only when a command runs, so `--help` and wrong options answer at once.
"""

import io
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Annotated, Any, Union

import tyro

from . import options as opt
from . import run_folder


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status.

    Returns:
        0; 1 for a fault of files, data or numbers; 2 for what the user can put right on the command line; 130 after
        Ctrl-C. Each but 0 is told in one line, or in tyro's box where an option cannot be read.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
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
    except SystemExit as done:  # from tyro, which has printed help or what is wrong
        return int(done.code or 0)
    if "RANK" in os.environ:  # torch would complain of a sum that Ctrl-C breaks off
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
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


def _parse(arguments: list[str]) -> Any:
    """The options of one command; read twice where --resume or --recipe decides what the others are by default."""
    options = _read(arguments, opt.RECIPES["tutorial"])
    if isinstance(options, opt.Train):
        if options.resume is not None:
            saved = run_folder.read_config(options.resume)
            options = _read(arguments, saved)
            opt.check_resumed(options, saved)
        elif options.recipe != "tutorial":
            options = _read(arguments, opt.RECIPES[options.recipe])
        opt.check(options)
    elif isinstance(options, opt.Sweep | opt.Compare):
        if options.training.recipe != "tutorial":
            options = _read(arguments, opt.RECIPES[options.training.recipe])
        options = run_folder.resumed(options)
        opt.check_sweep(options) if isinstance(options, opt.Sweep) else opt.check_compare(options)
    elif isinstance(options, opt.Plan):
        opt.check_plan(options)
    elif isinstance(options, opt.Analysis):
        opt.check_analysis(options)
    elif isinstance(options, opt.Account):
        opt.check_account(options)
    return options


def _read(arguments: list[str], defaults: opt.Train) -> Any:
    """The options as tyro reads them, those of `train` with these defaults."""
    held = replace(defaults, hold_out=defaults.hold_out or opt.SWEPT.hold_out)
    compared = opt.COMPARED if defaults == opt.RECIPES["tutorial"] else held
    command = Union[  # noqa: UP007 (built at run time)
        Annotated[opt.Train, tyro.conf.subcommand("train", default=defaults)],
        Annotated[opt.Evaluate, tyro.conf.subcommand("evaluate")],
        Annotated[opt.Predict, tyro.conf.subcommand("predict")],
        Annotated[opt.Plan, tyro.conf.subcommand("plan")],
        Annotated[opt.Scores, tyro.conf.subcommand("scores")],
        Annotated[opt.Mislabelled, tyro.conf.subcommand("mislabelled")],
        Annotated[opt.Store, tyro.conf.subcommand("store")],
        Annotated[opt.Influence, tyro.conf.subcommand("influence")],
        Annotated[opt.NoiseScale, tyro.conf.subcommand("noise-scale")],
        Annotated[opt.Account, tyro.conf.subcommand("account")],
        Annotated[opt.Sweep, tyro.conf.subcommand("sweep", default=opt.Sweep(training=held))],
        Annotated[opt.Compare, tyro.conf.subcommand("compare", default=opt.Compare(training=compared))],
    ]
    return tyro.cli(command, args=arguments, prog="functorch-mnist", description="Train on MNIST, purely functionally.")


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
