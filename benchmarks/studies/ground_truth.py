"""Attribution graded by ground truth: how each method ranks training examples, against what training does with them.

A grade is Spearman's rank correlation over training examples, for one test example, of a method's influence and of a
ground truth, of which there are two:

    unrolled         -d loss_j / d c_i, through the whole run
    leave-one-out    loss_j after the run without example i, less that of the run

The run is full training of a small model, in float64. Its seed draws the training and the test examples, where it
starts, and the order.

A damping is a ratio r to the trace of what is inverted, which is the sum of its eigenvalues: λ = r tr. What
is inverted is the Fisher information, the Gram matrix of the features for TRAK, and the tangent kernel.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from functorch_mnist import attribution, data, layers, losses, models, optim, per_sample, random, tree

from . import markdown

QUESTION = "How do attribution methods rank training examples, against retraining and the derivative of a whole run?"

Row: TypeAlias = dict[str, Any]
"""Of a record: what was graded, and the grade's mean over test examples with its standard error."""
Progress: TypeAlias = Callable[[str], object]

CLASSES = 10
PIXELS = 28
RANDOM, DOT, COSINE, TRACIN = "random numbers", "gradient dot", "gradient cosine", "TracIn"
EMPIRICAL, KRONECKER = "Fisher, empirical", "Fisher, Kronecker-factored"
CORRECTED, EXACT = "Fisher, Kronecker-factored, corrected", "Fisher, exact"
KERNEL, OTHER, UNROLLED = "tangent kernel", "unrolled, another run", "unrolled"
LEAVE_ONE_OUT = "leave-one-out"
TRUTHS = (UNROLLED, LEAVE_ONE_OUT)


@dataclass(frozen=True)
class Settings:
    """The sizes of the study."""

    seeds: int = 3
    train: int = 500
    test: int = 50
    left_out: int = 200
    """Training examples that leave-one-out leaves out, each alone."""
    side: int = 14
    """Images are side x side pixels, means of those of MNIST."""
    hidden: int = 24
    batch_size: int = 50
    steps: int = 400
    lr: float = 0.005
    momentum: float = 0.9
    checkpoints: int = 10
    """Of TracIn, one after each such part of the run."""
    models: int = 5
    """Of TRAK: the run's own, and others of the same examples."""
    features: tuple[int, ...] = (64, 512)
    """Of TRAK, for each parameter at most."""
    dampings: tuple[float, ...] = (1e-5, 1e-4, 3e-4, 1e-3, 1e-2, 1e-1)
    """Ratios to the trace."""
    lengths: tuple[int, ...] = (10, 20, 50, 100, 200, 400)
    """Runs of these numbers of steps are graded too."""
    parts: tuple[float, ...] = (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-6)
    """So much of an example's weight is taken away."""
    in_part: int = 50
    """Training examples of which a part is taken away, each alone."""


FULL = Settings()
QUICK = Settings(
    seeds=2, train=60, test=8, left_out=20, side=7, hidden=8, batch_size=20, steps=30, checkpoints=3, models=2,
    features=(16,), dampings=(1e-3, 1e-1), lengths=(3, 30), parts=(1.0, 1e-4), in_part=5,
)  # fmt: skip


class Kind(NamedTuple):
    """A model: a name, hidden layers, an activation."""

    name: str
    hidden: bool
    activation: Callable[[Tensor], Tensor]


KINDS = (
    Kind("logistic regression", False, layers.tanh),
    Kind("MLP with tanh", True, layers.tanh),
    Kind("MLP with ReLU", True, layers.relu),
)
VARIED = KINDS[1]
"""The model whose runs of other lengths are graded."""


@dataclass(frozen=True)
class Case:
    """A training run, test examples and the model of both."""

    model: models.Model
    run: attribution.Run
    test: tuple[Tensor, ...]
    params: models.Params
    """Where the run ends."""

    @property
    def train(self) -> tuple[Tensor, ...]:
        """Its examples."""
        return self.run.examples

    def ended(self, *, steps: int) -> models.Params:
        """The parameters after the first steps."""
        params: models.Params = attribution.trained(self.run._replace(order=self.run.order[:steps]), self.ones())
        return params

    def ones(self) -> Tensor:
        """The weights of the run."""
        return torch.ones(len(self.train[0]), dtype=torch.float64)

    def losses(self, examples: tuple[Tensor, ...]) -> Tensor:
        """(N,), of the parameters where the run ends."""
        outputs = self.model.apply(self.params, examples[0])
        return losses.cross_entropy(outputs, examples[1])


class Influence(NamedTuple):
    """What a method finds."""

    method: str
    damping: float | None
    """The ratio to the trace."""
    values: Tensor
    """(N, M): above zero where a training example helps."""


def run(*, quick: bool, progress: Progress) -> Row:
    """The record of the study."""
    settings = QUICK if quick else FULL
    stored = data.load()
    runs: list[Row] = []
    grades: list[Row] = []
    lengths: list[Row] = []
    parts: list[Row] = []
    for seed in range(settings.seeds):
        for kind in KINDS:
            progress(f"{kind.name}, seed {seed}")
            named = {"model": kind.name, "seed": seed}
            key = random.key(seed)
            case = _case(kind, settings, stored, key)
            runs.append(named | _ends(case))
            grades += [named | row for row in _grades(case, settings, key)]
            parts += [named | row for row in _parts(case, settings, key)]
            if kind is VARIED:
                lengths += [named | row for row in _lengths(case, settings)]
    return {"settings": asdict(settings), "runs": runs, "grades": grades, "lengths": lengths, "parts": parts}


def _case(kind: Kind, settings: Settings, stored: data.Dataset, key: Tensor) -> Case:
    """The run that a key names."""
    train_key, test_key, init_key, order_key = random.split(key, 4)
    train = _examples(stored.train, settings.train, settings.side, train_key)
    test = _examples(stored.test, settings.test, settings.side, test_key)
    hidden = [settings.hidden] if kind.hidden else []
    model = models.mlp([settings.side**2, *hidden, CLASSES], activation=kind.activation)

    def loss_fn(params: models.Params, x: Tensor, y: Tensor) -> Tensor:
        return losses.cross_entropy(model.apply(params, x), y)

    optimizer = optim.sgd(settings.lr, momentum=settings.momentum)
    made = attribution.Run(loss_fn, optimizer, _start(model, init_key), train, _order(settings, order_key))
    params = attribution.trained(made, torch.ones(settings.train, dtype=torch.float64))
    return Case(model, made, test, params)


def _examples(split: data.Split, count: int, side: int, key: Tensor) -> tuple[Tensor, Tensor]:
    """Images (N, side²) and labels (N,), drawn."""
    chosen = random.permutation(key, len(split.labels))[:count]
    images = data.normalize(split.images[chosen], 0.1307, 0.3081).double()
    return F.avg_pool2d(images, PIXELS // side).flatten(1), split.labels[chosen]


def _start(model: models.Model, key: Tensor) -> models.Params:
    return {name: p.double() for name, p in model.init(key).items()}


def _order(settings: Settings, key: Tensor) -> Tensor:
    """(T, B): epochs, each of all examples."""
    seen = settings.steps * settings.batch_size
    epochs = data.steps_per_epoch(seen, settings.train)
    order = torch.cat([data.epoch_order(settings.train, key=key, epoch=epoch) for epoch in range(epochs)])
    return order[:seen].reshape(settings.steps, settings.batch_size)


def _others(case: Case, settings: Settings, key: Tensor) -> list[Case]:
    """Runs of the same examples that start elsewhere and have another order."""
    cases = []
    for number in range(1, settings.models):
        init_key, order_key = random.split(random.fold_in(key, 1000 + number))
        other = case.run._replace(params=_start(case.model, init_key), order=_order(settings, order_key))
        cases.append(Case(case.model, other, case.test, attribution.trained(other, case.ones())))
    return cases


def _ends(case: Case) -> Row:
    """How well the run has trained."""
    right = case.model.apply(case.params, case.test[0]).argmax(-1) == case.test[1]
    return {
        "train_loss": float(case.losses(case.train).mean()),
        "test_loss": float(case.losses(case.test).mean()),
        "test_accuracy": float(right.double().mean()),
    }


# ---- grades


def _grades(case: Case, settings: Settings, key: Tensor) -> Iterator[Row]:
    """Of each method by each ground truth."""
    which = random.permutation(random.fold_in(key, 1), settings.train)[: settings.left_out]
    unrolled = attribution.unrolled(case.run, case.test)
    left_out = attribution.leave_one_out(case.run, case.test, which)
    yield _row(Influence(UNROLLED, None, unrolled[which]), left_out, truth=LEAVE_ONE_OUT)
    for found in _influences(case, settings, key):
        yield _row(found, unrolled, truth=UNROLLED)
        yield _row(found._replace(values=found.values[which]), left_out, truth=LEAVE_ONE_OUT)


def _row(found: Influence, target: Tensor, **named: object) -> Row:
    """A row of the record."""
    return {"method": found.method, "damping": found.damping, **named, **_grade(found.values, target)}


def _grade(values: Tensor, truth: Tensor) -> dict[str, float]:
    """Over test examples."""
    grades = attribution.rank_correlation(values, truth)
    return {"mean": float(grades.mean()), "standard_error": float(grades.std() / len(grades) ** 0.5)}


def _influences(case: Case, settings: Settings, key: Tensor) -> Iterator[Influence]:
    """What all methods find of a run."""
    loss_fn, train, test = case.run.loss_fn, case.train, case.test
    others = _others(case, settings, key)
    shape = settings.train, settings.test
    yield Influence(RANDOM, None, random.normal(random.fold_in(key, 2), shape))
    yield Influence(DOT, None, per_sample.gram(loss_fn, case.params, train, test))
    yield Influence(COSINE, None, attribution.gradient_cosine(loss_fn, case.params, train, test))
    yield Influence(TRACIN, None, _tracin(case, settings))
    yield from _empirical(case, settings.dampings)
    yield from _kronecker(case, settings.dampings)
    yield from _exact(case, settings.dampings)
    for size in settings.features:
        keys = random.split(random.fold_in(key, 3), settings.models)
        yield from _trak([case, *others], size, keys, settings.dampings)
    yield from _kernel(case, settings.dampings)
    yield Influence(OTHER, None, attribution.unrolled(others[0].run, test))


def _tracin(case: Case, settings: Settings) -> Tensor:
    count, steps = settings.checkpoints, len(case.run.order)
    ends = sorted({max(1, round(steps * (i + 1) / count)) for i in range(count)})
    checkpoints = [case.ended(steps=end) for end in ends]
    return attribution.tracin(case.run.loss_fn, checkpoints, case.train, case.test, lrs=[settings.lr] * len(ends))


def _empirical(case: Case, ratios: Sequence[float]) -> Iterator[Influence]:
    gram = per_sample.gram(case.run.loss_fn, case.params, case.train)
    cross = per_sample.gram(case.run.loss_fn, case.params, case.train, case.test)
    trace = float(gram.trace()) / len(gram)
    for ratio in ratios:
        yield Influence(EMPIRICAL, ratio, attribution.fisher_influence(gram, cross, damping=ratio * trace))


def _kronecker(case: Case, ratios: Sequence[float]) -> Iterator[Influence]:
    """In the eigenbases of the Kronecker factors, with the products of their eigenvalues and with corrected ones."""
    test_grads = per_sample.grads(case.run.loss_fn, case.params, *case.test)
    for name, corrected in ((KRONECKER, False), (CORRECTED, True)):
        curvature = attribution.fisher_curvature(case.model.apply, case.params, case.train[0], corrected=corrected)
        for ratio in ratios:
            directions = curvature.solve(test_grads, damping=ratio * curvature.trace)
            columns = [
                per_sample.dot(
                    case.run.loss_fn, case.params, *case.train, direction=tree.map(itemgetter(j), directions)
                )
                for j in range(len(case.test[0]))
            ]
            yield Influence(name, ratio, torch.stack(columns, 1))


def _exact(case: Case, ratios: Sequence[float]) -> Iterator[Influence]:
    """With the whole matrix of the Fisher information, from dense gradients: what its factored forms stand for."""

    def row_fn(params: models.Params, x: Tensor, y: Tensor) -> Tensor:
        log_prob = layers.log_softmax(case.model.apply(params, x)).gather(-1, y[None]).squeeze(-1)
        return log_prob.detach().exp().sqrt() * log_prob

    images = case.train[0]
    train, test = (_dense(case.run.loss_fn, case.params, batch) for batch in (case.train, case.test))
    fisher = torch.zeros(train.shape[1], train.shape[1], dtype=torch.float64)
    for label in range(CLASSES):
        rows = _dense(row_fn, case.params, (images, torch.full((len(images),), label)))
        fisher.addmm_(rows.T, rows, alpha=1 / len(rows))
    trace = float(fisher.trace())
    for ratio in ratios:
        damped = fisher.clone()
        damped.diagonal().add_(ratio * trace)
        yield Influence(EXACT, ratio, train @ torch.cholesky_solve(test.T, torch.linalg.cholesky(damped)))


def _dense(loss_fn: Callable[..., Tensor], params: models.Params, batch: tuple[Tensor, ...]) -> Tensor:
    """(N, P): the gradients, each as one vector."""
    return torch.cat([rows.flatten(1) for rows in tree.leaves(per_sample.grads(loss_fn, params, *batch))], 1)


def _trak(cases: Sequence[Case], size: int, keys: Tensor, ratios: Sequence[float]) -> Iterator[Influence]:
    """Of the first model, and the mean over all."""
    ready = []
    for case, key in zip(cases, keys, strict=True):
        maps = attribution.projection(case.params, key=key, size=size)
        train, test = (_features(case, batch, maps) for batch in (case.train, case.test))
        ready.append((train, test, case.losses(case.train).neg().exp()))
    for ratio in ratios:
        found = [
            attribution.trak(train, test, probs, damping=ratio * float(train.square().sum()))
            for train, test, probs in ready
        ]
        yield Influence(f"TRAK, {size} features, one model", ratio, found[0])
        yield Influence(f"TRAK, {size} features, {len(found)} models", ratio, torch.stack(found).mean(0))


def _features(case: Case, batch: tuple[Tensor, ...], maps: attribution.Projection) -> Tensor:
    def log_odds_fn(params: models.Params, x: Tensor, y: Tensor) -> Tensor:
        return attribution.log_odds(case.model.apply(params, x), y)

    return attribution.features(log_odds_fn, case.params, *batch, projection=maps)


def _kernel(case: Case, ratios: Sequence[float]) -> Iterator[Influence]:
    """What a residual moves in the outputs by regression in the tangent kernel, along the test loss's gradient."""
    (images, _), (test_images, _) = case.train, case.test
    kernel = attribution.tangent_kernel(case.model.apply, case.params, (images,))
    cross = attribution.tangent_kernel(case.model.apply, case.params, (test_images,), (images,))
    train, test = (_residuals(case, batch) for batch in (case.train, case.test))
    identity = torch.eye(len(kernel), dtype=torch.float64)
    for ratio in ratios:
        moved = attribution.kernel_regression(kernel, identity, cross, ridge=ratio * float(kernel.trace()))  # (M, N)
        yield Influence(KERNEL, ratio, (moved * (test @ train.T)).T)


def _residuals(case: Case, batch: tuple[Tensor, ...]) -> Tensor:
    """(N, K): labels less probabilities."""
    images, labels = batch
    outputs: Tensor = losses.one_hot(labels, CLASSES).double() - case.model.apply(case.params, images).softmax(-1)
    return outputs


def _lengths(case: Case, settings: Settings) -> Iterator[Row]:
    """Grades by the derivative of shorter runs."""
    for steps in settings.lengths:
        order = case.run.order[:steps]
        short = Case(case.model, case.run._replace(order=order), case.test, case.ended(steps=steps))
        unrolled = attribution.unrolled(short.run, short.test)
        dots = per_sample.gram(short.run.loss_fn, short.params, short.train, short.test)
        found = [Influence(TRACIN, None, _tracin(short, settings)), Influence(DOT, None, dots)]
        for one in [*found, *_empirical(short, settings.dampings)]:
            yield _row(one, unrolled, steps=steps, train_loss=float(short.losses(short.train).mean()))


def _parts(case: Case, settings: Settings, key: Tensor) -> Iterator[Row]:
    """Grades of the derivative by retraining with a part of an example's weight taken away."""
    which = random.permutation(random.fold_in(key, 1), settings.train)[: settings.in_part]
    unrolled = attribution.unrolled(case.run, case.test)[which]
    ones = case.ones()
    for part in settings.parts:
        weights = torch.cat([ones[None], ones.repeat(len(which), 1).scatter(1, which[:, None], 1 - part)])
        found = attribution.retrained(case.run, case.test, weights)
        yield {"part": part, **_grade(unrolled, (found[1:] - found[0]) / part)}


# ---- tables


def table(record: Row) -> dict[str, str]:
    """The tables of a record, in Markdown, by their names."""
    grades: list[Row] = record["grades"]
    tables = {f"{name}, grades": _of_model(rows) for name, rows in _grouped(grades, "model").items()}
    for truth in TRUTHS:
        rows = [row for row in grades if row["truth"] == truth and row["damping"] is not None]
        labelled = [row | {"model and method": f"{row['model']}: {row['method']}"} for row in rows]
        tables[f"Grades by {truth} at each damping, as a part of the trace"] = _across(
            labelled, "model and method", "damping"
        )
    lengths: list[Row] = record["lengths"]
    labelled = [row | {"method": "its training loss", "mean": row["train_loss"]} for row in lengths]
    labelled += [
        row if row["damping"] is None else row | {"method": f"{row['method']}, {row['damping']:g} tr"}
        for row in lengths
    ]
    tables["Grades by the derivative of a shorter run"] = _across(labelled, "method", "steps")
    tables["Grades of the derivative by retraining with so much of an example's weight taken away"] = _across(
        record["parts"], "model", "part"
    )
    tables["Runs"] = _of_runs(record["runs"])
    return tables


class _Mean(NamedTuple):
    """A grade over seeds."""

    mean: float
    standard_error: float
    """Over all test examples."""
    least: float
    most: float
    """The means of single seeds."""


def _mean(rows: Sequence[Row]) -> _Mean:
    """Of one grade's rows, one for each seed."""
    means = [float(row["mean"]) for row in rows]
    error = sum(float(row["standard_error"]) ** 2 for row in rows) ** 0.5 / len(rows)
    return _Mean(sum(means) / len(means), float(error), min(means), max(means))


def _grouped(rows: Iterable[Row], column: str) -> dict[Any, list[Row]]:
    """The rows by their value of a column, in order."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[column], []).append(row)
    return groups


def _of_model(rows: Sequence[Row]) -> str:
    """The grades of one model's methods, best first, each at the damping of its highest first grade."""
    lines: list[tuple[float, list[str]]] = []
    for method, of_method in _grouped(rows, "method").items():
        by_truth = _grouped(of_method, "truth")
        found = {
            truth: {damping: _mean(group) for damping, group in _grouped(by_truth[truth], "damping").items()}
            for truth in TRUTHS
            if truth in by_truth
        }
        first = next(iter(found.values()))
        best = max(first, key=lambda damping: first[damping].mean)
        cells = [text for truth in TRUTHS for text in (_cells(found[truth][best]) if truth in found else ("-", "-"))]
        lines.append((first[best].mean, [method, "" if best is None else f"{best:g} tr", *cells]))
    lines.sort(key=lambda line: -line[0])
    return markdown(
        ["method", "damping", UNROLLED, "range over seeds", LEAVE_ONE_OUT, "range over seeds"],
        [line for _, line in lines],
    )


def _cells(found: _Mean) -> tuple[str, str]:
    return f"{found.mean:.3f} ± {found.standard_error:.3f}", f"{found.least:.3f} to {found.most:.3f}"


def _across(rows: Sequence[Row], label: str, column: str) -> str:
    """Grades, a column for each value."""
    values = list(_grouped(rows, column))
    lines = []
    for name, of_name in _grouped(rows, label).items():
        groups = _grouped(of_name, column)
        lines.append([name, *[f"{_mean(groups[value]).mean:.3f}" if value in groups else "-" for value in values]])
    return markdown([label, *[f"{value:g}" for value in values]], lines)


def _of_runs(rows: Sequence[Row]) -> str:
    """How well the runs have trained."""
    lines = []
    for name, group in _grouped(rows, "model").items():
        columns = [[row[key] for row in group] for key in ("train_loss", "test_loss", "test_accuracy")]
        lines.append([name, *[f"{min(column):.3f} to {max(column):.3f}" for column in columns]])
    return markdown(["model", "training loss", "test loss", "test accuracy"], lines)
