"""Quantities of the summed gradients of groups, against sums of dense gradients, in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, vmap
from zoo import (
    CASES,
    EXACT,
    B,
    D,
    combine,
    dense,
    difference,
    joint,
    linear,
    mlp,
    normals,
    of_model,
    sequence_linear,
    tied_linear_and_embedding,
    tutorial_cnn,
)

from functorch_mnist import losses, per_sample, privacy, tree
from functorch_mnist.per_sample import groups, together
from functorch_mnist.per_sample.algebra import Factored
from functorch_mnist.per_sample.groups import checked, firsts, leads, summed

IDS = {
    "ragged, of any size": [48213, -7, 48213, 48213],
    "all one": [5, 5, 5, 5],
    "each its own": [3, 1, 2**62, -(2**63)],
    "pairs": [1, 0, 1, 0],
}
MASK = torch.tensor([True, False, True, True])


def of_groups(rows, group, mask=None):
    """The leaves (B, *w) of the groups' sums, by a loop in Python, and which rows stand for their groups."""
    keep = [True] * len(group) if mask is None else mask.tolist()
    ids = [("masked", i) if not keep[i] else int(k) for i, k in enumerate(group)]
    sums = [tree.map(lambda g, k=k: sum(g[j] for j in range(len(ids)) if ids[j] == k), rows) for k in ids]
    return tree.map(lambda *gs: torch.stack(gs), *sums), torch.tensor([ids.index(k) == i for i, k in enumerate(ids)])


def lengths(rows):
    return torch.cat([g.reshape(len(g), -1) for g in tree.leaves(rows)], 1).norm(dim=1)


def quantities(loss_fn, params, batch, group, **options):
    """Every public quantity that takes groups."""
    direction = tree.map(lambda w: normals(*w.shape, seed=8), params)
    options |= {"group": group}
    clipped = per_sample.clipped_sum(loss_fn, params, *batch, max_norm=0.7, **options)
    by_rule = per_sample.clipped_sum(loss_fn, params, *batch, max_norm=lambda n: 1 / (1 + n), **options)
    summed_up = per_sample.grad_and_norms(loss_fn, params, *batch, **options)
    along = per_sample.grad_and_dot(loss_fn, params, *batch, direction=direction, **options)
    ungrouped = {key: value for key, value in options.items() if key != "plan"}
    return {
        "grads": per_sample.grads(loss_fn, params, *batch, **ungrouped),
        "norms": per_sample.norms(loss_fn, params, *batch, **options),
        "leaf_norms": per_sample.leaf_norms(loss_fn, params, *batch, **options),
        "clipped_sum": clipped.grads,
        "norms before clipping": clipped.norms,
        "clipped by a rule": by_rule.grads,
        "summed": summed_up.grads,
        "norms beside the sum": summed_up.norms,
        "sum beside the products": along.grads,
        "products beside the sum": along.products,
        "dot": per_sample.dot(loss_fn, params, *batch, direction=direction, **options),
        "gram": per_sample.gram(loss_fn, params, batch, **options),
        "second_moment": per_sample.second_moment(loss_fn, params, *batch, **options),
    }


def expected_quantities(loss_fn, params, batch, group, mask=None):
    """The same by their definitions."""
    rows = dense(loss_fn, params, batch, mask)
    sums, once = of_groups(rows, group, mask)
    flat = torch.cat([g.reshape(len(group), -1) for g in tree.leaves(sums)], 1)
    norms, once = flat.norm(dim=1), once.to(D)
    direction = tree.ravel(tree.map(lambda w: normals(*w.shape, seed=8), params))
    total = combine(torch.ones_like(norms), rows)
    return {
        "grads": sums,
        "norms": norms,
        "leaf_norms": tree.map(lambda g: g.reshape(len(g), -1).norm(dim=1), sums),
        "clipped_sum": combine(once * (0.7 / norms).clamp(max=1).nan_to_num(), sums),
        "norms before clipping": norms,
        "clipped by a rule": combine(once / (1 + norms), sums),
        "summed": total,
        "norms beside the sum": norms,
        "sum beside the products": total,
        "products beside the sum": flat @ direction,
        "dot": flat @ direction,
        "gram": flat @ flat.T,
        "second_moment": combine(once, tree.map(torch.square, sums)),
    }


def assert_exact(case, group, mask=None, **options):
    group = torch.as_tensor(group)
    options |= {} if mask is None else {"mask": mask}
    found = quantities(case.loss_fn, case.params, case.batch, group, **options)
    expected = expected_quantities(case.loss_fn, case.params, case.batch, group, mask)
    for name in expected:
        assert difference(found[name], expected[name]) <= EXACT, name


@pytest.mark.parametrize("ids", [IDS["ragged, of any size"], IDS["all one"]], ids=["ragged", "one"])
@pytest.mark.parametrize("name", CASES)
def test_every_quantity_of_groups_equals_its_dense_definition(name, ids):
    assert_exact(CASES[name](), ids)


@pytest.mark.parametrize("name", ["tutorial_cnn", "tied_linear_and_embedding", "computed_weights", "norms_net"])
def test_a_masked_example_is_of_no_group_and_chunks_change_nothing(name):
    case = CASES[name]()
    poisoned = tuple(
        rows.index_fill(0, torch.tensor([1]), torch.nan) if rows.is_floating_point() else rows for rows in case.batch
    )
    group = torch.tensor([4, 4, -9, 4])
    expected = expected_quantities(case.loss_fn, case.params, case.batch, group, MASK)
    for options in ({}, {"chunk_size": 3}, {"chunk_size": 2, "group": torch.tensor([4, 4, -9, -9])}):
        ids = options.pop("group", group)
        if ids is not group:
            expected = expected_quantities(case.loss_fn, case.params, case.batch, ids, MASK)
        found = quantities(case.loss_fn, case.params, poisoned, ids, mask=MASK, **options)
        for quantity in expected:
            assert difference(found[quantity], expected[quantity]) <= EXACT, (quantity, options)


@pytest.mark.parametrize("way", ["gram", "build", "dense"])
@pytest.mark.parametrize("name", ["tutorial_cnn", "sequence_linear", "tied_linear_and_embedding", "products"])
def test_every_way_gives_the_same(name, way):
    case = CASES[name]()
    plan = per_sample.plan(case.loss_fn, case.params, *[rows[0] for rows in case.batch], batch_size=B)
    for row in plan.rows:
        if way in row.costs:
            plan = plan.override(row.path, way)
    assert_exact(case, IDS["ragged, of any size"], plan=plan)


def many(rows):
    params = {"w": normals(3, 5, seed=1), "k": normals(5, 5, 2, seed=2), "b": normals(3, seed=3)}
    return of_model(
        lambda p, x: F.linear(F.conv1d(x, p["k"], padding=1).sin().mean(1), p["w"], p["b"]), params, normals(rows, 5, 4)
    )


@settings(max_examples=20)
@given(data=st.data())
def test_ragged_ids_masks_and_chunks_are_exact(data):
    count = data.draw(st.integers(1, 9))
    ids = st.one_of(st.integers(0, 2), st.sampled_from([-(2**63), 2**63 - 1, 48213]))
    group = data.draw(st.lists(ids, min_size=count, max_size=count))
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    largest = max([sum(bool(m) and k == j for k, m in zip(group, mask, strict=True)) for j in group])
    chunk_size = data.draw(st.integers(max(largest, 1), count))
    assert_exact(many(count), group, mask, chunk_size=chunk_size)


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
def test_rows_stand_for_the_first_of_their_group_and_masked_ones_for_themselves(ids):
    group = torch.tensor(ids)
    for mask in (None, MASK, torch.zeros(B, dtype=torch.bool)):
        found = firsts(group, mask)
        keep = [True] * B if mask is None else mask.tolist()
        for i in range(B):
            own = [j for j in range(B) if keep[j] and ids[j] == ids[i]] if keep[i] else [i]
            assert found[i] == own[0]
        _, once = of_groups({"": torch.zeros(B, 1)}, group, mask)
        assert torch.equal(leads(found), once)
        assert torch.equal(firsts(found, mask), found)
    assert torch.equal(firsts(group.new_empty(0)), group.new_empty(0))
    narrow = torch.tensor([255, 0, 255], dtype=torch.uint8)
    assert firsts(narrow).tolist() == [0, 1, 0]


def test_a_sum_over_groups_keeps_what_is_not_finite_to_its_group():
    first = firsts(torch.tensor([0, 1, 0, 1]))
    found = summed(first, torch.tensor([1.0, math.nan, 2.0, 3.0]))
    assert found[0] == found[2] == 3 and found[1::2].isnan().all()


@pytest.mark.parametrize("make", [tutorial_cnn, mlp, sequence_linear, tied_linear_and_embedding])
def test_groups_of_one_are_examples(make):
    case = make()
    group = torch.tensor([9, -1, 4, 2**40])
    found = quantities(case.loss_fn, case.params, case.batch, group)
    options = {"max_norm": 0.7}
    assert difference(found["norms"], per_sample.norms(case.loss_fn, case.params, *case.batch)) <= 1e-14
    clipped = per_sample.clipped_sum(case.loss_fn, case.params, *case.batch, **options)
    assert difference(found["clipped_sum"], clipped.grads) <= 1e-14
    factored = per_sample.factored(case.loss_fn, case.params, *case.batch)
    assert difference(factored.leaf_bounds(group), factored.leaf_bounds()) <= 1e-14


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("make", [tutorial_cnn, mlp, CASES["regularised"]], ids=["cnn", "mlp", "regularised"])
def test_a_group_that_is_not_finite_is_left_out_whole_and_counted_once(make, bad, chunk_size):
    case = make()
    group = torch.tensor([1, 2, 1, 1])
    poisoned = (case.batch[0].index_fill(0, torch.tensor([2]), bad), case.batch[1])
    only = torch.tensor([False, True, False, False])
    expected = expected_quantities(case.loss_fn, case.params, case.batch, group, only)
    found = per_sample.clipped_sum(
        case.loss_fn, case.params, *poisoned, max_norm=0.7, group=group, chunk_size=chunk_size
    )
    assert difference(found.grads, expected["clipped_sum"]) <= EXACT
    assert found.nonfinite == 1
    assert found.norms.isfinite().tolist() == [False, True, False, False]
    sums = privacy.clipped_sums(case.loss_fn, case.params, *poisoned, clipping=privacy.Flat(0.7), group=group)
    assert difference(sums.grads, expected["clipped_sum"]) <= EXACT
    assert {name: int(sums.seen[name]) for name in ("count", "nonfinite")} == {"count": 2, "nonfinite": 1}


@pytest.mark.parametrize("count", [0, 1])
def test_an_empty_batch_and_one_example_work(count):
    case = tutorial_cnn()
    batch, group = tuple(rows[:count] for rows in case.batch), torch.full((count,), -3)
    found = quantities(case.loss_fn, case.params, batch, group)
    assert found["norms"].shape == found["dot"].shape == (count,) and found["gram"].shape == (count, count)
    sums = privacy.clipped_sums(case.loss_fn, case.params, *batch, clipping=privacy.Flat(1.0), group=group)
    assert sums.seen["count"] == count
    expected = per_sample.clipped_sum(case.loss_fn, case.params, *batch, max_norm=0.7).grads
    assert difference(found["clipped_sum"], expected) <= EXACT


def test_gram_of_two_batches_takes_groups_of_both():
    case = sequence_linear()
    a, b = (tuple(rows[part] for rows in case.batch) for part in (slice(0, 3), slice(1, 4)))
    flat = torch.cat([g.flatten(1) for g in dense(case.loss_fn, case.params, case.batch).values()], 1)
    same_a, same_b = (torch.tensor(ids)[:, None] == torch.tensor(ids) for ids in ([1, 2, 1], [7, 7, 1]))
    products = flat[:3] @ flat[1:].T
    of_a, of_b = torch.tensor([1, 2, 1]), torch.tensor([7, 7, 1])
    for chunk_size in (None, 2):
        options = {"chunk_size": chunk_size}
        found = per_sample.gram(case.loss_fn, case.params, a, b, group=of_a, group_b=of_b, **options)
        assert difference(found, same_a.to(D) @ products @ same_b.to(D)) <= EXACT
        found = per_sample.gram(case.loss_fn, case.params, a, b, group_b=of_b, **options)
        assert difference(found, products @ same_b.to(D)) <= EXACT
    with pytest.raises(ValueError, match="belong to batch_b"):
        per_sample.gram(case.loss_fn, case.params, a, group_b=of_b)


def test_what_are_no_groups_is_refused():
    case = linear()
    for group, kind, words in (
        (torch.zeros(B), TypeError, "integers"),
        (torch.zeros(B, dtype=torch.bool), TypeError, "integers"),
        ([0] * B, TypeError, "Found list"),
        (torch.zeros(B - 1, dtype=torch.int64), ValueError, r"must be \(4,\)"),
    ):
        for quantity in (per_sample.norms, per_sample.grads, per_sample.second_moment):
            with pytest.raises(kind, match=words):
                quantity(case.loss_fn, case.params, *case.batch, group=group)
        with pytest.raises(kind, match=words):
            privacy.clipped_sums(case.loss_fn, case.params, *case.batch, clipping=privacy.Flat(1.0), group=group)
    with pytest.raises(ValueError, match="a group of 3 rows, chunk_size 2"):
        per_sample.norms(case.loss_fn, case.params, *case.batch, group=torch.tensor([1, 1, 0, 1]), chunk_size=2)


# Float32


def opposite(rows=32, size=64):
    """Pairs of examples whose gradients nearly cancel."""
    x = normals(rows, size).float()
    x[1::2] = -x[::2] * (1 + 1e-5 * torch.rand(rows // 2, 1))
    return x, torch.arange(rows) // 2


def test_norms_of_groups_that_cancel_are_those_of_their_sums():
    x, group = opposite()
    params = {"w": normals(48, 64, seed=3).float()}

    def loss_fn(p, x):
        return F.linear(x, p["w"]).sin().sum()

    wide = dense(loss_fn, tree.map(torch.Tensor.double, params), (x.double(),))
    exact = lengths(of_groups(wide, group)[0])
    found = per_sample.norms(loss_fn, params, x, group=group)
    alone = per_sample.norms(loss_fn, params, x)
    assert (exact < 1e-3 * alone).all()
    assert ((found - exact).abs() <= 1e-5 * alone).all()


@pytest.mark.parametrize("scale", [1e-18, 1e-6, 1.0, 1e12])
def test_a_clipped_group_is_no_longer_than_its_clipping_norm(scale):
    """However much of it cancels, and whatever the size of its numbers."""
    x, group = opposite()
    params, limit = {"w": torch.zeros(48, 64)}, 1e-3 * scale
    rows = normals(len(x), 48, seed=5).float()
    rows[1::2] = rows[::2]

    def loss_fn(p, x, c):
        return F.linear(x, p["w"]) @ c

    for i in range(0, len(x), 2):
        pair = x[i : i + 2] * scale, rows[i : i + 2]
        sums = privacy.clipped_sums(loss_fn, params, *pair, clipping=privacy.Flat(limit), group=group[i : i + 2])
        assert tree.norm(sums.grads) <= limit
    every = x * scale, rows
    sums = privacy.clipped_sums(loss_fn, params, *every, clipping=privacy.Flat(limit), group=group)
    assert sums.seen["count"] == 16


def test_norms_of_groups_are_right_where_float32_has_no_squares():
    params = {"w": torch.zeros(4, 5), "k": torch.zeros(3, 2, 2)}
    x = normals(6, 2, 5).float()
    group = torch.tensor([1, 1, 2, 2, 2, 3])

    def loss_fn(p, x, c):
        return c * (F.linear(x, p["w"]).sum() + F.conv1d(x, p["k"]).sum())

    exact = lengths(of_groups(dense(loss_fn, params, (x, torch.ones(6))), group)[0])
    for scale in (1e-25, 1e-12, 1.0, 1e15):
        found = per_sample.norms(loss_fn, params, x, torch.full((6,), scale), group=group)
        torch.testing.assert_close(found / scale, exact, rtol=1e-5, atol=0)


def test_bounds_of_groups_are_no_smaller_than_norms():
    for make in (tutorial_cnn, tied_linear_and_embedding, sequence_linear):
        case = make()
        found, group = per_sample.factored(case.loss_fn, case.params, *case.batch), torch.tensor([1, 1, 2, 1])
        bounds, norms = tree.leaves(found.leaf_bounds(group)), tree.leaves(found.leaf_norms(group))
        assert all((a >= b).all() for a, b in zip(bounds, norms, strict=True))
        assert difference(bounds, norms) < 1e-10


def test_lower_precision_is_summed_in_float32():
    x, params = normals(B, 3, 6).to(torch.bfloat16), {"w": normals(5, 6, seed=1).to(torch.bfloat16)}
    group = torch.tensor([1, 1, 2, 1])

    def loss_fn(p, x):
        return F.linear(x, p["w"]).sin().sum()

    rows = tree.map(torch.Tensor.float, dense(loss_fn, params, (x,)))
    found = per_sample.norms(loss_fn, params, x, group=group)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, lengths(of_groups(rows, group)[0]), rtol=2e-2, atol=0)


# A large vocabulary


@pytest.mark.parametrize("tied", [True, False])
def test_groups_of_a_vocabulary_head_are_exact(tied):
    params = {"table": normals(11, 6, seed=1), "w": normals(6, 6, seed=2), "bias": normals(11, seed=3)}
    params |= {} if tied else {"head": normals(11, 6, seed=4)}

    def loss_fn(p, tokens, y):
        h = torch.tanh(F.linear(F.embedding(tokens, p["table"]), p["w"]))
        weight = p["table" if tied else "head"]
        return losses.chunked_cross_entropy(h, weight, y, bias=p["bias"], block_size=4).sum()

    tokens = (torch.arange(B * 3).view(B, 3) * 7) % 11
    batch = tokens, (tokens + 3) % 11
    for ids in IDS.values():
        group = torch.tensor(ids)
        expected = expected_quantities(loss_fn, params, batch, group)
        found = quantities(loss_fn, params, batch, group)
        for name in expected:
            assert difference(found[name], expected[name]) <= EXACT, name


# Transforms, compilers, prepared losses


@pytest.mark.parametrize("path", ["operator", "pairs"])
@pytest.mark.parametrize("name", CASES)
def test_a_program_that_may_not_look_at_sizes_gives_the_same(name, path, monkeypatch):
    case = CASES[name]()
    group = torch.tensor(IDS["ragged, of any size"])
    found = per_sample.factored(case.loss_fn, case.params, *case.batch)
    expected = found.leaf_norms(group), found.second_moment(group), found.leaf_bounds(group)
    monkeypatch.setattr(groups, "may_look", lambda first: False)
    if path == "pairs":
        monkeypatch.setattr(together, "_called", lambda *given: None)
    for factored in (found, found.built()):
        again = factored.leaf_norms(group), factored.second_moment(group), factored.leaf_bounds(group)
        assert difference(again, expected) <= EXACT


def test_pairs_are_right_where_float32_has_no_squares(monkeypatch):
    monkeypatch.setattr(groups, "may_look", lambda first: False)
    monkeypatch.setattr(together, "_called", lambda *given: None)
    test_norms_of_groups_are_right_where_float32_has_no_squares()


def test_the_gradient_of_the_norms_of_groups_is_that_of_their_definition():
    case = sequence_linear()
    group = torch.tensor(IDS["ragged, of any size"])

    def penalty(params, batch=case.batch):
        return per_sample.norms(case.loss_fn, params, *batch, group=group).square().sum()

    def by_definition(params):
        rows = vmap(grad(case.loss_fn), (None, 0, 0))(params, *case.batch)
        return sum([summed(firsts(group), g).square().sum() for g in tree.leaves(rows)])

    expected = grad(by_definition)(case.params)
    assert difference(grad(penalty)(case.params), expected) <= EXACT
    torch._dynamo.reset()
    compiled = torch.compile(grad(penalty), fullgraph=True, dynamic=False, backend="eager")
    assert difference(compiled(case.params), expected) <= EXACT


@pytest.mark.parametrize(("dtype", "bound"), [(D, EXACT), (torch.float32, 1e-5)])
def test_norms_of_groups_under_vmap(dtype, bound):
    case = mlp()
    group = torch.tensor(IDS["ragged, of any size"])
    params, (x, y) = tree.map(lambda w: w.to(dtype), case.params), case.batch
    batch = x.to(dtype), y
    ensemble = [tree.map(lambda w, s=s: w * s, params) for s in (1.0, 0.5)]
    stacked = tree.map(lambda *leaves: torch.stack(leaves), *ensemble)
    found = vmap(lambda params: per_sample.norms(case.loss_fn, params, *batch, group=group))(stacked)
    expected = torch.stack([per_sample.norms(case.loss_fn, p, *batch, group=group) for p in ensemble])
    assert difference(found, expected) <= bound
    users = torch.tensor([[1, 1, 2, 2], [1, 2, 3, 1]])
    found = vmap(lambda ids: per_sample.norms(case.loss_fn, params, *batch, group=ids))(users)
    expected = torch.stack([per_sample.norms(case.loss_fn, params, *batch, group=ids) for ids in users])
    assert difference(found, expected) <= bound


COMPILED = {
    "leaf_norms": lambda f, p, m, g, *b: per_sample.leaf_norms(f, p, *b, mask=m, group=g),
    "grads": lambda f, p, m, g, *b: per_sample.grads(f, p, *b, mask=m, group=g, chunk_size=3),
    "clipped_sum": lambda f, p, m, g, *b: per_sample.clipped_sum(f, p, *b, max_norm=0.7, mask=m, group=g),
    "clipped_sums": lambda f, p, m, g, *b: privacy.clipped_sums(
        f, p, *b, clipping=privacy.Quantile(0.5, 1.0), mask=m, group=g
    ),
    "grad_and_norms": lambda f, p, m, g, *b: per_sample.grad_and_norms(f, p, *b, mask=m, group=g),
    "grad_and_dot": lambda f, p, m, g, *b: per_sample.grad_and_dot(
        f, p, *b, direction=p, mask=m, group=g, chunk_size=3
    ),
    "dot": lambda f, p, m, g, *b: per_sample.dot(f, p, *b, direction=p, mask=m, group=g, chunk_size=3),
    "gram": lambda f, p, m, g, *b: per_sample.gram(f, p, b, mask=m, group=g),
    "second_moment": lambda f, p, m, g, *b: per_sample.second_moment(f, p, *b, mask=m, group=g),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_equals_eager_as_one_graph_without_recompilation(name):
    case = many(B) if name == "clipped_sum" else linear()
    torch._dynamo.reset()
    calls = CompileCounterWithBackend("inductor" if name == "clipped_sums" else "aot_eager")
    compiled = torch.compile(
        lambda p, *given: COMPILED[name](case.loss_fn, p, *given), fullgraph=True, dynamic=False, backend=calls
    )
    for ids in IDS.values():  # of other sizes
        given = case.params, MASK, torch.tensor(ids), *case.batch
        assert difference(compiled(*given), COMPILED[name](case.loss_fn, *given)) <= EXACT
    assert calls.frame_count == 1


def test_compiled_norms_of_groups_equal_eager():
    case = joint(["tied_linear_and_embedding", "transformed_first"])
    torch._dynamo.reset()
    group = torch.tensor(IDS["ragged, of any size"])
    compiled = torch.compile(
        lambda p, g, *b: per_sample.norms(case.loss_fn, p, *b, group=g), fullgraph=True, dynamic=False, backend="eager"
    )
    expected = per_sample.norms(case.loss_fn, case.params, *case.batch, group=group)
    assert difference(compiled(case.params, group, *case.batch), expected) <= EXACT


def test_compiled_chunks_of_groups_are_refused():
    case = linear()
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda g: per_sample.norms(case.loss_fn, case.params, *case.batch, group=g, chunk_size=2), backend="eager"
    )
    with pytest.raises(ValueError, match="Leave chunk_size out"):
        compiled(torch.tensor([1, 1, 2, 2]))


@pytest.mark.parametrize("make", [lambda: many(B), tied_linear_and_embedding, CASES["computed_weights"]])
def test_a_prepared_loss_gives_what_the_loss_gives(make):
    case = make()
    loss = per_sample.prepare(case.loss_fn, case.params, *[rows[0] for rows in case.batch])
    for ids in IDS.values():  # found out, recorded, run, run
        group = torch.tensor(ids)
        expected = quantities(case.loss_fn, case.params, case.batch, group)
        found = quantities(loss, case.params, case.batch, group)
        for name in expected:
            assert difference(found[name], expected[name]) <= EXACT, name
    for ids in IDS.values():
        group = torch.tensor(ids)
        for options in ({}, {"mask": MASK}, {"chunk_size": 4}):
            found = per_sample.clipped_sum(loss, case.params, *case.batch, max_norm=0.7, group=group, **options)
            other = per_sample.clipped_sum(case.loss_fn, case.params, *case.batch, max_norm=0.7, group=group, **options)
            assert difference(found, other) <= EXACT


@pytest.mark.parametrize("make", [lambda: many(B), tied_linear_and_embedding])
def test_a_compiled_prepared_loss_gives_what_the_loss_gives(make):
    case = make()
    loss = per_sample.prepare(case.loss_fn, case.params, *[rows[0] for rows in case.batch])
    for ids in IDS.values():  # recorded
        per_sample.norms(loss, case.params, *case.batch, group=torch.tensor(ids))
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda g: per_sample.clipped_sum(loss, case.params, *case.batch, max_norm=0.7, group=g),
        fullgraph=True, backend="aot_eager",
    )  # fmt: skip
    for ids in IDS.values():
        group = torch.tensor(ids)
        expected = per_sample.clipped_sum(case.loss_fn, case.params, *case.batch, max_norm=0.7, group=group)
        assert difference(compiled(group), expected) <= EXACT


def test_a_recorded_pass_with_groups_runs_its_ops_alone():
    case = mlp()
    loss = per_sample.prepare(case.loss_fn, case.params, *[rows[0] for rows in case.batch])
    for ids in IDS.values():
        per_sample.norms(loss, case.params, *case.batch, group=torch.tensor(ids))
    assert "ops" in str(loss) and "hangs on" not in str(loss)


# Privacy


RULES = [
    privacy.Flat(0.5),
    privacy.Automatic(0.5),
    privacy.Global(0.8),
    privacy.PerLayer(0.5),
    privacy.PerGroup({"": 0.5}),
    privacy.Quantile(0.5, 1.0, initial_norm=0.6),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_a_rule_clips_groups_as_it_clips_examples(rule):
    """A group's sum is the gradient of one example whose loss is the sum of the group's."""
    case = mlp()
    group = torch.tensor([3, 8, 3, 3])
    mask = torch.tensor([True, True, False, True])
    kept = {3: [0, 3], 8: [1]}
    rows = dense(case.loss_fn, case.params, case.batch)
    leaves = [tree.map(lambda g, at=at: g[at].sum(0), rows) for at in kept.values()]
    sums = tree.map(lambda *gs: torch.stack(gs), *leaves)

    def loss_fn(p, *gradient):
        return sum([(w * g).sum() for w, g in zip(tree.leaves(p), gradient, strict=True)])

    expected = privacy.clipped_sums(loss_fn, case.params, *tree.leaves(sums), clipping=rule, clipping_state=rule.init())
    found = privacy.clipped_sums(
        case.loss_fn, case.params, *case.batch, clipping=rule, clipping_state=rule.init(), mask=mask, group=group
    )
    assert difference(found.grads, expected.grads) <= EXACT
    assert torch.equal(found.votes, expected.votes)
    for name in ("count", "clipped", "nonfinite"):
        assert found.seen[name] == expected.seen[name], name


def test_a_group_with_a_loss_that_is_not_finite_moves_nothing():
    x, c = normals(3, 2), torch.tensor([0.0, math.inf, 0.0], dtype=D)
    sums = privacy.clipped_sums(
        lambda w, x, c: w @ x + c, torch.zeros(2, dtype=D), x, c, clipping=privacy.Flat(10.0),
        group=torch.tensor([1, 1, 2]),
    )  # fmt: skip
    assert difference(sums.grads, x[2]) <= EXACT
    assert sums.seen["nonfinite"] == 1 and sums.seen["count"] == 2 and sums.seen["loss"] == 0


def test_one_group_moves_the_sums_by_no_more_than_the_sensitivity():
    case = mlp()
    rule, group = privacy.Quantile(0.5, 1.0, initial_norm=0.6), torch.tensor([1, 1, 2, 2])

    def sums(mask):
        return privacy.clipped_sums(
            case.loss_fn, case.params, *case.batch, clipping=rule, clipping_state=rule.init(), mask=mask, group=group
        )

    whole, less = sums(torch.ones(B, dtype=torch.bool)), sums(group == 2)
    assert tree.norm(tree.map(torch.sub, whole.grads, less.grads)) <= rule.sensitivity(rule.init()).double()
    assert (whole.votes - less.votes).norm() <= 0.5


def test_a_factored_without_parameters_has_norms_of_groups():
    empty = Factored(torch.zeros(3), (), {})
    assert torch.equal(empty.norms(torch.tensor([1, 1, 2])), torch.zeros(3))
    assert checked("here", torch.tensor([5, 5]), None, 2).tolist() == [0, 0]
