"""The linear datamodeling score of each attribution method, on dattri's protocol.

    LDS_j = ρ( -loss_j(θ(S_r)),  Σ_{i in S_r} τ_ij ),    over half subsets r = 1 … 100, averaged over test examples j

MNIST, its first 5,000 training and 500 test images; an MLP 784-128-64-10 with ReLU and dropout of 0.1 after each hidden
layer; SGD, lr 0.01, momentum 0.9, batches of 64, 50 epochs. Each subset is a data set of its own: a model trained on it
has a start, an order and dropout masks of its own. Read in TRAIS-Lab/dattri, files `experiments/benchmark_result.py`,
`dattri/benchmark/load.py`, `dattri/benchmark/datasets/mnist/`, `dattri/benchmark/models/mlp/mlp.py`,
`dattri/model_util/retrain.py`, `dattri/script/dattri_retrain.py` and `dattri/metric/metrics.py`. There is one model of
each subset, and of some subsets another one from another initialisation: how well the one predicts the other bounds
what the noise of training leaves to be predicted. With a rank correlation of ρ between the two, a perfect prediction of
their mean would reach about √ρ.

Every method is graded at every damping of a grid, and shown at its best, as there: the best of a grid is chosen by the
score itself. What is published is read off a plot.

The second part is of own runs: models with the start and the order of the one run that is differentiated, in which the
left-out examples have weight zero. There the unrolled derivative is exact but for curvature in the weights.

Reference: Deng et al., "dattri: a library for efficient data attribution", NeurIPS 2024, arXiv 2410.04555. Own runs:
Ilyas and Engstrom, "MAGIC: near-optimal data attribution for deep learning", 2025, arXiv 2504.16430.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import torch
from torch import Tensor
from torch.func import vmap

from functorch_mnist import (
    attribution,
    data,
    layers,
    losses,
    models,
    optim,
    per_sample,
    random,
    sweep,
    tree,
)
from functorch_mnist import train as training

from . import markdown

QUESTION = "How well does each attribution method predict models that are trained on half of the data?"

T = TypeVar("T")

Row: TypeAlias = dict[str, Any]
Progress: TypeAlias = Callable[[str], object]
Examples: TypeAlias = tuple[Tensor, Tensor]
"""Images (N, 784) and labels (N,)."""

CLASSES, PIXELS = 10, 784


RANDOM, DOT, COSINE, TRACIN, TRACIN_MODELS = (
    "random numbers", "gradient dot", "gradient cosine", "TracIn", "TracIn, models of all images",
)  # fmt: skip
EMPIRICAL, KRONECKER = "Fisher, empirical", "Fisher, Kronecker-factored"
CORRECTED = "Fisher, Kronecker-factored, corrected"
KERNEL, DIFFERENCE = "tangent kernel", "difference of means, half subsets"
LOG_ODDS, NEWTON, TRAK = "TRAK, not projected", "Gauss-Newton of the log-odds", "TRAK, half subsets"
AGAIN = "another model of the subset"

PUBLISHED = {"TRAK-50": 0.45, "influence by conjugate gradients": 0.26}
"""dattri's LDS on this protocol, read off a plot: two digits at most."""


class Own(NamedTuple):
    """A kind of own runs: the network's activation, momentum and length."""

    activation: str
    momentum: float
    epochs: int
    left_out: tuple[float, ...] = (0.01, 0.05, 0.1, 0.5)
    """Parts of the examples that are left out."""

    def __str__(self) -> str:
        return f"{self.activation}, momentum {self.momentum:g}, {self.epochs} epochs"


@dataclass(frozen=True)
class Settings:
    """The sizes of the study."""

    train: int = 5000
    test: int = 500
    hidden: tuple[int, int] = (128, 64)
    dropout: float = 0.1
    lr: float = 0.01
    momentum: float = 0.9
    batch_size: int = 64
    epochs: int = 50
    subsets: int = 100
    part: float = 0.5
    """Of the examples, in a subset."""
    again: int = 30
    """Subsets that a second model is trained on."""
    others: int = 50
    """Models on half subsets of their own, for methods that need several."""
    full: int = 10
    """Models of all examples; the first is the one that is attributed."""
    width: int = 10
    """Models trained in one vmapped run."""
    compile: bool = True
    dampings: tuple[float, ...] = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
    """Of the Fisher information: dattri's grid goes from 1e-5 to 1."""
    ratios: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2)
    """Dampings as parts of the trace of what is inverted."""
    averaged: tuple[float, ...] = (1e-4,)
    """The same, of methods that are averaged over checkpoints, masks or models."""
    members: int = 5
    """Of such averages."""
    features: int = 128
    """Of TRAK, for each parameter at most."""
    models: tuple[int, ...] = (1, 10, 50)
    """Of TRAK."""
    draws: int = 100
    """Of the bootstrap."""
    own: tuple[Own, ...] = (
        Own("ReLU", 0.9, 50, (0.01,)), Own("ReLU", 0.9, 5), Own("ReLU", 0.0, 5), Own("tanh", 0.9, 5),
        Own("tanh", 0.0, 5),
    )  # fmt: skip
    """The first is the protocol's, but for dropout."""
    own_test: int = 10
    """Test images of own runs, the first."""
    stand_ins: tuple[Own, ...] = (Own("ReLU", 0.9, 5), Own("tanh", 0.9, 5))
    """Runs whose derivative is graded by the models of the subsets."""
    stand_in_test: int = 40
    own_subsets: int = 12


FULL = Settings()
QUICK = Settings(
    train=120, test=6, hidden=(8, 6), batch_size=20, epochs=3, subsets=6, again=5, others=4, full=2, width=2,
    compile=False, dampings=(1e-3, 1e-1), ratios=(1e-2,), averaged=(1e-2,), members=2, features=8, models=(1, 4),
    draws=20, own=(Own("ReLU", 0.9, 2, (0.05,)), Own("tanh", 0.0, 2, (0.05, 0.5))), own_test=3, own_subsets=6,
    stand_ins=(Own("ReLU", 0.9, 2),), stand_in_test=4,
)  # fmt: skip


class Stored:
    """What a study that was broken off has already found, in a folder of files; without a folder nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def __call__(self, name: str, make: Callable[[], T]) -> T:
        """What was stored under a name, or else what is made now."""
        if self.folder is None:
            return make()
        path = self.folder / f"{name}.pt"
        if path.is_file():
            return cast(T, torch.load(path, weights_only=True))
        found = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".partial")
        torch.save(found, part)
        part.replace(path)
        return found


def _folder(settings: Settings) -> Path:
    """Where a study of these settings keeps what it has found: a folder of temporary files."""
    settled = json.dumps([asdict(settings), torch.__version__], sort_keys=True).encode()
    return Path(tempfile.gettempdir()) / f"functorch-mnist-datamodeling-{hashlib.sha256(settled).hexdigest()[:12]}"


class Trained(NamedTuple):
    """The models of the study. Leaves of parameters have a leading axis of models."""

    full: models.Params
    """Of all examples."""
    checkpoints: models.Params
    """(epochs, …): the first model after each epoch."""
    others: models.Params
    """(50, …), each of a half subset."""
    others_subsets: Tensor
    """(50, N) bool."""
    subsets: Tensor
    """(R, N) bool: of the graded models."""
    losses: Tensor
    """(R, M): of the test examples, of the models of the subsets."""
    again: Tensor
    """(R', M): of another model of each of the first subsets."""


def _apply(settings: Settings, params: models.Params, x: Tensor, keys: Tensor | None = None) -> Tensor:
    """Logits (..., 10) of images (..., 784); with dropout where there are keys (..., 2)."""
    for layer, name in enumerate(("0.", "2.")):
        x = layers.relu(layers.linear(x, params[name + "weight"], params[name + "bias"]))
        if keys is not None:
            x = layers.dropout(x, random.fold_in(keys, layer), rate=settings.dropout)
    return layers.linear(x, params["4.weight"], params["4.bias"])


def _examples(split: data.Split, count: int) -> Examples:
    """The first images, normalized and flat, and labels."""
    return data.normalize(split.images[:count], 0.1307, 0.3081).flatten(1).contiguous(), split.labels[:count].long()


def _program(settings: Settings) -> sweep.Program:
    """How a model is trained."""
    start = models.mlp([PIXELS, *settings.hidden, CLASSES]).init
    optimizer = optim.sgd(settings.lr, momentum=settings.momentum)

    def losses_fn(params: models.Params, x: Tensor, y: Tensor, keys: Tensor) -> Tensor:
        return losses.cross_entropy(_apply(settings, params, x, keys), y)

    make = training.make_step(training.batch_gradient(losses_fn), optimizer)

    def init(_hyper: sweep.Values, key: Tensor) -> training.State:
        init_key, train_key = random.split(key)
        return training.init_state(start(init_key), optimizer, train_key)

    def step(
        _hyper: sweep.Values, state: training.State, *rows: Tensor, mask: Tensor | None, divisor: Tensor
    ) -> tuple[training.State, dict[str, Tensor]]:
        return make(state, *rows, mask=mask, divisor=divisor)

    return sweep.Program(init, step, lambda _hyper, state: {"steps": state.step.double()})


def _trained(settings: Settings, train: Examples, test: Examples, stored: Stored, progress: Progress) -> Trained:
    """All models; those that are stored already are read."""
    subsets_key, others_key = random.split(random.key(0))
    graded, others = (
        attribution.subsets(settings.train, key=key, count=count, fraction=settings.part)
        for key, count in ((subsets_key, settings.subsets), (others_key, settings.others))
    )
    program = _program(settings)
    size, compile = settings.batch_size, settings.compile
    of_all = sweep.VmappedStep(program, train, batch_size=size, compile=compile)
    of_halves = sweep.on_subsets(program, train, torch.cat([graded, others]), batch_size=size, compile=compile)

    def models_of(
        vmapped: sweep.VmappedStep, seed: int, numbers: range, callback: Callable[[sweep.Sweep], None]
    ) -> models.Params:
        """Parameters of runs with seeds of their own, on subsets of these numbers."""
        runs = {sweep.SUBSET: torch.tensor(numbers), sweep.SEED: seed + torch.arange(len(numbers))}
        begun = sweep.init_sweep(vmapped.program, runs, epochs=settings.epochs)
        found = sweep.fit(vmapped, runs, begun, width=settings.width, callbacks=(callback,))
        return cast(models.Params, found.states.params)

    def full() -> tuple[models.Params, models.Params]:
        passed: list[models.Params] = []

        def keep(at: sweep.Sweep) -> None:
            passed.append({name: p[0].clone() for name, p in at.states.params.items()})

        found = models_of(of_all, 0, range(settings.full), keep)
        return found, sweep.stacked(passed)

    def half(seed: int, numbers: range) -> models.Params:
        return models_of(of_halves, seed, numbers, lambda _at: None)

    def tested(seed: int, numbers: range) -> Tensor:
        params = half(seed, numbers)
        return vmap(lambda one: losses.cross_entropy(_apply(settings, one, test[0]), test[1]))(params)

    last = settings.subsets + settings.others
    ends, checkpoints = stored("full", full)
    progress("models of all examples are trained")
    first = stored("subsets", lambda: tested(1_000_000, range(settings.subsets)))
    progress("models of the subsets are trained")
    of_others = stored("others", lambda: half(3_000_000, range(settings.subsets, last)))
    progress("models for methods with several are trained")
    second = stored("subsets again", lambda: tested(2_000_000, range(settings.again)))
    progress("second models of some subsets are trained")
    return Trained(ends, checkpoints, of_others, others, graded, first, second)


# ---- methods


class Influence(NamedTuple):
    """What a method finds."""

    method: str
    models: int
    """That it needs."""
    damping: float | None
    ratio: bool
    """Whether the damping is a part of the trace."""
    values: Tensor
    """(N, M) float32: above zero where a training example helps."""


@dataclass(frozen=True)
class Case:
    """What is attributed."""

    settings: Settings
    train: Examples
    test: Examples
    trained: Trained

    @property
    def one(self) -> models.Params:
        """The parameters of the one model."""
        return _member(self.trained.full, 0)

    def loss_fn(self, params: models.Params, x: Tensor, y: Tensor) -> Tensor:
        """Of one example, without dropout."""
        return losses.cross_entropy(_apply(self.settings, params, x), y)

    def passed(self) -> list[models.Params]:
        """Some checkpoints of the one model's run, evenly apart, the last among them."""
        count, epochs = self.settings.members, self.settings.epochs
        ends = sorted({max(1, round(epochs * (i + 1) / count)) for i in range(count)})
        return [_member(self.trained.checkpoints, end - 1) for end in ends]


def _member(params: models.Params, number: int) -> models.Params:
    return {name: leaf[number] for name, leaf in params.items()}


Method: TypeAlias = Callable[[Case], Iterator[Influence]]


def _plain(case: Case) -> Iterator[Influence]:
    """Without curvature."""
    loss_fn, train, test, settings = case.loss_fn, case.train, case.test, case.settings
    drawn = random.normal(random.key(1), (settings.train, settings.test))
    yield Influence(RANDOM, 0, None, False, drawn)
    yield Influence(DOT, 1, None, False, per_sample.gram(loss_fn, case.one, train, test))
    yield Influence(COSINE, 1, None, False, attribution.gradient_cosine(loss_fn, case.one, train, test))
    passed = [_member(case.trained.checkpoints, end) for end in range(settings.epochs)[settings.epochs // 10 :: 5]]
    ends = [_member(case.trained.full, number) for number in range(settings.full)]
    for name, count, points in ((TRACIN, 1, passed), (TRACIN_MODELS, len(ends), ends)):
        found = attribution.tracin(loss_fn, points, train, test, lrs=[settings.lr] * len(points))
        yield Influence(name, count, None, False, found)


def _empirical(case: Case) -> Iterator[Influence]:
    gram = per_sample.gram(case.loss_fn, case.one, case.train)
    cross = per_sample.gram(case.loss_fn, case.one, case.train, case.test)
    for damping in case.settings.dampings:
        found = attribution.fisher_influence(gram, cross, damping=damping)
        yield Influence(EMPIRICAL, 1, damping, False, found)


def _kronecker(case: Case) -> Iterator[Influence]:
    """With the products of the factors' eigenvalues, and with corrected ones."""
    for name, corrected in ((KRONECKER, False), (CORRECTED, True)):
        apply, images = partial(_apply, case.settings), case.train[0]
        curvature = attribution.fisher_curvature(apply, case.one, images, corrected=corrected, chunk_size=500)
        yield from _solved(case, name, curvature)


def _solved(case: Case, name: str, curvature: attribution.Curvature) -> Iterator[Influence]:
    """Influence functions by a curvature that solves for test gradients."""
    some = list(zip(*[x.split(100) for x in case.test], strict=True))
    columns = torch.cat(
        [
            _rows(curvature.solve(per_sample.grads(case.loss_fn, case.one, *part), damping=damping))
            for damping in case.settings.dampings
            for part in some
        ]
    ).T
    chunks = [
        _rows(per_sample.grads(case.loss_fn, case.one, *rows)) @ columns
        for rows in zip(*[x.split(500) for x in case.train], strict=True)
    ]
    found = torch.cat(chunks).split(case.settings.test, 1)
    for damping, values in zip(case.settings.dampings, found, strict=True):
        yield Influence(name, 1, damping, False, values)


def _rows(grads: models.Params) -> Tensor:
    """(N, P)."""
    return torch.cat([leaf.flatten(1) for leaf in tree.leaves(grads)], 1)


def _log_odds(case: Case) -> Iterator[Influence]:
    """With the Gram matrix of the log-odds' gradients, of which no number is thrown away by a projection.

    A loss is log(1 + exp(-φ)) of the log-odds φ of its label, with slope -(1 - p) and second derivative p (1 - p). So
    the Gauss-Newton matrix through the log-odds is Σ p (1 - p) ∇φ ∇φᵀ; TRAK leaves the factors out.
    """
    settings = case.settings
    of_one = [_of_log_odds(case, case.one, ratio) for ratio in settings.ratios]
    for ratio, (newton, plain) in zip(settings.ratios, of_one, strict=True):
        yield Influence(NEWTON, 1, ratio, True, newton)
        yield Influence(LOG_ODDS, 1, ratio, True, plain)


def _log_odds_means(case: Case) -> Iterator[Influence]:
    """The Gauss-Newton form averaged over checkpoints of the one run, over dropout masks, and over models."""
    settings = case.settings
    masks = random.split(random.key(2), settings.members)
    members: dict[tuple[str, int], list[tuple[models.Params, Tensor | None]]] = {
        (f"{NEWTON}, {settings.members} checkpoints", 1): [(params, None) for params in case.passed()],
        (f"{NEWTON}, {settings.members} dropout masks", 1): [(case.one, mask) for mask in masks],
        (f"{NEWTON}, models of all images", settings.members): [
            (_member(case.trained.full, number % settings.full), None) for number in range(settings.members)
        ],
    }
    for (name, count), group in members.items():
        for ratio in settings.averaged:
            found = [_of_log_odds(case, params, ratio, mask, plain=False)[0] for params, mask in group]
            yield Influence(name, count, ratio, True, torch.stack(found).mean(0))


def _of_log_odds(
    case: Case, params: models.Params, ratio: float, mask: Tensor | None = None, *, plain: bool = True
) -> tuple[Tensor, Tensor]:
    """With and without the factors p (1 - p): (N, M) each. `mask` is the key of one dropout mask for all examples."""

    def log_odds_fn(params: models.Params, x: Tensor, y: Tensor) -> Tensor:
        return attribution.log_odds(_apply(case.settings, params, x, mask), y)

    gram = per_sample.gram(log_odds_fn, params, case.train).double()
    cross = per_sample.gram(log_odds_fn, params, case.train, case.test).double()
    images, labels = case.train
    keys = None if mask is None else mask.expand(len(images), 2)
    odds = attribution.log_odds(_apply(case.settings, params, images, keys), labels).double()
    wrong, second = (-odds).sigmoid(), odds.sigmoid() * (-odds).sigmoid()
    root = second.sqrt().clamp(min=1e-12)
    scaled = gram * root[:, None] * root
    newton = _damped(scaled, cross * root[:, None], ratio) / root[:, None]
    found = _damped(gram, cross, ratio) if plain else newton
    return (wrong[:, None] * newton).float(), (wrong[:, None] * found).float()


def _damped(gram: Tensor, cross: Tensor, ratio: float) -> Tensor:
    return attribution.fisher_influence(gram, cross, damping=ratio * float(gram.trace()) / len(gram))


def _trak(case: Case) -> Iterator[Influence]:
    """TRAK on models of half subsets, as in its paper."""
    settings, labels = case.settings, case.train[1]

    def log_odds_fn(params: models.Params, x: Tensor, y: Tensor) -> Tensor:
        return attribution.log_odds(_apply(settings, params, x), y)

    sums = [torch.zeros(settings.train, settings.test, dtype=torch.float64) for _ in settings.ratios]
    for number, key in enumerate(random.split(random.key(3), max(settings.models))):
        params = _member(case.trained.others, number)
        maps = attribution.projection(params, key=key, size=settings.features)
        train, test = (
            attribution.features(log_odds_fn, params, *batch, projection=maps) for batch in (case.train, case.test)
        )
        probabilities = _apply(settings, params, case.train[0]).softmax(-1).gather(1, labels[:, None]).squeeze(1)
        for ratio, found in zip(settings.ratios, sums, strict=True):
            damping = ratio * float(train.double().square().sum())
            found += attribution.trak(train, test, probabilities, damping=damping)
        if number + 1 in settings.models:
            for ratio, found in zip(settings.ratios, sums, strict=True):
                yield Influence(f"{TRAK}, {maps.size} features", number + 1, ratio, True, found.float())


def _difference(case: Case) -> Iterator[Influence]:
    """How much lower the loss is on average on models that had the example: a datamodel without regression."""
    inside = case.trained.others_subsets.float()
    tested = vmap(lambda one: losses.cross_entropy(_apply(case.settings, one, case.test[0]), case.test[1]))
    found = tested(case.trained.others)
    means = [side.T @ found / side.sum(0)[:, None].clamp(min=1) for side in (inside, 1 - inside)]
    yield Influence(DIFFERENCE, len(inside), None, False, means[1] - means[0])


def _kernel(case: Case) -> Iterator[Influence]:
    """What a residual moves in the outputs by regression in the tangent kernel, along the test loss's gradient."""
    apply, ((images, _), (test_images, _)) = partial(_apply, case.settings), (case.train, case.test)
    kernel = attribution.tangent_kernel(apply, case.one, (images,))
    cross = attribution.tangent_kernel(apply, case.one, (images,), (test_images,))
    train, test = (
        losses.one_hot(labels, CLASSES) - apply(case.one, x).softmax(-1) for x, labels in (case.train, case.test)
    )
    identity = torch.eye(len(kernel), dtype=torch.float64)
    for ratio in case.settings.ratios:
        moved = attribution.kernel_regression(kernel, cross, identity, ridge=ratio * float(kernel.trace()))  # (N, M)
        yield Influence(KERNEL, 1, ratio, True, moved * (train @ test.T))


METHODS: dict[str, Method] = {
    "plain": _plain,
    "empirical": _empirical,
    "kronecker": _kronecker,
    "log-odds": _log_odds,
    "trak": _trak,
    "difference": _difference,
    "kernel": _kernel,
    "log-odds means": _log_odds_means,
}
"""A row of a table, or some, each. One that solves with a curvature is `_solved` of it."""


def _influences(case: Case, stored: Stored) -> Iterator[tuple[str, list[Influence]]]:
    """What all methods find."""

    def found(name: str, method: Method) -> tuple[str, list[Influence]]:
        def make() -> list[tuple[Any, ...]]:
            return [tuple(one._replace(values=one.values.float().clone())) for one in method(case)]

        return name, [Influence(*one) for one in stored(name, make)]

    for name, method in METHODS.items():
        yield found(name, method)
    for kind in case.settings.stand_ins:
        yield found(f"unrolled of {kind}", partial(_stand_in, kind=kind))


def _stand_in(case: Case, kind: Own) -> Iterator[Influence]:
    """The derivative of another run: shorter, smoother or without dropout, so that it can be differentiated."""
    run = _own_run(case.settings, kind, case.train, random.key(4))
    images, labels = (x[: case.settings.stand_in_test] for x in case.test)
    name = f"unrolled, {kind}, no dropout"
    yield Influence(name, 1, None, False, attribution.unrolled(run, (images, labels), chunk_size=10))


# ---- own runs


def _own_run(settings: Settings, kind: Own, train: Examples, key: Tensor) -> attribution.Run:
    """The one run of a kind, without dropout. Examples beyond an epoch's last whole batch wait for another epoch."""
    activation = {"ReLU": layers.relu, "tanh": layers.tanh}[kind.activation]
    model = models.mlp([PIXELS, *settings.hidden, CLASSES], activation=activation)
    init_key, order_key = random.split(key)
    whole = settings.train // settings.batch_size * settings.batch_size
    orders = [data.epoch_order(settings.train, key=order_key, epoch=epoch)[:whole] for epoch in range(kind.epochs)]

    def loss_fn(params: models.Params, x: Tensor, y: Tensor) -> Tensor:
        return losses.cross_entropy(model.apply(params, x), y)

    optimizer = optim.sgd(settings.lr, momentum=kind.momentum)
    order = torch.cat(orders).view(-1, settings.batch_size)
    return attribution.Run(loss_fn, optimizer, model.init(init_key), train, order)


def _own(settings: Settings, kind: Own, train: Examples, test: Examples, stored: Stored) -> list[Row]:
    """How well the derivative predicts its own runs."""
    run = _own_run(settings, kind, train, random.key(4))
    few = test[0][: settings.own_test], test[1][: settings.own_test]
    count = settings.own_test
    at_one = stored(f"unrolled, {kind}", lambda: attribution.unrolled(run, few, chunk_size=count))
    rows = []
    for number, part in enumerate(kind.left_out):
        key = random.fold_in(random.key(5), number)
        kept = attribution.subsets(settings.train, key=key, count=settings.own_subsets, fraction=1 - part)
        again = partial(attribution.retrained, run, few, kept.float(), chunk_size=6)
        found = stored(f"own, {kind}, {part:g}", again)
        derivatives = {"one": at_one}
        if part == 0.5:
            middle = torch.full((settings.train,), 1 - part)
            at_middle = partial(attribution.unrolled, run, few, middle, chunk_size=count)
            derivatives["the middle"] = stored(f"unrolled, {kind}, {part:g}", at_middle)
        for at, influence in derivatives.items():
            interval = attribution.datamodeling_interval(
                influence, kept, found, key=random.key(6), resamples=settings.draws
            )
            rows.append({"run": str(kind), "left_out": part, "weights": at, **interval._asdict()})
    return rows


# ---- the record


def run(*, quick: bool, progress: Progress) -> Row:
    """The record of the study."""
    settings = QUICK if quick else FULL
    stored = Stored(None if quick else _folder(settings))
    both = data.load("mnist")
    train, test = _examples(both.train, settings.train), _examples(both.test, settings.test)
    trained = _trained(settings, train, test, stored, progress)
    case = Case(settings, train, test, trained)
    grades: list[Row] = []
    for name, found in _influences(case, stored):
        rows = _grades(case, trained.subsets, found)
        grades += rows
        progress(f"{name}: " + ", ".join(f"{row['score']:.3f}" for row in rows if row["low"] is not None))
    own: list[Row] = []
    for kind in settings.own:
        rows = _own(settings, kind, train, test, stored)
        own += rows
        progress(f"own runs, {kind}: " + ", ".join(f"{row['mean']:.3f}" for row in rows))
    each = torch.eye(settings.again, dtype=torch.bool)  # as if a model were an example, whose loss is predicted
    some = replace(case, trained=trained._replace(losses=trained.losses[: settings.again]))
    again = _grades(some, each, [Influence(AGAIN, 0, None, False, -trained.again)])
    return {
        "settings": asdict(settings),
        "published": PUBLISHED,
        "one_model": _end(case),
        "grades": grades,
        "again": again[0],
        "own": own,
    }


def _grades(case: Case, subsets: Tensor, found: Sequence[Influence]) -> list[Row]:
    """Of each influence the mean score; of each method at its best damping the interval too."""
    rows: list[Row] = []
    for one in found:
        count = one.values.shape[1]
        scores = attribution.linear_datamodeling_score(one.values, subsets, case.trained.losses[:, :count])
        means = {"score": float(scores.mean()), "of_few": float(scores[: case.settings.own_test].mean())}
        rows.append(one._asdict() | {"test": count, **means, "low": None, "high": None})
    for name, models_of in dict.fromkeys((row["method"], row["models"]) for row in rows):
        same = [row for row in rows if (row["method"], row["models"]) == (name, models_of)]
        best = max(same, key=lambda row: row["score"])
        outputs = case.trained.losses[:, : best["test"]]
        interval = attribution.datamodeling_interval(
            best["values"], subsets, outputs, key=random.key(7), resamples=case.settings.draws
        )
        best |= {"low": interval.low, "high": interval.high}
    for row in rows:
        del row["values"]
    return rows


def _end(case: Case) -> Row:
    """How well the one model is trained."""
    losses_of = [losses.cross_entropy(_apply(case.settings, case.one, x), y) for x, y in (case.train, case.test)]
    right = _apply(case.settings, case.one, case.test[0]).argmax(-1) == case.test[1]
    return {
        "train_loss": float(losses_of[0].mean()),
        "test_loss": float(losses_of[1].mean()),
        "test_accuracy": float(right.double().mean()),
        "loss_of_subset_models": float(case.trained.losses.mean()),
    }


# ---- tables


def table(record: Row) -> dict[str, str]:
    """The tables of a record, in Markdown, by their names."""
    grades: list[Row] = record["grades"]
    best = sorted([row for row in grades if row["low"] is not None], key=lambda row: -row["score"])
    rows = [_line(row) for row in best]
    rows = [_line(record["again"]), *rows]
    rows += [[f"dattri's {name}, published", "", "", f"about {value:g}", "", ""] for name, value in PUBLISHED.items()]
    few = record["settings"]["own_test"]
    heads = ["method", "models", "damping", "LDS", "95 %", f"of the first {few} images"]
    grid = [[_named(row), _damping(row), f"{row['score']:.3f}"] for row in grades if row["damping"] is not None]
    own: list[Row] = record["own"]
    parts = list(dict.fromkeys(row["left_out"] for row in own))
    lines = []
    for name, weights in dict.fromkeys((row["run"], row["weights"]) for row in own):
        cells = {row["left_out"]: row for row in own if (row["run"], row["weights"]) == (name, weights)}
        lines.append([f"{name}, at {weights}", *[_interval(cells[part]) if part in cells else "-" for part in parts]])
    return {
        "Linear datamodeling score": markdown(heads, rows),
        "Every damping": markdown(["method", "damping", "LDS"], grid),
        "Own runs": markdown(
            ["run, derivative at weights of", *[f"{100 * part:g} % left out" for part in parts]], lines
        ),
    }


def _named(row: Row) -> str:
    return f"{row['method']}, {row['models']} models" if row["models"] > 1 else str(row["method"])


def _damping(row: Row) -> str:
    return "" if row["damping"] is None else f"{row['damping']:g}{' tr' if row['ratio'] else ''}"


def _line(row: Row) -> list[str]:
    few = f", {row['test']} test images" if row["test"] < FULL.test else ""
    models_of = str(row["models"]) if row["models"] else ""
    interval = f"{row['low']:.3f} to {row['high']:.3f}"
    return [f"{row['method']}{few}", models_of, _damping(row), f"{row['score']:.3f}", interval, f"{row['of_few']:.3f}"]


def _interval(row: Row) -> str:
    return f"{row['mean']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
