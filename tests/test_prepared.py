"""A prepared loss gives what the loss gives: the first time, recorded and compiled."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from zoo import CASES, D, difference, mlp, normals, tutorial_cnn

from functorch_mnist import losses, models, per_sample, tree
from functorch_mnist.per_sample import opaque, programs
from functorch_mnist.per_sample.prepared import Prepared

EXACT = 1e-10
BRANCHING = ("bags of embeddings",)


def quantities(loss_fn, params, batch, **options):
    return of(loss_fn, params, batch, *arguments(params, batch), **options)


def arguments(params, batch):
    return normals(len(batch[0]), seed=7), tree.map(lambda w: normals(*w.shape, seed=8), params)


def of(loss_fn, params, batch, weights, direction, **options):
    return {
        "norms": per_sample.norms(loss_fn, params, *batch, **options),
        "leaf_norms": per_sample.leaf_norms(loss_fn, params, *batch, **options),
        "weighted_sum": per_sample.weighted_sum(loss_fn, params, *batch, weights=weights, **options),
        "clipped_sum": per_sample.clipped_sum(loss_fn, params, *batch, max_norm=0.7, **options)._asdict(),
        "ruled_sum": per_sample.clipped_sum(loss_fn, params, *batch, max_norm=lambda n: 1 / (1 + n), **options).grads,
        "dot": per_sample.dot(loss_fn, params, *batch, direction=direction, **options),
        "gram": per_sample.gram(loss_fn, params, batch, **options),
        "second_moment": per_sample.second_moment(loss_fn, params, *batch, **options),
    }


def prepared(loss_fn, params, batch):
    return per_sample.prepare(loss_fn, params, *[x[0] for x in batch])


def recorded(loss):
    return [entry for known in loss._known.values() for entry in known.recorded.values() if entry is not None]


@pytest.mark.parametrize("name", CASES)
def test_what_is_recorded_gives_what_the_loss_gives(name):
    case = CASES[name]()
    expected = quantities(case.loss_fn, case.params, case.batch)
    loss = prepared(case.loss_fn, case.params, case.batch)
    for _ in range(3):
        assert difference(quantities(loss, case.params, case.batch), expected) < EXACT
    entries = recorded(loss)
    assert len(entries) == 8
    assert all(entry.program is not None for entry in entries), str(loss)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_masks_and_chunks_are_those_of_the_loss(masked, chunk_size):
    case = mlp()
    mask = torch.arange(len(case.batch[0])) % 3 > 0 if masked else None
    expected = quantities(case.loss_fn, case.params, case.batch, mask=mask)
    loss = prepared(case.loss_fn, case.params, case.batch)
    for _ in range(3):
        found = quantities(loss, case.params, case.batch, mask=mask, chunk_size=chunk_size)
        assert difference(found, expected) < EXACT


def test_numbers_that_change_are_read_anew():
    case = mlp()
    loss = prepared(case.loss_fn, case.params, case.batch)
    for step in range(4):
        params = tree.map(lambda w, s=step: w * (1 + s), case.params)
        batch = (case.batch[0] * (1 - step), *case.batch[1:])
        assert difference(quantities(loss, params, batch), quantities(case.loss_fn, params, batch)) < EXACT


def test_other_shapes_dtypes_and_orders_are_prepared_anew():
    def loss_fn(p, x):
        return (torch.tanh(x @ p["a"]) @ p["b"]).sum()

    a, b = normals(3, 3, seed=1), normals(3, 3, seed=2)
    loss = per_sample.prepare(loss_fn, {"a": a, "b": b}, normals(4, 3))
    trees = ({"a": a, "b": b}, {"b": b, "a": a}, {"a": a.float(), "b": b.float()})
    for _, params, rows, length in itertools.product(range(3), trees, (2, 5), (4, 6)):
        x = normals(rows, length, 3, seed=3).to(params["a"].dtype)
        found, expected = (per_sample.leaf_norms(fn, params, x) for fn in (loss, loss_fn))
        assert difference(found, expected) == 0
        assert list(found) == list(params)


def test_fewer_parameters_than_it_was_prepared_with_are_prepared_anew_for_each_size():
    def loss_fn(p, x):
        return sum((w * x).sum() for w in p.values())

    params = {name: normals(3, seed=i) for i, name in enumerate("abcd")}
    loss = per_sample.prepare(loss_fn, params, normals(3))
    for _, rows in itertools.product(range(3), (1, 2, 5)):
        x = normals(rows, 3, seed=rows)
        torch.testing.assert_close(per_sample.norms(loss, {"a": params["a"]}, x), x.norm(dim=1))


def test_a_masked_first_row_of_another_shape_may_hold_anything():
    def loss_fn(w, x, y):
        return losses.cross_entropy(x @ w, y).sum()

    w = normals(3, 4, seed=1)
    loss = per_sample.prepare(loss_fn, w, normals(3), torch.tensor(0))
    x, y, mask = normals(2, 5, 3, seed=2), torch.zeros(2, 5, dtype=torch.int64), torch.tensor([False, True])
    y[0], x[0] = 99, torch.nan
    for _ in range(3):
        found, expected = (per_sample.norms(fn, w, x, y, mask=mask) for fn in (loss, loss_fn))
        assert difference(found, expected) < EXACT


def test_one_tensor_may_be_given_twice():
    def loss_fn(w, x, y):
        return (w * x * y.sin()).sum()

    w, x = normals(3, seed=1), normals(4, 3, seed=2)
    loss = per_sample.prepare(loss_fn, w, x[0], x[0])
    for _ in range(3):
        assert torch.equal(per_sample.norms(loss, w, x, x), per_sample.norms(loss_fn, w, x, x))
    y = normals(4, 3, seed=3)
    assert torch.equal(per_sample.norms(loss, w, x, y), per_sample.norms(loss_fn, w, x, y))


def test_a_tensor_that_the_loss_holds_is_read_in_every_call():
    scale = torch.ones((), dtype=D)

    def loss_fn(w, x):
        return (w * x * scale.square().sqrt().clone()).sum()

    w, x = normals(3, seed=1), normals(4, 3, seed=2)
    loss = per_sample.prepare(loss_fn, w, x[0])
    compiled = torch.compile(lambda w, x: per_sample.norms(loss, w, x), backend="eager", fullgraph=True)
    for step in range(5):
        scale.fill_(1.0 + step)
        expected = (1 + step) * x.norm(dim=1)
        torch.testing.assert_close(per_sample.norms(loss, w, x), expected)
        torch.testing.assert_close(compiled(w, x), expected)


def test_a_forward_that_branches_on_its_data_is_not_recorded_and_right():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return self.one(x) if bool((x > -100).all()) else self.two(x).sin()

    params, model = models.from_module(Branching().double(), example_ndim=1)

    def loss_fn(p, x):
        return model.apply(p, x).square().sum()

    x = normals(4, 3, seed=2)
    loss = per_sample.prepare(loss_fn, params, x[0])
    for batch in (x, x, x, x - 1000, x - 1000, x):
        expected = per_sample.norms(loss_fn, params, batch)
        torch.testing.assert_close(per_sample.norms(loss, params, batch), expected, rtol=EXACT, atol=0)
    assert all(entry.program is None for entry in recorded(loss))
    assert "numbers of the inputs" in str(loss)


def test_a_result_that_may_be_differentiated_is_not_taken_from_what_is_recorded():
    case = mlp()
    loss = prepared(case.loss_fn, case.params, case.batch)
    for _ in range(3):
        per_sample.norms(loss, case.params, *case.batch)

    def total(fn):
        return lambda p: per_sample.norms(fn, p, *case.batch).sum()

    inside = torch.func.grad(total(loss))(case.params)
    assert difference(inside, torch.func.grad(total(case.loss_fn))(case.params)) < EXACT
    params = tree.map(lambda w: w.clone().requires_grad_(), case.params)
    outside = torch.autograd.grad(total(loss)(params), tree.leaves(params))
    assert difference(list(outside), tree.leaves(inside)) < EXACT
    weights = torch.ones(len(case.batch[0]), dtype=D, requires_grad=True)
    summed = per_sample.weighted_sum(loss, case.params, *case.batch, weights=weights)
    products = per_sample.dot(case.loss_fn, case.params, *case.batch, direction=case.params)
    (by_weights,) = torch.autograd.grad(tree.dot(summed, case.params), weights)
    torch.testing.assert_close(by_weights, products, rtol=EXACT, atol=EXACT)


def test_a_loss_that_holds_what_requires_a_gradient_is_not_recorded():
    held = normals(3, seed=5).requires_grad_()

    def loss_fn(w, x):
        return (w * x * held).sum()

    w, x = normals(3, seed=1), normals(4, 3, seed=2)
    loss = per_sample.prepare(loss_fn, w, x[0])
    for _ in range(3):
        (found,) = torch.autograd.grad(per_sample.norms(loss, w, x).sum(), held)
        (expected,) = torch.autograd.grad((x * held).norm(dim=1).sum(), held)
        torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)


def test_writes_in_place_are_made_in_their_order():
    def loss_fn(w, x):
        y = w * x
        early = y + 1
        y.mul_(2)
        z = torch.zeros_like(x)
        z += y
        z[0] = early[1]
        return (z * early).sum() + y.sum()

    w, x = normals(3, seed=1), normals(4, 3, seed=2)
    loss = per_sample.prepare(loss_fn, w, x[0])
    for _ in range(3):
        torch.testing.assert_close(per_sample.norms(loss, w, x), per_sample.norms(loss_fn, w, x), rtol=EXACT, atol=0)


def test_zeros_that_are_written_to_through_a_view_are_no_zeros():
    def loss_fn(w, x):
        held = x.new_zeros(3)
        seen = held.view(3)
        held.add_(x.sin())
        return ((w * x + seen) * seen).sum() + (w * (x + torch.zeros(3, dtype=D))).sum()

    w, x = normals(3, seed=1), normals(4, 3, seed=2)
    loss = per_sample.prepare(loss_fn, w, x[0])
    expected = (x * x.sin() + x).norm(dim=1)
    for _ in range(3):
        torch.testing.assert_close(per_sample.norms(loss, w, x), expected, rtol=EXACT, atol=0)
        torch.testing.assert_close(
            per_sample.factored(loss, w, x).losses, torch.func.vmap(loss_fn, (None, 0))(w, x), rtol=EXACT, atol=0
        )


def test_what_is_returned_is_the_callers_to_write_to():
    def loss_fn(p, x):
        return (p["w"] * x).sum()

    params = {"w": normals(3, seed=1), "unused": normals(3, seed=2), "other": normals(3, seed=3)}
    x = normals(4, 3, seed=4)
    loss = per_sample.prepare(loss_fn, params, x[0])
    for _ in range(4):
        grads, norms, losses = per_sample.grad_and_norms(loss, params, x)
        squares = per_sample.leaf_norms(loss, params, x)
        assert torch.equal(grads["w"], x.sum(0))
        for leaf in (grads["unused"], grads["other"], squares["unused"], squares["other"]):
            assert not leaf.any()
        torch.testing.assert_close(norms, x.norm(dim=1))
        written = [*grads.values(), *squares.values(), norms, losses]
        for i, leaf in enumerate(written):
            leaf.fill_(i + 1)
        for i, leaf in enumerate(written):
            assert (leaf == i + 1).all()


def test_nothing_that_is_kept_or_shared_is_handed_out():
    def fn(x):
        return [torch.zeros(3).view(3, 1), torch.zeros(3), torch.zeros(3), x.sin(), x.sin().view(-1), (x * 0 + 1).cos()]

    x = normals(3, seed=1)
    program, expected = programs.record(fn, [x]), fn(x)
    for _ in range(3):
        found = program(x)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
        for i, one in enumerate(found):
            one.fill_(i + 5)
        for i, one in enumerate(found):
            assert (one == i + 5).all()


def test_a_branch_on_what_was_written_through_a_view_is_a_branch_on_data():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            held = torch.zeros(3, dtype=D)
            seen = held.view(3)
            held.add_(x.detach().flatten(0, -2).amax(0))
            return self.one(x) if bool((seen < 100).all()) else self.two(x).sin()

    params, model = models.from_module(Branching().double(), example_ndim=1)

    def loss_fn(p, x):
        return model.apply(p, x).square().sum()

    x = normals(1, 3, seed=2)
    loss = per_sample.prepare(loss_fn, params, x[0])
    for batch in (x, x, x, x + 1000, x + 1000):
        torch.testing.assert_close(per_sample.norms(loss, params, batch), per_sample.norms(loss_fn, params, batch))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_example_that_is_not_finite_is_left_out_and_counted(bad):
    case = mlp()
    loss = prepared(case.loss_fn, case.params, case.batch)
    for batch in (case.batch, case.batch, (case.batch[0].clone(), *case.batch[1:])):
        if batch is not case.batch:
            batch[0][1] = bad
        found, expected = (per_sample.clipped_sum(fn, case.params, *batch, max_norm=0.5) for fn in (loss, case.loss_fn))
        assert found.nonfinite == expected.nonfinite == int(batch is not case.batch)
        assert difference(found.grads, expected.grads) < EXACT
        assert all(leaf.isfinite().all() for leaf in tree.leaves(found.grads))


def test_a_label_out_of_range_is_refused_recorded_too():
    def loss_fn(w, x, y):
        return losses.cross_entropy(x @ w, y)

    w, x = normals(3, 4, seed=1), normals(5, 3, seed=2)
    loss = per_sample.prepare(loss_fn, w, x[0], torch.tensor(0))
    for _ in range(3):
        per_sample.norms(loss, w, x, torch.zeros(5, dtype=torch.int64))
    with pytest.raises((ValueError, RuntimeError), match="labels must be in"):
        per_sample.norms(loss, w, x, torch.tensor([0, 1, 2, 3, 4]))


def test_autocast_is_recorded_apart():
    def loss_fn(w, x):
        return (x @ w).float().square().sum()

    w, x = normals(16, 8, seed=1).float(), normals(5, 16, seed=2).float()
    loss = per_sample.prepare(loss_fn, w, x[0])
    for _ in range(3):
        plain = per_sample.norms(loss, w, x)
        with torch.autocast("cpu", torch.bfloat16):
            cast = per_sample.norms(loss, w, x)
            assert torch.equal(cast, per_sample.norms(loss_fn, w, x))
        assert torch.equal(plain, per_sample.norms(loss_fn, w, x))
        assert not torch.equal(plain, cast)


def test_the_plan_and_has_aux_are_those_of_prepare():
    def loss_fn(w, x):
        return (w * x).sum(), {"x": x}

    w, x = normals(3, seed=1), normals(4, 3, seed=2)
    loss = per_sample.prepare(loss_fn, w, x[0], has_aux=True)
    for _ in range(3):
        found = per_sample.factored(loss, w, x, has_aux=True)
        assert torch.equal(found.aux["x"], x)
        torch.testing.assert_close(found.norms(), x.norm(dim=1))
    with pytest.raises(ValueError, match="has_aux from prepare"):
        per_sample.norms(loss, w, x)

    def plain(w, x):
        return (x @ w).square().sum()

    w, x = normals(3, 2, seed=1), normals(4, 5, 3, seed=2)
    plan = per_sample.plan(plain, w, x[0], batch_size=4).override("", "gram")
    loss = per_sample.prepare(plain, w, x[0], plan=plan)
    assert per_sample.factored(loss, w, x).terms[0].strategy == "gram"
    with pytest.raises(ValueError, match="has its plan"):
        per_sample.norms(loss, w, x, plan=plan)


def test_a_loss_that_does_not_fit_is_refused_when_it_is_prepared():
    with pytest.raises(ValueError, match="0-d tensor"):
        per_sample.prepare(lambda w, x: w * x, normals(3), normals(3))
    with pytest.raises(TypeError, match="float tensor"):
        per_sample.prepare(lambda w, x: w.sum(), torch.ones(3, dtype=torch.int64), normals(3))


def test_it_is_the_loss_itself():
    case = mlp()
    loss = prepared(case.loss_fn, case.params, case.batch)
    assert isinstance(loss, Prepared)
    example = [x[0] for x in case.batch]
    assert torch.equal(loss(case.params, *example), case.loss_fn(case.params, *example))


def test_compiled_it_gives_what_the_loss_gives():
    case = tutorial_cnn()
    loss = prepared(case.loss_fn, case.params, case.batch)
    expected = quantities(case.loss_fn, case.params, case.batch)

    def all_of(params, batch, *more):
        return of(loss, params, batch, *more)

    more = arguments(case.params, case.batch)
    torch._dynamo.reset()  # shapes of another case would make these dynamic
    found = torch.compile(all_of, backend="aot_eager", fullgraph=True)(case.params, case.batch, *more)
    assert difference(found, expected) < EXACT


def test_the_compiler_sees_one_chunk_and_calls_it():
    case = mlp()
    loss = prepared(case.loss_fn, case.params, case.batch)
    x, y = normals(64, *case.batch[0].shape[1:]), case.batch[1].repeat(64)[:64]
    sizes = []

    def backend(graph, inputs):
        graphs = [graph, *[part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]]
        nodes = [node for part in dict.fromkeys(graphs) for node in part.graph.nodes]
        sizes.append((len(nodes), len([node for node in nodes if node.target is opaque.call])))
        return graph.forward

    expected = per_sample.clipped_sum(case.loss_fn, case.params, x, y, max_norm=1.0).grads
    for chunk_size in (4, 16):

        def fn(p, *b, size=chunk_size):
            return per_sample.clipped_sum(loss, p, *b, max_norm=1.0, chunk_size=size).grads

        torch._dynamo.reset()
        found = torch.compile(fn, backend=backend, fullgraph=True)(case.params, x, y)
        assert difference(found, expected) < EXACT
    assert sizes[0] == sizes[1]
    assert sizes[0][1] == 1


def test_what_is_made_of_factors_runs_as_soon_as_it_can():
    def loss_fn(p, x):
        for w in p:
            x = torch.tanh(x @ w)
        return x.sum()

    params, x = [normals(4, 4, seed=i) for i in range(6)], normals(3, 5, 4, seed=9)
    loss = per_sample.prepare(loss_fn, params, x[0])
    for _ in range(2):
        per_sample.norms(loss, params, x)
    (entry,) = recorded(loss)
    nodes = list(entry.program.graph.nodes)
    backward = max(i for i, node in enumerate(nodes) if "tanh_backward" in str(node.target))
    squared = [i for i, node in enumerate(nodes) if "pow" in str(node.target) or "square" in str(node.target)]
    assert sum(i < backward for i in squared) >= 4  # of six parameters
    assert torch.equal(F.relu(per_sample.norms(loss, params, x)), per_sample.norms(loss_fn, params, x))
