"""What is random in a module: drawn from the key of each example, whatever its batch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import vmap
from torchvision.ops import StochasticDepth, stochastic_depth
from zoo import D, difference, normals

from functorch_mnist import models, per_sample, random, tree


class Calls(nn.Module):
    def __init__(self, fn, **layers):
        super().__init__()
        self.fn = fn
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.fn(self, x)


class DropPath(nn.Module):
    """Paths dropped example by example, as vision models write it."""

    def forward(self, x):
        keep = 0.5
        if not self.training:
            return x
        mask = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep)
        mask.div_(keep)
        return x * mask


def path_by_rand(module, x):
    if not module.training:
        return x
    mask = (0.5 + torch.rand((x.shape[0],) + (1,) * (x.dim() - 1), dtype=x.dtype)).floor_()
    return x.div(0.5) * mask


def attention(module, x, *, weights):
    return module.a(x, x, x, need_weights=weights)[0]


MODULES = {
    "stochastic depth": lambda: StochasticDepth(0.5, "row"),
    "drop path": DropPath,
    "drop path by rand": lambda: Calls(path_by_rand),
    "drop path beside": lambda: Calls(lambda module, x: x + module.a(x), a=DropPath()),
    "attention, weights": lambda: Calls(
        lambda module, x: attention(module, x, weights=True), a=nn.MultiheadAttention(4, 2, 0.5, batch_first=True)
    ),
    "attention, no weights": lambda: Calls(
        lambda module, x: attention(module, x, weights=False), a=nn.MultiheadAttention(4, 2, 0.5, batch_first=True)
    ),
    "lstm": lambda: Calls(lambda module, x: module.a(x)[0], a=nn.LSTM(4, 3, 3, dropout=0.5, batch_first=True)),
    "gru": lambda: Calls(lambda module, x: module.a(x)[0], a=nn.GRU(4, 3, 2, dropout=0.5, batch_first=True)),
    "encoder": lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5, batch_first=True),
    "merged": lambda: Calls(
        lambda module, x: (
            F.dropout(x.transpose(0, 1).flatten(0, 1), 0.5, module.training)
            .view(x.shape[1], x.shape[0], -1)
            .transpose(0, 1)
        )
    ),
}


def keyed(name):
    torch.manual_seed(0)
    return models.from_module(MODULES[name]().to(D), example_ndim=2)


KEYS = random.split(random.key(3), 6)
X = normals(6, 3, 4)


@pytest.mark.parametrize("name", MODULES)
def test_under_keys_a_batch_is_the_stack_of_its_examples(name):
    params, model = keyed(name)
    batch = model.apply(params, X, key=KEYS)
    rows = torch.stack([model.apply(params, x, key=key) for x, key in zip(X, KEYS, strict=True)])
    exact = name.split(",")[0] in ("stochastic depth", "drop path", "drop path by rand", "drop path beside", "merged")
    if exact:
        assert torch.equal(batch, rows)
    else:  # products of other sizes: a rounding
        torch.testing.assert_close(batch, rows, rtol=1e-12, atol=1e-12)
    pairs = torch.cat([model.apply(params, X[i : i + 2], key=KEYS[i : i + 2]) for i in (0, 2, 4)])
    torch.testing.assert_close(pairs, batch, rtol=1e-12, atol=1e-12)

    def apply(x, key):
        return model.apply(params, x, key=key)

    torch.testing.assert_close(vmap(apply)(X, KEYS), batch, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(batch, model.apply(params, X))
    assert len({tuple(y.flatten().tolist()) for y in model.apply(params, X[:1].expand(6, 3, 4), key=KEYS)}) > 1


@pytest.mark.parametrize(
    "name", [name for name in MODULES if name.split(",")[0] in ("attention", "lstm", "gru", "encoder")]
)
def test_sample_gradients_under_keys_are_those_of_each_example_alone(name):
    params, model = keyed(name)

    def loss_fn(params, x, key):
        return model.apply(params, x, key=key).sin().sum()

    rows = []
    for x, key in zip(X, KEYS, strict=True):
        leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
        rows.append(torch.autograd.grad(loss_fn(leaves, x, key), list(leaves.values())))
    expected = {n: torch.stack([row[j] for row in rows]) for j, n in enumerate(params)}
    assert difference(per_sample.grads(loss_fn, params, X, KEYS), expected) < 1e-10
    plan = per_sample.plan(loss_fn, params, X[0], KEYS[0], batch_size=6)
    assert "dense" not in [row.way for row in plan.rows]


RATES = {
    "dropout": (lambda x: F.dropout(x, 0.3), 0.3),
    "rand_like": (lambda x: (torch.rand_like(x) >= 0.3) * x, 0.3),
    "rand": (lambda x: (torch.rand(x.shape) >= 0.3) * x, 0.3),
    "bernoulli_": (lambda x: torch.empty_like(x).bernoulli_(0.7), 0.3),
    "bernoulli_ by name": (lambda x: torch.empty_like(x).bernoulli_(p=0.7), 0.3),
    "bernoulli of a tensor": (lambda x: torch.bernoulli(0.7 * x), 0.3),
    "bernoulli of a rate": (lambda x: x.bernoulli(0.7), 0.3),
    "bernoulli of a rate by name": (lambda x: torch.bernoulli(x, p=0.7), 0.3),
    "bernoulli_ of a tensor": (lambda x: torch.empty_like(x).bernoulli_(0.7 * x), 0.3),
    "stochastic depth": (lambda x: stochastic_depth(x, 0.3, "row"), 0.3),
    "attention": (
        lambda x: F.scaled_dot_product_attention(
            torch.zeros_like(x)[..., None], torch.zeros_like(x)[..., None],
            torch.eye(x.shape[1], dtype=x.dtype).expand(len(x), -1, -1), dropout_p=0.3,
        ), 0.3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RATES)
def test_draws_keep_their_rate(name):
    fn, rate = RATES[name]
    params, model = models.from_module(Calls(lambda module, x: fn(x)), example_ndim=1)
    count, width = 2000, 20
    x, keys = torch.ones(count, width), random.split(random.key(0), count)
    zero = (model.apply(params, x, key=keys) == 0).double()
    draws = count if name == "stochastic depth" else zero.numel()
    # Five standard deviations of a mean of so many coins.
    assert zero.mean().item() == pytest.approx(rate, abs=5 * (rate * (1 - rate) / draws) ** 0.5)


@pytest.mark.parametrize("p", [0, 1])
def test_rates_of_0_and_1_need_no_draw(p):
    for kind in (nn.Dropout(p), nn.Dropout1d(p), nn.Dropout(p, inplace=True)):
        params, model = models.from_module(kind, example_ndim=2)
        out = model.apply(params, X.clone(), key=KEYS)
        assert torch.equal(out, X * (1 - p))


def layer_drop(module, x):
    if module.training and torch.rand([]) < 0.5:
        return x
    return module.a(x)


def test_a_draw_for_a_whole_batch_is_refused_by_name_and_right_for_one_example():
    torch.manual_seed(0)
    module = Calls(layer_drop, a=nn.Linear(4, 4)).to(D)
    params, model = models.from_module(module, example_ndim=2)
    with pytest.raises(ValueError, match=r"draws of its own.*calls rand once for a whole batch"):
        model.apply(params, X, key=KEYS)
    found = [model.apply(params, x, key=key) for x, key in zip(X, KEYS, strict=True)]
    dropped = [torch.equal(y, x) for x, y in zip(X, found, strict=True)]
    assert 0 < sum(dropped) < 6
    for x, y, drop in zip(X, found, dropped, strict=True):
        if not drop:
            torch.testing.assert_close(y, module.a(x).detach(), rtol=1e-12, atol=1e-12)
    again = [model.apply(params, x, key=key) for x, key in zip(X, KEYS, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    torch.testing.assert_close(model.apply(params, X), module.a(X).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["batch"])
def test_stochastic_depth_of_a_batch_is_refused_by_name(mode):
    params, model = models.from_module(StochasticDepth(0.5, mode), example_ndim=2)
    with pytest.raises(ValueError, match=r"draws of its own.*calls bernoulli_ once for a whole batch"):
        model.apply(params, X, key=KEYS)


def test_two_draws_of_one_forward_are_different_and_another_key_draws_anew():
    params, model = models.from_module(
        Calls(lambda module, x: (torch.rand_like(x), torch.rand_like(x))), example_ndim=2
    )
    a, b = model.apply(params, X, key=KEYS)
    assert not (a == b).any()
    other, _ = model.apply(params, X, key=random.split(random.key(4), 6))
    assert not (a == other).any()
    again = model.apply(params, X, key=KEYS)
    assert torch.equal(a, again[0]) and torch.equal(b, again[1])
    assert tree.leaves(params) == []
