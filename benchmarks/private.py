"""What differential privacy adds to a training step: sampling, clipping and noise, against an ordinary step.

Tutorial CNN without dropout, float32. The reference is the fastest ordinary step of the compiled `nn.Module`, on one
batch that lies ready. A private step draws a Poisson sample from all 60,000 training images, gathers it into chunks,
clips, adds noise and steps, as `train --private` does; timed are several steps in a row, for draws are of different
sizes. First the same step without noise, on the ordinary step's batch, is held against the definition of a clipped one.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from functorch_mnist import data, losses, models, optim, privacy, random, train, tree

from . import report
from .definitions import Definitions, difference
from .measure import Arm, Axis, Case, Comparison, Question, Setup, Work
from .problems import Problem, cnn, start
from .quantities import MAX_NORM
from .step import SGD, TOLERANCES
from .steps import LR, MOMENTUM, module_step

BATCH_SIZES = {256: 30, 512: 20}
"""And the rounds at each."""
STEPS = 6
"""In a timed call."""
NOISE = 1.1
SIZES = 8
"""Of chunks, as for a long run."""


class Count:
    """How many steps a call makes: one until the arms have been compared."""

    def __init__(self) -> None:
        self._value = 1

    def __call__(self) -> int:
        return self._value

    def turn_on(self) -> None:
        self._value = STEPS


def repeated(make: Callable[[], Work], count: Count) -> Work:
    """Work of N steps."""
    one = make()

    def call() -> None:
        for _ in range(count()):
            one.call()

    return Work(call, one.outputs, one.start, one.release)


Made = Callable[[int, int], privacy.Mechanism]
"""`made(batch_size, examples)`: the mechanism with this expected batch size."""


def poisson(batch_size: int, examples: int) -> privacy.Mechanism:
    """Poisson sampling: each example independently."""
    return privacy.Poisson(batch_size / examples, NOISE)


def private_steps(problem: Problem, count: Count, device: str, mechanism: Made = poisson) -> Work:
    """Private steps on draws from all images; in the first call one without noise on the problem's batch."""
    batch_size = len(problem.labels)
    images = data.load("mnist").train
    examples, rows = (images.images.to(device), images.labels.to(device)), (problem.stored, problem.labels)
    clipping, optimizer, secret = privacy.Flat(MAX_NORM), optim.sgd(LR, momentum=MOMENTUM), privacy.Secret(0)

    def loss_fn(params: models.Params, stored: Tensor, label: Tensor, _key: Tensor) -> Tensor:
        return losses.cross_entropy(problem.apply(params, problem.prepare(stored)), label)

    def made(mechanism: privacy.Mechanism, examples: int, sizes: Sequence[int] | None = None) -> train.PrivateStep:
        return train.make_private_step(
            loss_fn, optimizer, clipping=clipping, mechanism=mechanism, examples=examples, chunk_sizes=sizes
        ).compiled()

    chosen = mechanism(batch_size, len(images.labels))
    step = made(chosen, len(images.labels), privacy.chunk_sizes(chosen, len(images.labels), count=SIZES))
    noiseless = made(privacy.Poisson(1.0, 0.0), batch_size, sizes=step.sizes[:1])  # in two chunks
    first = train.init_private_state(problem.params, optimizer, random.key(0), clipping)
    state, fit = first, partial(train.fit_private, step, examples=examples, secret=secret)

    def compile_all() -> None:
        """Whatever a draw may need."""
        drawn, roots = privacy.Draw(torch.arange(batch_size, device=device)), secret.roots(device)
        for size in step.sizes:
            step._stepped(first, roots, privacy.chunks(drawn, (size,)), None, examples)
        fit(first, steps=1)

    def call() -> None:
        nonlocal state
        if count() == 1:
            compile_all()
            state, _ = noiseless(first, secret.roots(device), *rows)
        else:
            state = fit(state, steps=int(state.step) + count())

    return Work(
        call,
        lambda: tree.map(torch.sub, state.params, problem.params),
        start(problem.params.values(), (problem.x, problem.labels), torch.float32),
    )


def case_of(batch_size: int, arms: list[Arm], rounds: int, count: Count) -> Case:
    """Steps of these arms, several in a call once they have been compared."""
    return Case(
        f"B={batch_size}",
        arms,
        difference,
        rounds,
        lead=0,
        settings={
            "model": "cnn without dropout", "batch_size": batch_size, "steps_in_a_call": STEPS,
            "max_norm": MAX_NORM, "noise_multiplier": NOISE,
        },
        axis=Axis("B", batch_size),
        compared=count.turn_on,
    )  # fmt: skip


def cases(setup: Setup) -> Iterator[Case]:
    """A case for each batch size."""
    for batch_size, rounds in {256: 2}.items() if setup.quick else BATCH_SIZES.items():
        problem, count = cnn(batch_size, setup.device), Count()
        definitions, tolerance = Definitions(problem), TOLERANCES[torch.float32]
        arms = [
            Arm(
                f"ordinary step, compiled nn.Module{kind}",
                partial(repeated, partial(module_step, problem, compile=True, sgd=sgd), count),
                tolerance,
                baseline=True,
                expected=partial(getattr, definitions, "ordinary_step"),
            )
            for sgd, kind in SGD.items()
        ]
        arms.append(
            Arm(
                "private step, compiled",
                partial(private_steps, problem, count, setup.device),
                tolerance,
                expected=partial(getattr, definitions, "clipped_step"),
            )
        )
        yield case_of(batch_size, arms, rounds, count)


def conclude(comparisons: Sequence[Comparison]) -> str:
    """What a private step costs over the fastest ordinary one."""
    rows = [(one.case, one, one.timings[-1]) for one in comparisons]
    return report.ratios("case", "over the fastest ordinary step", rows)


QUESTION = Question("private", "a private training step, sampling and noise included", cases, conclude)
