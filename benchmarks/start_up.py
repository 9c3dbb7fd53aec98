"""What a user waits for before the first result: imports, a first training step, a first compiled step.

Every call is a process of its own, timed from its start to its end. A process of a step does one step of the tutorial
CNN without dropout; all of them import and load the same, so that they differ by the step alone, and what imports take
is a case of its own. What a step computes is held against its definition, by its norm. `compile, cold` begins each call
with an empty cache of torch's compiler, `compile, warm` with one that the arm's first call has filled.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

from functorch_mnist import tree

from . import command
from .definitions import Definitions
from .measure import Arm, Case, Question, Setup, Work
from .problems import Problem, cnn
from .programs import run
from .quantities import clipped_step, factored, quantity
from .steps import functional_step, module_step

BATCH_SIZE = 64
TOLERANCE = 1e-4
"""Relative, of a norm."""


class First(NamedTuple):
    """A first step."""

    quantity: str
    """What it computes, by its name in `Definitions`."""
    work: Callable[[Problem], Work]


EAGER: Mapping[str, First] = {
    "eager nn.Module": First("ordinary_step", partial(module_step, compile=False)),
    "functional, eager": First("ordinary_step", partial(functional_step, compile=False)),
    "clipped, eager": First("clipped_step", lambda problem: clipped_step(partial(factored, problem), compile=False)),
}
COMPILED: Mapping[str, First] = {
    "compiled nn.Module": First("ordinary_step", partial(module_step, compile=True)),
    "functional, compiled": First("ordinary_step", partial(functional_step, compile=True)),
    "clipped, compiled": First("clipped_step", lambda problem: clipped_step(partial(factored, problem), compile=True)),
    "clipped, prepared, compiled": First("clipped_step", lambda problem: _prepared(problem, None)),
    "clipped, prepared, compiled, 16 chunks": First(
        "clipped_step", lambda problem: _prepared(problem, BATCH_SIZE // 16)
    ),
    "norms, compiled": First("norms", lambda problem: quantity(partial(factored, problem), "norms", compile=True)),
}


def _prepared(problem: Problem, chunk_size: int | None) -> Work:
    """A compiled clipped step of a prepared loss."""
    return clipped_step(partial(factored, problem, chunk_size=chunk_size, prepared=True), compile=True)


def import_arms() -> Iterator[Arm]:
    """Commands that compute nothing."""
    lines = {
        "import torch": "import torch",
        "import torch, torch.func": "import torch, torch.func",
        "import functorch_mnist (no namespace used)": "import functorch_mnist",
        "functorch_mnist.models": "import functorch_mnist; functorch_mnist.models",
        "functorch_mnist.per_sample": "import functorch_mnist; functorch_mnist.per_sample",
    }
    for name, line in lines.items():
        yield Arm(name, partial(_command, "-c", line))
    yield Arm("functorch-mnist --help", partial(_command, "-m", "functorch_mnist", "--help"))
    for package in ("opacus", "jax"):
        yield Arm(f"import {package}", partial(_import, package))


def _import(package: str) -> Work:
    if find_spec(package) is None:
        raise ImportError(package)
    return _command("-c", f"import {package}")


def _command(*arguments: str) -> Work:
    """A process, whose output is its exit status."""
    found: list[int] = []

    def call() -> None:
        found[:] = [run(*arguments).returncode]

    return Work(call, lambda: found[0])


def step_arms(firsts: Mapping[str, First], setup: Setup, folder: str, *, cold: bool) -> Iterator[Arm]:
    """Processes of first steps; their compilers' caches are in the folder."""
    definitions = Definitions(cnn(BATCH_SIZE, setup.device))
    for name, first in firsts.items():
        expected = partial(lambda quantity: float(tree.norm(getattr(definitions, quantity))), first.quantity)
        yield Arm(name, partial(_process, name, setup, folder, cold=cold), TOLERANCE, expected=expected)


def _process(name: str, setup: Setup, folder: str, *, cold: bool) -> Work:
    """A process of a first step, whose output is the norm that it prints."""
    kept, found = tempfile.mkdtemp(dir=folder), list[float]()

    def call() -> None:
        with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as fresh:
            place = fresh if cold else kept
            variables = {"TORCHINDUCTOR_CACHE_DIR": place, "TMPDIR": place}  # the compiler's headers are in the latter
            done = run("-m", "benchmarks.start_up", name, *command.options_of(setup), variables=variables)
        found[:] = [float(done.stdout)]

    return Work(call, lambda: found[0])


def relative_difference(found: float, expected: float) -> float:
    """How far a norm is from the expected one, relative to it."""
    return abs(found - expected) / expected


def cases(setup: Setup) -> Iterator[Case]:
    """Imports, then first steps."""
    rounds = 3 if setup.quick else 7
    yield Case("import", list(import_arms()), lambda found, expected: abs(found - expected), rounds, lead=0)
    if setup.quick:
        return
    settings = {"model": "cnn without dropout", "batch_size": BATCH_SIZE}
    for name, firsts, cold, rounds in (
        ("first step", EAGER, False, 5),
        ("compile, cold", COMPILED, True, 1),
        ("compile, warm", COMPILED, False, 5),
    ):
        with tempfile.TemporaryDirectory() as folder:
            arms = list(step_arms(firsts, setup, folder, cold=cold))
            yield Case(name, arms, relative_difference, rounds, warmups=0 if cold else 1, lead=0, settings=settings)


QUESTION = Question(
    "start_up", "imports, a first training step and a first compiled step, each in a new process", cases
)


def main() -> None:
    """Does one first step, and prints the norm of what it computes."""
    parser = command.Parser("python -m benchmarks.start_up", __doc__)
    parser.add_argument("arm", choices=(*EAGER, *COMPILED))
    command.add_setup(parser)
    options = parser.parse_args()
    setup = command.setup(parser, options)
    work = {**EAGER, **COMPILED}[options.arm].work(cnn(BATCH_SIZE, setup.device))
    work.call()
    print(float(tree.norm(work.outputs())))


if __name__ == "__main__":
    main()
