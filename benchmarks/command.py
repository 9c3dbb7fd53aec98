"""The options that every command of the benchmarks has, and what they set for its process."""

import argparse
import os
from typing import NoReturn

from .measure import Setup


class Parser(argparse.ArgumentParser):
    """A parser whose help shows a module's docstring as it is, and that reports a mistake in one line."""

    def __init__(self, prog: str, description: str | None) -> None:
        super().__init__(prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        """Ends the command with status 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def add_setup(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a setup."""
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, metavar="N", help="cores to run on (default: all there are)")
    parser.add_argument(
        "--quick", action="store_true", help="fewer and smaller cases, few rounds: a look, not a result"
    )
    parser.add_argument(
        "--default-allocator", action="store_true", help="let the C library give freed memory back at once"
    )


def setup(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Setup:
    """Makes this process what the options say, and says what it is; ends the command where they cannot be had."""
    cores = _cores()
    threads = len(cores) if options.threads is None else options.threads
    if not 1 <= threads <= len(cores):
        parser.error(f"--threads must be from 1 to {len(cores)}, the cores there are. Found {threads}.")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores[:threads])  # holds for every library, so before any of them starts threads
    import torch

    from functorch_mnist import allocator

    try:
        device = torch.device(options.device)
    except RuntimeError:
        parser.error(f"--device must be cpu or cuda. Found {options.device!r}.")
    if device.type not in ("cpu", "cuda"):
        parser.error(f"--device must be cpu or cuda. Found {options.device!r}.")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here.")
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32, on a GPU too
    kept = not options.default_allocator and allocator.keep_freed_memory()
    return Setup(str(device), threads, options.quick, kept)


def options_of(setup: Setup) -> list[str]:
    """The options that give another process the same setup."""
    flags = {"--quick": setup.quick, "--default-allocator": not setup.keep_freed_memory}
    named = ["--device", setup.device, "--threads", str(setup.threads)]
    return named + [flag for flag, on in flags.items() if on]


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
