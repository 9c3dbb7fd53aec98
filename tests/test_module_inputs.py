"""What a module gets and gives: inputs by position and by name, nested and shared; outputs of any form."""

from collections import namedtuple
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.func import grad, vmap
from zoo import D, difference, normals

from functorch_mnist import models, per_sample, random, tree

B = 4


class Several(nn.Module):
    """Inputs of every kind."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Embedding(7, 2)

    def forward(self, x, tokens=None, *, pair=None, table=None, times=1.0, flag="plus"):
        h = self.a(x)
        if tokens is not None:
            h = h + self.b(tokens).mean(1)
        if pair is not None:
            h = h + pair["left"][0] * pair["right"][1]
        if table is not None:
            h = h @ table
        return h * times if flag == "plus" else -h


def module_of(kind=Several, *arguments):
    module = kind(*arguments).to(D)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=D))
    return module


X, TOKENS, SHARED = normals(B, 3), torch.arange(2 * B).view(B, 2) % 7, normals(2, 2, seed=4)
U, V = normals(B, 2, seed=2), normals(B, 2, seed=3)
NDIM = {"x": 1, "tokens": 1, "pair": 1}


def pair_of(rows=slice(None)):
    return {"left": [U[rows], (V[rows], None)], "right": (2, V[rows])}


CALLS = {
    "one": lambda rows: ((X[rows],), {}),
    "two by position": lambda rows: ((X[rows], TOKENS[rows]), {}),
    "two by name": lambda rows: ((), {"tokens": TOKENS[rows], "x": X[rows]}),
    "one by position, one by name": lambda rows: ((X[rows],), {"tokens": TOKENS[rows]}),
    "nested": lambda rows: ((X[rows],), {"pair": pair_of(rows)}),
    "shared": lambda rows: ((X[rows],), {"table": SHARED}),
    "no tensors": lambda rows: ((X[rows], None), {"times": 3, "flag": "minus"}),
    "all": lambda rows: ((X[rows], TOKENS[rows]), {"pair": pair_of(rows), "table": SHARED, "times": 0.5}),
}


@pytest.mark.parametrize("name", CALLS)
def test_inputs_of_any_form_are_as_those_of_the_module(name):
    module = module_of()
    params, model = models.from_module(module, example_ndim=NDIM, shared=["table"])
    alone_params, alone = models.from_module(module, shared=["table"])
    args, kwargs = CALLS[name](slice(None))
    batch = model.apply(params, *args, **kwargs)
    rows, grads = [], []
    for i in range(B):
        one_args, one_kwargs = CALLS[name](slice(i, i + 1))
        out = module(*one_args, **one_kwargs)
        rows.append(out.detach()[0])
        found = torch.autograd.grad(out.sin().sum(), list(module.parameters()), allow_unused=True)
        grads.append([torch.zeros_like(p) if g is None else g for g, p in zip(found, module.parameters(), strict=True)])
        its_args, its_kwargs = CALLS[name](i)
        single = alone.apply(alone_params, *its_args, **its_kwargs)
        torch.testing.assert_close(single, rows[-1], rtol=1e-12, atol=1e-12)
        single = model.apply(params, *its_args, **its_kwargs)
        torch.testing.assert_close(single, rows[-1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(batch, torch.stack(rows), rtol=1e-12, atol=1e-12)

    def loss_fn(params, number):
        its_args, its_kwargs = CALLS[name](number)
        return model.apply(params, *its_args, **its_kwargs).sin().sum()

    expected = {n: torch.stack([g[j] for g in grads]) for j, (n, _) in enumerate(module.named_parameters())}
    assert difference(per_sample.grads(loss_fn, params, torch.arange(B)), expected) < 1e-10


@pytest.mark.parametrize("lead", [(1,), (0,), (2, 3), (2, 1, 2), (0, 2)])
def test_inputs_of_all_leading_axes_are_taken(lead):
    module = module_of()
    params, model = models.from_module(module, example_ndim={"x": 1, "tokens": 1})
    x, tokens = normals(*lead, 3), torch.randint(7, (*lead, 2), generator=torch.Generator().manual_seed(0))
    out = model.apply(params, x, tokens=tokens)
    assert out.shape == (*lead, 2)
    if x.numel():
        expected = module(x.flatten(0, -2), tokens.flatten(0, -2)).detach().view(*lead, 2)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_examples_may_have_other_numbers_of_axes_by_name():
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 1)

        def forward(self, x, mask, weight):  # (B, T, 3), (B, T), (B,)
            scores = self.a(x)[..., 0].masked_fill(~mask, -torch.inf)
            return (scores.softmax(1)[..., None] * x).sum(1) * weight[:, None]

    module = module_of(Attending)
    params, model = models.from_module(module, example_ndim={"x": 2, "mask": 1, "weight": 0})
    x, weight = normals(B, 2, 3), normals(B, seed=2)
    mask = torch.tensor([[True, True], [True, False], [False, True], [True, True]])
    expected = torch.cat([module(x[i : i + 1], mask[i : i + 1], weight[i : i + 1]) for i in range(B)]).detach()
    torch.testing.assert_close(model.apply(params, x, mask, weight), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.apply(params, x[2], mask[2], weight[2]), expected[2], rtol=1e-12, atol=1e-12)
    grid = model.apply(params, x.view(2, 2, 2, 3), mask.view(2, 2, 2), weight.view(2, 2))
    torch.testing.assert_close(grid.flatten(0, 1), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "args, kwargs, error, fault",
    [
        ((X, TOKENS[:2]), {}, ValueError, r"same leading axes.*\(2,\) for tokens and \(4,\) for x.*shared="),
        ((X, TOKENS, X), {}, ValueError, r"takes the inputs \['x', 'tokens'\]\. Found 3\. Pass a key as key="),
        ((X,), {"other": X}, ValueError, r"example_ndim must name each input.*'other'"),
        ((X[0, 0],), {}, ValueError, r"one example of x has 1 axes\. Found \(\)"),
        ((X,), {"pair": namedtuple("Pair", "a b")(X, X)}, TypeError, "dicts, lists and tuples.*Found Pair in pair"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(args, kwargs, error, fault):
    params, model = models.from_module(module_of(), example_ndim=NDIM)
    with pytest.raises(error, match=fault):
        model.apply(params, *args, **kwargs)


# Outputs


class Record(NamedTuple):
    mean: torch.Tensor
    more: object


class Giving(nn.Module):
    """Outputs of any form."""

    def __init__(self, form):
        super().__init__()
        self.a, self.form = nn.Linear(3, 2), form

    def forward(self, x):
        h = self.a(x)
        return {
            "tuple": lambda: (h, h.exp()),
            "list": lambda: [h, x],
            "dict": lambda: {"h": h, "nested": {"more": (h.sum(1), None)}},
            "namedtuple": lambda: Record(h, [h.sin(), 3]),
            "number beside": lambda: (h, 2.5, "word", True),
            "constant": lambda: (h, self.a.weight.sum(), torch.arange(3)),
            "an object beside": lambda: (h, object()),
        }[self.form]()


@pytest.mark.parametrize("lead", [(), (B,), (2, 2)])
@pytest.mark.parametrize("form", ["tuple", "list", "dict", "namedtuple"])
def test_outputs_of_any_form_come_back_in_it(form, lead):
    module = module_of(Giving, form)
    params, model = models.from_module(module, example_ndim=1)
    x = normals(*lead, 3)
    found, expected = model.apply(params, x), module(x.reshape(-1, 3))
    assert type(found) is type(expected)
    flat = torch.utils._pytree.tree_leaves
    for a, b in zip(flat(found), flat(expected), strict=True):
        if isinstance(b, torch.Tensor):
            torch.testing.assert_close(a, b.detach().view((*lead, *b.shape[1:])), rtol=1e-12, atol=1e-12)
        else:
            assert a == b


def test_what_is_no_tensor_comes_back_as_it_is_if_it_is_a_number_or_text_and_else_as_none():
    params, model = models.from_module(module_of(Giving, "number beside"), example_ndim=1)
    assert model.apply(params, X)[1:] == (2.5, "word", True)
    params, model = models.from_module(module_of(Giving, "an object beside"), example_ndim=1)
    assert model.apply(params, X)[1] is None


def test_an_output_that_does_not_depend_on_the_example_comes_back_once():
    module = module_of(Giving, "constant")
    params, model = models.from_module(module, example_ndim=1)
    _, total, numbers = model.apply(params, X)
    torch.testing.assert_close(total, module.a.weight.sum().detach())
    assert numbers.tolist() == [0, 1, 2]

    def loss_fn(params, x):
        h, total, numbers = model.apply(params, x)
        return (h * total).sin().sum() + numbers.sum()

    def alone(i):
        h, total, numbers = module(X[i : i + 1])
        return torch.autograd.grad((h[0] * total).sin().sum() + numbers.sum(), list(module.parameters()))

    expected = [torch.stack(rows) for rows in zip(*[alone(i) for i in range(B)], strict=True)]
    assert difference(list(per_sample.grads(loss_fn, params, X).values()), expected) < 1e-10


@pytest.mark.parametrize("axis, first", [(0, True), (1, False)])
def test_the_states_of_an_lstm_have_their_batch_at_axis_1_and_come_back_example_by_example(axis, first):
    torch.manual_seed(0)
    module = nn.LSTM(3, 2, 2, bidirectional=True, batch_first=first).to(D)
    params, model = models.from_module(module, example_ndim=2, batch_axis=axis)
    x = normals(B, 5, 3)
    out, (h, c) = model.apply(params, x)
    y, (hidden, cells) = module(x if first else x.transpose(0, 1))
    expected = (y if first else y.transpose(0, 1)), hidden.transpose(0, 1), cells.transpose(0, 1)
    for found, its in zip((out, h, c), expected, strict=True):
        torch.testing.assert_close(found, its.detach(), rtol=1e-12, atol=1e-12)
    rows = []
    for i in range(B):
        one = x[i : i + 1] if first else x[i][:, None]
        y, (hidden, cells) = module(one)
        rows.append(torch.autograd.grad(y.sin().sum() + (hidden * cells).sum(), list(module.parameters())))
    expected = [torch.stack(parts) for parts in zip(*rows, strict=True)]

    def loss_fn(params, x):
        y, (h, c) = model.apply(params, x)
        return y.sin().sum() + (h * c).sum()

    assert difference(list(per_sample.grads(loss_fn, params, x).values()), expected) < 1e-10


# Transforms


def small():
    module = module_of(nn.Sequential, nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return (module, *models.from_module(module))


def test_any_axis_of_vmap_is_taken():
    module, params, model = small()
    expected = module(X).detach()
    torch.testing.assert_close(vmap(model.apply, (None, 1))(params, X.T), expected)
    torch.testing.assert_close(vmap(model.apply, (None, 1), out_dims=1)(params, X.T), expected.T)


def test_nested_vmaps_are_taken():
    module, params, model = small()
    x = normals(2, 3, 3)
    expected = module(x).detach()
    torch.testing.assert_close(vmap(vmap(model.apply, (None, 0)), (None, 0))(params, x), expected)
    torch.testing.assert_close(vmap(vmap(model.apply, (None, 0)), (None, 1), 1)(params, x), expected)
    params2, model2 = models.from_module(module, example_ndim=1)
    torch.testing.assert_close(vmap(model2.apply, (None, 0))(params2, x), expected)


def test_parameters_of_several_models_are_mapped_over():
    _, params, model = small()
    stacked = tree.map(lambda p: torch.stack([p, 2 * p, -p]), params)
    found = vmap(vmap(model.apply, (None, 0)), (0, None))(stacked, X)
    each = vmap(model.apply, (0, 0))(stacked, X[:3])
    for i, factor in enumerate((1, 2, -1)):
        mine = tree.map(lambda p, f=factor: f * p, params)
        torch.testing.assert_close(found[i], vmap(model.apply, (None, 0))(mine, X), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(each[i], model.apply(mine, X[i]), rtol=1e-12, atol=1e-12)
    shared = vmap(model.apply, (0, None))(stacked, X[0])
    torch.testing.assert_close(shared[1], model.apply(tree.map(lambda p: 2 * p, params), X[0]), rtol=1e-12, atol=1e-12)


def test_gradients_outside_and_inside_of_vmap_are_those_of_the_module():
    module, params, model = small()

    def loss_fn(params, x):
        return model.apply(params, x).sin().sum()

    rows = [torch.autograd.grad(module(x[None]).sin().sum(), list(module.parameters())) for x in X]
    expected = [torch.stack(parts) for parts in zip(*rows, strict=True)]
    inside = vmap(grad(loss_fn), (None, 0))(params, X)
    assert difference(list(inside.values()), expected) < 1e-10
    outside = grad(lambda params: vmap(loss_fn, (None, 0))(params, X).sum())(params)
    assert difference(list(outside.values()), [g.sum(0) for g in expected]) < 1e-10
    by_input = vmap(grad(loss_fn, 1), (None, 0))(params, X)
    x = X.clone().requires_grad_()
    assert difference([by_input], list(torch.autograd.grad(module(x).sin().sum(), x))) < 1e-10


@pytest.mark.parametrize("way", ["apply", "norms"])
def test_a_module_compiles_as_one_graph(way):
    """With one input, and with several under `vmap(grad)`."""
    module = module_of()
    params, model = models.from_module(module, example_ndim={"x": 1, "tokens": 1})

    def loss_fn(params, x, tokens):
        return model.apply(params, x, tokens=tokens).sin().sum()

    def fn(params, x, tokens):
        return model.apply(params, x) if way == "apply" else per_sample.norms(loss_fn, params, x, tokens)

    torch._dynamo.reset()
    fused = torch.compile(fn, fullgraph=True, dynamic=False, backend="eager")(params, X, TOKENS)
    torch.testing.assert_close(fused, fn(params, X, TOKENS), rtol=1e-10, atol=1e-12)


def test_keys_are_one_for_each_example_in_all_leading_axes_and_under_vmap():
    params, model = models.from_module(nn.Dropout(0.5), example_ndim=1)
    x, keys = torch.ones(2, 3, 8), random.split(random.key(0), 6).view(2, 3, 2)
    expected = torch.stack(
        [torch.stack([model.apply(params, x[i, j], key=keys[i, j]) for j in range(3)]) for i in range(2)]
    )
    assert torch.equal(model.apply(params, x, key=keys), expected)

    def apply(x, key):
        return model.apply(params, x, key=key)

    assert torch.equal(vmap(apply)(x, keys), expected)
    assert torch.equal(vmap(vmap(apply))(x, keys), expected)
    assert torch.equal(vmap(apply, (1, 1), 1)(x, keys), expected)
    assert torch.equal(vmap(apply, (None, 0))(x[0, 0], keys[0]), expected[0])
    same = vmap(apply, (0, None))(x[0], keys[0, 0])
    assert torch.equal(same, expected[0, :1].expand(3, 8))
