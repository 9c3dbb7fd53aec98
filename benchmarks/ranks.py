"""Arms of several processes: each process runs this program, and steps on request.

    python -m benchmarks.ranks ARM ROWS          with the environment that a launcher sets

A line `N` on its standard input has it make N steps, `save PATH` write how far the parameters have gone. While it waits
for a line it takes no time from other arms.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from functorch_mnist import allocator, distributed, losses, models, optim, per_sample, random, train, tree
from functorch_mnist.data import Batch
from functorch_mnist.distributed import World

from .measure import Start, Work
from .problems import Problem, cnn, start
from .quantities import CHUNK, MAX_NORM
from .steps import LR, MOMENTUM

STEPS = 10
"""In a call."""


def functional(problem: Problem, world: World, *, clipped: bool, shards: bool = False) -> Work:
    """Steps of this library, compiled; with the optimizer's state in shards, if it is asked for."""

    def losses_fn(params: models.Params, stored: Tensor, labels: Tensor) -> Tensor:
        return losses.cross_entropy(problem.apply(params, problem.prepare(stored)), labels)

    def clipped_sum(params: models.Params, *batch: Tensor, mask: Tensor | None) -> tuple[Any, dict[str, Tensor]]:
        found = per_sample.clipped_sum(losses_fn, params, *batch, max_norm=MAX_NORM, chunk_size=CHUNK, mask=mask)
        return found.grads, {"loss": found.losses.sum()}

    optimizer: Any = optim.sgd(LR, momentum=MOMENTUM)
    if shards:
        optimizer = distributed.sharded(optimizer, world, problem.params)
    estimator = train.Estimator(clipped_sum) if clipped else train.batch_gradient(losses_fn)
    step = train.make_step(estimator, optimizer, world)
    if world.shards is None:
        step = train.compiled(step)
    else:
        update = optimizer._replace(update=train.compiled(optimizer.update))
        step = train.make_step(train.Estimator(train.compiled(estimator.fn)), update, world)
    state = train.init_state(problem.params, optimizer, random.key(0))
    count = len(problem.labels)
    mine = distributed.rows_of(world, Batch(torch.arange(count), None))
    rows = problem.stored[mine.examples], problem.labels[mine.examples]
    divisor = torch.tensor(float(count))

    def call() -> None:
        nonlocal state
        state, _ = step(state, *rows, mask=mine.mask, divisor=divisor)

    return Work(call, lambda: tree.map(torch.sub, state.params, problem.params))


def module(problem: Problem, world: World) -> Work:
    """Steps of `nn.Module`, compiled, in DistributedDataParallel where there are several processes."""
    net: nn.Module = problem.loaded()
    weights = dict(net.named_parameters())
    sgd = torch.optim.SGD(net.parameters(), lr=LR, momentum=MOMENTUM)
    forward: Any = torch.compile(net, dynamic=False)
    if world.size > 1:
        forward = nn.parallel.DistributedDataParallel(forward)
    rows = _rows(problem, world)

    def call() -> None:
        sgd.zero_grad()
        F.cross_entropy(forward(rows[0]), rows[1]).backward()
        sgd.step()

    return Work(call, lambda: {name: p.detach() - problem.params[name] for name, p in weights.items()})


def opacus(problem: Problem, world: World, *, ghost: bool) -> Work:
    """Clipped steps of Opacus, in its own DistributedDataParallel."""
    optimizers: Any = import_module("opacus.optimizers")
    net: nn.Module = problem.loaded()
    weights = dict(net.named_parameters())
    sgd = torch.optim.SGD(net.parameters(), lr=LR, momentum=MOMENTUM)
    rows = _rows(problem, world)
    constants = {"noise_multiplier": 0.0, "max_grad_norm": MAX_NORM, "expected_batch_size": len(rows[1])}
    parallel: Any = import_module("opacus.distributed").DifferentiallyPrivateDistributedDataParallel(net)
    utilities: Any = import_module("opacus.grad_sample.utils")
    criterion: Any = F.cross_entropy
    if ghost:
        wrapped = utilities.wrap_model(parallel, "ghost", max_grad_norm=MAX_NORM)
        optimizer = optimizers.DistributedDPOptimizerFastGradientClipping(sgd, **constants)
        losses_of: Any = import_module("opacus.utils.fast_gradient_clipping_utils")
        criterion = losses_of.DPLossFastGradientClipping(wrapped, optimizer, nn.CrossEntropyLoss())
    else:
        wrapped = utilities.wrap_model(parallel, "hooks")
        optimizer = optimizers.DistributedDPOptimizer(sgd, **constants)

    def call() -> None:
        optimizer.zero_grad(set_to_none=True)
        criterion(wrapped(rows[0]), rows[1]).backward()
        optimizer.step()

    return Work(call, lambda: {name: p.detach() - problem.params[name] for name, p in weights.items()})


def _rows(problem: Problem, world: World) -> tuple[Tensor, Tensor]:
    """This process's rows, of a batch that the processes divide without a rest."""
    size = len(problem.labels) // world.size
    mine = slice(world.rank * size, (world.rank + 1) * size)
    return problem.x[mine], problem.labels[mine]


def summed(problem: Problem, world: World, *, numbers: int | None = None) -> Work:
    """The sum of a tree over processes, of `numbers` numbers or of the parameters."""
    values = problem.params if numbers is None else {"": torch.zeros(numbers)}
    found: list[Any] = []

    def call() -> None:
        found[:] = [distributed.all_reduce(world, values)]

    return Work(call, lambda: {"": torch.ones(1)})


ARMS: Mapping[str, Callable[[Problem, World], Work]] = {
    "ordinary": lambda problem, world: functional(problem, world, clipped=False),
    "ordinary, optimizer in shards": lambda problem, world: functional(problem, world, clipped=False, shards=True),
    "clipped": lambda problem, world: functional(problem, world, clipped=True),
    "clipped, optimizer in shards": lambda problem, world: functional(problem, world, clipped=True, shards=True),
    "module": module,
    "opacus, hooks": lambda problem, world: opacus(problem, world, ghost=False),
    "opacus, ghost": lambda problem, world: opacus(problem, world, ghost=True),
    "one number": lambda problem, world: summed(problem, world, numbers=1),
    "all numbers": summed,
}


class Ranks:
    """Processes of an arm, as the harness holds them."""

    def __init__(self, arm: str, rows: int, *, size: int, threads: int, shards: int | None = None) -> None:
        import socket

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        base = os.environ | {
            "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": str(threads),
        }  # fmt: skip
        line = [sys.executable, "-m", "benchmarks.ranks", arm, str(rows), str(shards or 0)]
        self._line = " ".join(line)
        self._processes = [
            subprocess.Popen(line, env=base | {"RANK": str(rank)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             stderr=subprocess.DEVNULL, text=True, cwd=Path(__file__).parent.parent)
            for rank in range(size)
        ]  # fmt: skip
        self.ask("0")

    def ask(self, line: str) -> list[str]:
        """What each answers to a line."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(line + "\n")
            process.stdin.flush()
        answers = [process.stdout.readline().strip() for process in self._processes if process.stdout]
        if not all(answers):
            raise RuntimeError(f"a process has ended: {self._line}, in an environment as torchrun's, says why")
        return answers

    def __del__(self) -> None:
        """Ends them: their input ends."""
        for process in self._processes:
            for stream in (process.stdin, process.stdout):
                with suppress(OSError):
                    if stream:
                        stream.close()
        for process in self._processes:
            process.wait(60)


def started(problem: Problem, threads: int) -> Start:
    """What all arms start from: each process draws the same weights and takes the same batch."""
    found = start(problem.params.values(), (problem.x, problem.labels), torch.float32)
    return found._replace(threads=threads)


def main(arm: str, rows: int, shards: int) -> None:
    """Joins the others, and does what the lines say."""
    allocator.keep_freed_memory()
    with distributed.joined(shards=shards or None, timeout=600) as world:
        distributed.bind_cores(world, int(os.environ["OMP_NUM_THREADS"]))
        work = ARMS[arm](cnn(rows), world)
        for line in sys.stdin:
            if line.startswith("save "):
                if world.rank == 0:
                    torch.save(work.outputs(), line.removeprefix("save ").strip())
            else:
                for _ in range(int(line)):
                    work.call()
            print("done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
