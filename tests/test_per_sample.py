"""Factored per-sample gradients against `vmap(grad)`, the dense oracle, in float64."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
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
    labels,
    linear,
    mlp,
    normals,
    of_model,
    of_module,
    sequence_linear,
    tied_linear_and_embedding,
    tutorial_cnn,
)

from functorch_mnist import losses, models, per_sample, tree
from functorch_mnist.per_sample.forms import Sizes
from functorch_mnist.train import compiled, in_precision


def quantities(loss_fn, params, batch, **options):
    """Every public quantity of a batch."""
    weights = normals(len(batch[0]), seed=7)
    direction = tree.map(lambda w: normals(*w.shape, seed=8), params)
    clipped = per_sample.clipped_sum(loss_fn, params, *batch, max_norm=0.7, **options)
    summed = per_sample.grad_and_norms(loss_fn, params, *batch, **options)
    along = per_sample.grad_and_dot(loss_fn, params, *batch, direction=direction, **options)
    return {
        "summed": summed.grads,
        "norms beside the sum": summed.norms,
        "sum beside the products": along.grads,
        "products beside the sum": along.products,
        "grads": per_sample.factored(
            loss_fn, params, *batch, **{k: v for k, v in options.items() if k != "chunk_size"}
        ).grads(),
        "norms": per_sample.norms(loss_fn, params, *batch, **options),
        "leaf_norms": per_sample.leaf_norms(loss_fn, params, *batch, **options),
        "weighted_sum": per_sample.weighted_sum(loss_fn, params, *batch, weights=weights, **options),
        "clipped_sum": clipped.grads,
        "norms before clipping": clipped.norms,
        "dot": per_sample.dot(loss_fn, params, *batch, direction=direction, **options),
        "gram": per_sample.gram(loss_fn, params, batch, **options),
        "second_moment": per_sample.second_moment(loss_fn, params, *batch, **options),
    }


def expected_quantities(loss_fn, params, batch, mask=None):
    """The same from the dense gradients, by their definitions."""
    rows = dense(loss_fn, params, batch, mask)
    count = len(batch[0])
    flat = torch.cat([g.reshape(count, -1) for g in tree.leaves(rows)], 1)
    norms = flat.norm(dim=1)
    direction = tree.map(lambda w: normals(*w.shape, seed=8), params)
    return {
        "summed": combine(torch.ones_like(norms), rows),
        "norms beside the sum": norms,
        "sum beside the products": combine(torch.ones_like(norms), rows),
        "products beside the sum": flat @ tree.ravel(direction),
        "grads": rows,
        "norms": norms,
        "leaf_norms": tree.map(lambda g: g.reshape(count, -1).norm(dim=1), rows),
        "weighted_sum": combine(normals(count, seed=7), rows),
        "clipped_sum": combine((0.7 / norms).clamp(max=1), rows),
        "norms before clipping": norms,
        "dot": flat @ tree.ravel(direction),
        "gram": flat @ flat.T,
        "second_moment": tree.map(lambda g: g.square().sum(0), rows),
    }


def assert_exact(loss_fn, params, batch, mask=None, **options):
    if mask is not None:
        options["mask"] = mask
    found, expected = quantities(loss_fn, params, batch, **options), expected_quantities(loss_fn, params, batch, mask)
    for name in expected:
        assert difference(found[name], expected[name]) <= EXACT, name


def ways(loss_fn, params, batch):
    """The way each parameter is taken, by its path."""
    plan = per_sample.plan(loss_fn, params, *[rows[0] for rows in batch], batch_size=len(batch[0]))
    return {row.path: row.way for row in plan.rows}


@pytest.mark.parametrize("name", CASES)
def test_every_quantity_equals_its_dense_definition(name):
    case = CASES[name]()
    assert_exact(case.loss_fn, case.params, case.batch)


@pytest.mark.parametrize("name", CASES)
def test_only_what_has_no_factored_form_is_dense(name):
    case = CASES[name]()
    found = ways(case.loss_fn, case.params, case.batch)
    assert {path for path, way in found.items() if way == "dense"} == case.dense


@pytest.mark.parametrize("name", CASES)
def test_masks_and_chunks_change_nothing_else(name):
    case = CASES[name]()
    mask = torch.tensor([True, False, True, True])
    poisoned = tuple(
        rows.index_fill(0, torch.tensor([1]), torch.nan) if rows.is_floating_point() else rows for rows in case.batch
    )
    expected = expected_quantities(case.loss_fn, case.params, case.batch, mask)
    for options in ({}, {"chunk_size": 3}):
        found = quantities(case.loss_fn, case.params, poisoned, mask=mask, **options)
        for quantity in expected:
            assert difference(found[quantity], expected[quantity]) <= EXACT, (quantity, options)
    assert_exact(case.loss_fn, case.params, case.batch, chunk_size=1)


@pytest.mark.parametrize("way", ["gram", "build", "dense"])
@pytest.mark.parametrize("name", ["tutorial_cnn", "sequence_linear", "tied_linear_and_embedding", "products"])
def test_every_way_gives_the_same(name, way):
    case = CASES[name]()
    plan = per_sample.plan(case.loss_fn, case.params, *[rows[0] for rows in case.batch], batch_size=B)
    changed = 0
    for row in plan.rows:
        if way in row.costs:
            plan, changed = plan.override(row.path, way), changed + 1
    assert changed
    assert_exact(case.loss_fn, case.params, case.batch, plan=plan)


PADDINGS = st.one_of(st.integers(0, 2), st.sampled_from(["same", "valid"]))


@settings(max_examples=40)
@given(data=st.data(), space=st.integers(1, 3), transposed=st.booleans())
def test_every_convolution_is_exact(data, space, transposed):
    groups = data.draw(st.sampled_from([1, 2]))
    channels, outputs = groups * data.draw(st.integers(1, 2)), groups * data.draw(st.integers(1, 3))
    kernel = tuple(data.draw(st.integers(1, 3)) for _ in range(space))
    stride, dilation = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    options = {"stride": stride, "dilation": dilation, "groups": groups, "bias": data.draw(st.booleans())}
    mode = "zeros"
    if transposed:
        kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        options |= {"padding": data.draw(st.integers(0, 1)), "output_padding": max(stride, dilation) - 1}
    else:
        kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        padding = data.draw(PADDINGS)
        if padding == "same":
            options["stride"] = 1
        mode = data.draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        if space == 3 and mode == "reflect":
            mode = "zeros"
        options |= {"padding": padding, "padding_mode": mode}
    layer = kinds[space - 1](channels, outputs, kernel, dtype=D, **options)
    params = {name: normals(*p.shape, seed=i) for i, (name, p) in enumerate(layer.named_parameters())}

    def loss_fn(params, x):
        return torch.func.functional_call(layer, params, (x,)).sin().square().sum()

    batch = (normals(3, channels, *[6 if space < 3 else 5] * space),)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using padding='same' with even kernel")
        assert "dense" not in ways(loss_fn, params, batch).values()
        assert_exact(loss_fn, params, batch)


@settings(max_examples=30)
@given(data=st.data())
def test_random_compositions_of_layers_are_exact(data):
    width, length = data.draw(st.integers(2, 5)), data.draw(st.integers(1, 4))
    stack, x = [], normals(3, length, width)
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["linear", "norm", "tanh", "again", "conv", "scale"]))
        if kind == "again" and any(isinstance(layer, nn.Linear) for layer in stack):
            stack.append(next(layer for layer in stack if isinstance(layer, nn.Linear)))
        elif kind == "norm":
            stack.append(nn.LayerNorm(width))
        elif kind == "conv":
            stack.append(nn.Conv1d(length, length, 3, padding=1))
        elif kind == "scale":
            stack.append(nn.PReLU())
        elif kind == "tanh":
            stack.append(nn.Tanh())
        else:
            stack.append(nn.Linear(width, width, bias=data.draw(st.booleans())))
    params, model = models.from_module(nn.Sequential(*stack).to(D))

    def loss_fn(params, x):
        return model.apply(params, x).sin().square().sum()

    assert_exact(loss_fn, params, (x,))


def resnet18():
    torchvision = pytest.importorskip("torchvision")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torchvision.models.resnet18(num_classes=3, norm_layer=lambda channels: nn.GroupNorm(8, channels))
    return net, normals(2, 3, 32, 32)


def vision_transformer():
    torchvision = pytest.importorskip("torchvision")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torchvision.models.VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=3)
    for p in net.heads.parameters():
        nn.init.normal_(p, generator=torch.Generator().manual_seed(1))
    return net, normals(2, 3, 16, 16)


@pytest.fixture
def fallback():
    """Lets vmap run what has no batching rule one example at a time, as users have it."""
    torch._C._functorch._set_vmap_fallback_enabled(True)
    yield
    torch._C._functorch._set_vmap_fallback_enabled(False)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.usefixtures("fallback")
@pytest.mark.parametrize("make", [resnet18, vision_transformer])
def test_whole_networks_are_exact(make):
    module, x = make()
    params, model = models.from_module(module.to(D))

    def loss_fn(params, x, y):
        return losses.cross_entropy(model.apply(params, x), y)

    batch = (x, labels(len(x)))
    rows = dense(loss_fn, params, batch)
    norms = torch.stack([g.flatten(1).square().sum(1) for g in rows.values()]).sum(0).sqrt()
    clipped = per_sample.clipped_sum(loss_fn, params, *batch, max_norm=0.3)
    assert difference(clipped.norms, norms) <= EXACT
    assert difference(clipped.grads, combine((0.3 / norms).clamp(max=1), rows)) <= EXACT
    taken = ways(loss_fn, params, batch)
    fallen_back = {path for path, way in taken.items() if way == "dense" and rows[path][0].dim() > 1}
    assert all("self_attention" in path or path in ("class_token", "encoder.pos_embedding") for path in fallen_back)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("name", ["tutorial_cnn", "mlp", "sequence_linear"])
def test_lower_precision_stays_within_its_bound(name, dtype, bound):
    """The bound is of the norm of the difference over the norm, against the same precision's dense gradients."""
    case = CASES[name]()
    params = {key: p.float() for key, p in case.params.items()}
    x, y = case.batch[0].float(), case.batch[1]
    apply = in_precision(
        {"tutorial_cnn": models.cnn(dropout=(0, 0)).apply, "mlp": models.mlp([6, 8, 8, 3]).apply}.get(
            name, lambda p, x, key=None: F.linear(torch.tanh(F.linear(x, p["u"], p["b"])), p["v"]).mean(0)
        ),
        dtype,
    )

    def loss_fn(params, x, y):
        return losses.cross_entropy(apply(params, x), y)

    assert "dense" not in ways(loss_fn, params, (x, y)).values()
    rows = dense(loss_fn, params, (x, y))
    norms = torch.stack([g.flatten(1).square().sum(1) for g in rows.values()]).sum(0).sqrt()
    clipped = per_sample.clipped_sum(loss_fn, params, x, y, max_norm=0.5)
    expected = combine((0.5 / norms).clamp(max=1), rows)
    assert torch.linalg.vector_norm(clipped.norms - norms) <= bound * torch.linalg.vector_norm(norms)
    assert tree.norm(tree.map(torch.sub, clipped.grads, expected)) <= bound * tree.norm(expected)
    assert all(g.dtype == torch.float32 for g in clipped.grads.values()) and clipped.norms.dtype == torch.float32


def test_an_all_false_mask_gives_exact_zeros():
    case = mlp()
    mask = torch.zeros(B, dtype=torch.bool)
    poisoned = (torch.full_like(case.batch[0], torch.nan), case.batch[1])
    found = quantities(case.loss_fn, case.params, poisoned, mask=mask)
    assert all((leaf == 0).all() for leaf in tree.leaves(found))


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("name", ["tutorial_cnn", "mlp", "tied_linear_and_embedding", "norms_net"])
def test_an_empty_batch_and_one_example_work(name, count):
    case = CASES[name]()
    batch = tuple(rows[:count] for rows in case.batch)
    found = per_sample.clipped_sum(case.loss_fn, case.params, *batch, max_norm=1.0)
    assert found.norms.shape == found.losses.shape == (count,)
    assert found.nonfinite == 0
    assert per_sample.gram(case.loss_fn, case.params, batch).shape == (count, count)
    rows = per_sample.grads(case.loss_fn, case.params, *batch)
    assert all(g.shape == (count, *p.shape) for g, p in zip(tree.leaves(rows), tree.leaves(case.params), strict=True))
    if count == 0:
        assert all((leaf == 0).all() for leaf in tree.leaves(found.grads))
    else:
        assert_exact(case.loss_fn, case.params, batch)


@pytest.mark.parametrize("name", ["tutorial_cnn", "mlp", "regularised"])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_an_example_that_is_not_finite_adds_nothing_and_is_counted(name, bad):
    case = CASES[name]()
    poisoned = (case.batch[0].index_fill(0, torch.tensor([2]), bad), case.batch[1])
    mask = torch.tensor([True, True, False, True])
    expected = expected_quantities(case.loss_fn, case.params, case.batch, mask)
    found = per_sample.clipped_sum(case.loss_fn, case.params, *poisoned, max_norm=0.7)
    assert difference(found.grads, expected["clipped_sum"]) <= EXACT
    assert found.nonfinite == 1 and not found.norms[2].isfinite()


def test_a_function_of_the_norms_is_a_clipping_rule():
    case = mlp()
    rows = dense(case.loss_fn, case.params, case.batch)
    norms = expected_quantities(case.loss_fn, case.params, case.batch)["norms"]

    def below_the_median(norms):
        return (norms <= norms.median()).to(norms.dtype)

    for chunk_size in (None, 1, 3):
        found = per_sample.clipped_sum(
            case.loss_fn, case.params, *case.batch, max_norm=below_the_median, chunk_size=chunk_size
        )
        assert difference(found.grads, combine(below_the_median(norms), rows)) <= EXACT
    by_tensor = per_sample.clipped_sum(case.loss_fn, case.params, *case.batch, max_norm=torch.tensor(0.7, dtype=D))
    by_number = per_sample.clipped_sum(case.loss_fn, case.params, *case.batch, max_norm=0.7)
    assert difference(by_tensor.grads, by_number.grads) <= EXACT


def test_a_rule_that_divides_by_zero_norms_leaves_no_trace():
    case = mlp()
    mask = torch.tensor([True, False, True, True])
    rows = dense(case.loss_fn, case.params, case.batch, mask)
    norms = expected_quantities(case.loss_fn, case.params, case.batch, mask)["norms"]
    expected = combine(torch.where(mask, 1 / norms, 0), rows)
    for chunk_size in (None, 3):
        found = per_sample.clipped_sum(
            case.loss_fn, case.params, *case.batch, max_norm=lambda n: 1 / n, mask=mask, chunk_size=chunk_size
        )
        assert difference(found.grads, expected) <= EXACT
    weights = torch.tensor([1.0, math.nan, 2.0, 3.0], dtype=D)
    found = per_sample.weighted_sum(case.loss_fn, case.params, *case.batch, weights=weights, mask=mask)
    assert difference(found, combine(weights.nan_to_num(0), rows)) <= EXACT


def test_the_gradient_of_a_norm_at_zero_is_zero():
    x = normals(B, 3)
    found = grad(lambda w: per_sample.norms(lambda w, x: (x @ w).square(), w, x).sum())(torch.zeros(3, dtype=D))
    assert torch.equal(found, torch.zeros(3, dtype=D))


def test_mixed_precision_by_autocast_and_by_casts_works():
    params = {"w": normals(4, 3, seed=1).float(), "v": normals(2, 4, seed=2).float()}
    x = normals(B, 2, 3).float()

    def autocast(p, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = torch.tanh(F.linear(x, p["w"]))
            return F.linear(h, p["v"]).float().square().sum()

    rows = dense(autocast, params, (x,))
    norms = torch.stack([g.flatten(1).square().sum(1) for g in rows.values()]).sum(0).sqrt()
    assert torch.allclose(per_sample.norms(autocast, params, x), norms, rtol=2e-2)

    def cast(p, x):
        return F.linear(torch.tanh(F.linear(x.double(), p["w"].double())), p["v"].double()).square().sum()

    direction = tree.map(torch.ones_like, params)
    expected = sum(g.double().flatten(1).sum(1) for g in dense(cast, params, (x,)).values())
    assert torch.allclose(per_sample.dot(cast, params, x, direction=direction), expected, rtol=1e-5)


def test_clipped_gradients_are_no_longer_than_the_clipping_norm():
    case = tutorial_cnn()
    for row in range(B):
        one = tuple(rows[row : row + 1] for rows in case.batch)
        found = per_sample.clipped_sum(case.loss_fn, case.params, *one, max_norm=0.25)
        assert found.norms > 0.25 and tree.norm(found.grads) <= 0.25 * (1 + 1e-12)


def test_gram_of_two_batches_is_exact():
    case = sequence_linear()
    a, b = (tuple(rows[part] for rows in case.batch) for part in (slice(0, 3), slice(1, 4)))
    flat = torch.cat([g.flatten(1) for g in dense(case.loss_fn, case.params, case.batch).values()], 1)
    for options in ({}, {"chunk_size": 2}):
        found = per_sample.gram(case.loss_fn, case.params, a, b, **options)
        assert difference(found, flat[:3] @ flat[1:].T) <= EXACT
    keep = torch.tensor([False, True, True])
    found = per_sample.gram(case.loss_fn, case.params, a, b, mask_b=keep)
    assert difference(found, (flat[:3] @ flat[1:].T) * keep) <= EXACT


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_kronecker_factors_are_sums_over_examples_and_positions(chunk_size):
    params = {"w": normals(3, 5, seed=1), "table": normals(7, 5, seed=2), "k": normals(4, 2, 2, seed=3)}

    def loss_fn(p, tokens, x):
        h = torch.tanh(F.embedding(tokens, p["table"], padding_idx=1))
        return F.linear(h, p["w"]).square().sum() + F.conv1d(x, p["k"]).sum()

    tokens, x = torch.arange(B * 6).view(B, 6) % 7, normals(B, 2, 4)
    found = per_sample.kronecker(loss_fn, params, tokens, x, chunk_size=chunk_size)
    h = torch.tanh(params["table"][tokens]).view(-1, 5)
    g = 2 * h @ params["w"].T
    assert difference(found["w"].inputs, (h.T @ h)[None]) <= EXACT
    assert difference(found["w"].cotangents, (g.T @ g)[None]) <= EXACT
    counts = torch.bincount(tokens[tokens != 1], minlength=7).to(D)
    assert torch.equal(found["table"].inputs, counts)
    patches = x.unfold(2, 2, 1).permute(0, 2, 3, 1).reshape(-1, 4)  # kernel, channel
    assert difference(found["k"].inputs, (patches.T @ patches)[None]) <= EXACT
    assert torch.equal(found["k"].cotangents, torch.full((1, 4, 4), 3.0 * B, dtype=D))
    assert set(found) == {"w", "table", "k"}


def test_a_batch_norm_that_mixes_examples_is_refused_by_name():
    params = {"w": normals(4, seed=1)}

    def loss_fn(p, x):
        return F.batch_norm(x, torch.zeros(4, dtype=D), torch.ones(4, dtype=D), p["w"], training=True).sum()

    with pytest.raises(ValueError, match=r"batch_norm in training mode.*group norm"):
        per_sample.norms(loss_fn, params, normals(B, 2, 4))


BAD_CALLS = {
    "no batch": (lambda f, p, x, y: per_sample.norms(f, p), ValueError, "at least one tensor"),
    "sizes": (lambda f, p, x, y: per_sample.norms(f, p, x, y[:2]), ValueError, "one leading size"),
    "mask": (lambda f, p, x, y: per_sample.norms(f, p, x, y, mask=torch.ones(B)), ValueError, "mask must be bool"),
    "chunk": (lambda f, p, x, y: per_sample.norms(f, p, x, y, chunk_size=0), ValueError, "chunk_size must be"),
    "weights": (
        lambda f, p, x, y: per_sample.weighted_sum(f, p, x, y, weights=torch.ones(2)),
        ValueError,
        r"weights must be a tensor \(4,\)",
    ),
    "max_norm": (lambda f, p, x, y: per_sample.clipped_sum(f, p, x, y, max_norm=-1.0), ValueError, "above 0"),
    "nan": (lambda f, p, x, y: per_sample.clipped_sum(f, p, x, y, max_norm=math.nan), ValueError, "above 0"),
    "direction": (
        lambda f, p, x, y: per_sample.dot(f, p, x, y, direction=dict(reversed(p.items()))),
        ValueError,
        "one structure",
    ),
    "direction's shapes": (
        lambda f, p, x, y: per_sample.dot(f, p, x, y, direction=tree.map(lambda w: w[None], p)),
        ValueError,
        "shapes of params",
    ),
    "tensor": (
        lambda f, p, x, y: per_sample.clipped_sum(f, p, x, y, max_norm=torch.ones(B)),
        ValueError,
        "must be 0-d",
    ),
    "rule": (
        lambda f, p, x, y: per_sample.clipped_sum(f, p, x, y, max_norm=lambda n: n[:1]),
        ValueError,
        "max_norm returns",
    ),
    "rule of chunks": (
        lambda f, p, x, y: per_sample.clipped_sum(f, p, x, y, max_norm=lambda n: n[:1], chunk_size=2),
        ValueError,
        "max_norm returns",
    ),
    "rows": (lambda f, p, x, y: per_sample.gram(f, p, x), TypeError, "tuple of tensors"),
    "loss": (
        lambda f, p, x, y: per_sample.norms(lambda p, x, y: x, p, x, y),
        ValueError,
        r"0-d tensor\. Found \(6,\)",
    ),
    "number": (lambda f, p, x, y: per_sample.norms(lambda *_: 3.0, p, x, y), ValueError, r"0-d tensor\. Found float"),
    "integer": (lambda f, p, x, y: per_sample.norms(f, {"n": torch.ones(2).long()}, x, y), TypeError, "float tensor"),
    "no tensor": (
        lambda f, p, x, y: per_sample.norms(f, {"n": 3.0}, x, y),
        TypeError,
        "float tensors. Found float at 'n'",
    ),
    "mask_b": (lambda f, p, x, y: per_sample.gram(f, p, (x, y), mask_b=torch.ones(B).bool()), ValueError, "mask_b"),
    "empty": (lambda f, p, x, y: per_sample.factored(f, p, x[:0], y[:0]), ValueError, "at least one example"),
    "size": (lambda f, p, x, y: per_sample.plan(f, p, x[0], y[0], batch_size=0), ValueError, "batch_size"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_wrong_argument_is_named(name):
    call, error, message = BAD_CALLS[name]
    case = mlp()
    with pytest.raises(error, match=message):
        call(case.loss_fn, case.params, *case.batch)


def test_a_plan_that_does_not_fit_is_refused():
    case, other = mlp(), linear()
    plan = per_sample.plan(case.loss_fn, case.params, *[rows[0] for rows in case.batch], batch_size=B)
    with pytest.raises(ValueError, match="must be a parameter's"):
        plan.override("nothing", "build")
    with pytest.raises(ValueError, match="can be taken as"):
        plan.override("0.bias", "gram")
    with pytest.raises(ValueError, match="must be of these parameters"):
        per_sample.norms(other.loss_fn, other.params, *other.batch, plan=plan)


@pytest.mark.usefixtures("fallback")
def test_a_plan_names_ops_that_vmap_runs_one_by_one():
    def loss_fn(w, x):
        return (w * x).square().sum() * torch.histc(x, 4)[0]

    plan = per_sample.plan(loss_fn, normals(4, seed=1), normals(4), batch_size=B)
    assert any("histc" in op for op in plan.slow) and "slow" in str(plan)


RULED = {
    "linear": (lambda w, x: F.linear(x, w), (3, 4), (2, 4), Sizes(1, 2, 4, 3)),
    "product from the right": (lambda w, x: x @ w, (4, 3), (2, 4), Sizes(1, 2, 4, 3)),
    "product from the left": (lambda w, x: w @ x, (3, 4), (4, 2), Sizes(1, 2, 4, 3)),
    "product with a vector": (lambda w, x: w.mv(x), (3, 4), (4,), Sizes(1, 1, 4, 3)),
    "products": (lambda w, x: x @ w, (5, 4, 3), (5, 2, 4), Sizes(5, 2, 4, 3)),
    "one product of several": (lambda w, x: w @ x, (5, 3, 4), (4, 2), Sizes(1, 2, 4, 15)),
    "einsum": (lambda w, x: torch.einsum("ti,oi->to", x, w), (3, 4), (2, 4), Sizes(1, 2, 4, 3)),
    "einsum of a list": (lambda w, x: torch.einsum("ti, oi -> to", [x, w]), (3, 4), (2, 4), Sizes(1, 2, 4, 3)),
    "einsum from the left": (lambda w, x: torch.einsum("oi,ti->ot", w, x), (3, 4), (2, 4), Sizes(1, 2, 4, 3)),
    "einsum of groups": (lambda w, x: torch.einsum("tgi,igo->gto", x, w), (4, 5, 3), (2, 5, 4), Sizes(5, 2, 4, 3)),
    "einsum that repeats": (lambda w, x: torch.einsum("ti,ii->t", x, w), (4, 4), (2, 4), Sizes(1, 1, 1, 16)),
    "einsum that sums a weight": (lambda w, x: torch.einsum("ti,io->t", x, w), (4, 3), (2, 4), Sizes(1, 1, 1, 12)),
    "einsum that sums an input": (lambda w, x: torch.einsum("ti,o->o", x, w), (3,), (2, 4), Sizes(1, 1, 1, 3)),
    "einsum that broadcasts": (lambda w, x: torch.einsum("ti,oi->to", x, w), (3, 1), (2, 4), Sizes(1, 1, 1, 3)),
    "bilinear": (lambda w, x: F.bilinear(x, x.cos(), w), (3, 4, 4), (2, 4), Sizes(1, 2, 16, 3)),
}  # fmt: skip
"""Ops of a weight and an example, their shapes, and how the op reads the weight: one position where it has no rule."""


@pytest.mark.parametrize("name", RULED)
def test_a_product_is_read_by_its_rule_and_exact(name):
    op, shape, example, sizes = RULED[name]

    def loss_fn(params, x):
        return op(params["w"], x).sin().sum()

    params, x = {"w": normals(*shape, seed=1)}, normals(B, *example)
    assert per_sample.plan(loss_fn, params, x[0], batch_size=B).rows[0].sizes == sizes
    assert_exact(loss_fn, params, (x,))


@pytest.mark.parametrize("shape", [(3,), (1, 3), (2, 3)])
@pytest.mark.parametrize(("beta", "alpha"), [(1, 1), (2.0, 0.5), (0, 3)])
def test_a_product_that_is_added_is_exact(beta, alpha, shape):
    params = {"b": normals(*shape, seed=1), "w": normals(4, 3, seed=2)}

    def loss_fn(params, x):
        return torch.addmm(params["b"], x, params["w"], beta=beta, alpha=alpha).sin().sum()

    batch = (normals(B, 2, 4),)
    found = ways(loss_fn, params, batch)
    assert found["b"] == ("build" if beta == 0 else "sum")
    assert found["w"] != "dense"
    assert_exact(loss_fn, params, batch)


PLACES = {
    "input": lambda p, x: F.linear(p["w"], x),
    "weight of one axis": lambda p, x: F.linear(x, p["v"]),
    "weight beside a bias of the example": lambda p, x: F.linear(x, p["w"], x[0, :3]),
    "bias beside a weight of the example": lambda p, x: F.linear(p["w"], x, p["b"]),
    "bias beside inputs of the example": lambda p, x: F.linear(x, x, p["b"]),
    "left factor": lambda p, x: torch.addmm(p["b"], p["w"], x.T),
    "both other places": lambda p, x: torch.addmm(p["b"], x, p["w"].T[:, :2]),
    "right factor": lambda p, x: torch.addmm(x[:, :3], x, p["w"].T),
    "what is added": lambda p, x: torch.addmm(p["b"], x, x.T),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_parameter_at_any_place_of_a_linear_map_is_exact(name):
    params = {"w": normals(3, 4, seed=1), "v": normals(4, seed=2), "b": normals(2, seed=3)}
    assert_exact(lambda p, x: PLACES[name](p, x).sin().sum(), params, (normals(B, 2, 4),))


@pytest.mark.parametrize("first", [False, True])
def test_a_parameter_used_as_it_is_and_within_a_weight_is_exact_in_either_order(first):
    def loss_fn(params, x):
        w, made = params["w"], params["w"].exp()
        one, two = (made, w) if first else (w, made)
        return F.linear(F.linear(F.linear(x, one).tanh(), two).tanh(), one).sin().sum()

    assert_exact(loss_fn, {"w": normals(4, 4, seed=1)}, (normals(B, 2, 4),))


def test_a_weight_made_of_arguments_by_name_is_exact():
    params = {"a": normals(3, 4, seed=1), "b": normals(3, 4, seed=2)}

    def loss_fn(params, x):
        return F.linear(x, torch.mul(input=params["a"].exp(), other=params["b"])).sin().sum()

    batch = (normals(B, 2, 4),)
    assert "dense" not in ways(loss_fn, params, batch).values()
    assert_exact(loss_fn, params, batch)


SEEN = {
    "t": lambda w: w.t(), "T": lambda w: w.T, "mT": lambda w: w.mT, "transpose": lambda w: w.transpose(0, 1),
    "permute": lambda w: w.permute(1, 0), "movedim": lambda w: w.movedim(0, 1), "swapaxes": lambda w: w.swapaxes(0, 1),
    "swapdims": lambda w: w.swapdims(0, 1), "moveaxis": lambda w: w.moveaxis(0, 1), "torch.t": torch.t,
    "torch.transpose": lambda w: torch.transpose(w, 0, 1), "torch.permute": lambda w: torch.permute(w, (1, 0)),
    "torch.movedim": lambda w: torch.movedim(w, 0, 1), "torch.swapaxes": lambda w: torch.swapaxes(w, 0, 1),
    "torch.swapdims": lambda w: torch.swapdims(w, 0, 1), "torch.moveaxis": lambda w: torch.moveaxis(w, 0, 1),
    "view": lambda w: w.view(4, 6), "reshape": lambda w: w.reshape(4, 6), "flatten": lambda w: w.flatten().view(4, 6),
    "unflatten": lambda w: w.unflatten(1, (1, 4)).view(4, 6), "squeeze": lambda w: w.view(4, 1, 6).squeeze(1),
    "unsqueeze": lambda w: w.unsqueeze(1).view(4, 6), "view_as": lambda w: w.view_as(torch.empty(4, 6)),
    "reshape_as": lambda w: w.reshape_as(torch.empty(4, 6)), "torch.reshape": lambda w: torch.reshape(w, (4, 6)),
    "torch.flatten": lambda w: torch.flatten(w).view(4, 6), "torch.squeeze": lambda w: torch.squeeze(w.view(4, 1, 6)),
    "torch.unflatten": lambda w: torch.unflatten(w, 1, (1, 4)).view(4, 6),
    "torch.unsqueeze": lambda w: torch.unsqueeze(w, 1).view(4, 6), "getitem": lambda w: w[1:4].view(2, 6),
    "chunk": lambda w: w.chunk(2)[0].view(2, 6), "torch.chunk": lambda w: torch.chunk(w, 2)[1].view(2, 6),
    "split": lambda w: w.split([3, 3])[0].view(2, 6), "torch.split": lambda w: torch.split(w, 3)[1].view(2, 6),
    "narrow": lambda w: w.narrow(0, 1, 3).view(2, 6), "torch.narrow": lambda w: torch.narrow(w, 0, 1, 3).view(2, 6),
    "select": lambda w: w.select(1, 1)[None], "torch.select": lambda w: torch.select(w, 1, 1)[None],
    "unbind": lambda w: w.unbind(1)[2][None], "torch.unbind": lambda w: torch.unbind(w, 1)[3][None],
    "tensor_split": lambda w: w.tensor_split(2)[0].view(2, 6), "double": lambda w: w.double().view(4, 6),
    "torch.tensor_split": lambda w: torch.tensor_split(w, 2)[1].view(2, 6), "to": lambda w: w.to(D).view(4, 6),
    "contiguous": lambda w: w.contiguous().view(4, 6), "clone": lambda w: w.clone().view(4, 6),
}  # fmt: skip
"""Ways to see the numbers of a parameter (6, 4), each once."""


@pytest.mark.parametrize("name", SEEN)
def test_numbers_of_a_parameter_seen_otherwise_are_those_of_the_parameter(name):
    def loss_fn(params, x):
        return F.linear(x, SEEN[name](params["w"])).sin().sum()

    params, batch = {"w": normals(6, 4, seed=1)}, (normals(B, 6),)
    row = per_sample.plan(loss_fn, params, batch[0][0], batch_size=B).rows[0]
    assert (row.way, row.sizes[:3]) == ("outer product", (1, 1, 6))
    assert_exact(loss_fn, params, batch)


def test_weights_that_an_op_returns_in_a_list_are_followed():
    def loss_fn(params, x):
        one, two = torch.ops.aten.unbind(params["w"])
        return (F.linear(x, one) * F.linear(x, two)).sin().sum()

    params, batch = {"w": normals(2, 3, 4, seed=1)}, (normals(B, 4),)
    assert isinstance(torch.ops.aten.unbind(params["w"]), list)
    assert "dense" not in ways(loss_fn, params, batch).values()
    assert_exact(loss_fn, params, batch)


def test_an_op_of_an_example_with_several_outputs_is_exact():
    def loss_fn(params, x):
        rows, shifts = torch.broadcast_tensors(x, params["w"])
        return (rows * shifts).sin().sum() + shifts.square().sum()

    params, batch = {"w": normals(4, seed=1)}, (normals(B, 3, 4),)
    assert ways(loss_fn, params, batch) == {"w": "build"}
    assert_exact(loss_fn, params, batch)


FLOWLESS = {
    "a comparison": lambda w, x: x > w,
    "complex numbers": lambda w, x: (w.to(torch.complex128) * (x + 1j)).abs(),
}


@pytest.mark.parametrize("name", FLOWLESS)
def test_an_op_without_an_output_of_real_numbers_has_no_factored_form(name):
    def loss_fn(params, x):
        return (F.linear(x, params["v"]) * FLOWLESS[name](params["w"], x).sum()).sin().sum()

    params, batch = {"v": normals(3, 4, seed=1), "w": normals(4, seed=2)}, (normals(B, 4),)
    assert ways(loss_fn, params, batch) == {"v": "outer product", "w": "dense"}
    assert_exact(loss_fn, params, batch)


STRIDED = {
    "as it is": ((6, 4), (4, 1)),
    "as it is, from its start": ((6, 4), (4, 1), 0),
    "transposed": ((4, 6), (1, 4)),
    "its first rows": ((2, 4), (4, 1)),
    "from a place": ((5, 4), (4, 1), 4),
    "rows that overlap": ((6, 4), (2, 1)),
}


@pytest.mark.parametrize("name", STRIDED)
def test_a_parameter_seen_by_strides_is_exact(name):
    def loss_fn(params, x):
        seen = params["w"].as_strided(*STRIDED[name])
        return F.linear(x[: seen.shape[1]], seen).sin().sum()

    assert_exact(loss_fn, {"w": normals(6, 4, seed=1)}, (normals(B, 6),))


@pytest.mark.parametrize("frozen", ["weight_ih_l0", "weight_hh_l0", "bias_hh_l0"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_recurrent_layer_with_a_weight_that_is_constant_is_exact(kind, frozen):
    layer = kind(3, 2, batch_first=True, dtype=D)
    weights = {name: normals(*p.shape, seed=i) for i, (name, p) in enumerate(layer.named_parameters())}
    constant = {frozen: weights.pop(frozen)}

    def loss_fn(params, x):
        return torch.func.functional_call(layer, {**params, **constant}, (x,))[0].sin().sum()

    batch = (normals(B, 1, 4, 3),)
    assert "dense" not in ways(loss_fn, weights, batch).values()
    assert_exact(loss_fn, weights, batch)


def test_a_registered_rule_is_followed():
    params = {"w": normals(3, 4, seed=1)}

    def loss_fn(p, x):
        return torch.inner(x, p["w"]).sin().sum()

    batch = (normals(B, 2, 4),)
    row = per_sample.plan(loss_fn, params, batch[0][0], batch_size=B).rows[0]
    assert (row.way, row.reason) == ("build", "no rule: the op's own vector-Jacobian product")
    assert_exact(loss_fn, params, batch)

    @per_sample.rule(torch.inner)
    def inner(input, other):
        return [per_sample.matrix(other, input)] if other.dim() == 2 else []

    assert "no rule" not in per_sample.plan(loss_fn, params, batch[0][0], batch_size=B).rows[0].reason
    assert_exact(loss_fn, params, batch)


@pytest.mark.usefixtures("traced")
def test_a_compiled_function_follows_a_rule_that_is_mended():
    norms = compiled(lambda w, x: per_sample.norms(lambda w, x: torch.inner(x, w).sin().sum(), w, x))
    w, x = normals(3, 4, seed=1), normals(B, 4)

    def register(factor):
        @per_sample.rule(torch.inner)
        def inner(input, other):
            return [per_sample.matrix(other, factor * input)] if other.dim() == 2 else []

    register(2)
    wrong = norms(w, x)
    register(1)
    assert torch.allclose(norms(w, x), wrong / 2)


def relu_in_place(h):
    F.relu(h, True)


WRITES = {"method": lambda h: h.mul_(0.5), "function": torch.neg_, "option": relu_in_place, "op": torch.ops.aten.relu_}


@pytest.mark.parametrize("name", WRITES)
def test_an_input_that_is_written_to_after_its_op_is_kept_as_it_was(name):
    params = {"u": normals(5, 5, seed=1)}

    def loss_fn(p, x, write):
        h = x * 2
        y = F.linear(h, p["u"])
        if write:
            WRITES[name](h)
        return y.sin().sum()

    batch = (normals(B, 5),)
    found = per_sample.norms(lambda p, x: loss_fn(p, x, True), params, *batch)
    expected = expected_quantities(lambda p, x: loss_fn(p, x, False), params, batch)["norms"]
    assert difference(found, expected) <= EXACT


def test_the_gradient_through_a_weighted_sum_is_the_dot_product():
    case = mlp()
    direction = tree.map(lambda w: normals(*w.shape, seed=8), case.params)

    def projected(weights):
        return tree.dot(per_sample.weighted_sum(case.loss_fn, case.params, *case.batch, weights=weights), direction)

    for weights in (normals(B), torch.zeros(B, dtype=D)):
        expected = per_sample.dot(case.loss_fn, case.params, *case.batch, direction=direction)
        assert difference(grad(projected)(weights), expected) <= EXACT


def test_norms_are_differentiable_in_the_parameters():
    case = sequence_linear()

    def penalty(params):
        return per_sample.norms(case.loss_fn, params, *case.batch).sum()

    def dense_penalty(params):
        rows = vmap(grad(case.loss_fn), in_dims=(None, 0, 0))(params, *case.batch)
        return torch.stack([g.flatten(1).square().sum(1) for g in rows.values()]).sum(0).sqrt().sum()

    assert difference(grad(penalty)(case.params), grad(dense_penalty)(case.params)) <= EXACT


def test_norms_of_an_ensemble_are_the_norms_of_its_members():
    case = tutorial_cnn()
    ensemble = [tree.map(lambda w, s=s: w * s, case.params) for s in (1.0, 0.5, 1.5)]
    stacked = tree.map(lambda *leaves: torch.stack(leaves), *ensemble)
    found = vmap(lambda params: per_sample.norms(case.loss_fn, params, *case.batch))(stacked)
    expected = torch.stack([per_sample.norms(case.loss_fn, params, *case.batch) for params in ensemble])
    assert difference(found, expected) <= EXACT


def test_factored_is_a_pytree_that_comes_back_whole():
    case = tied_linear_and_embedding()
    factored = per_sample.factored(case.loss_fn, case.params, *case.batch)
    copy = tree.map(lambda x: x.clone(), factored)
    assert isinstance(copy, per_sample.Factored)
    assert difference(copy.norms(), factored.norms()) == 0
    losses_ = torch.stack([case.loss_fn(case.params, *row) for row in zip(*case.batch, strict=True)])
    assert difference(factored.losses, losses_) <= EXACT


def one_layer():
    params = {"w": normals(3, 5, seed=1), "b": normals(3, seed=2)}
    return of_model(lambda p, x: F.linear(x, p["w"], p["b"]).mean(0), params, normals(B, 9, 5))


def methods(factored):
    """All quantities of factored gradients."""
    weights = torch.linspace(-1, 2, B, dtype=D)
    return (
        factored.norms(), factored.leaf_norms(), factored.leaf_bounds(), factored.grads(),
        factored.weighted_sum(weights), factored.dot(factored.params), factored.second_moment(),
    )  # fmt: skip


def small_cnn():
    """A layer of each kind of the CNN's."""
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3))
    params = {name: normals(*p.shape, seed=i) for i, (name, p) in enumerate(net.named_parameters())}
    return of_model(lambda p, x: torch.func.functional_call(net, p, (x[None],))[0], params, normals(B, 1, 6, 6))


COMPILED = {
    "grads": lambda f, p, m, *b: per_sample.grads(f, p, *b, mask=m),
    "clipped_sum": lambda f, p, m, *b: per_sample.clipped_sum(f, p, *b, max_norm=0.7, mask=m),
    "clipped_sum in chunks": lambda f, p, m, *b: per_sample.clipped_sum(f, p, *b, max_norm=0.7, mask=m, chunk_size=3),
    "gram": lambda f, p, m, *b: per_sample.gram(f, p, b, mask=m),
    "kronecker": lambda f, p, m, *b: per_sample.kronecker(f, p, *b, mask=m),
    "factored": lambda f, p, m, *b: methods(per_sample.factored(f, p, *b, mask=m)),
}
"""What no other test compiles: `leaf_norms` of all cases below, the others in chunks and of groups."""


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_equals_eager_as_one_graph_without_recompilation(name):
    case = small_cnn() if name.startswith("clipped_sum") else one_layer()
    torch._dynamo.reset()
    calls = CompileCounterWithBackend("inductor" if name == "clipped_sum" else "eager")
    compiled = torch.compile(
        lambda p, m, *b: COMPILED[name](case.loss_fn, p, m, *b), fullgraph=True, dynamic=False, backend=calls
    )
    mask = torch.tensor([True, True, False, True])
    for scale in (1.0, 0.5):
        params = tree.map(lambda w, s=scale: w * s, case.params)
        result, expected = compiled(params, mask, *case.batch), COMPILED[name](case.loss_fn, params, mask, *case.batch)
        assert difference(result, expected) <= EXACT
    assert calls.frame_count == 1


def layers_of_norms():
    """The kinds of `norms_net` and `frozen_batch_norm`, one after another."""
    net = nn.Sequential(
        nn.GroupNorm(2, 4), nn.InstanceNorm1d(4, affine=True), nn.BatchNorm1d(4).eval(), nn.LayerNorm(3), nn.RMSNorm(3),
        nn.Flatten(),
    )  # fmt: skip
    return of_module(net, normals(B, 4, 3))


TRACED = {
    "linear maps, lookups": (
        "nested", "tied_linear_and_embedding", "one_linear_used_twice", "one_leaf_at_two_places", "unused",
    ),
    "products, shifts": ("products", "shifts_outside_ops", "one_convolution_on_two_inputs", "regularised"),
    "arguments, parts": ("keywords", "degenerate_shapes", "slices", "inner_transform"),
    "bags": ("bags_of_embeddings",),
    "attention": ("attention",),
    "weights that are computed": ("computed_weights",),
    "views and weights changed in place": ("views_of_parameters", "weights_changed_in_place"),
    "without gradients": (
        "viewed without grad", "cast to integers", "cast to complex", "seen as another type", "detached",
    ),
}  # fmt: skip
"""Cases that are traced as one graph, which takes half the time of a graph for each: every kind of rule and of use."""


@pytest.mark.parametrize("names", TRACED.values(), ids=TRACED.keys())
def test_compiled_leaf_norms_of_cases_in_one_graph_equal_eager(names):
    compiled_equals_eager(joint(names), "aot_eager" if "views_of_parameters" in names else "eager")


def test_compiled_leaf_norms_of_layers_of_norms_equal_eager():
    compiled_equals_eager(layers_of_norms(), "eager")


def compiled_equals_eager(case, backend):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda p, *b: per_sample.leaf_norms(case.loss_fn, p, *b), fullgraph=True, dynamic=False, backend=backend
    )
    expected = expected_quantities(case.loss_fn, case.params, case.batch)["leaf_norms"]
    assert difference(compiled(case.params, *case.batch), expected) <= EXACT
