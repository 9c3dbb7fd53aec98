"""What attribution asks of gradients in two ways: factored, as this library has it, and by plain torch.

The first examples of a problem are those trained on, the others those tested on. With the gradients ∇_i and ∇'_j of the
loss TracIn at one checkpoint is lr ⟨∇_i, ∇'_j⟩. With the gradients φ_i and φ'_j of the log-odds, rows of Φ and Φ', TRAK
is φ'_jᵀ (Φᵀ Φ + λ)⁻¹ φ_i (1 - p_i): of random projections; or exactly, with K = Φ Φᵀ, as Φ' Φᵀ (K + λ)⁻¹. Kronecker
factors are Σ a aᵀ and Σ g gᵀ over examples and positions, of each layer's inputs and its outputs' cotangents.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from functorch_mnist import attribution, losses, models, per_sample, random, statistics, train
from functorch_mnist.per_sample import Kronecker

from .measure import Work
from .problems import Problem, start
from .steps import LR, relative_difference

DAMPING = 1000.0
"""λ, of the order of the largest eigenvalues of K: a projection is then near to what it stands for."""
SEED = 0
"""Of random projections."""

Batch: TypeAlias = tuple[Tensor, Tensor]
"""Examples and labels."""
ModuleLoss: TypeAlias = Callable[[nn.Module, dict[str, Tensor], Tensor, Tensor], Tensor]
"""Of a module with these parameters, of one example."""


class Factors(NamedTuple):
    """Of one layer's weight."""

    inputs: Tensor
    """(D, D)."""
    cotangents: Tensor
    """(H, H)."""


def parts(batch: Batch, count: int) -> tuple[Batch, Batch]:
    """The first `count` examples, and the others."""
    x, labels = batch
    return (x[:count], labels[:count]), (x[count:], labels[count:])


def factored_tracin(problem: Problem, count: int, *, chunk_size: int, compile: bool) -> Work:
    """TracIn of this library."""
    loss_fn = partial(_loss, problem)

    def tracin(params: models.Params, *batch: Tensor) -> Tensor:
        train, test = parts((batch[0], batch[1]), count)
        return attribution.tracin(loss_fn, [params], train, test, lrs=[LR], chunk_size=chunk_size)

    return _ours(problem, tracin, compile=compile)


def factored_trak(problem: Problem, count: int, *, size: int, chunk_size: int, compile: bool, only: str = "") -> Work:
    """TRAK of this library, of projected log-odds.

    Args:
        problem: of a classifier.
        count: how many examples are trained on.
        size: features of a parameter, at most.
        chunk_size: examples taken at a time.
        compile: whether it is compiled.
        only: the start of the names of the parameters that count; the others are constants.
    """

    def trak(params: models.Params, *batch: Tensor) -> Tensor:
        train, test = parts((batch[0], batch[1]), count)
        free = {name: p for name, p in params.items() if name.startswith(only)}

        def loss_fn(free: models.Params, stored: Tensor, label: Tensor) -> Tensor:
            return _log_odds(problem, params | free, stored, label)

        maps = attribution.projection(free, key=random.key(SEED, device=batch[0].device), size=size)
        features = partial(attribution.features, loss_fn, free, projection=maps, chunk_size=chunk_size)
        found = features(*train), features(*test)
        return attribution.trak(*found, _probabilities(problem, params, *train), damping=DAMPING)

    return _ours(problem, trak, compile=compile)


def factored_exact_trak(problem: Problem, count: int, *, chunk_size: int) -> Work:
    """The same without a projection, from the Gram matrices."""
    gram = partial(per_sample.gram, partial(_log_odds, problem), chunk_size=chunk_size)

    def trak(params: models.Params, *batch: Tensor) -> Tensor:
        train, test = parts((batch[0], batch[1]), count)
        products, across = gram(params, train), gram(params, train, test)
        influence = attribution.fisher_influence(products, across, damping=DAMPING / count) / count
        return influence * (1 - _probabilities(problem, params, *train).double())[:, None]

    return _ours(problem, trak, compile=False)


def factored_kronecker(problem: Problem, *, chunk_size: int, compile: bool) -> Work:
    """Kronecker factors of this library, summed in float32."""
    fn = partial(per_sample.kronecker, partial(_loss, problem), chunk_size=chunk_size)
    return _ours(problem, fn, partial(_in_torchs_order, problem), compile=compile)


def folded_kronecker(problem: Problem, *, chunk_size: int) -> Work:
    """The same as a statistic, whose chunks are added up in float64."""

    def fold(params: models.Params, *batch: Tensor) -> dict[str, Kronecker]:
        of = statistics.KroneckerFactors.of
        return statistics.fold(partial(_loss, problem), params, *batch, of=of, chunk_size=chunk_size).sums

    return _ours(problem, fold, partial(_in_torchs_order, problem), compile=False)


def dense_tracin(problem: Problem, count: int) -> Work:
    """TracIn by every sample gradient of the module, held."""
    net = problem.loaded()
    gradients = _gradients(net, cross_entropy)

    def tracin(*batch: Tensor) -> Tensor:
        train, test = (gradients(*part) for part in parts((batch[0], batch[1]), count))
        return LR * _products(train, test)

    return _plain(net, problem, tracin)


def exact_trak(problem: Problem, count: int) -> Work:
    """TRAK without a projection, by every sample gradient of the module, held: K' (K + λ)⁻¹ of their products."""
    net = problem.loaded()
    gradients = _gradients(net, log_odds)

    def trak(*batch: Tensor) -> Tensor:
        train, test = parts((batch[0], batch[1]), count)
        rows = gradients(*train)
        products, across = _products(rows, rows).double(), _products(rows, gradients(*test)).double()
        with torch.no_grad():
            probabilities = torch.exp(-F.cross_entropy(net(train[0]), train[1], reduction="none"))
        damped = products + DAMPING * torch.eye(count, dtype=products.dtype, device=products.device)
        solved: Tensor = torch.linalg.solve(damped, across)
        return solved * (1 - probabilities.double())[:, None]

    return _plain(net, problem, trak)


def hooked_kronecker(problem: Problem, dtype: torch.dtype = torch.float32) -> Work:
    """Kronecker factors by hooks on the module's layers."""
    net, x, labels = problem.loaded(dtype), problem.x.to(dtype), problem.labels
    inputs, cotangents, found = dict[str, Tensor](), dict[str, Tensor](), dict[str, Factors]()

    def hook(name: str, module: nn.Module, arguments: tuple[Tensor], output: Tensor) -> None:
        rows = arguments[0].detach()
        if isinstance(module, nn.Conv2d):
            rows = F.unfold(rows, module.kernel_size).movedim(1, 2).flatten(0, 1)
        inputs[name] = rows.T @ rows
        output.register_hook(partial(backward_hook, name))

    def backward_hook(name: str, cotangent: Tensor) -> None:
        rows = cotangent.movedim(1, -1).flatten(0, -2)
        cotangents[name] = rows.T @ rows

    for name, module in net.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(partial(hook, name))

    def release() -> None:
        found.clear()
        net.zero_grad()

    def call() -> None:
        release()
        F.cross_entropy(net(x), labels, reduction="sum").backward()
        found.update({name: Factors(inputs.pop(name), cotangents.pop(name)) for name in list(inputs)})

    return Work(call, lambda: dict(found), start(net.parameters(), (problem.x, labels), dtype), release)


def cross_entropy(net: nn.Module, params: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
    """The loss of one example."""
    return F.cross_entropy(functional_call(net, params, (image[None],)), label[None])


def log_odds(net: nn.Module, params: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
    """log(p / (1 - p)) of one example's label."""
    log_p = -cross_entropy(net, params, image, label)
    return log_p - torch.log1p(-log_p.exp())


def scores_difference(found: Tensor, expected: Tensor) -> float:
    """How far the scores of an example, trained on or tested on, are at most from those expected, over their norm."""
    error = found - expected
    return max(float((error.norm(dim=d) / expected.norm(dim=d)).max()) for d in (0, 1))


def directions_difference(found: Tensor, expected: Tensor) -> float:
    """One less the cosine of the scores of a test example with those expected, the mean of all."""
    return float(1 - F.cosine_similarity(found.double(), expected.double(), dim=0).mean())


def factors_difference(found: dict[str, Factors], expected: dict[str, Factors]) -> float:
    """How far a factor is at most from the expected one, relative to its norm."""
    if found.keys() != expected.keys():
        return torch.inf
    pairs = [(a, b) for name in expected for a, b in zip(found[name], expected[name], strict=True)]
    return max(relative_difference(a.to(b.dtype), b) for a, b in pairs)


def _loss(problem: Problem, params: models.Params, stored: Tensor, label: Tensor) -> Tensor:
    return losses.cross_entropy(problem.apply(params, problem.prepare(stored)), label)


def _log_odds(problem: Problem, params: models.Params, stored: Tensor, label: Tensor) -> Tensor:
    return attribution.log_odds(problem.apply(params, problem.prepare(stored)), label)


def _probabilities(problem: Problem, params: models.Params, stored: Tensor, labels: Tensor) -> Tensor:
    """(N,), of the labels."""
    return torch.exp(-losses.cross_entropy(problem.apply(params, problem.prepare(stored)), labels))


def _ours(
    problem: Problem, fn: Callable[..., Any], outputs: Callable[[Any], Any] = lambda x: x, *, compile: bool
) -> Work:
    """A function of this library on a problem, computed by each call."""
    run, found = train.compiled(fn) if compile else fn, list[Any]()

    def call() -> None:
        found[:] = [run(problem.params, problem.stored, problem.labels)]

    begin = start(problem.params.values(), (problem.x, problem.labels), torch.float32)
    return Work(call, lambda: outputs(found[0]), begin, found.clear)


def _plain(net: nn.Module, problem: Problem, fn: Callable[..., Tensor]) -> Work:
    """A function of the module's, computed by each call."""
    batch, found = (problem.x, problem.labels), list[Tensor]()

    def call() -> None:
        found[:] = [fn(*batch)]

    return Work(call, lambda: found[0], start(net.parameters(), batch, torch.float32), found.clear)


def _gradients(net: nn.Module, loss: ModuleLoss) -> Callable[[Tensor, Tensor], list[Tensor]]:
    """A function to every sample gradient of the module: (B, P) of each parameter."""
    params = {name: p.detach() for name, p in net.named_parameters()}
    of = vmap(grad(partial(loss, net)), in_dims=(None, 0, 0))
    return lambda x, labels: [g.flatten(1) for g in of(params, x, labels).values()]


def _products(train: Iterable[Tensor], test: Iterable[Tensor]) -> Tensor:
    return torch.stack([a @ b.T for a, b in zip(train, test, strict=True)]).sum(0)


def _in_torchs_order(problem: Problem, found: dict[str, Kronecker]) -> dict[str, Factors]:
    """By the layer's name, with the inputs in the order of a row of the weight."""
    factors = {}
    for path, pair in found.items():
        weight = problem.params[path]
        places = pair.matrices(torch.arange(weight.numel(), device=weight.device).view_as(weight))[0, 0].argsort()
        factors[path.removesuffix(".weight")] = Factors(pair.inputs[0][places][:, places], pair.cotangents[0])
    return factors
