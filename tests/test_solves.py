"""Solves with Gram matrices, moments and kernels: against the pseudo-inverse of numpy, and refused where singular."""

import math

import numpy
import pytest
import torch
from zoo import EXACT, D, difference, labels, normals

import functorch_mnist as fm
from functorch_mnist import attribution, per_sample, random, tree

F32 = torch.float32


def definite(count, rank=None, seed=0):
    """A positive semidefinite matrix (N, N) whose eigenvalues that are not zero are near each other."""
    rows = normals(count, 4 * count if rank is None else rank, seed=seed)
    return rows @ rows.T / rows.shape[1]


def pseudo_inverse(matrix):
    return torch.from_numpy(numpy.linalg.pinv(matrix.double().numpy(), rcond=1e-9, hermitian=True))


def by_pseudo_inverse(train, test, probs):
    train, test = train.double(), test.double()
    return (train @ pseudo_inverse(train.T @ train) @ test.T) * (1 - probs.double())[:, None]


# ---- TRAK


def features(kind, count=40, width=6):
    train, test = normals(count, width), normals(3, width, seed=1)
    if kind == "zero":
        train, test = train.index_fill(1, torch.tensor([2]), 0), test.index_fill(1, torch.tensor([2]), 0)
    if kind == "zero in training alone":
        train = train.index_fill(1, torch.tensor([2]), 0)
    if kind == "equal":
        train, test = train[:, [0, 1, 2, 3, 4, 4]], test[:, [0, 1, 2, 3, 4, 4]]
    if kind == "adding up to zero":
        train, test = train - train.mean(1, keepdim=True), test - test.mean(1, keepdim=True)
    return train, test, torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=D)


SINGULAR = ["zero", "zero in training alone", "equal", "adding up to zero"]


@pytest.mark.parametrize("dtype", [D, F32])
@pytest.mark.parametrize("kind", ["ordinary", *SINGULAR])
def test_traks_own_damping_gives_the_pseudo_inverse(kind, dtype):
    train, test, probs = (x.to(dtype) for x in features(kind))
    found = attribution.trak(train, test, probs)
    assert found.dtype == D
    # λ is 1e-6 of the mean eigenvalue, and no eigenvalue but zero is below a tenth of the mean
    assert difference(found, by_pseudo_inverse(train, test, probs)) <= 1e-5


def test_traks_own_damping_serves_fewer_examples_than_features_and_features_that_are_all_zero():
    train, test, probs = features("ordinary", count=5, width=12)
    assert difference(attribution.trak(train, test, probs), by_pseudo_inverse(train, test, probs)) <= 1e-5
    assert torch.equal(attribution.trak(train * 0, test, probs), torch.zeros(5, 3, dtype=D))
    assert torch.equal(attribution.trak(train[:, :0], test[:, :0], probs), torch.zeros(5, 3, dtype=D))


def test_a_plain_classifiers_features_are_dependent_and_trak_is_right_on_them():
    model = fm.models.mlp([10, 6, 4])
    params = model.init(random.key(0))
    train, test = ((normals(n, 10, seed=n).float(), labels(n, 4)) for n in (200, 5))

    def loss_fn(params, x, y):
        return attribution.log_odds(model.apply(params, x), y)

    maps = attribution.projection(params, key=random.key(3), size=16)
    rows, other = (attribution.features(loss_fn, params, *batch, projection=maps) for batch in (train, test))
    probs = torch.full((200,), 0.25)
    expected = by_pseudo_inverse(rows, other, probs)
    assert difference(attribution.trak(rows, other, probs), expected) <= 1e-4  # λ over the least eigenvalue
    with pytest.raises(ValueError, match=r"trak: .* with a damping of 0\. Take a larger damping"):
        attribution.trak(rows, other, probs, damping=0)


@pytest.mark.parametrize("dtype", [D, F32])
@pytest.mark.parametrize("kind", SINGULAR)
def test_a_damping_of_zero_is_exact_or_refused(kind, dtype):
    train, test, probs = (x.to(dtype) for x in features("ordinary"))
    tolerance = EXACT if dtype == D else 1e-6  # of the features' own precision
    assert difference(attribution.trak(train, test, probs, damping=0), by_pseudo_inverse(train, test, probs)) <= (
        tolerance
    )
    train, test, probs = (x.to(dtype) for x in features(kind))
    with pytest.raises(ValueError, match=r"trak: the matrix must be positive definite beyond its rounding"):
        attribution.trak(train, test, probs, damping=0)


# ---- influence functions and kernel regression

CALLS = {
    "fisher_influence": lambda m, b, damping: attribution.fisher_influence(m, b, damping=damping / len(m)) / len(m),
    "kernel_regression": lambda m, b, damping: attribution.kernel_regression(
        m, b, torch.eye(len(m), dtype=m.dtype, device=m.device), ridge=damping
    ),
}
each = pytest.mark.parametrize("name", CALLS)


@each
@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("dtype", [D, F32])
def test_a_solve_is_the_inverse_of_the_damped_matrix(name, rank, dtype):
    matrix, right = definite(9, rank).to(dtype), normals(9, 2, seed=1).to(dtype)
    found = CALLS[name](matrix, right, 0.1)
    expected = pseudo_inverse(matrix.double() + 0.1 * torch.eye(9, dtype=D)) @ right.double()
    assert found.dtype == D
    assert difference(found, expected) <= (EXACT if dtype == D else 1e-6)  # float32's matrix is not quite symmetric


def test_kernel_regression_without_a_ridge_interpolates():
    matrix, right = definite(9), normals(9, 2, seed=1)
    expected = pseudo_inverse(matrix) @ right
    assert difference(CALLS["kernel_regression"](matrix, right, 0.0), expected) <= EXACT
    with pytest.raises(ValueError, match=r"kernel_regression: .* with a ridge of 0\. Take a larger ridge"):
        CALLS["kernel_regression"](definite(9, 3), right, 0.0)


@each
@pytest.mark.parametrize(("dtype", "damping"), [(D, 1e-16), (F32, 1e-16), (F32, 1e-9)])
def test_a_damping_below_the_rounding_of_a_singular_matrix_is_refused(name, dtype, damping):
    with pytest.raises(ValueError, match=rf"{name}: the matrix must be positive definite beyond its rounding"):
        CALLS[name](definite(9, 3).to(dtype), normals(9, 2), damping)


@each
@pytest.mark.parametrize("below", [1.0, 0.2, 0.09])
def test_an_indefinite_matrix_is_refused_whether_or_not_damping_hides_it(name, below):
    vectors = torch.linalg.qr(normals(9, 9)).Q
    values = torch.linspace(0.5, 1.5, 9, dtype=D)
    values[3] = -below
    matrix = vectors * values @ vectors.T
    with pytest.raises(ValueError, match=f"{name}: the matrix must be positive definite"):
        CALLS[name]((matrix + matrix.T) / 2, normals(9, 2), 0.1)


@each
def test_what_is_not_symmetric_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}: the matrix must be symmetric"):
        CALLS[name](definite(9) + normals(9, 9), normals(9, 2), 0.1)


@each
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("of", ["matrix", "right"])
def test_what_is_not_finite_is_refused(name, value, of):
    matrix, right = definite(4), normals(4, 2)
    (matrix if of == "matrix" else right)[1, 1] = value
    with pytest.raises(ValueError, match=f"{name}: numbers must be finite"):
        CALLS[name](matrix, right, 0.1)


def test_trak_curvature_and_cross_refuse_what_is_not_finite():
    train, test, probs = features("ordinary")
    for given in ((train * math.nan, test, probs), (train, test / 0, probs), (train, test, probs * math.nan)):
        with pytest.raises(ValueError, match="trak: numbers must be finite"):
            attribution.trak(*given)
    with pytest.raises(ValueError, match="kernel_regression: numbers must be finite"):
        attribution.kernel_regression(definite(3), normals(3, 1), normals(2, 3) / 0, ridge=0.1)
    pair = per_sample.kronecker(lambda w, x: (w @ x).sum(), normals(2, 3), normals(4, 3))
    with pytest.raises(ValueError, match="curvature: numbers must be finite"):
        attribution.curvature(tree.map(lambda x: x * math.nan, pair), torch.ones(2, 3, dtype=D))
    made = attribution.curvature(pair, torch.ones(2, 3, dtype=D))
    with pytest.raises(ValueError, match="solve: numbers must be finite"):
        made.solve(torch.full((2, 3), math.nan), damping=0.1)
    with pytest.raises(ValueError, match="solve: damping must be at least 1e-12 of a block's largest eigenvalue"):
        made.solve(torch.ones(2, 3), damping=1e-15)


@pytest.mark.parametrize("name", ["fisher_influence", "kernel_regression", "trak"])
def test_solves_trace_as_one_graph_and_stay_on_their_device(name):
    def call(matrix, right):
        if name == "trak":
            return attribution.trak(matrix, right.T, matrix[0])
        return CALLS[name](matrix, right, 1e-15)

    traced = torch.compile(call, fullgraph=True, backend="eager")
    good, right = definite(9), normals(9, 2)
    assert torch.equal(traced(good, right), call(good, right))
    if name != "trak":
        assert traced(definite(9, 3), right).isnan().all()  # where no number may be looked at
    assert call(good.to("meta"), right.to("meta")).device.type == "meta"
    slopes = [torch.func.grad(lambda m, f=f: f(m, right).sum())(good) for f in (call, traced)]
    assert slopes[0].isfinite().all()
    batched = torch.func.vmap(call)(torch.stack([good, 2 * good]), torch.stack([right, right]))
    assert difference(batched[0], call(good, right)) <= EXACT
