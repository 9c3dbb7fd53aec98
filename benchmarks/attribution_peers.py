"""What others take for attribution: Gram matrices by TorchJD, TracIn and TRAK by dattri, factors by kronfluence.

Each function gives a `Work`, or raises ImportError where its package is missing (`pip install -e '.[bench]'`). All
start from the same weights and take the same normalised batch, of which the first examples are trained on. Each package
gets the batches that take it the least time, and nothing of it is timed that only shows progress or writes files.
"""

import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from .attribution import DAMPING, SEED, Factors, ModuleLoss, cross_entropy, log_odds, parts
from .measure import Work
from .problems import Problem, start
from .steps import LR


def torchjd_gram(problem: Problem) -> Work:
    """The Gram matrix by TorchJD's Gramian engine, which goes through the network layer by layer."""
    engines: Any = import_module("torchjd.autogram")
    net, x, labels = problem.loaded(), problem.x, problem.labels
    engine, found = engines.Engine(net, batch_dim=0), list[Tensor]()

    def call() -> None:
        found[:] = [engine.compute_gramian(F.cross_entropy(net(x), labels, reduction="none"))]

    return Work(call, lambda: found[0], start(net.parameters(), (x, labels), torch.float32), found.clear)


def dattri_tracin(problem: Problem, count: int, *, batch_size: int) -> Work:
    """TracIn by dattri, without a projection.

    Args:
        problem: a loss's.
        count: how many examples are trained on. They are one batch: it computes all test gradients again for each.
        batch_size: of the tests.
    """
    module: Any = import_module("dattri.algorithm.tracin")

    def attributor(task: Any) -> Any:
        options = {"normalized_grad": False, "projector_kwargs": _projector(problem, None)}
        return module.TracInAttributor(task, torch.tensor([LR]), device=problem.labels.device.type, **options)

    return _dattri(problem, count, batch_size, module, cross_entropy, attributor)


def dattri_trak(
    problem: Problem, count: int, *, size: int | None, batch_size: int, only: Sequence[str] | None = None
) -> Work:
    """TRAK by dattri.

    Args:
        problem: of the log-odds.
        count: how many examples are trained on. They are one batch: it samples the projection again for each.
        size: of the projection, by independent normal numbers; None for none.
        batch_size: of the tests.
        only: the parameters that count, all by default.
    """
    module: Any = import_module("dattri.algorithm.trak")

    def attributor(task: Any) -> Any:
        net = task.get_model()

        def probability(params: dict[str, Tensor], example: tuple[Tensor, Tensor]) -> Tensor:
            return torch.exp(-cross_entropy(net, params, *example))

        return module.TRAKAttributor(
            task,
            probability,
            projector_kwargs=_projector(problem, size),
            layer_name=None if only is None else list(only),
            device=problem.labels.device.type,
            # It divides gradients by the root of the number of parameters.
            regularization=DAMPING / sum(p.numel() for p in problem.params.values()),
        )

    return _dattri(problem, count, batch_size, module, log_odds, attributor)


def _dattri(
    problem: Problem,
    count: int,
    batch_size: int,
    module: Any,
    loss: ModuleLoss,
    make: Callable[[Any], Any],
) -> Work:
    """An attributor's scores of a loss, which is also what is tested."""
    tasks: Any = import_module("dattri.task")
    module.tqdm = lambda batches, **_: batches  # no bars
    net, batch, found = problem.loaded(), (problem.x, problem.labels), list[Tensor]()

    def of_example(params: dict[str, Tensor], example: tuple[Tensor, Tensor]) -> Tensor:
        return loss(net, params, *example)

    attributor = make(tasks.AttributionTask(of_example, net, {n: p.detach() for n, p in problem.params.items()}))
    train, test = (TensorDataset(*part) for part in parts(batch, count))
    loaders = {"train_dataloader": DataLoader(train, count), "test_dataloader": DataLoader(test, batch_size)}

    def call() -> None:
        with torch.no_grad():  # else the gradients would be recorded to be differentiated again
            found[:] = [attributor.attribute(**loaders)]

    device = problem.labels.device
    return Work(call, lambda: found[0].to(device), start(net.parameters(), batch, torch.float32), found.clear)


def _projector(problem: Problem, size: int | None) -> dict[str, Any]:
    """All of dattri's options, as it keeps those of the last attributor."""
    kind = {"proj_type": "identity", "proj_dim": 1} if size is None else {"proj_type": "normal", "proj_dim": size}
    return {**kind, "proj_max_batch_size": 32, "proj_seed": SEED, "device": problem.labels.device.type}


def kronfluence_factors(problem: Problem, *, batch_size: int) -> Work:
    """The covariance matrices that kronfluence fits with the labels of the data, less the bias's row and column."""
    task: Any = import_module("kronfluence.task")
    covariance: Any = import_module("kronfluence.factor.covariance")
    options: Any = import_module("kronfluence.arguments").FactorArguments(use_empirical_fisher=True)
    warnings.filterwarnings("ignore", ".*GradScaler", FutureWarning)
    device = problem.labels.device

    class Task(task.Task):  # type: ignore[misc]
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Tensor:  # noqa: ARG002
            return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

        def compute_measurement(self, batch: Any, model: Any) -> Tensor:
            return self.compute_train_loss(batch, model)

    net, x, labels, found = problem.loaded(), problem.x, problem.labels, list[Any]()
    begin = start(net.parameters(), (x, labels), torch.float32)
    net = import_module("kronfluence.analyzer").prepare_model(net, Task())
    state = import_module("kronfluence.utils.state").State(cpu=device.type == "cpu")
    batches = list(zip(x.split(batch_size), labels.split(batch_size), strict=True))
    fit = covariance.fit_covariance_matrices_with_loader

    def call() -> None:
        found[:] = [fit(net, state, Task(), batches, options, disable_tqdm=True)[1]]

    def outputs() -> dict[str, Factors]:
        inputs, cotangents = found[0]["activation_covariance"], found[0]["gradient_covariance"]
        return {name: Factors(inputs[name][:-1, :-1].to(device), cotangents[name].to(device)) for name in inputs}

    return Work(call, outputs, begin, found.clear)
