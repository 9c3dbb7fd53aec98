"""What a step of many training runs costs: runs in one call against loops over modules and over one compiled step.

Each run has its own weights, learning rate, examples and keys. A round is one step of all runs, at 64 examples. The
references are loops: over eager `nn.Module`s with `torch.optim.SGD`, over modules compiled, and over this library's
compiled step. A `VmappedStep` is what `sweep` trains with; the arm's name holds its width. All pick their examples
from the data set and normalise them, but for the modules whose examples lie ready.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from functorch_mnist import data, losses, models, optim, random, sweep, train, tree

from . import networks, problems, report
from .measure import Arm, Case, Comparison, Question, Setup, Start, Work
from .problems import Problem, start
from .steps import MOMENTUM, relative_difference

BATCH_SIZE = 64
TOLERANCE = 1e-4


class Many(NamedTuple):
    """Runs of one kind."""

    problem: Callable[[int, str], Problem]
    runs: int
    widths: tuple[int, ...]
    rounds: int


KINDS = {
    "64 linear models": Many(partial(problems.mlp, hidden=()), 64, (1, 8, 64), 60),
    "64 MLPs 784-128-10": Many(partial(problems.mlp, hidden=(128,)), 64, (1, 8, 64), 40),
    "8 tutorial CNNs": Many(problems.cnn, 8, (1, 8), 15),
}


class Group:
    """The runs: weights, learning rates and examples, the same for all arms."""

    def __init__(self, many: Many, device: str) -> None:
        self.problem, self.count = many.problem(BATCH_SIZE, device), many.runs
        images = data.load("mnist").train
        total = many.runs * BATCH_SIZE
        self.images, self.labels = images.images[:total].to(device), images.labels[:total].to(device)
        self.lrs = [0.01 * 1.02**k for k in range(many.runs)]
        self.params = [
            {
                name: w + 0.01 * random.normal(random.fold_in(random.key(k, device=device), place), tuple(w.shape))
                for place, (name, w) in enumerate(self.problem.params.items())
            }
            for k in range(many.runs)
        ]
        self.index = torch.arange(total, device=device).view(many.runs, BATCH_SIZE)
        self.keys = random.split(random.key(1, device=device), total).view(many.runs, BATCH_SIZE, 2)

    def updates(self, params: Sequence[models.Params]) -> list[models.Params]:
        """How far the runs have moved."""
        return [tree.map(torch.sub, after, before) for after, before in zip(params, self.params, strict=True)]

    def start(self) -> Start:
        """What every arm starts from."""
        return start([w for params in self.params for w in params.values()], (self.images, self.labels), torch.float32)

    def losses_fn(self, params: models.Params, stored: Tensor, labels: Tensor, _keys: Tensor) -> Tensor:
        """Of this library's steps."""
        return losses.cross_entropy(self.problem.apply(params, self.problem.prepare(stored)), labels)

    def program(self) -> sweep.Program:
        """A run, as the sweep takes it."""

        def optimizer(lr: Tensor | float) -> optim.Optimizer:
            return optim.sgd(lr, momentum=MOMENTUM)

        def init(hyper: sweep.Values, key: Tensor) -> train.State:
            return train.init_state(self.params[int(hyper[sweep.SEED])], optimizer(hyper["lr"]), key)

        def step(
            hyper: sweep.Values, state: train.State, *rows: Tensor, mask: Tensor | None, divisor: Tensor
        ) -> tuple[train.State, dict[str, Tensor]]:
            made = train.make_step(train.batch_gradient(self.losses_fn), optimizer(hyper["lr"]))
            return made(state, *rows, mask=mask, divisor=divisor)

        return sweep.Program(init, step, lambda _hyper, _state: {})


def modules(group: Group, *, compile: bool, fused: bool, channels_last: bool, ready: bool) -> Work:
    """A loop over `nn.Module`s, each with its `torch.optim.SGD`."""
    form = torch.channels_last if channels_last else torch.contiguous_format
    nets, steps = [], []

    def examples(k: int) -> tuple[Tensor, Tensor]:
        x = group.problem.prepare(group.images[group.index[k]])
        return x.contiguous(memory_format=form), group.labels[group.index[k]]

    for k in range(group.count):
        net = group.problem.module().to(group.images.device)
        models.load_into(net, group.params[k])
        net = net.to(memory_format=form)
        nets.append(net)
        optimizer = torch.optim.SGD(net.parameters(), lr=group.lrs[k], momentum=MOMENTUM, fused=fused)
        steps.append((net, optimizer, examples(k) if ready else None))
    shared = torch.compile(_loss, dynamic=False) if compile else _loss

    def call() -> None:
        for k, (net, optimizer, batch) in enumerate(steps):
            optimizer.zero_grad()
            shared(net, *(batch or examples(k))).backward()
            optimizer.step()

    return Work(
        call,
        lambda: group.updates([{name: p.detach() for name, p in net.named_parameters()} for net in nets]),
        group.start(),
        lambda: [optimizer.zero_grad() for _, optimizer, _ in steps],
    )


def _loss(net: torch.nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(net(x), labels)


def vmapped(group: Group, *, width: int, compile: bool) -> Work:
    """A step of all runs in one call."""
    program = group.program()
    made = sweep.VmappedStep(program, (group.images, group.labels), batch_size=BATCH_SIZE, compile=compile)
    runs = sweep.with_seeds({"lr": torch.tensor(group.lrs)}, [0], settings=group.count)
    runs[sweep.SEED] = torch.arange(group.count)
    runs = {name: column.to(group.images.device) for name, column in runs.items()}
    states = [
        train.init_state(params, optim.sgd(lr, momentum=MOMENTUM), random.key(0, device=group.images.device))
        for params, lr in zip(group.params, group.lrs, strict=True)
    ]
    parts = []
    for first in range(0, group.count, width):
        some = slice(first, first + width)
        of_runs = {name: column[some] for name, column in runs.items()}
        parts.append((of_runs, sweep.stacked(states[some]), group.index[some], group.keys[some]))

    def call() -> None:
        for part in parts:
            made.step_(*part, None)

    def outputs() -> list[models.Params]:
        return group.updates(
            [{name: w[k] for name, w in part[1].params.items()} for part in parts for k in range(len(part[2]))]
        )

    return Work(call, outputs, group.start())


def arms(group: Group, many: Many) -> list[Arm]:
    """Loops, then vmapped runs."""
    convolutional = group.problem.module is networks.Net
    found: list[Arm] = []
    for compile, ready, fused in product((False, True), (False, True), (False, True)):
        if compile and group.count > 8:
            continue  # the compiler gives up after eight modules
        name = f"loop of {'compiled' if compile else 'eager'} nn.Modules{', fused SGD' if fused else ''}"
        name += ", examples ready" if ready else ""
        make = partial(modules, group, compile=compile, fused=fused, channels_last=convolutional, ready=ready)
        found.append(Arm(name, make, TOLERANCE, baseline=not compile and not ready))
    for width in many.widths:
        name = "loop over one compiled step" if width == 1 else f"vmapped runs, {width} at once"
        found.append(Arm(name, partial(vmapped, group, width=width, compile=True), TOLERANCE))
    return found


def difference(updates: list[models.Params], expected: list[models.Params]) -> float:
    """Of the run that differs most, relative to its update."""
    return max(relative_difference(one, other) for one, other in zip(updates, expected, strict=True))


def cases(setup: Setup) -> Iterator[Case]:
    """A case for each kind of run."""
    for name, many in KINDS.items():
        if setup.quick:
            many = many._replace(runs=4, widths=(1, 4), rounds=5)
        group = Group(many, setup.device)
        yield Case(
            f"{name}, B={BATCH_SIZE}",
            arms(group, many),
            difference,
            many.rounds,
            warmups=2,
            settings={"runs": many.runs, "batch_size": BATCH_SIZE},
        )
        if setup.quick:
            return


def conclude(comparisons: Sequence[Comparison]) -> str:
    """How many times faster the best vmapped runs are than each loop."""
    columns = {}
    for comparison in comparisons:
        best = min(t.median for t in comparison.timings if t.name.startswith(("vmapped runs", "loop over one")))
        columns[comparison.case] = {t.name: t.median / best for t in comparison.timings}
    return report.across("times as long as the sweep's choice", columns, 2)


QUESTION = Question("sweep", "a step of many training runs in one call, against loops over them", cases, conclude)
