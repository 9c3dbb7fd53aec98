"""Gradients whose squares float32 cannot hold: norms, and what is made of them, against dense ones in float64.

Factors of 1e-30 and less are left out where a term's own numbers would be below float32's normal ones, 1.2e-38.
"""

import pytest
import torch
import torch.nn.functional as F
from zoo import D, dense, normals

import functorch_mnist as fm
from functorch_mnist import attribution, optim, per_sample, privacy, statistics, tree
from functorch_mnist.per_sample.terms import BUILDS

ROUNDING = 1e-5  # of sums in float32
SCALES = torch.tensor([1.0, 5e-22, 1e-30, 1e25, 0.0, 1e18, 1e-12])


def wide(values):
    return tree.map(lambda x: x.to(D) if x.is_floating_point() else x, values)


def narrow(values):
    return tree.map(lambda x: x.float() if x.is_floating_point() else x, values)


def flat(rows):
    leaves = [leaf.reshape(len(leaf), -1).to(D) for leaf in tree.leaves(rows)]
    return torch.cat(leaves, 1)


def scaled(loss_fn):
    """The loss times the last tensor of an example."""
    return lambda params, *example: loss_fn(params, *example[:-1]) * example[-1]


def close(found, expected):
    torch.testing.assert_close(found.to(D), expected, rtol=ROUNDING, atol=0)


def convolution(p, x, y):
    hidden = F.conv2d(x, p["w"], p["b"]).tanh().sum((1, 2))
    return (hidden * y).sum()


def sequence(p, x, y):
    return (F.linear(F.linear(x, p["v"]).tanh(), p["w"]).tanh() * y).sum()


def lookup(p, x, y):
    return (F.embedding(x, p["table"]).tanh() * y).sum()


def tied(p, x, y):
    hidden = F.embedding(x, p["table"]).tanh()
    return (F.linear(hidden, p["table"]).tanh() * y).sum()


def twice(p, x, y):
    return (F.linear(F.linear(x, p["w"]).tanh(), p["w"].t()).tanh() * y).sum()


def recurrent(p, x, y):
    out = torch.gru(x[None], x.new_zeros(1, 1, 3), [p[k] for k in "abcd"], True, 1, 0.0, False, False, True)[0]
    return (out * y).sum()


def problem(name, count):
    tokens = (torch.arange(count * 4).view(count, 4) * 5) % 6
    if name == "convolution":
        params = {"w": normals(3, 2, 2, 2, seed=1), "b": normals(3, seed=2)}
        return convolution, params, (normals(count, 2, 5, 5), normals(count, 3, seed=3))
    if name == "sequence":
        params = {"v": normals(5, 4, seed=1), "w": normals(3, 5, seed=2)}
        return sequence, params, (normals(count, 6, 4), normals(count, 6, 3, seed=3))
    if name == "one position":
        params = {"v": normals(5, 4, seed=1), "w": normals(3, 5, seed=2)}
        return sequence, params, (normals(count, 4), normals(count, 3, seed=3))
    if name == "twice":
        return twice, {"w": normals(5, 4, seed=1)}, (normals(count, 6, 4), normals(count, 6, 4, seed=3))
    if name == "recurrent":
        shapes = {"a": (9, 4), "b": (9, 3), "c": (9,), "d": (9,)}
        params = {k: normals(*shape, seed=i) for i, (k, shape) in enumerate(shapes.items())}
        return recurrent, params, (normals(count, 6, 4), normals(count, 6, 3, seed=9))
    y = normals(count, 4, 3 if name == "lookup" else 6, seed=3)
    return (lookup if name == "lookup" else tied), {"table": normals(6, 3, seed=1)}, (tokens, y)


WAYS = {
    "convolution": ["gram", "unfold", "grouped convolution"],
    "sequence": ["gram", "build"],
    "one position": ["outer product"],
    "twice": ["gram", "build"],
    "lookup": ["gram", "build"],
    "tied": ["pairs", "build"],
    "recurrent": [None],
}


def given(name, way):
    """A loss with examples at all scales, its plan, and the norms of its leaves in float64."""
    loss_fn, params, batch = problem(name, len(SCALES))
    loss_fn, params, batch = scaled(loss_fn), narrow(params), narrow((*batch, SCALES))
    rows = dense(loss_fn, wide(params), wide(batch))
    plan = per_sample.plan(loss_fn, params, *[x[0] for x in batch], batch_size=len(SCALES))
    for row in plan.rows:
        if way in row.costs or (way in BUILDS and "build" in row.costs and row.path == "w"):
            plan = plan.override(row.path, way)
    return loss_fn, params, batch, plan, tree.map(lambda g: g.reshape(len(g), -1).norm(dim=1), rows)


EACH = pytest.mark.parametrize(("name", "way"), [(name, way) for name, ways in WAYS.items() for way in ways])


@EACH
def test_norms_at_all_scales_are_right_by_each_way(name, way):
    loss_fn, params, batch, plan, expected = given(name, way)
    found = per_sample.leaf_norms(loss_fn, params, *batch, plan=plan)
    for path in params:
        close(found[path], expected[path])
        assert found[path].dtype == torch.float32
    whole = torch.stack(tree.leaves(expected)).norm(dim=0)
    close(per_sample.norms(loss_fn, params, *batch, plan=plan), whole)
    close(per_sample.norms(loss_fn, params, *batch, plan=plan, chunk_size=3), whole)
    bounds = per_sample.factored(loss_fn, params, *batch, plan=plan).leaf_bounds()
    for path in params:
        assert (bounds[path] >= expected[path] * (1 - ROUNDING)).all()
        assert (bounds[path] <= expected[path] * 1.1).all()


@EACH
def test_a_prepared_loss_finds_the_same_norms(name, way):
    loss_fn, params, batch, plan, expected = given(name, way)
    loss = per_sample.prepare(loss_fn, params, *[x[0] for x in batch], plan=plan)
    whole = torch.stack(tree.leaves(expected)).norm(dim=0)
    ordinary = (*batch[:-1], torch.ones(len(SCALES)))
    plain = [per_sample.norms(loss, params, *ordinary) for _ in range(3)]
    assert torch.equal(plain[0], plain[2])
    for _ in range(2):
        close(per_sample.norms(loss, params, *batch), whole)
        close(per_sample.grad_and_norms(loss, params, *batch).norms, whole)
        each = per_sample.leaf_norms(loss, params, *batch)
        for path in params:
            close(each[path], expected[path])
    assert torch.equal(per_sample.norms(loss, params, *ordinary), plain[2])


@pytest.mark.parametrize(
    ("name", "way", "prepared"),
    [("sequence", "gram", False), ("tied", "pairs", False), ("convolution", "gram", True)],
)
def test_compiled_norms_at_all_scales_are_right(name, way, prepared):
    loss_fn, params, batch, plan, expected = given(name, way)
    if prepared:
        loss_fn, plan = per_sample.prepare(loss_fn, params, *[x[0] for x in batch], plan=plan), None
    call = torch.compile(
        lambda p, *batch: per_sample.norms(loss_fn, p, *batch, plan=plan),
        fullgraph=True,
        backend="aot_eager",
        dynamic=False,
    )
    close(call(params, *batch), torch.stack(tree.leaves(expected)).norm(dim=0))


def confident(gap=60.0):
    """Losses of a linear classifier that is sure of its examples, by a gap of logits: gradients of e^-gap."""
    params = {"w": torch.zeros(5, 3), "b": torch.tensor([gap, 0.0, 0.0, 0.0, 0.0])}
    x, y = normals(4, 3).float(), torch.tensor([0, 0, 1, 0])

    def loss_fn(params, x, y):
        return fm.losses.cross_entropy(F.linear(x, params["w"], params["b"]), y)

    return loss_fn, params, (x, y)


def test_confident_examples_have_norms_cosines_and_scores():
    loss_fn, params, (x, y) = confident()
    rows = flat(dense(loss_fn, params, (x, y)))
    close(per_sample.norms(loss_fn, params, x, y), rows.norm(dim=1))
    assert (rows.norm(dim=1)[:2] < 1e-25).all()
    expected = F.cosine_similarity(rows[:, None], rows[None], dim=2, eps=0)
    found = attribution.gradient_cosine(loss_fn, params, (x, y), (x, y))
    torch.testing.assert_close(found.to(D), expected, rtol=0, atol=1e-5)
    direction = per_sample.grads(loss_fn, params, x[:1], y[:1])
    direction = tree.map(lambda g: g[0], direction)
    found = statistics.cosines(loss_fn, params, x, y, direction=direction)
    torch.testing.assert_close(found.to(D), expected[0], rtol=0, atol=1e-5)
    scores = attribution.scores(lambda p, x: F.linear(x, p["w"], p["b"]), params, x, labels=y)
    close(scores.grand, rows.norm(dim=1))
    close(scores.el2n[:2], 2 * torch.tensor([-60.0, -60.0], dtype=D).exp())
    norms = statistics.fold(loss_fn, params, x, y, of=statistics.Norms.of)
    assert norms.whole.minimum > 0
    found = attribution.self_influence(scores.grand[None], torch.ones(1))
    close(found, rows.square().sum(1))


@pytest.mark.parametrize("way", ["gram", "build"])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e25])
def test_a_sure_softmax_over_a_vocabulary_has_a_norm(way, scale):
    def loss_fn(p, x, y):
        return fm.losses.chunked_cross_entropy(x, p["w"], y, bias=p["b"], block_size=2).sum() * scale

    params = {"w": torch.eye(5, 3), "b": torch.tensor([0.1, -0.2, 0.3, 0.0, 0.0])}
    y = torch.tensor([[0, 1], [2, 0], [1, 1]])
    x = F.one_hot(y, 3).float() * torch.tensor([60.0, 1.0, 55.0])[:, None, None]
    plan = per_sample.plan(loss_fn, params, x[0], y[0], batch_size=3).override("w", way)
    rows = dense(loss_fn, wide(params), (x.to(D), y))
    found = per_sample.leaf_norms(loss_fn, params, x, y, plan=plan)
    for path in params:
        close(found[path], rows[path].flatten(1).norm(dim=1))


def test_a_tiny_gradient_is_not_clipped_and_a_large_one_is():
    def loss_fn(w, x, c):
        return (w @ x) * c

    x = torch.tensor([[3.0, 4.0]]).expand(4, 2)
    c = torch.tensor([1e-22, 1e25, 0.0, 1e-34])
    for i, expected in enumerate([5e-22, 1.0, 0.0, 5e-34]):
        clipped = per_sample.clipped_sum(loss_fn, torch.zeros(2), x[i : i + 1], c[i : i + 1], max_norm=1.0)
        close(clipped.grads, torch.tensor([0.6, 0.8], dtype=D) * expected)
        assert clipped.nonfinite == 0
        sums = privacy.clipped_sums(loss_fn, torch.zeros(2), x[i : i + 1], c[i : i + 1], clipping=privacy.Flat(1.0))
        close(sums.grads, torch.tensor([0.6, 0.8], dtype=D) * expected)


def test_the_gradient_of_a_tiny_norm_is_the_direction_and_of_none_is_zero():
    def norm_of(w, c):
        return per_sample.norms(lambda w, x: (w * w * x).sum() / 2 * c, w, torch.ones(1, 2)).sum()

    w = torch.tensor([3.0, 4.0])
    for c in (1.0, 5e-22, 1e25):
        close(torch.func.grad(norm_of)(w, c) / c, torch.tensor([0.6, 0.8], dtype=D))
    assert torch.equal(torch.func.grad(norm_of)(w * 0, 1.0), torch.zeros(2))
    assert torch.equal(
        torch.func.vmap(norm_of, (None, 0))(w, torch.tensor([1.0, 1e-22])) > 0, torch.tensor([True, True])
    )


@pytest.mark.parametrize("compiled", [False, True])
def test_the_norm_of_a_tree_holds_what_its_squares_do_not(compiled):
    norm = torch.compile(tree.norm, fullgraph=True, backend="eager") if compiled else tree.norm
    for scale in (1.0, 1e-22, 1e-36, 1e25, 1e37):
        values = {"a": torch.tensor([3.0 * scale]), "b": torch.tensor([[0.0, 4.0 * scale]])}
        close(norm(values) / scale, torch.tensor(5.0, dtype=D))
    zero = {"a": torch.zeros(3)}
    assert norm(zero) == 0 and norm({"a": torch.tensor([torch.inf])}) == torch.inf
    assert norm({"a": torch.tensor([torch.nan])}).isnan()
    assert torch.equal(torch.func.grad(tree.norm)(zero)["a"], torch.zeros(3))
    step = optim.clip_by_global_norm(optim.sgd(1.0), max_norm=1.0)
    params = {"a": torch.zeros(2)}
    moved, _ = step.update(params, step.init(params), {"a": torch.tensor([3e25, 4e25])})
    close(moved["a"], torch.tensor([-0.6, -0.8], dtype=D))
