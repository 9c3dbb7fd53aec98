"""Kronecker-factored curvature with corrected eigenvalues, against dense definitions in float64."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, vmap
from zoo import normals

from functorch_mnist import attribution, losses, per_sample, random, statistics, tree
from functorch_mnist.statistics import Eigenvalues, KroneckerFactors

D = torch.float64
EXACT = 1e-10


def labels(*shape):
    return random.randint(random.key(9), shape, 0, 3)


def net(**shapes):
    return {name: normals(*shape, seed=i + 1) for i, (name, shape) in enumerate(shapes.items())}


def mlp(p, x, y):
    hidden = F.linear(x, p["a.weight"], p["a.bias"]).tanh()
    return losses.cross_entropy(F.linear(hidden, p["b.weight"], p["b.bias"]), y)


def positions(p, x, y):
    hidden = F.linear(x, p["a.weight"], p["a.bias"]).tanh()  # (T, H)
    return losses.cross_entropy(F.linear(hidden, p["b.weight"]).mean(0) * p["scale"], y)


def grouped(p, x, y):
    hidden = F.conv2d(x, p["a.weight"], p["a.bias"], groups=2).tanh()
    return losses.cross_entropy(F.conv_transpose2d(hidden, p["b.weight"], p["b.bias"]).mean((-2, -1)), y)


def lookup(p, x, y):
    hidden = F.embedding(x, p["table"]).mean(0)
    return losses.cross_entropy(F.linear(hidden, p["b.weight"], p["b.bias"]), y)


def shared(p, x, y):
    hidden = F.linear(x, p["a.weight"], p["a.bias"]).tanh()
    return losses.cross_entropy(F.linear(hidden, p["a.weight"], p["b.bias"]), y)


def viewed(p, x, y):
    return losses.cross_entropy(F.linear(x, p["a.weight"].T, p["a.bias"]), y)


B = 6
CASES = {
    "mlp": (mlp, net(**{"a.weight": (4, 5), "a.bias": (4,), "b.weight": (3, 4), "b.bias": (3,)}), normals(B, 5)),
    "positions": (
        positions, net(**{"a.weight": (4, 5), "a.bias": (4,), "b.weight": (3, 4), "scale": (3,)}), normals(B, 3, 5),
    ),
    "grouped": (
        grouped, net(**{"a.weight": (4, 1, 2, 2), "a.bias": (4,), "b.weight": (4, 3, 2, 2), "b.bias": (3,)}),
        normals(B, 2, 4, 4),
    ),
    "lookup": (
        lookup, net(**{"table": (7, 4), "b.weight": (3, 4), "b.bias": (3,)}),
        random.randint(random.key(3), (B, 4), 0, 7),
    ),
    "shared": (shared, net(**{"a.weight": (3, 3), "a.bias": (3,), "b.bias": (3,)}), normals(B, 3)),
    "viewed": (viewed, net(**{"a.weight": (5, 3), "a.bias": (3,)}), normals(B, 5)),
}  # fmt: skip
JOINED = {
    "mlp": {"a.weight": "a.bias", "b.weight": "b.bias"},
    "positions": {"a.weight": "a.bias", "b.weight": None},
    "grouped": {"a.weight": "a.bias", "b.weight": None},
    "lookup": {"table": None, "b.weight": "b.bias"},
    "shared": {"a.weight": None},
    "viewed": {"a.weight": "a.bias"},
}


def factors_of(name, **options):
    loss_fn, params, x = CASES[name]
    return statistics.fold(loss_fn, params, x, labels(B), of=KroneckerFactors.of, **options).mean


def dense_of(name, params=None):
    loss_fn, given, x = CASES[name]
    return vmap(grad(loss_fn), (None, 0, 0))(given if params is None else params, x, labels(B))


@pytest.mark.parametrize("name", CASES)
def test_a_bias_is_joined_to_the_weight_whose_op_alone_adds_it(name):
    assert {path: pair.bias for path, pair in factors_of(name).items()} == JOINED[name]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_the_joined_factor_is_that_of_inputs_with_a_one(name, chunk_size):
    mask = torch.tensor([True, True, False, True, True, True])
    whole, masked = factors_of(name, chunk_size=chunk_size), factors_of(name, mask=mask, chunk_size=chunk_size)
    loss_fn, params, x = CASES[name]
    some = statistics.fold(loss_fn, params, x[mask], labels(B)[mask], of=KroneckerFactors.of).mean
    for path, pair in whole.items():
        assert (masked[path].joined - some[path].joined).abs().max() <= EXACT
        if name == "mlp" and path == "a.weight":
            ones = torch.cat([x, torch.ones(B, 1, dtype=D)], 1)
            assert (pair.joined[0] - ones.T @ ones / B).abs().max() <= EXACT
        if name == "positions" and path == "a.weight":
            ones = torch.cat([x.flatten(0, 1), torch.ones(3 * B, 1, dtype=D)], 1)
            assert (pair.joined[0] - ones.T @ ones / B).abs().max() <= EXACT


def vectors(basis, rank, size):
    """Orthonormal columns, those that are kept first, of each group; and of each how many it is averaged with."""
    columns = []
    for kept in basis:
        rest = torch.linalg.svd(torch.eye(size, dtype=D) - kept @ kept.T).U[:, : size - kept.shape[1]]
        columns.append(torch.cat([kept, rest], 1))
    return torch.stack(columns), min(rank or size, size)


def averaged(squares, kept, axis):
    """The numbers along an axis, those after the first `kept` replaced by their mean."""
    first, rest = squares.split([kept, squares.shape[axis] - kept], axis)
    return torch.cat([first, rest.mean(axis, keepdim=True).expand_as(rest)], axis)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("name", CASES)
def test_the_corrected_curvature_is_the_dense_second_moment_along_its_eigenvectors(name, rank):
    loss_fn, params, x = CASES[name]
    factors, dense = factors_of(name), dense_of(name)
    bases = {path: per_sample.eigenbasis(pair, rank=rank) for path, pair in factors.items()}
    found = statistics.fold(loss_fn, params, x, labels(B), of=partial(Eigenvalues.of, bases=bases), chunk_size=4).mean
    vector = tree.map(lambda w: normals(2, *w.shape, seed=4), params)
    solved = attribution.corrected_curvature(bases, found).solve(vector, damping=0.2)
    within = set()
    for path, pair in factors.items():
        m, v, s = (matrices(path, pair, t) for t in (dense, vector, solved))
        u, h = vectors(bases[path].outputs, rank, m.shape[-2])
        if pair.diagonal:
            w, d = torch.eye(m.shape[-1], dtype=D)[None], m.shape[-1]
        else:
            w, d = vectors(bases[path].inputs, rank, m.shape[-1])
        squares = (u.mT @ m @ w).square().mean(0)
        squares = averaged(averaged(squares, h, -2), d, -1)
        shown = squares[:, : h + (h < m.shape[-2]), : d + (d < m.shape[-1])]
        assert (found[path] - shown).abs().max() <= EXACT
        expected = u @ ((u.mT @ v @ w) / (squares + 0.2)) @ w.mT
        assert (s - expected).abs().max() <= EXACT
        within |= {path, pair.bias}
    for path in params.keys() - within:
        second = dense[path].square().mean(0)
        assert (found[path] - second).abs().max() <= EXACT
        assert (solved[path] - vector[path] / (second + 0.2)).abs().max() <= EXACT


def matrices(path, pair, t):
    """What is shaped as the parameter and its bias, with leading axes, as matrices (*lead, G, H, D)."""
    m = torch.stack([pair.matrices(row) for row in t[path]])
    return m if pair.bias is None else torch.cat([m, t[pair.bias].reshape(*m.shape[:3], 1)], 3)


def test_iterated_eigenvectors_are_those_of_the_largest_eigenvalues():
    x = normals(200, 64) @ torch.diag(torch.logspace(0, -2, 64, dtype=D))
    pair = per_sample.kronecker(lambda w, x: (w @ x).sum(), torch.zeros(2, 64, dtype=D), x)[""]
    whole, some = per_sample.eigenbasis(pair).inputs[0], per_sample.eigenbasis(pair, rank=6).inputs[0]
    assert some.shape == (64, 6)
    assert (some.T @ some - torch.eye(6, dtype=D)).abs().max() <= EXACT
    assert ((whole[:, :6].T @ some).abs() - torch.eye(6, dtype=D)).abs().max() <= 1e-3  # the gaps are of a tenth


@pytest.mark.parametrize("corrected", [True, False])
def test_the_fisher_curvature_is_made_of_its_parts(corrected):
    _, params, x = CASES["mlp"]

    def outputs_fn(p, x):
        return F.linear(F.linear(x, p["a.weight"], p["a.bias"]).tanh(), p["b.weight"], p["b.bias"])

    options = {"key": random.key(5), "draws": 2, "chunk_size": 4}
    found = attribution.fisher_curvature(outputs_fn, params, x, corrected=corrected, **options)
    factors = statistics.fisher_kronecker(outputs_fn, params, x, **options)
    diagonal = statistics.fisher_diagonal(outputs_fn, params, x, **options)
    if corrected:
        bases = {path: per_sample.eigenbasis(pair) for path, pair in factors.items()}
        values = statistics.fisher_eigenvalues(outputs_fn, params, x, bases=bases, **options)
        expected = attribution.corrected_curvature(bases, values)
    else:
        expected = attribution.curvature(factors, diagonal)
    v = tree.map(lambda w: normals(*w.shape, seed=4), params)
    for path, leaf in found.solve(v, damping=0.1).items():
        assert (leaf - expected.solve(v, damping=0.1)[path]).abs().max() <= EXACT
    total = sum(float(leaf.sum()) for leaf in diagonal.values())
    assert found.trace == pytest.approx(total, rel=1e-10)


def test_corrected_eigenvalues_are_nearer_to_the_fisher_information_than_products():
    """George et al. 2018, section 3.2: of all matrices with these eigenvectors, none is nearer."""
    loss_fn, params, x = CASES["positions"]
    factors, dense = factors_of("positions"), dense_of("positions")
    pair, rows = factors["b.weight"], dense["b.weight"].flatten(1)
    second = rows.T @ rows / B
    bases = {path: per_sample.eigenbasis(one) for path, one in factors.items()}
    values = statistics.fold(loss_fn, params, x, labels(B), of=partial(Eigenvalues.of, bases=bases)).mean["b.weight"]
    q = torch.kron(bases["b.weight"].outputs[0], bases["b.weight"].inputs[0])
    corrected = q @ torch.diag(values.flatten()) @ q.T
    product = torch.kron(pair.cotangents[0], pair.inputs[0])
    product = product * second.trace() / product.trace()
    assert (corrected - second).norm() < (product - second).norm()
