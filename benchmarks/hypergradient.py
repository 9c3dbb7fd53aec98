"""What a gradient through training costs: time and memory against the number of steps.

An MLP 784-128-10 at 64 examples, compiled; the gradient of the held-out loss by learning rate, momentum and weight
decay. The reference is the training alone. States are kept every √T steps, as `sweep.hypergradient` does, or all of
them, as reverse mode by itself must; both are held against a run of the same kind that is not compiled.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from functorch_mnist import data, losses, models, optim, random, sweep, train, tree

from . import problems
from .measure import Arm, Axis, Case, Question, Setup, Work
from .problems import Problem, start
from .steps import relative_difference

BATCH_SIZE = 64
STEPS = (25, 100, 400, 1600)
TOLERANCE = 2e-3
"""Rounding of float32 grows through hundreds of steps."""
HYPER = {"lr": 0.02, "momentum": 0.9, "weight_decay": 1e-3}


class Run:
    """A training run of N steps."""

    def __init__(self, steps: int, device: str) -> None:
        self.steps, self.problem = steps, problems.mlp(BATCH_SIZE, device, hidden=(128,))
        images = data.load("mnist").train
        self.images, self.labels = images.images[:10_000].to(device), images.labels[:10_000].to(device)
        self.held_out = images.images[50_000:51_000].to(device), images.labels[50_000:51_000].to(device)
        self.hyper = {name: torch.tensor(value, device=device) for name, value in HYPER.items()}
        self.begun = train.init_state(self.problem.params, self.optimizer(self.hyper), random.key(0, device=device))

    def optimizer(self, hyper: sweep.Values) -> optim.Optimizer:
        """SGD of these hyperparameters."""
        return optim.sgd(hyper["lr"], momentum=hyper["momentum"], weight_decay=hyper["weight_decay"])

    def step(self, hyper: sweep.Values, state: train.State, stored: Tensor, labels: Tensor) -> train.State:
        """One step."""
        estimator = train.batch_gradient(partial(_losses, self.problem))
        return train.make_step(estimator, self.optimizer(hyper))(state, stored, labels)[0]

    def loss(self, _hyper: sweep.Values, state: train.State) -> Tensor:
        """The mean loss on held-out images."""
        return _losses(self.problem, state.params, *self.held_out).mean()

    def inputs(self, t: int) -> tuple[Tensor, Tensor]:
        """The rows of a step."""
        first = t * BATCH_SIZE % (len(self.labels) - BATCH_SIZE)
        return self.images[first : first + BATCH_SIZE], self.labels[first : first + BATCH_SIZE]

    def work(self, every: int | None, *, compile: bool = True) -> Work:
        """The run's gradient; of `every` 0 the training alone."""
        unrolled = sweep.Unrolled(self.step, self.loss, compile=compile)
        step = train.compiled(self.step) if compile else self.step
        last: list[tree.Tree] = [None]

        def call() -> None:
            if every == 0:
                state = self.begun
                for t in range(self.steps):
                    state = step(self.hyper, state, *self.inputs(t))
                last[0] = state.params
            else:
                last[0] = unrolled.hypergradient(
                    self.hyper, self.begun, self.inputs, steps=self.steps, every=every
                ).grads

        weights = self.problem.params.values()
        return Work(call, lambda: last[0], start(weights, (self.problem.x, self.problem.labels), torch.float32))

    def expected(self) -> tree.Tree:
        """The gradient, without a compiler."""
        work = self.work(None, compile=False)
        work.call()
        return work.outputs()


def _losses(problem: Problem, params: models.Params, stored: Tensor, labels: Tensor) -> Tensor:
    return losses.cross_entropy(problem.apply(params, problem.prepare(stored)), labels)


def cases(setup: Setup) -> Iterator[Case]:
    """A case for each number of steps."""
    for steps in STEPS[:1] if setup.quick else STEPS:
        run = Run(steps, setup.device)
        yield Case(
            f"T={steps}",
            [
                Arm("training alone", partial(run.work, 0), TOLERANCE, baseline=True),
                Arm("states of every √T steps", partial(run.work, None), TOLERANCE, expected=run.expected),
                Arm("all states", partial(run.work, 1), TOLERANCE, expected=run.expected),
            ],
            relative_difference,
            3,
            settings={"model": "mlp 784-128-10", "batch_size": BATCH_SIZE, "steps": steps},
            axis=Axis("T", steps),
            memory=True,
        )


QUESTION = Question("hypergradient", "a gradient through training: time and memory against its steps", cases)
