"""The command line: reads the options, runs the command, and tells a user's mistake in one line.

torch is imported only when a command runs, so `--help` and wrong options answer at once.
"""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Union

import tyro

from . import options as opt
from . import run_folder


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status: 0, 1 for an error told in one line, 2 for unusable options."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    signal.signal(signal.SIGTERM, _interrupt)  # a polite kill stops as Ctrl-C does
    try:
        return _run(_parse(arguments))
    except KeyboardInterrupt:
        return _fail("Interrupted.", opt.INTERRUPTED)
    except opt.UsageError as error:
        return _fail(str(error), 2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads on: end quietly
        return 1
    except OSError as error:
        return _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}.", 1)


def _parse(arguments: list[str]) -> Any:
    base = opt.RECIPES["article"]
    resume, recipe = _value_of("--resume", arguments), _value_of("--recipe", arguments)
    if resume is not None:
        base = run_folder.read_config(Path(resume))
    elif recipe in opt.RECIPES:
        base = opt.RECIPES[recipe]
    command = Union[  # noqa: UP007 (built at run time)
        Annotated[opt.Train, tyro.conf.subcommand("train", default=base)],
        Annotated[opt.Evaluate, tyro.conf.subcommand("evaluate")],
        Annotated[opt.Predict, tyro.conf.subcommand("predict")],
    ]
    options = tyro.cli(
        command, args=arguments, prog="functorch-mnist", description="Train on MNIST, purely functionally."
    )
    if isinstance(options, opt.Train):
        opt.check(options)
        if resume is not None:
            opt.check_resumed(options, base)
    return options


def _value_of(flag: str, arguments: list[str]) -> str | None:
    """The value of a flag that decides the defaults of the others, so it is read before them."""
    for argument, following in zip(arguments, [*arguments[1:], None], strict=True):
        if argument == flag:
            return following
        if argument.startswith(flag + "="):
            return argument.removeprefix(flag + "=")
    return None


def _run(options: Any) -> int:
    from . import commands  # imports torch

    try:
        if isinstance(options, opt.Train):
            return commands.train(options)
        if isinstance(options, opt.Evaluate):
            return commands.evaluate(options)
        return commands.predict(options)
    except commands.FAULTS as error:
        return _fail(str(error), 1)


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _fail(message: str, status: int) -> int:
    print(f"functorch-mnist: {message}", file=sys.stderr)
    return status
