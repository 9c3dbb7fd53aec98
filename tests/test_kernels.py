"""Ops that torch takes one example at a time under `vmap`, in a pure loss: on the whole batch, and as in a loop."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from zoo import D, difference, normals

from functorch_mnist import per_sample, tree
from functorch_mnist.per_sample import recurrence

B = 4
# The suite makes the fallback of vmap an error, so whatever passes here runs on the whole batch.


def in_a_loop(loss_fn, params, *batch):
    """The sample gradients by torch.autograd.grad, one example after another, without a transform."""
    rows = []
    for example in zip(*batch, strict=True):
        leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
        rows.append(torch.autograd.grad(loss_fn(leaves, *example), list(leaves.values())))
    return {name: torch.stack([row[j] for row in rows]) for j, name in enumerate(params)}


def assert_as_in_a_loop(loss_fn, params, *batch):
    expected = in_a_loop(loss_fn, params, *batch)
    norms = torch.cat([g.flatten(1) for g in expected.values()], 1).norm(dim=1)
    torch.testing.assert_close(per_sample.norms(loss_fn, params, *batch), norms, rtol=1e-10, atol=1e-12)
    assert difference(per_sample.grads(loss_fn, params, *batch), expected) < 1e-10
    found = per_sample.clipped_sum(loss_fn, params, *batch, max_norm=0.5).grads
    factors = (0.5 / norms).clamp(max=1)
    assert difference(found, tree.map(lambda g: torch.einsum("b,b...->...", factors, g), expected)) < 1e-10
    plan = per_sample.plan(loss_fn, params, *[rows[0] for rows in batch], batch_size=B)
    assert plan.slow == ()
    assert "dense" not in [row.way for row in plan.rows]


T, H, E = 3, 2, 4
CAUSAL = torch.ones(T, T, dtype=torch.bool).tril()
MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "bool (T, T)": {"attn_mask": CAUSAL},
    "float (T, T)": {"attn_mask": normals(T, T, seed=9)},
    "bool (H, T, T)": {"attn_mask": torch.stack([CAUSAL, CAUSAL.flip(0, 1)])},
    "float (H, T, T)": {"attn_mask": normals(H, T, T, seed=9)},
    "float (1, 1, T)": {"attn_mask": normals(1, 1, T, seed=9)},
    "scaled": {"scale": 0.3},
}
WEIGHTS = {name: normals(5, H * E, seed=i) for i, name in enumerate("qkv")}


def attended(p, x, heads=(H, H, H), **options):  # (T, 5)
    q, k, v = ((x @ p[name]).view(T, H, E).transpose(0, 1)[:n] for name, n in zip("qkv", heads, strict=True))
    return F.scaled_dot_product_attention(q, k, v, **options)


@pytest.mark.parametrize("name", MASKS)
def test_attention_in_a_loss_is_as_in_a_loop(name):
    assert_as_in_a_loop(lambda p, x: attended(p, x, **MASKS[name]).sin().sum(), WEIGHTS, normals(B, T, 5))


def test_attention_of_grouped_queries_is_as_in_a_loop():
    def loss_fn(p, x):
        return attended(p, x, (H, 1, 1), enable_gqa=True).sin().sum()

    assert_as_in_a_loop(loss_fn, WEIGHTS, normals(B, T, 5))


@pytest.mark.parametrize("kind", ["bool", "float", "bool of heads", "of keys"])
def test_attention_with_a_mask_for_each_example_is_as_in_a_loop(kind):
    mask = {
        "bool": torch.stack([CAUSAL, CAUSAL, CAUSAL.flip(0, 1), CAUSAL]),
        "float": normals(B, T, T, seed=9),
        "bool of heads": (normals(B, H, T, T, seed=9) > 0) | torch.eye(T, dtype=torch.bool),
        "of keys": torch.tensor([[True] * 3, [True, False, True], [True, True, False], [True] * 3])[:, None],
    }[kind]
    assert_as_in_a_loop(lambda p, x, m: attended(p, x, attn_mask=m).sin().sum(), WEIGHTS, normals(B, T, 5), mask)


def test_attention_without_heads_or_with_more_axes_is_as_in_a_loop():
    def flat(p, x):
        return F.scaled_dot_product_attention(x @ p["q"], x @ p["k"], x @ p["v"], is_causal=True).sin().sum()

    def deep(p, x):
        q, k, v = ((x @ p[name]).view(T, H, 2, 2).permute(1, 2, 0, 3) for name in "qkv")
        return F.scaled_dot_product_attention(q, k, v, CAUSAL).sin().sum()

    for loss_fn in (flat, deep):
        assert_as_in_a_loop(loss_fn, WEIGHTS, normals(B, T, 5))


def test_attention_with_keys_that_all_examples_share_is_as_in_a_loop():
    keys = normals(H, T, E, seed=5)

    def loss_fn(p, x):
        q = (x @ p["q"]).view(T, H, E).transpose(0, 1)
        return F.scaled_dot_product_attention(q, keys, keys * 2).sin().sum()

    assert_as_in_a_loop(loss_fn, {"q": WEIGHTS["q"]}, normals(B, T, 5))


RECURRENT = {"lstm": (4, torch.lstm), "gru": (3, torch.gru), "tanh": (1, torch.rnn_tanh), "relu": (1, torch.rnn_relu)}


def recurrent_weights(gates, layers, directions, size=3, inputs=4):
    weights = {}
    for layer in range(layers):
        for direction in range(directions):
            d = inputs if layer == 0 else directions * size
            for i, shape in enumerate([(gates * size, d), (gates * size, size), (gates * size,), (gates * size,)]):
                weights[f"{layer}{direction}{i}"] = normals(*shape, seed=len(weights)) / 2
    return weights


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("layers, directions", [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("name", RECURRENT)
def test_a_recurrent_layer_in_a_loss_is_as_in_a_loop(name, layers, directions, batched):
    gates, op = RECURRENT[name]
    params = recurrent_weights(gates, layers, directions)

    def loss_fn(p, x):  # (T, 4)
        x = x[None] if batched else x[:, None]
        zeros = x.new_zeros(layers * directions, 1, 3)
        state = (zeros, zeros) if name == "lstm" else zeros
        out = op(x, state, list(p.values()), True, layers, 0.0, False, directions == 2, batched)
        return out[0].sin().sum() + out[1].square().sum()

    assert_as_in_a_loop(loss_fn, params, normals(B, 3, 4))


CELLS = {"lstm": (4, torch.lstm_cell), "gru": (3, torch.gru_cell), "tanh": (1, torch.rnn_tanh_cell)}


@pytest.mark.parametrize("name", CELLS)
def test_a_recurrent_cell_in_a_loss_is_as_in_a_loop(name):
    gates, op = CELLS[name]
    params = recurrent_weights(gates, 1, 1)

    def loss_fn(p, x):
        h = c = x.new_zeros(1, 3)
        for row in x:
            out = op(row[None], (h, c) if name == "lstm" else h, *p.values())
            h, c = out if name == "lstm" else (out, c)
        return h.sin().sum()

    assert_as_in_a_loop(loss_fn, params, normals(B, 3, 4))


POOLINGS = {
    F.adaptive_avg_pool1d: (2, 6), F.adaptive_avg_pool2d: (2, 4, 6), F.adaptive_avg_pool3d: (2, 4, 2, 2),
}  # fmt: skip


@pytest.mark.parametrize("pool", POOLINGS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("size", [1, 2])
def test_adaptive_pooling_in_a_loss_is_as_in_a_loop(pool, size):
    shape = POOLINGS[pool]

    def loss_fn(p, x):
        return pool(x * p["s"].view(-1, *[1] * (x.dim() - 1)), size).sin().sum()

    assert_as_in_a_loop(loss_fn, {"s": normals(2, seed=1)}, normals(B, *shape))


def test_a_product_of_two_inputs_and_a_weight_is_as_in_a_loop():
    params = {"w": normals(3, 4, 4, seed=1), "b": normals(3, seed=2)}
    assert_as_in_a_loop(lambda p, x: F.bilinear(x, x.flip(-1), p["w"], p["b"]).sin().sum(), params, normals(B, 2, 4))


def test_a_lookup_with_a_table_for_each_example_keeps_its_padding():
    table, tokens = normals(5, 3, seed=1), torch.tensor([[0, 1], [2, 0], [4, 4], [0, 0]])

    def loss_fn(table, tokens):
        return F.embedding(tokens, table, padding_idx=0).sin().sum()

    expected = in_a_loop(lambda p, tokens: loss_fn(p["t"], tokens), {"t": table}, tokens)["t"]
    assert difference(per_sample.grads(loss_fn, table, tokens), expected) < 1e-10
    plan = per_sample.plan(loss_fn, table, tokens[0], batch_size=B)
    dense = plan.override(plan.rows[0].path, "dense")
    assert difference(per_sample.factored(loss_fn, table, tokens, plan=dense).grads(), expected) < 1e-10


# Uses that are hard to see


ROWS = normals(B, 3, 4)


def test_a_loss_made_of_parameters_alone_is_as_in_a_loop():
    params = {"w": normals(3, 4, seed=1)}
    for loss_fn in (
        lambda p, x: p["w"].sin().sum(),
        lambda p, x: p["w"][0, 0],
        lambda p, x: p["w"].expand(2, 3, 4).sum(),
    ):
        expected = in_a_loop(loss_fn, params, ROWS)
        assert difference(per_sample.factored(loss_fn, params, ROWS).grads(), expected) < 1e-10
        torch.testing.assert_close(per_sample.norms(loss_fn, params, ROWS), expected["w"].flatten(1).norm(dim=1))


def test_a_parameter_used_without_its_gradient_alone_has_none():
    params = {"w": normals(4, 4, seed=1), "v": normals(4, seed=2)}

    def loss_fn(p, x):
        with torch.no_grad():
            scale = p["w"].norm()
        return (F.linear(x, p["w"].detach()) * p["v"] * scale).sin().sum()

    leaf = params["v"].clone().requires_grad_()
    rows = [torch.autograd.grad(loss_fn({**params, "v": leaf}, x), leaf)[0] for x in ROWS]
    found = per_sample.leaf_norms(loss_fn, params, ROWS)
    torch.testing.assert_close(found["v"], torch.stack(rows).norm(dim=1), rtol=1e-10, atol=0)
    assert found["w"].tolist() == [0] * B


@pytest.mark.parametrize("kind", ["rows in a loop", "a weight norm"])
def test_what_the_compiler_would_not_show_is_as_in_a_loop(kind):
    params = {"w": normals(3, 4, seed=1), "g": normals(3, 1, seed=2)}

    def loss_fn(p, x):
        if kind == "rows in a loop":
            return sum([(x * row).sin().sum() for row in p["w"]]) * p["g"].sum()
        return F.linear(x, torch._weight_norm(p["w"], p["g"], 0)).sin().sum()

    expected = in_a_loop(loss_fn, params, ROWS)
    norms = torch.cat([g.flatten(1) for g in expected.values()], 1).norm(dim=1)
    torch._dynamo.reset()
    fused = torch.compile(lambda p, x: per_sample.norms(loss_fn, p, x), fullgraph=True, dynamic=False, backend="eager")
    torch.testing.assert_close(fused(params, ROWS), norms, rtol=1e-10, atol=1e-12)


def test_a_lookup_that_renormalises_its_table_is_refused_and_writes_nothing():
    table = normals(5, 3, seed=1)
    before = table.clone()
    for quantity in (per_sample.norms, per_sample.grads):
        with pytest.raises(ValueError, match="must not be written to"):
            quantity(lambda w, a: F.embedding(a, w, max_norm=0.1).sum(), table, torch.arange(B)[:, None])
    assert torch.equal(table, before)


def recurrent(**options):
    """A recurrent op's arguments, as its module gives them."""
    lstm = nn.LSTM(3, 4, batch_first=True, **options).to(D)
    directions = 2 if lstm.bidirectional else 1
    size = options.get("proj_size") or 4
    states = normals(lstm.num_layers * directions, 1, size), normals(lstm.num_layers * directions, 1, 4)
    weights = [getattr(lstm, name) for name in lstm._flat_weights_names]
    switches = (lstm.bias, lstm.num_layers, lstm.dropout, lstm.training, lstm.bidirectional, True)
    return normals(1, 5, 3), states, weights, *switches


def test_only_plain_recurrent_calls_run_on_the_batch_as_they_are():
    for options in ({}, {"bias": False}, {"num_layers": 2, "bidirectional": True}):
        call = recurrence.read(torch.lstm, recurrent(**options))
        assert call is not None
        assert [len(layer.weights) for layer in call.layers] == [4 if options.get("bias", True) else 2] * len(
            call.layers
        )
        assert [layer.reverse for layer in call.layers] == (
            [False, True] * 2 if "bidirectional" in options else [False]
        )
    input, states, weights, *rest = recurrent()
    packed = nn.utils.rnn.pack_sequence([input[0]])
    for op, args in (
        (torch.lstm, recurrent(proj_size=2)),
        (torch.lstm, recurrent(num_layers=2, dropout=0.5)),
        (torch.lstm, (packed.data, packed.batch_sizes, states, weights, *rest[:-1])),
        (torch.lstm, (input, states, weights, *rest, None)),
        (torch.lstm, (input[0], states, weights, *rest)),
    ):
        assert recurrence.read(op, args) is None


def test_an_op_without_a_rule_that_returns_one_number_is_exact():
    w, x = normals(3, seed=1), normals(4, 3)
    found = per_sample.dot(lambda w, x: (w @ x).sin(), w, x, direction=normals(3, seed=2))
    assert difference(found, (x @ w).cos() * (x @ normals(3, seed=2))) < 1e-12
