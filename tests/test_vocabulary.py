"""The cross-entropy of a large vocabulary in blocks of words, against the plain one on all logits, in float64."""

import pytest
import torch
import torch.nn.functional as F
from test_per_sample import expected_quantities, quantities, ways
from torch.autograd import gradcheck
from torch.func import grad, jacrev, jvp, vmap
from zoo import EXACT, B, D, difference, normals

from benchmarks import measure, peak
from functorch_mnist import losses, per_sample, tree
from functorch_mnist.losses import vocabulary as blocks
from functorch_mnist.per_sample.forms import Cost, Sizes
from functorch_mnist.per_sample.vocabulary import Vocabulary, VocabularyForm
from functorch_mnist.train import compiled

T, H, V = 5, 4, 11
HIDDEN, WEIGHT, BIAS = normals(B, T, H), normals(V, H, seed=1), normals(V, seed=2)
LABELS = torch.arange(B * T).view(B, T) * 7 % V
MB = 10**6


def chunked(weight, bias, hidden, labels, block_size=4):
    return losses.chunked_cross_entropy(hidden, weight, labels, bias=bias, block_size=block_size)


def plain(weight, bias, hidden, labels):
    return losses.cross_entropy(F.linear(hidden, weight, bias), labels)


def by_all(fn):
    """The gradient of a sum that is no plain one, by the weight, the bias and the hidden states."""
    return grad(lambda *args: fn(*args).square().sum(), argnums=(0, 1, 2))


def backward(fn):
    def run(weight, bias, hidden, labels):
        leaves = [x.clone().requires_grad_() for x in (weight, bias, hidden)]
        fn(*leaves, labels).square().sum().backward()
        return tuple(x.grad for x in leaves)

    return run


def twice(fn):
    """A gradient of a function of the gradient."""

    def first(*args):
        return sum([(g * g.detach().cos()).sum() for g in by_all(fn)(*args)])

    return grad(first, argnums=(0, 1, 2))


SHARED = (None, None, 0, 0)
TRANSFORMED = {
    "value": lambda fn: fn,
    "backward": backward,
    "grad": by_all,
    "vmap": lambda fn: vmap(fn, SHARED),
    "vmap of grad": lambda fn: vmap(by_all(fn), SHARED),
    "grad of vmap": lambda fn: by_all(vmap(fn, SHARED)),
    "grad of vmap over copies": lambda fn: (
        lambda w, b, h, y: by_all(vmap(fn))(w.expand(B, *w.shape), b.expand(B, *b.shape), h, y)
    ),
    "vmap over weights": lambda fn: (
        lambda w, b, h, y: vmap(by_all(fn), (0, None, None, None))(torch.stack([w, 2 * w]), b, h, y)
    ),
    "vmap over biases": lambda fn: (
        lambda w, b, h, y: by_all(vmap(fn, (None, 0, None, None)))(w, torch.stack([b, 2 * b]), h, y)
    ),
    "vmap over labels": lambda fn: lambda w, b, h, y: vmap(by_all(fn), (None, None, None, 0))(w, b, h[0], y),
    "two vmaps": lambda fn: (
        lambda w, b, h, y: vmap(vmap(by_all(fn), (0, None, None, None)), SHARED)(torch.stack([w, 2 * w]), b, h, y)
    ),
    "two vmaps, weights without": lambda fn: (
        lambda w, b, h, y: vmap(vmap(by_all(fn), SHARED), (0, None, None, None))(torch.stack([w, 2 * w]), b, h, y)
    ),
    "grad of two vmaps": lambda fn: (
        lambda w, b, h, y: by_all(vmap(vmap(fn, (0, None, None, None)), SHARED))(torch.stack([w, 2 * w]), b, h, y)
    ),
    "grad of grad": twice,
    "grad of vmap of grad": lambda fn: (
        lambda *args: grad(
            lambda w: sum([(g * g.detach().cos()).sum() for g in vmap(by_all(fn), SHARED)(w, *args[1:])])
        )(args[0])
    ),
    "vmap of grad of grad": lambda fn: vmap(twice(fn), SHARED),
    "Hessian": lambda fn: lambda w, b, h, y: jacrev(jacrev(lambda h: fn(w, b, h, y[0]).square().sum()))(h[0]),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_losses_and_their_derivatives_equal_those_of_all_logits(name):
    args = WEIGHT, BIAS, HIDDEN, LABELS
    assert difference(TRANSFORMED[name](chunked)(*args), TRANSFORMED[name](plain)(*args)) <= EXACT


IN_GRAPHS = [
    "backward",
    "vmap",
    "vmap of grad",
    "grad of vmap",
    "grad of vmap over copies",
    "two vmaps",
    "grad of grad",
]


@pytest.mark.parametrize("name", IN_GRAPHS)
def test_a_graph_of_it_gives_the_same(name):
    args = WEIGHT, BIAS, HIDDEN, LABELS
    if name == "backward":
        fused = torch.compile(chunked, fullgraph=True, backend="aot_eager")
        found = backward(fused)(*args)
    else:
        found = torch.compile(TRANSFORMED[name](chunked), fullgraph=True, backend="aot_eager")(*args)
    assert difference(found, TRANSFORMED[name](plain)(*args)) <= EXACT


@pytest.mark.parametrize("block_size", [1, 3, 10, 11, 12, None])
def test_the_size_of_a_block_changes_nothing(block_size):
    def without_bias(weight, hidden, labels, fn):
        return fn(weight, None, hidden, labels).sin().sum()

    found = grad(without_bias, argnums=(0, 1))(WEIGHT, HIDDEN, LABELS, lambda *args: chunked(*args, block_size))
    assert difference(found, grad(without_bias, argnums=(0, 1))(WEIGHT, HIDDEN, LABELS, plain)) <= EXACT
    both = WEIGHT, BIAS, HIDDEN, LABELS
    assert difference(by_all(lambda *args: chunked(*args, block_size))(*both), by_all(plain)(*both)) <= EXACT


def test_third_derivatives_are_those_of_all_logits():
    def third(fn):
        def loss(t):
            return fn(WEIGHT * t, BIAS + t, HIDDEN + t * t, LABELS).square().mean()

        return grad(grad(grad(loss)))(torch.tensor(0.3, dtype=D))

    torch.testing.assert_close(third(chunked), third(plain), rtol=EXACT, atol=EXACT)


def test_first_and_second_derivatives_equal_finite_differences():
    leaves = [x.clone().requires_grad_() for x in (WEIGHT, BIAS, HIDDEN[0, :2])]
    assert gradcheck(lambda *args: chunked(*args, LABELS[0, :2]), leaves)
    assert torch.autograd.gradgradcheck(lambda *args: chunked(*args, LABELS[0, :2]), leaves)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_forward_mode_is_refused_and_never_wrong():
    with pytest.raises((RuntimeError, NotImplementedError), match="jvp"):
        jvp(lambda h: chunked(WEIGHT, BIAS, h, LABELS), (HIDDEN,), (HIDDEN,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_round_as_a_linear_layer_does_and_add_up_in_float32(dtype):
    weight, hidden = (3 * normals(300, 16, seed=3)).to(dtype), normals(7, 16, seed=4).to(dtype)
    labels, args = torch.arange(7) * 40, (None,)
    found = chunked(weight, *args, hidden, labels, 64)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain(weight, *args, hidden, labels), rtol=1e-6, atol=1e-5)

    def total(weight, hidden, fn):
        return fn(weight, None, hidden, labels).sum()

    slopes = grad(total, argnums=(0, 1))(weight, hidden, chunked)
    exact = grad(total, argnums=(0, 1))(weight.double(), hidden.double(), plain)
    rounded = grad(total, argnums=(0, 1))(weight, hidden, plain)
    for one, other, best in zip(slopes, rounded, exact, strict=True):
        assert one.dtype == dtype
        assert (one - best).abs().max() <= 1.5 * (other - best).abs().max() + 1e-3


def test_autocast_takes_it_as_a_linear_layer():
    weight, bias, hidden = WEIGHT.float(), BIAS.float(), HIDDEN.float()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (fn(weight, None, hidden, LABELS) for fn in (chunked, plain))
        slopes = by_all(chunked)(weight, bias, hidden, LABELS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert difference(slopes, by_all(plain)(weight, bias, hidden, LABELS)) < 0.05


def test_words_that_are_ruled_out_by_the_bias_add_nothing():
    bias = BIAS.index_fill(0, torch.tensor([4, 5, 6, 7, 9]), -torch.inf)  # the whole second block, too
    labels = torch.tensor([0, 3, 8, 10, 2])
    found = by_all(chunked)(WEIGHT, bias, HIDDEN[0], labels)
    assert difference(found, by_all(plain)(WEIGHT, bias, HIDDEN[0], labels)) <= EXACT
    assert not found[0][4:8].any()


def test_no_positions_and_no_axes_before_the_last():
    empty = torch.zeros(0, H, dtype=D), torch.zeros(0, dtype=torch.int64)
    assert chunked(WEIGHT, BIAS, *empty).shape == (0,)
    assert not grad(lambda w: chunked(w, BIAS, *empty).sum())(WEIGHT).any()
    one = chunked(WEIGHT, None, HIDDEN[0, 0], LABELS[0, 0])
    torch.testing.assert_close(one, plain(WEIGHT, None, HIDDEN[0, 0], LABELS[0, 0]))


WRONG = {
    "hidden must be (..., H) and weight (V, H). Found (4, 5, 4) and (4, 11).": {"weight": WEIGHT.T},
    "hidden must be (..., H) and weight (V, H). Found (4, 5, 4) and (4,).": {"weight": WEIGHT[0]},
    "bias must be (V,), (11,). Found (4,).": {"bias": BIAS[:4]},
    "hidden and weight must have one float type. Found torch.float64, torch.float32.": {"weight": WEIGHT.float()},
    "hidden (..., H) and labels (...) must share their leading axes. Found (4, 5, 4) and (5,).": {"labels": LABELS[0]},
    "labels must be in [0, 11). Found -100. Leave out such examples, or mask them.": {"labels": LABELS * 0 - 100},
    "labels must be in [0, 11). Found 11. Leave out such examples, or mask them.": {"labels": LABELS * 0 + 11},
    "block_size must be a whole number, at least 1. Found 0.": {"block_size": 0},
    "weight must be a float tensor. Found torch.int64.": {"weight": WEIGHT.long()},
    "hidden must be a float tensor. Found list.": {"hidden": [1.0]},
    "labels must be integers in [0, V). Found torch.float64.": {"labels": LABELS.double()},
}


@pytest.mark.parametrize("sentence", WRONG)
def test_what_does_not_fit_is_refused_in_one_sentence(sentence):
    given = {"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS, **WRONG[sentence]}
    with pytest.raises((TypeError, ValueError)) as refused:
        losses.chunked_cross_entropy(given.pop("hidden"), given.pop("weight"), given.pop("labels"), **given)
    assert str(refused.value) == f"chunked_cross_entropy: {sentence}"


def test_a_label_out_of_range_is_refused_beneath_transforms_and_compiled():
    def norms(params, hidden, labels):
        return per_sample.norms(of_layer("bias", chunked), params, hidden, labels)

    wrong = LABELS.clone()
    wrong[1, 2] = V
    with pytest.raises(ValueError, match=r"^chunked_cross_entropy: labels must be in \[0, 11\)\. Found 11"):
        norms(PARAMS, INPUTS, wrong)
    fused = torch.compile(norms, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(fused(PARAMS, INPUTS, LABELS), norms(PARAMS, INPUTS, LABELS))
    with pytest.raises(RuntimeError, match="labels must be in"):
        fused(PARAMS, INPUTS, wrong)


INPUTS = normals(B, T, 3, seed=9)
PARAMS = {
    "in": normals(H, 3, seed=1), "w": normals(V, H, seed=2), "b": normals(V, seed=3), "t": normals(H, V, seed=4),
    "l": normals(V, 2, seed=5), "r": normals(2, H, seed=6),
}  # fmt: skip
LAYERS = {
    "no bias": lambda f, p, h, x, y: f(p["w"], None, h, y),
    "bias": lambda f, p, h, x, y: f(p["w"], p["b"], h, y),
    "one position": lambda f, p, h, x, y: f(p["w"], p["b"], h[0], y[0]),
    "transposed": lambda f, p, h, x, y: f(p["t"].T, p["b"], h, y),
    "low rank": lambda f, p, h, x, y: f(p["l"] @ p["r"], p["b"], h, y),
    "some words": lambda f, p, h, x, y: f(p["w"][2:9], p["b"][2:9], h, y % 7),
    "twice": lambda f, p, h, x, y: torch.cat([f(p["w"], p["b"], h, y), f(p["w"], None, h.sin(), y)]),
    "tied": lambda f, p, h, x, y: f(p["w"], None, torch.tanh(F.embedding(y, p["w"])), y.flip(0)),
    "hidden states are parameters": lambda f, p, h, x, y: f(p["w"], p["b"], p["w"][:T], y),
    "a bias of each example": lambda f, p, h, x, y: f(p["w"], x.sum() * torch.arange(V), h, y),
    "a weight of each example": lambda f, p, h, x, y: f(p["w"] * x.sum(), p["b"], h, y),
}


def of_layer(name, fn):
    def loss_fn(params, x, labels):
        hidden = torch.tanh(F.linear(x, params["in"]))
        return LAYERS[name](fn, params, hidden, x, labels).square().sum()

    return loss_fn


@pytest.mark.parametrize("name", LAYERS)
def test_every_quantity_of_sample_gradients_equals_its_dense_definition(name):
    batch = INPUTS, LABELS
    expected = expected_quantities(of_layer(name, plain), PARAMS, batch)
    found = quantities(of_layer(name, chunked), PARAMS, batch)
    for quantity in expected:
        assert difference(found[quantity], expected[quantity]) <= EXACT, quantity


@pytest.mark.parametrize("name", LAYERS)
def test_masks_and_chunks_change_nothing_else(name):
    mask = torch.tensor([True, False, True, True])
    poisoned = INPUTS.index_fill(0, torch.tensor([1]), torch.nan), LABELS
    expected = expected_quantities(of_layer(name, plain), PARAMS, (INPUTS, LABELS), mask)
    for options in ({}, {"chunk_size": 3}):
        found = quantities(of_layer(name, chunked), PARAMS, poisoned, mask=mask, **options)
        for quantity in expected:
            assert difference(found[quantity], expected[quantity]) <= EXACT, (quantity, options)


@pytest.mark.parametrize("name", ["bias", "tied"])
def test_a_graph_of_the_quantities_gives_the_same(name):
    loss_fn, weights = of_layer(name, chunked), normals(B)

    def run(x, labels):
        found = per_sample.factored(loss_fn, PARAMS, x, labels)
        clipped = per_sample.clipped_sum(loss_fn, PARAMS, x, labels, max_norm=0.7)
        sums = found.weighted_sum(weights), found.second_moment(), found.grads(), clipped.grads
        return found.losses, found.norms(), found.leaf_bounds(), found.gram(found), found.dot(PARAMS), *sums

    fused = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert difference(fused(INPUTS, LABELS), run(INPUTS, LABELS)) <= EXACT


def test_a_compiled_clipped_sum_equals_the_eager_one():
    def run(x, labels):
        return per_sample.clipped_sum(of_layer("bias", chunked), PARAMS, x, labels, max_norm=0.7).grads

    assert difference(compiled(run)(INPUTS, LABELS), run(INPUTS, LABELS)) <= EXACT


@pytest.mark.parametrize("way", ["gram", "build", "dense"])
def test_every_way_gives_the_same(way):
    loss_fn, batch = of_layer("bias", chunked), (INPUTS, LABELS)
    plan = per_sample.plan(loss_fn, PARAMS, INPUTS[0], LABELS[0], batch_size=B).override("w", way).override("b", way)
    found = quantities(loss_fn, PARAMS, batch, plan=plan)
    for quantity, expected in expected_quantities(of_layer("bias", plain), PARAMS, batch).items():
        assert difference(found[quantity], expected) <= EXACT, quantity


@pytest.mark.parametrize("name", ["bias", "one position", "low rank", "some words"])
def test_quantities_are_differentiated_and_mapped_over_runs_as_those_of_all_logits(name):
    batch = INPUTS, LABELS

    def made(fn):
        loss_fn = of_layer(name, fn)

        def total(params):
            sums = per_sample.weighted_sum(loss_fn, params, *batch, weights=normals(B, seed=7))
            squares = per_sample.second_moment(loss_fn, params, *batch)
            return per_sample.norms(loss_fn, params, *batch).sum() + tree.dot(sums, PARAMS) + tree.dot(squares, PARAMS)

        runs = tree.map(lambda w: torch.stack([w, 2 * w]), PARAMS)
        return grad(total)(PARAMS), vmap(lambda params: per_sample.norms(loss_fn, params, *batch))(runs)

    assert difference(made(chunked), made(plain)) <= EXACT


def term(name="bias", leaf="w", rows=B):
    found = per_sample.factored(of_layer(name, chunked), PARAMS, INPUTS[:rows], LABELS[:rows])
    return found.terms[list(PARAMS).index(leaf)]


def all_columns(layer):
    """g (B, T, V) of the losses' squares."""

    def total(logits):
        return losses.cross_entropy(logits, LABELS).square().sum()

    return grad(total)(F.linear(torch.tanh(F.linear(INPUTS, PARAMS["in"])), *layer))


def test_columns_are_those_of_the_logits_cotangents():
    rows = torch.tensor([[0, 3, 3], [10, 1, 2], [4, 5, 6], [7, 8, 9]])
    expected = all_columns((PARAMS["w"], PARAMS["b"])).gather(2, rows[:, None].expand(B, T, 3))
    torch.testing.assert_close(term().cotangents(rows), expected, rtol=EXACT, atol=EXACT)
    own = per_sample.factored(of_layer("a bias of each example", chunked), PARAMS, INPUTS, LABELS).terms[1]
    shifts = INPUTS.sum((1, 2))[:, None, None] * torch.arange(V)
    hidden = torch.tanh(F.linear(INPUTS, PARAMS["in"]))
    logits = F.linear(hidden, PARAMS["w"]) + shifts
    expected = grad(lambda x: losses.cross_entropy(x, LABELS).square().sum())(logits)
    expected = expected.gather(2, rows[:, None].expand(B, T, 3))
    torch.testing.assert_close(own.cotangents(rows), expected, rtol=EXACT, atol=EXACT)
    keep = torch.tensor([True, False, True, True])
    assert not term().masked(keep).cotangents(rows)[1].any()


@pytest.mark.parametrize("leaf", ["w", "b"])
def test_the_reach_is_the_sum_of_norms_over_positions_and_projections_are_those_of_gradients(leaf):
    g, mine = all_columns((PARAMS["w"], PARAMS["b"])), term(leaf=leaf)
    hidden = torch.tanh(F.linear(INPUTS, PARAMS["in"]))
    sizes = hidden.norm(dim=-1) if leaf == "w" else 1
    torch.testing.assert_close(mine.reach(), (g.norm(dim=-1) * sizes).sum(1), rtol=EXACT, atol=EXACT)
    assert term("one position", leaf).reach() is None
    left, right = normals(2, V), normals(3, H if leaf == "w" else 1)
    expected = left @ mine.grads().reshape(B, V, -1) @ right.T
    torch.testing.assert_close(mine.project(left, right), expected, rtol=EXACT, atol=EXACT)
    assert mine.kronecker() is None


def test_inner_products_of_two_batches_are_taken_by_pairs_or_by_parts_of_gradients():
    for name in ("bias", "one position"):
        for rows in (1, 3):
            mine, other = term(name), term(name, rows=rows)
            for block in (1, 2, 4, 0):
                found = Vocabulary(**{**vars(mine), "block": block}).gram(other)
                expected = mine.grads().flatten(1) @ other.grads().flatten(1).T
                torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)


def test_an_example_that_diverges_adds_exactly_nothing():
    inputs = INPUTS.index_fill(0, torch.tensor([2]), torch.inf)
    params = {**PARAMS, "in": PARAMS["in"] * 1.0}

    def loss_fn(params, x, labels):
        return chunked(params["w"], params["b"], F.linear(x, params["in"]), labels).sum()

    found = per_sample.clipped_sum(loss_fn, params, inputs, LABELS, max_norm=0.5)
    keep = torch.tensor([True, True, False, True])
    expected = per_sample.clipped_sum(loss_fn, params, INPUTS[keep], LABELS[keep], max_norm=0.5)
    assert int(found.nonfinite) == 1
    assert difference(found.grads, expected.grads) <= EXACT
    infinite = per_sample.clipped_sum(loss_fn, {**params, "w": params["w"] * torch.inf}, INPUTS, LABELS, max_norm=0.5)
    assert int(infinite.nonfinite) == B
    assert not any([bool(g.any()) for g in tree.leaves(infinite.grads)])


def test_the_plan_knows_what_the_layer_costs():
    form = VocabularyForm((V, H), True, False, 4, D)
    assert form.sizes(None, torch.Size((T,))) == Sizes(1, T, H, V)
    assert form.costs(Sizes(1, T, H, V)) == {
        "gram": Cost(2 * T * T, 2 * T * T * (H + V)),
        "build": Cost(16 * H, 2 * T * V * H),
    }
    assert form.costs(Sizes(1, 1, H, V))["outer product"] == Cost(0, 2 * (H + V))
    found = ways(of_layer("bias", chunked), PARAMS, (INPUTS, LABELS))
    assert (found["w"], found["b"]) == ("gram", "build")  # (T, T) is less than the factors, T (H + 1)
    found = ways(of_layer("one position", chunked), PARAMS, (INPUTS, LABELS))
    assert (found["w"], found["b"]) == ("outer product", "outer product")


def test_narrow_terms_keep_the_products_of_the_pass_when_they_are_made_wide():
    params = {"w": (3 * normals(V, H, seed=2)).bfloat16()}
    hidden = normals(B, T, H).bfloat16()

    def loss_fn(params, hidden, labels):
        return chunked(params["w"], None, hidden, labels).sum()

    found = per_sample.factored(loss_fn, params, hidden, LABELS).wide()
    logits = F.linear(hidden, params["w"]).float()
    g = logits.softmax(-1) - F.one_hot(LABELS, V)
    expected = torch.einsum("btv,bth->bvh", g, hidden.float())
    torch.testing.assert_close(found.terms[0].grads(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.norms(), expected.flatten(1).norm(dim=1), rtol=1e-4, atol=1e-4)
    total = found.terms[0].weighted_sum(torch.ones(B))
    torch.testing.assert_close(total, expected.sum(0), rtol=1e-4, atol=1e-4)


def test_by_default_a_block_has_the_words_that_make_two_million_logits():
    assert blocks.spans(2**11, 50257, 0, "cpu")[:2] == [(0, 1024), (1024, 2048)]
    assert blocks.spans(2**11, 50257, 0, "cuda")[-1] == (49152, 50257)
    assert blocks.spans(2**20, 600, 0, "cpu") == [(0, 256), (256, 512), (512, 600)]
    assert blocks.spans(0, 3, 0, "cpu") == [(0, 3)]


N, WORDS, SIZE = 2048, 16384, 16
ALL_LOGITS = 4 * N * WORDS  # bytes


def many(fn, transform):
    weight = torch.randn(WORDS, SIZE)
    hidden, labels = torch.randn(4, N // 4, SIZE), torch.randint(0, WORDS, (4, N // 4))

    def loss_fn(params, hidden, labels):
        return fn(params["w"], None, hidden, labels).mean()

    return lambda: transform(loss_fn, {"w": weight}, hidden, labels)


def of_batch(loss_fn, params, *batch):
    return grad(lambda params, hidden: vmap(loss_fn, (None, 0, 0))(params, hidden, batch[1]).sum(), (0, 1))(
        params, batch[0]
    )


MEMORY = {
    "a gradient": of_batch,
    "norms": per_sample.norms,
    "a clipped sum": lambda *args: per_sample.clipped_sum(*args, max_norm=0.5),
    "inner products": lambda loss_fn, params, *batch: per_sample.gram(loss_fn, params, batch),
    "squares": per_sample.second_moment,
    "a compiled gradient": lambda *args: FUSED(*args),
}
FUSED = torch.compile(of_batch, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("name", MEMORY)
def test_no_tensor_of_positions_times_words_exists(name):
    call = many(lambda *args: chunked(*args, None), MEMORY[name])
    found = peak.of(measure.Work(call, lambda: None), "cpu")
    assert found < ALL_LOGITS / 3, (found / MB, ALL_LOGITS / MB)


def test_the_plain_loss_does_make_one():
    assert peak.of(measure.Work(many(plain, of_batch), lambda: None), "cpu") > ALL_LOGITS
