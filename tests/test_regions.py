"""A module inside a loss of one example: nothing wrong in silence, and where the batch lies."""

import collections
import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, vmap
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from zoo import D, difference, normals

from functorch_mnist import models, per_sample, random, tree

B = 4


def drawn(module, *, seed=0):
    """The module in double precision, its parameters drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    module = module.to(D)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=D) / max(1, p.shape[-1] if p.dim() else 1) ** 0.5)
    return module


def alone(module, x, *, axis=0):
    """The untouched module, one example after another."""
    rows = [module(x[i].unsqueeze(min(axis, x.dim() - 1))) for i in range(len(x))]
    return torch.stack([row.squeeze(min(axis, row.dim() - 1)) for row in rows]).detach()


def by_autograd(module, x, *, axis=0, target=None):
    """The sample gradients of `sin(output)` summed, by torch.autograd.grad of the untouched module in a loop."""
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    rows = []
    for i in range(len(x)):
        out = module(x[i].unsqueeze(min(axis, x.dim() - 1)))
        found = torch.autograd.grad(out.sin().sum(), list(named.values()), allow_unused=True)
        rows.append([torch.zeros_like(p) if g is None else g for g, p in zip(found, named.values(), strict=True)])
    return {name: torch.stack([row[j] for row in rows]) for j, name in enumerate(named)}


def loss_of(model):
    return lambda params, x: model.apply(params, x).sin().sum()


def assert_as_alone(module, x, *, axis=0, dense=frozenset()):
    """Outputs and sample gradients are those of the untouched module in a loop; only `dense` is dense."""
    params, model = models.from_module(module, example_ndim=x.dim() - 1, batch_axis=axis)
    torch.testing.assert_close(model.apply(params, x), alone(module, x, axis=axis), rtol=1e-10, atol=1e-12)
    expected = by_autograd(module, x, axis=axis)
    flat = torch.cat([g.flatten(1) for g in expected.values()], 1)
    loss_fn = loss_of(model)
    assert difference(per_sample.grads(loss_fn, params, x), expected) < 1e-10
    torch.testing.assert_close(per_sample.norms(loss_fn, params, x), flat.norm(dim=1), rtol=1e-10, atol=1e-12)
    weights = normals(len(x), seed=7)
    found = per_sample.weighted_sum(loss_fn, params, x, weights=weights)
    assert difference(found, tree.map(lambda g: torch.einsum("b,b...->...", weights, g), expected)) < 1e-10
    plan = per_sample.plan(loss_fn, params, x[0], batch_size=len(x))
    assert {row.path for row in plan.rows if row.way == "dense"} == dense
    assert plan.slow == ()


class Calls(nn.Module):
    """Layers, and a forward that is one function of them and the batch."""

    def __init__(self, fn, **layers):
        super().__init__()
        self.fn = fn
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.fn(self, x)


# No trace


class TwoNames(nn.Module):
    """A layer that has two names, another that is tied to it, and both within a nested module."""

    def __init__(self, *, shares, ties, nests):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = self.first if shares else nn.Linear(3, 3)
        self.third = nn.Linear(3, 3)
        if ties:
            self.third.weight = self.first.weight
        self.inner = nn.Sequential(nn.Tanh(), self.first, self.third) if nests else nn.Identity()

    def forward(self, x):
        return self.inner(self.third(self.second(self.first(x).tanh()).tanh()))


@pytest.mark.parametrize("nests", [False, True])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("shares", [False, True])
def test_a_later_call_uses_its_own_parameters_whatever_shares_a_name(shares, ties, nests):
    module = drawn(TwoNames(shares=shares, ties=ties, nests=nests))
    params, model = models.from_module(module, example_ndim=1)
    x, initial = normals(B, 3), model.init(random.key(3))
    for seed in range(3):
        other = drawn(module, seed=seed)
        given = {name: p.detach().clone() for name, p in other.named_parameters()}
        torch.testing.assert_close(model.apply(given, x), alone(other, x), rtol=1e-12, atol=1e-12)
        assert difference(per_sample.grads(loss_of(model), given, x), by_autograd(other, x)) < 1e-10
        again = model.init(random.key(3))
        assert all(torch.equal(again[name], initial[name]) for name in params)


def test_a_forward_that_raises_half_way_leaves_no_trace():
    def fn(module, x):
        module.seen = module.a(x)
        module.kept.append(module.seen)
        hidden = module.b(module.seen)
        if x.shape[-1] > 3 or x.shape[1] == 2:
            raise ArithmeticError("half-way")
        return hidden

    module = drawn(Calls(fn, a=nn.Linear(3, 3), b=nn.Linear(3, 2)))
    module.kept = []
    params, model = models.from_module(module, example_ndim=2)
    x = normals(B, 4, 3)
    expected = module(x)
    for i in range(3):
        with pytest.raises(ArithmeticError, match="half-way"):
            model.apply(tree.map(lambda p, more=i + 1: p + more, params), x[:, :2])
        torch.testing.assert_close(model.apply(params, x), expected, rtol=1e-12, atol=1e-12)
    assert len(module.kept) == 1


def test_threads_that_call_at_once_use_their_own_parameters():
    module = drawn(TwoNames(shares=True, ties=True, nests=True))
    params, model = models.from_module(module, example_ndim=1)
    x, faults = normals(B, 3), []

    def work(number):
        mine = tree.map(lambda p: p * (1 + number), params)
        first = model.apply(mine, x)
        for _ in range(30):
            if not torch.equal(model.apply(mine, x), first):
                faults.append(number)
        found[number] = first

    found = {}
    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    for number in range(4):
        assert torch.equal(found[number], model.apply(tree.map(lambda p, times=1 + number: p * times, params), x))
    assert len({float(value.sum()) for value in found.values()}) == 4


def cache_of_a_dict(module, x):
    if "bias" not in module.cache:
        module.cache["bias"] = module.table[module.index]
    return module.a(x) + module.cache["bias"]


def plain_attribute(module, x):
    if getattr(module, "kept", None) is None:
        module.kept = module.a.weight.sum(0)
    return module.a(x) * module.kept


def list_appended_to(module, x):
    module.cache_list.append(module.a.weight.exp())
    return module.a(x) + sum([w.sum() for w in module.cache_list])


def hook_installed(module, x):
    if not hasattr(module, "hooked"):
        weight, module.hooked = module.a.weight, True
        module.a.register_forward_hook(lambda layer, inputs, out: out + weight.sum())
    return module.a(x)


class Caching(Calls):
    def __init__(self, fn):
        super().__init__(fn, a=nn.Linear(3, 3))
        self.table = nn.Parameter(torch.zeros(5))
        self.index = torch.tensor([4, 0, 2])
        self.cache, self.cache_list = {}, []

    def train(self, mode=True):
        self.cache = {}
        return super().train(mode)


@pytest.mark.parametrize("filled", ["never", "under grad", "under no_grad"])
@pytest.mark.parametrize("fn", [cache_of_a_dict, plain_attribute, list_appended_to, hook_installed])
def test_what_a_forward_keeps_is_kept_for_that_call_alone(fn, filled):
    module = drawn(Caching(fn)).eval()
    if filled != "never" and fn is cache_of_a_dict:
        with torch.set_grad_enabled(filled == "under grad"):
            module(normals(B, 3))
    _, model = models.from_module(module, example_ndim=1)
    for seed in (1, 2):
        other = drawn(Caching(fn), seed=seed)
        given = {name: p.detach().clone() for name, p in other.named_parameters()}
        x = normals(B, 3, seed=seed)

        def fresh(x, other=other):
            twin = Caching(fn).to(D)
            twin.load_state_dict(other.state_dict())
            return twin(x)

        torch.testing.assert_close(model.apply(given, x), fresh(x).detach(), rtol=1e-12, atol=1e-12)
        rows = []
        for i in range(B):
            twin = Caching(fn).to(D)
            twin.load_state_dict(other.state_dict())
            found = torch.autograd.grad(twin(x[i : i + 1]).sin().sum(), list(twin.parameters()), allow_unused=True)
            rows.append(
                [torch.zeros_like(p) if g is None else g for g, p in zip(found, twin.parameters(), strict=True)]
            )
        names = [name for name, _ in other.named_parameters()]
        expected = {name: torch.stack([row[j] for row in rows]) for j, name in enumerate(names)}
        assert difference(per_sample.grads(loss_of(model), given, x), expected) < 1e-10
    assert module.cache_list == []


def test_a_hook_that_a_forward_adds_leaves_those_that_were_there():
    def fn(module, x):
        module.a.register_forward_hook(lambda layer, inputs, out: out + 1)
        return module.a(x)

    module = drawn(Calls(fn, a=nn.Linear(3, 3)))
    module.a.register_forward_hook(lambda layer, inputs, out: out * 2)
    params, model = models.from_module(module, example_ndim=1)
    x = normals(B, 3)
    for _ in range(3):
        expected = 2 * F.linear(x, params["a.weight"], params["a.bias"]) + 1
        torch.testing.assert_close(model.apply(params, x), expected, rtol=1e-12, atol=1e-12)


def test_a_dict_of_another_kind_stays_one():
    def fn(module, x):
        module.seen["a"].append(module.a(x))
        return sum(module.seen["a"])

    module = drawn(Calls(fn, a=nn.Linear(3, 3)))
    module.seen = collections.defaultdict(list)
    params, model = models.from_module(module, example_ndim=1)
    x = normals(B, 3)
    torch.testing.assert_close(model.apply(params, x), F.linear(x, params["a.weight"], params["a.bias"]))
    assert module.seen == {}


def test_calls_one_after_another_share_a_copy_of_the_module():
    copies = []

    def fn(module, x):
        if not any([module is other for other in copies]):
            copies.append(module)
        return module.a(x)

    params, model = models.from_module(drawn(Calls(fn, a=nn.Linear(3, 3))), example_ndim=1)
    for count in (B, B, 2):
        model.apply(params, normals(count, 3))
    assert len(copies) == 1


@pytest.mark.parametrize("where", ["attribute", "list", "tuple", "list in a dict", "buffer"])
def test_a_tensor_computed_from_parameters_that_is_kept_already_is_refused(where):
    module = drawn(Calls(lambda module, x: module.a(x), a=nn.Linear(3, 3)))
    kept = module.a.weight.exp()
    if where == "buffer":
        module.register_buffer("cache", kept)
    else:
        module.cache = {"attribute": kept, "list": [kept], "tuple": (1, (kept,)), "list in a dict": {"a": [kept]}}[
            where
        ]
    with pytest.raises(ValueError, match=r"may not keep tensors that are computed from its parameters.*'cache'"):
        models.from_module(module)


def test_a_tensor_computed_from_parameters_that_is_kept_in_dicts_is_made_anew():
    def fn(module, x):
        if "b" not in module.cache.setdefault("a", {}):
            module.cache["a"]["b"] = module.a.weight.exp()
        return module.a(x) @ module.cache["a"]["b"]

    module = drawn(Calls(fn, a=nn.Linear(3, 3)))
    module.cache = {}
    x = normals(B, 3)
    module(x)
    params, model = models.from_module(module, example_ndim=1)
    changed = tree.map(lambda p: p + 1, params)
    expected = F.linear(x, changed["a.weight"], changed["a.bias"]) @ changed["a.weight"].exp()
    torch.testing.assert_close(model.apply(changed, x), expected, rtol=1e-12, atol=1e-12)


# Where the batch lies


def first_of(layer):
    return Calls(lambda module, x: module.layer(x)[0], layer=layer)


TIME_FIRST = {
    "lstm": lambda first: first_of(nn.LSTM(4, 3, batch_first=first)),
    "encoder": lambda first: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=first), 1, enable_nested_tensor=False
    ),
    "transformer": lambda first: Calls(
        lambda module, x: module.layer(x, x.flip(-1)), layer=nn.Transformer(4, 2, 1, 1, 8, 0.0, batch_first=first)
    ),
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("name", TIME_FIRST)
def test_a_time_first_module_is_refused_and_the_way_out_named(name):
    params, model = models.from_module(drawn(TIME_FIRST[name](False)), example_ndim=2)
    x = normals(B, 5, 4)
    for call in (lambda: model.apply(params, x), lambda: per_sample.norms(loss_of(model), params, x)):
        with pytest.raises(ValueError, match=r"examples must not mix.*batch_axis=1 for batch_first=False"):
            call()


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("name", TIME_FIRST)
def test_a_time_first_module_with_its_batch_axis_is_as_alone(name):
    assert_as_alone(drawn(TIME_FIRST[name](False)).eval(), normals(B, 5, 4), axis=1)


@pytest.mark.parametrize("name", TIME_FIRST)
def test_a_batch_first_module_is_as_alone(name):
    assert_as_alone(drawn(TIME_FIRST[name](True)).eval(), normals(B, 5, 4))


def merged(module, x):  # (B, T, 3)
    return module.a(x.view(-1, x.shape[-1])).view(x.shape[0], -1)


def merged_time_first(module, x):
    return module.a(x.transpose(0, 1).reshape(-1, x.shape[-1])).view(x.shape[1], x.shape[0], -1).transpose(0, 1)


def heads_first(module, x):  # (heads · B, T, d)
    parts = module.a(x).view(*x.shape[:2], 2, -1).permute(2, 0, 1, 3).reshape(2 * x.shape[0], x.shape[1], -1)
    mixed = module.b((parts @ parts.mT).softmax(-1) @ parts)
    return mixed.view(2, x.shape[0], x.shape[1], -1).permute(1, 2, 0, 3).flatten(2)


def windows(module, x):  # (B, 4, 3) in windows of two
    parts = x.view(x.shape[0], 2, 2, 3).permute(2, 0, 1, 3).reshape(-1, 2, 3)  # places · B, two each
    return module.a(parts).view(2, x.shape[0], 2, -1).permute(1, 2, 0, 3).flatten(1)


def sandwiched(module, x):  # 2 · B · 2 along one axis
    rows = x.view(x.shape[0], 2, 2, 3).permute(1, 0, 2, 3).reshape(-1, 3)
    return module.a(rows).tanh().view(2, x.shape[0], 2, -1).transpose(0, 1).flatten(1)


def batch_last(module, x):
    columns = x.flatten(1).t()  # (12, B)
    return (module.c @ columns).t()


def positions(module, x):  # the same for each example
    return module.a(x) + module.e(torch.arange(4).repeat(len(x))).view(len(x), 4, -1)


def positions_time_first(module, x):
    return module.a(x) + module.e(torch.arange(4).repeat_interleave(len(x))).view(4, len(x), -1).transpose(0, 1)


MERGED = {
    fn.__name__: fn
    for fn in (
        merged, merged_time_first, heads_first, windows, sandwiched, batch_last, positions, positions_time_first,
    )
}  # fmt: skip


@pytest.mark.parametrize("name", MERGED)
def test_the_batch_is_found_wherever_it_is_merged(name):
    module = Calls(MERGED[name], a=nn.Linear(3, 4), b=nn.Linear(2, 2))
    if name == "batch_last":
        module.c = nn.Parameter(torch.zeros(2, 12))
    if name.startswith("positions"):
        module.e = nn.Embedding(4, 4)
    module = drawn(module)
    unused = {"heads_first": set(), "batch_last": {"a.weight", "a.bias", "b.weight", "b.bias"}}
    assert_as_alone(module, normals(B, 4, 3), dense=unused.get(name, {"b.weight", "b.bias"}))


def test_an_op_whose_batch_axis_cannot_be_told_is_refused_by_name():
    def fn(module, x):
        square = (x.mean((1, 2))[:, None] + x.new_zeros(len(x))) * module.scale  # (B, B)
        return square[:, 0]

    module = Calls(fn)
    module.scale = nn.Parameter(torch.ones(()))
    params, model = models.from_module(drawn(module), example_ndim=2)
    with pytest.raises(ValueError, match=r"examples must not mix.*of mul has the shapes \(2, 2\) and \(3, 3\)"):
        per_sample.norms(loss_of(model), params, normals(B, 4, 3))


# What mixes examples


MIXING = {
    "a mean over the batch is taken off": lambda module, x: module.a(x - x.mean(0)),
    "after a layer": lambda module, x: (h := module.a(x)) - h.mean(0, keepdim=True),
    "softmax over the batch": lambda module, x: module.a(x).softmax(0),
    "a contrastive loss": lambda module, x: (z := F.normalize(module.a(x))) @ z.t(),
    "a contrastive loss for each": lambda module, x: ((z := F.normalize(module.a(x))) @ z.t()).logsumexp(1),
    "sorting": lambda module, x: module.a(x).sort(0).values,
    "sorting of inputs": lambda module, x: module.a(x.sort(0).values),
    "a cumulative sum": lambda module, x: module.a(x).cumsum(0),
    "a roll": lambda module, x: module.a(x).roll(1, 0),
    "a flip": lambda module, x: module.a(x).flip(0),
    "a loss that is a mean": lambda module, x: module.a(x).square().mean(),
    "a sum over the batch": lambda module, x: module.a(x).sum(0),
    "distances": lambda module, x: torch.cdist(module.a(x), module.a(x)),
    "distances to the nearest": lambda module, x: torch.cdist(h := module.a(x), h).sum(1),
    "the batch size": lambda module, x: module.a(x) / x.shape[0],
    "the first example": lambda module, x: module.a(x) + module.a(x[:1]),
    "the last example": lambda module, x: module.a(x[-1:]).expand(len(x), -1),
    "batch norm": lambda module, x: F.batch_norm(module.a(x), None, None, training=True),
    "the number of an example": lambda module, x: module.a(x) + torch.arange(len(x))[:, None],
    "an average by weights": lambda module, x: module.a(x) * (x.sum(1) / x.sum())[:, None],
    "attention over the batch": lambda module, x: F.scaled_dot_product_attention(module.a(x), x, x),
    "an einsum over the batch": lambda module, x: torch.einsum("bi,ci->bc", module.a(x), module.a(x)).sum(1),
    "the largest of the batch": lambda module, x: module.a(x) / x.abs().amax(),
    "a rank": lambda module, x: module.a(x) * x.argsort(0),
}


@pytest.mark.parametrize("name", MIXING)
def test_a_module_that_mixes_examples_is_refused_before_any_number(name):
    params, model = models.from_module(drawn(Calls(MIXING[name], a=nn.Linear(3, 3))), example_ndim=1)
    x = normals(B, 3)
    for call in (
        lambda: model.apply(params, x),
        lambda: model.apply(params, x[0]),
        lambda: per_sample.norms(loss_of(model), params, x),
        lambda: vmap(model.apply, (None, 0))(params, x),
    ):
        with pytest.raises(ValueError, match="examples must not mix"):
            call()


def test_the_output_that_mixes_is_named():
    def fn(module, x):
        return {"plain": x, "mixed": module.a(x) - x.mean(0)}

    for forward, found in ((fn, r"of output \['mixed'\], "), (MIXING["a roll"], "of its output, ")):
        params, model = models.from_module(drawn(Calls(forward, a=nn.Linear(3, 3))), example_ndim=1)
        with pytest.raises(ValueError, match=found):
            model.apply(params, normals(B, 3))


def test_an_output_with_other_axes_for_another_batch_size_is_refused():
    params, model = models.from_module(drawn(Calls(lambda m, x: x if len(x) == 2 else x[:, None])), example_ndim=1)
    with pytest.raises(ValueError, match=r"examples must not mix.*another number of axes for another batch size"):
        model.apply(params, normals(B, 3))


@pytest.mark.parametrize("row", [[1, 2, 1], [3, 3, 3], [1, 2, 2], [2, 0, 1]])
def test_integers_that_mix_are_refused_where_all_examples_are_equal(row):
    module = drawn(Calls(lambda module, x: module.a(x) - module.a(x).mean(0), a=nn.Embedding(4, 3)))
    params, model = models.from_module(module, example_ndim=1)
    with pytest.raises(ValueError, match="examples must not mix"):
        model.apply(params, torch.tensor([row] * B))


@pytest.mark.parametrize("merge", [merged_time_first, merged])
def test_mixing_along_a_merged_axis_is_refused(merge):
    def fn(module, x):
        hidden = merge(module, x)
        rows = hidden.reshape(-1, 3)
        return (rows - rows.mean(0)).view_as(hidden)

    params, model = models.from_module(drawn(Calls(fn, a=nn.Linear(3, 3))), example_ndim=2)
    for call in (
        lambda: model.apply(params, normals(B, 2, 3)),
        lambda: per_sample.norms(loss_of(model), params, normals(B, 2, 3)),
    ):
        with pytest.raises(ValueError, match="examples must not mix"):
            call()


# Branches on data


class Masked(nn.Module):
    """Takes a fast path where nothing is masked."""

    def __init__(self, *, effect):
        super().__init__()
        self.a, self.effect = nn.Linear(3, 2), effect

    def forward(self, x, mask):
        h = self.a(x)
        if mask.all():
            return h * (2 if self.effect else 1)
        return torch.where(mask[..., None], h, 0.0)


MASK = torch.tensor([[True, True], [True, False], [True, True], [False, True]])


def test_a_branch_with_an_effect_is_refused_for_a_batch_that_would_take_both():
    params, model = models.from_module(drawn(Masked(effect=True)), example_ndim={"x": 2, "mask": 1})
    x = normals(B, 2, 3)
    for call in (
        lambda: model.apply(params, x, MASK),
        lambda: per_sample.norms(lambda p, x, m: model.apply(p, x, m).sin().sum(), params, x, MASK),
    ):
        with pytest.raises(ValueError, match=r"branches on its data.*torch\.where"):
            call()


def test_a_branch_without_effect_is_as_alone_for_any_batch():
    module = drawn(Masked(effect=False))
    params, model = models.from_module(module, example_ndim={"x": 2, "mask": 1})
    x = normals(B, 2, 3)

    def loss_fn(params, x, mask):
        return model.apply(params, x, mask).sin().sum()

    for mask in (MASK, MASK[[0, 0, 2, 2]], MASK[[1, 3, 1, 3]], MASK.flip(0)):
        rows = torch.cat([module(x[i : i + 1], mask[i : i + 1]) for i in range(B)]).detach()
        torch.testing.assert_close(model.apply(params, x, mask), rows, rtol=1e-12, atol=1e-12)
        norms = [
            torch.cat(
                [
                    g.flatten()
                    for g in torch.autograd.grad(module(x[i : i + 1], mask[i : i + 1]).sin().sum(), module.parameters())
                ]
            ).norm()
            for i in range(B)
        ]
        torch.testing.assert_close(per_sample.norms(loss_fn, params, x, mask), torch.stack(norms), rtol=1e-10, atol=0)


def test_a_branch_without_effect_may_run_other_ops_of_its_parameters():
    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 2)

        def forward(self, x, mask):
            if mask.all():
                return self.a(x)
            return torch.where(mask[..., None], x @ self.a.weight.t() + self.a.bias, self.a(x))

    module = drawn(Either())
    params, model = models.from_module(module, example_ndim={"x": 2, "mask": 1})
    x = normals(B, 2, 3)
    expected = by_autograd(module.a, x)
    for mask in (MASK, MASK.flip(0)):
        found = per_sample.factored(lambda p, x, m: model.apply(p, x, m).sin().sum(), params, x, mask).grads()
        assert difference(list(found.values()), list(expected.values())) < 1e-10


@pytest.mark.parametrize("effect", [False, True])
def test_a_batch_that_takes_one_branch_is_as_alone(effect):
    module = drawn(Masked(effect=effect))
    params, model = models.from_module(module, example_ndim={"x": 2, "mask": 1})
    x = normals(2, 2, 3)
    for mask in (MASK[[0, 2]], MASK[[1, 3]]):
        rows = torch.cat([module(x[i : i + 1], mask[i : i + 1]) for i in range(2)]).detach()
        torch.testing.assert_close(model.apply(params, x, mask), rows, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count", [1, 2, B])
def test_each_of_several_examples_is_run_again_up_to_the_last_branch(count):
    runs = []

    def fn(module, x):
        runs.append("before")
        h = module.a(x)
        if (h > -1e9).all():
            h = h + 1
        runs.append("after")
        return h

    params, model = models.from_module(drawn(Calls(fn, a=nn.Linear(3, 2))), example_ndim=1)
    x = normals(count, 3)
    model.apply(params, x)
    runs.clear()
    model.apply(params, x)
    assert runs == ["before", "after"] + ["before"] * (count if count > 1 else 0)


@pytest.mark.parametrize("dtype", [D, torch.complex128])
def test_a_branch_on_a_mask_goes_by_the_mask_of_the_call_whatever_lies_beside_it(dtype):
    def fn(module, x, mask):
        h = module.a(x.real)
        return h if mask.all() else h * x.shape[0]  # this one would mix

    class Pair(Calls):
        def forward(self, x, mask):
            return self.fn(self, x, mask)

    module = Pair(fn, a=nn.Linear(3, 2)).to(D)
    params, model = models.from_module(module, example_ndim={"x": 1, "mask": 1})
    mask = torch.ones(B, 2, dtype=torch.bool)
    for x in (torch.zeros(B, 3, dtype=dtype), normals(B, 3).to(dtype)):
        torch.testing.assert_close(model.apply(params, x, mask), module.a(x.real).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("times", [0, 2, 3])
def test_a_selection_that_hangs_on_numbers_is_refused_whether_it_takes_more_or_less(times):
    def fn(module, x):  # each once when it is tried
        rows = x.repeat_interleave((x[:, 0] < 100).long() + times * (x[:, 0] > 100).long(), 0)
        return module.a(rows)

    params, model = models.from_module(drawn(Calls(fn, a=nn.Linear(3, 2))), example_ndim=1)
    with pytest.raises(ValueError, match=rf"Found that linear gets \({times}, 3\)"):
        per_sample.norms(loss_of(model), params, normals(B, 3) + 1000)


# Writing to parameters


def under_no_grad(module, x):
    with torch.no_grad():
        module.a.weight.mul_(0.9)
    return module.a(x)


def by_data(module, x):
    module.a.weight.data *= 0.9
    return module.a(x)


def by_data_of_a_view(module, x):
    with torch.no_grad():
        module.a.weight[0].zero_()
    return module.a(x)


def by_copy(module, x):
    with torch.no_grad():
        module.a.weight.copy_(module.a.weight / module.a.weight.norm())
    return module.a(x)


def by_assignment(module, x):
    with torch.no_grad():
        module.a.weight[0] = 0.0
    return module.a(x)


@pytest.mark.parametrize("fn", [under_no_grad, by_data, by_data_of_a_view, by_copy, by_assignment])
def test_a_forward_that_writes_to_a_parameter_is_refused_and_writes_nothing(fn):
    module = drawn(Calls(fn, a=nn.Linear(3, 2)))
    params, model = models.from_module(module, example_ndim=1)
    before = tree.map(torch.clone, params)
    x = normals(B, 3)
    for call in (
        lambda: model.apply(params, x),
        lambda: model.apply(params, x[0]),
        lambda: per_sample.norms(loss_of(model), params, x),
    ):
        with pytest.raises(ValueError, match=r"may not write to its parameters.*'a\.weight'"):
            call()
    assert all(torch.equal(params[name], before[name]) for name in params)


@pytest.mark.parametrize("inner", [False, True])
def test_the_layer_that_writes_is_named_whatever_ran_before_it(inner):
    def write(module, x):
        module.weight.mul_(0.9)
        return F.linear(x, module.weight)

    writer = Calls(write)
    writer.weight = nn.Parameter(torch.ones(3, 3))
    module = (
        Calls(lambda m, x: m.b(m.a(x)), a=nn.Linear(3, 3), b=writer)
        if inner
        else Calls(lambda m, x: m.b.fn(m.b, m.a(x)), a=nn.Linear(3, 3), b=writer)
    )
    params, model = models.from_module(drawn(module), example_ndim=1)
    found = r"Found that layer 'b' \(Calls\)" if inner else r"Found that layer '' \(Calls\)"
    with pytest.raises(ValueError, match=found + r" writes to 'b\.weight'"):
        model.apply(params, normals(B, 3))


@pytest.mark.parametrize("kind", ["layer", "function"])
def test_an_embedding_that_renormalises_is_refused_and_writes_nothing(kind):
    tokens = torch.arange(B * 2).view(B, 2)
    if kind == "layer":
        with pytest.raises(ValueError, match=r"layer '0' \(Embedding\) has max_norm"):
            models.from_module(nn.Sequential(nn.Embedding(9, 3, max_norm=0.1)))
        with pytest.raises(ValueError, match=r"layer '' \(EmbeddingBag\) has max_norm"):
            models.from_module(nn.EmbeddingBag(9, 3, max_norm=0.1))
        return
    module = Calls(lambda module, x: F.embedding(x, module.a.weight, max_norm=0.1), a=nn.Embedding(9, 3))
    params, model = models.from_module(drawn(module), example_ndim=1)
    before = params["a.weight"].clone()
    with pytest.raises(ValueError, match="may not write to its parameters"):
        model.apply(params, tokens)
    assert torch.equal(params["a.weight"], before)


@pytest.mark.parametrize("make", [nn.Embedding, nn.EmbeddingBag])
def test_gradients_divided_by_counts_over_the_batch_are_refused(make):
    with pytest.raises(ValueError, match=r"examples must not mix.*scale_grad_by_freq"):
        models.from_module(nn.Sequential(make(9, 3, scale_grad_by_freq=True)))


@pytest.mark.parametrize("make", [parametrizations.spectral_norm, spectral_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_spectral_norm_is_refused_by_layer(make):
    with pytest.raises(
        ValueError, match=r"may not change what the next one sees.*'(0|0\.parametrizations\.weight\.0)'"
    ):
        models.from_module(nn.Sequential(make(nn.Linear(3, 3))))


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_old_weight_norm_is_refused_by_layer_and_the_new_one_named(called):
    module = nn.Sequential(weight_norm(nn.Linear(3, 3)))
    if called:
        module(torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"'0' \(Linear\).*Use torch\.nn\.utils\.parametrizations\.weight_norm"):
        models.from_module(module)


def test_the_new_weight_norm_is_as_alone():
    assert_as_alone(drawn(parametrizations.weight_norm(nn.Linear(3, 4))), normals(B, 3))


# What torch.func cannot differentiate


class Old(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].exp()


@pytest.mark.parametrize("lead", [(), (B,)])
def test_an_old_autograd_function_is_refused_by_name(lead):
    params, model = models.from_module(drawn(Calls(lambda m, x: Old.apply(m.a(x)), a=nn.Linear(3, 2))), example_ndim=1)
    x = normals(*lead, 3)
    calls = [lambda: model.apply(params, x), lambda: grad(lambda p: model.apply(p, x).sum())(params)]
    if lead:
        calls.append(lambda: per_sample.norms(loss_of(model), params, x))
    for call in calls:
        with pytest.raises(ValueError, match=r"setup_context\. Found Old of .*test_regions"):
            call()


def test_an_old_autograd_function_in_a_loss_is_refused_by_name():
    with pytest.raises(ValueError, match=r"per_sample: .*Found Old of .*test_regions"):
        per_sample.norms(lambda p, x: Old.apply(F.linear(x, p)).sum(), normals(3, 3), normals(B, 3))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_an_activation_checkpoint_is_refused_in_one_sentence(reentrant):
    from torch.utils.checkpoint import checkpoint

    module = drawn(Calls(lambda m, x: checkpoint(m.a, x, use_reentrant=reentrant), a=nn.Linear(3, 2)))
    params, model = models.from_module(module, example_ndim=1)
    x = normals(B, 3)
    for call in (lambda: model.apply(params, x), lambda: per_sample.norms(loss_of(model), params, x)):
        with pytest.raises(ValueError, match=r"checkpoint.*Switch checkpointing off"):
            call()
    with pytest.raises(ValueError, match=r"checkpoint.*Switch checkpointing off"):
        per_sample.norms(
            lambda p, x: checkpoint(lambda y: F.linear(y, p), x, use_reentrant=reentrant).sum(), normals(3, 3), x
        )


# Hostile shapes


def stacked_in_a_loop(module, x):
    return torch.stack([module.a(row) for row in x])


def concatenated_in_a_loop(module, x):
    return torch.cat([module.a(row[None]).tanh() for row in x], 0)


def unbound(module, x):
    return torch.stack([module.a(row).sum() for row in x.unbind(0)])


def chunked(module, x):
    return torch.cat([module.a(part) for part in x.split(1)])


def mean_by_hand(module, x):
    return module.a(x).flatten(1).sum(1) / x[0].numel()


def transposed_twice(module, x):
    return module.a(x.transpose(0, -1).contiguous().transpose(0, -1))


def broadcast_over_places(module, x):
    return module.a(x[:, None] * x[..., None]).sum(1)


def expanded_token(module, x):
    rows = torch.cat([module.token.expand(x.shape[0], -1)[:, None], module.a(x)[:, None]], 1)
    return rows.flatten(1).cumsum(1)


def repeated_token(module, x):
    return module.a(x) + module.token.repeat(x.shape[0], 1)


def indexed_parameter(module, x):
    return module.a(x) * module.table[(x.sum(1) > 0).long()]


def signs(module, x):  # the trial's change of an example may change none
    return sum([module.token * torch.sign(x[:, :1] - at) for at in torch.linspace(-1, 1, 16)]) + module.a(x)


def einsum_with_a_batch(module, x):
    return torch.einsum("bi,oi->bo", x, module.a.weight)


def einsum_with_an_expanded_weight(module, x):
    return torch.einsum("bi,boi->bo", x, module.a.weight.expand(x.shape[0], -1, -1))


def bmm_with_an_expanded_weight(module, x):
    return torch.bmm(module.a.weight[None].expand(len(x), -1, -1), x[:, :, None])[..., 0]


def weights_by_example(module, x):
    weights = module.a.weight * x[:, None, :]  # (B, 3, 3)
    return (weights @ weights.mT).sum(-1)


def integers_of_the_batch(module, x):
    rows = torch.arange(x.shape[0])
    return module.a(x)[rows, rows * 0 + 1]


def buffer_of_the_batch(module, x):
    out = x.new_zeros(x.shape[0], 3)
    out[:, 1:] = module.a(x)[:, 1:]
    out += module.table[1]
    return out


def in_place(module, x):
    h = module.a(x)
    h.mul_(module.table[0]).add_(module.token)
    h += module.token
    h *= module.table[1]
    return h.relu_()


def powers(module, x):
    return x.abs() ** module.token + module.token ** x.abs()


def beside_itself(module, x):
    y = module.a(torch.cat([x, x.flip(1)]))
    return y[: len(x)] * y[len(x) :]


def between_each_other(module, x):
    y = module.a(torch.stack([x, x.flip(1)], 1).flatten(0, 1))
    return y[::2] * y[1::2]


def one_number_each(module, x):
    return module.a(x).sum(1)


def parameters_alone(module, x):
    return module.table[0].expand(len(x), -1)


def detached(module, x):
    return F.linear(x, module.a.weight.detach()) + module.token


def as_a_number(module, x):
    return module.a(x).tanh() * module.token[0].item()


def by_groups_of_a_convolution(module, x):
    weights = (module.a.weight * x.mean(1)[:, None, None]).reshape(-1, 3, 1)
    return F.conv1d(x.reshape(1, -1, 1), weights, groups=len(x)).view(len(x), 3)


def over_time(module, x):
    h = x.new_zeros(x.shape[0], 3)
    for t in range(3):
        h = torch.tanh(module.a(h + x[:, t : t + 1]))
    return h


def identity_of_the_batch(module, x):
    return torch.eye(len(x), dtype=x.dtype) @ module.a(x)


def diagonal_of_the_batch(module, x):
    h = module.a(x)
    return (h @ h.t()).diagonal()[:, None]


def counting(module, x):
    module.count += 1
    return module.a(x) + module.count


def nothing_of_it(module, x):
    return torch.cat([module.a(x), x[:, :0], F.linear(x[:, :0], module.a.weight[:, :0])], 1)


def read_by_a_scalar(module, x):
    return (x.reshape(-1) * module.token[0]).view(x.shape)


def padded(module, x):
    rows = len(x) + -len(x) % 4
    return module.a(F.pad(x, (0, 0, 0, rows - len(x))))[: len(x)]


def between_padding(module, x):
    return module.a(F.pad(x, (0, 0, 1, 1)))[1:-1]


def beside_its_mirror(module, x):
    y = module.a(torch.cat([x, x.flip(0)]))
    return y[: len(x)] + y[len(x) :].flip(0)


def beside_a_token(module, x):
    return module.a(torch.cat([module.token[None], x]))[1:]


def to_experts(module, x):
    out, chosen = x.new_zeros(x.shape), (x.sum(1) > 0).long()
    for e in range(2):
        rows = (chosen == e).nonzero()[:, 0]
        out = out.index_add(0, rows, x[rows] * module.table[e])
    return out


def mapped(module, x):
    return vmap(module.a)(x)


HOSTILE = {
    fn.__name__: fn
    for fn in (
        stacked_in_a_loop, concatenated_in_a_loop, unbound, chunked, mean_by_hand, transposed_twice,
        broadcast_over_places, expanded_token, repeated_token, indexed_parameter, einsum_with_a_batch,
        einsum_with_an_expanded_weight, bmm_with_an_expanded_weight, weights_by_example, integers_of_the_batch,
        buffer_of_the_batch, in_place, powers, beside_itself, between_each_other, one_number_each, parameters_alone,
        detached, as_a_number, by_groups_of_a_convolution, over_time, identity_of_the_batch, diagonal_of_the_batch,
        counting, nothing_of_it, read_by_a_scalar, padded, between_padding, beside_its_mirror, beside_a_token,
        to_experts, mapped, signs,
    )
}  # fmt: skip


class Hostile(Calls):
    def __init__(self, fn):
        super().__init__(fn, a=nn.Linear(3, 3))
        self.token = nn.Parameter(torch.zeros(3))
        self.table = nn.Parameter(torch.zeros(2, 3))
        self.register_buffer("count", torch.zeros(()))


REFUSED = {
    "stacked_in_a_loop": "of linear does not grow", "concatenated_in_a_loop": "of linear does not grow",
    "unbound": "of linear does not grow", "chunked": "of linear does not grow", "padded": "of linear does not grow",
    "between_padding": "of linear has the shapes", "beside_its_mirror": "holds the batch in no recognised order",
    "beside_a_token": "of cat has the shapes", "to_experts": "of mul does not grow",
    "mapped": "outside of transforms of torch.func. Found linear",
}  # fmt: skip
"""Why their sample gradients are refused, not their outputs alone."""


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_module_is_as_alone_or_refused(name):
    module = drawn(Hostile(HOSTILE[name]))
    with torch.no_grad():
        module.token.abs_()
    x = normals(B, 3)
    params, model = models.from_module(module, example_ndim=1)
    loss_fn = loss_of(model)
    rows = torch.cat([copy.deepcopy(module)(x[i : i + 1]) for i in range(B)]).detach()
    torch.testing.assert_close(model.apply(params, x), rows, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.apply(params, x[0]), rows[0], rtol=1e-12, atol=1e-12)
    if name in REFUSED:
        for quantity in (per_sample.norms, per_sample.grads):
            with pytest.raises(ValueError, match=REFUSED[name]):
                quantity(loss_fn, params, x)
        return
    expected = [by_autograd(copy.deepcopy(module), x[i : i + 1]) for i in range(B)]
    expected = tree.map(lambda *gs: torch.cat(gs), *expected)
    assert difference(per_sample.factored(loss_fn, params, x).grads(), expected) < 1e-10
    pairs = {n: g.unflatten(0, (2, 2)).sum(1) for n, g in expected.items()}
    assert difference(per_sample.factored(loss_fn, params, x.view(2, 2, 3)).grads(), pairs) < 1e-10
    if name != "as_a_number":
        assert difference(per_sample.grads(loss_fn, params, x), expected) < 1e-10


def test_an_axis_of_the_size_of_the_batch_that_is_not_the_batch_is_refused():
    def fn(module, x):  # (B, 2, 3) read as (2, B, 3)
        return module.a(x.reshape(2, x.shape[0], 3)).reshape(x.shape)

    module = drawn(Calls(fn, a=nn.Linear(3, 3)))
    params, model = models.from_module(module, example_ndim=2)
    x = normals(B, 2, 3)
    torch.testing.assert_close(model.apply(params, x), alone(module, x), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="of linear holds the batch in no recognised order"):
        per_sample.norms(loss_of(model), params, x)


@pytest.mark.parametrize("fill", [-torch.inf, -1e9, torch.finfo(D).min])
def test_a_constant_fill_hides_no_mixing(fill):
    def fn(module, x):
        h = module.a(x)
        return (h + 1e-3 * h.mean(0)).masked_fill(torch.tensor([True, False, False]), fill)

    params, model = models.from_module(drawn(Calls(fn, a=nn.Linear(3, 3))), example_ndim=1)
    with pytest.raises(ValueError, match="examples must not mix"):
        model.apply(params, normals(B, 3))


class Keeps(nn.Module):
    """Keeps what it makes of its parameter in an attribute, in a new one, and in a dict."""

    def __init__(self):
        super().__init__()
        self.w, self.kept, self.kept_too = nn.Parameter(torch.ones(3, dtype=D)), None, {}

    def forward(self, x):
        if self.kept is None:
            self.kept = self.w * 2
        self.new = self.w
        return x * self.kept + self.kept_too.setdefault("w", self.w * 3)


def test_what_a_forward_keeps_is_kept_for_that_call_alone_when_it_is_compiled():
    params, model = models.from_module(Keeps(), example_ndim=1)
    x = normals(B, 3)
    apply = torch.compile(model.apply, fullgraph=True, backend="eager")
    norms = torch.compile(
        lambda params, x: per_sample.norms(loss_of(model), params, x), fullgraph=True, backend="eager"
    )
    for factor in (1, 5, 2):
        other = {"w": factor * params["w"]}
        torch.testing.assert_close(apply(other, x), (2 * x + 3) * other["w"], rtol=1e-12, atol=1e-12)
        expected = (((2 * x + 3) * other["w"]).cos() * (2 * x + 3)).norm(dim=1)
        torch.testing.assert_close(norms(other, x), expected, rtol=1e-10, atol=1e-12)


def test_a_shared_input_with_one_for_each_example_is_refused():
    params, model = models.from_module(nn.Bilinear(3, 3, 2).to(D), shared=("input2",))
    with pytest.raises(ValueError, match="input2 is shared"):
        vmap(lambda x, y: model.apply(params, x, y))(normals(B, 3), normals(B, 3))
