"""What the laws of per-sample gradients are tested on: losses of all forms, in float64, and the dense oracle."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, vmap

from functorch_mnist import losses, models, random, tree

EXACT = 1e-10
D = torch.float64
B = 4


def normals(*shape, seed=0):
    return torch.randn(shape, dtype=D, generator=torch.Generator().manual_seed(seed))


def labels(count=B, classes=3):
    return torch.arange(count) % classes


def difference(found, expected):
    """The largest difference of two trees' numbers, relative to the largest of the leaf, or of all where it is 0."""
    a, b = tree.leaves(found), tree.leaves(expected)
    assert [x.shape for x in a] == [x.shape for x in b]
    scale = max([float(y.abs().max()) for y in b if y.numel()], default=1.0) or 1.0
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if y.numel():
            assert x.isfinite().all()
            worst = max(worst, float((x - y).abs().max()) / max(float(y.abs().max()), 1e-6 * scale))
    return worst


def dense(loss_fn, params, batch, mask=None):
    """The leaves (B, *w) of the sample gradients, zero where masked: one example after another."""
    grads = [grad(loss_fn)(params, *example) for example in zip(*batch, strict=True)]
    if grads:
        rows = tree.map(lambda *gs: torch.stack(gs), *grads)
    else:
        rows = tree.map(lambda w: w.new_zeros((0, *w.shape)), params)
    keep = torch.ones(len(batch[0]), dtype=torch.bool) if mask is None else mask
    return tree.map(lambda g: torch.where(keep.view(-1, *[1] * (g.dim() - 1)), g, torch.zeros_like(g)), rows)


def combine(weights, rows):
    return tree.map(lambda g: torch.einsum("b,b...->...", weights, g), rows)


class Case(NamedTuple):
    loss_fn: object
    params: object
    batch: tuple
    dense: frozenset = frozenset()
    """The parameters that have no factored form."""


def joint(names):
    """Cases as one: the sum of their losses, each with its own parameters, by its name, and its own inputs."""
    cases = {name: CASES[name]() for name in names}

    def loss_fn(params, *rows):
        total, rows = 0, list(rows)
        for name, case in cases.items():
            total = total + case.loss_fn(params[name], *rows[: len(case.batch)])
            del rows[: len(case.batch)]
        return total

    params = {name: case.params for name, case in cases.items()}
    return Case(loss_fn, params, tuple([rows for case in cases.values() for rows in case.batch]))


def of_model(apply, params, x):
    def loss_fn(params, x, y):
        return losses.cross_entropy(apply(params, x), y)

    classes = apply(params, x[0]).shape[-1]
    return Case(loss_fn, params, (x, labels(len(x), classes)))


def tutorial_cnn():
    model = models.cnn(dropout=(0, 0))
    params = {name: p.to(D) for name, p in model.init(random.key(0)).items()}
    return of_model(model.apply, params, normals(B, 1, 28, 28))


def linear():
    model = models.linear(5, 3)
    return of_model(model.apply, {name: p.to(D) for name, p in model.init(random.key(0)).items()}, normals(B, 5))


def mlp():
    model = models.mlp([6, 8, 8, 3])
    return of_model(model.apply, {name: p.to(D) for name, p in model.init(random.key(0)).items()}, normals(B, 6))


def of_module(module, x):
    params, model = models.from_module(module.to(D))
    return of_model(model.apply, params, x)


def sequence_linear():
    params = {"u": normals(7, 5, seed=1), "b": normals(7, seed=2), "v": normals(3, 7, seed=3)}

    def apply(p, x):  # (T, 5)
        return F.linear(torch.tanh(F.linear(x, p["u"], p["b"])), p["v"]).mean(0)

    return of_model(apply, params, normals(B, 9, 5))


def tied_linear_and_embedding():
    params = {"table": normals(11, 6, seed=1), "w": normals(6, 6, seed=2)}

    def loss_fn(p, tokens, y):
        h = torch.tanh(F.linear(F.embedding(tokens, p["table"], padding_idx=0), p["w"]))
        return losses.cross_entropy(F.linear(h.mean(0), p["table"]), y)

    return Case(loss_fn, params, (torch.arange(B * 5).view(B, 5) % 11, labels(B, 11)))


def one_linear_used_twice():
    params = {"w": normals(5, 5, seed=1), "b": normals(5, seed=2)}

    def apply(p, x):
        return F.linear(torch.tanh(F.linear(x, p["w"], p["b"])), p["w"], p["b"])

    return of_model(apply, params, normals(B, 5))


def one_convolution_on_two_inputs():
    params = {"w": normals(4, 2, 3, 3, seed=1), "b": normals(4, seed=2)}

    def apply(p, x):
        halves = [F.conv2d(part, p["w"], p["b"], padding=1) for part in (x, x.flip(-1).square())]
        return (halves[0] * halves[1]).sum((1, 2))

    return of_model(apply, params, normals(B, 2, 6, 6))


def one_leaf_at_two_places():
    shared = normals(5, 5, seed=1)

    def apply(p, x):
        return F.linear(torch.tanh(F.linear(x, p["a"])), p["b"])

    return of_model(apply, {"a": shared, "b": shared}, normals(B, 5))


def views_of_parameters():
    params = {"w": normals(5, 4, seed=1), "flat": normals(20, seed=2), "t": normals(4, 3, seed=3)}

    def apply(p, x):
        h = torch.tanh(F.linear(x, p["w"].t(), None))
        h = torch.tanh(F.linear(h, p["flat"].view(5, 4)))
        return h @ p["w"] @ p["t"]

    return of_model(apply, params, normals(B, 5))


def products():
    params = {
        "right": normals(5, 4, seed=1),
        "left": normals(4, 4, seed=2),
        "heads": normals(2, 4, 3, seed=3),
        "low": normals(3, 2, seed=4),
        "rank": normals(2, 3, seed=5),
    }

    def apply(p, x):
        h = torch.tanh(x @ p["right"])
        h = torch.tanh(torch.matmul(p["left"], h))
        h = torch.einsum("d,hdk->hk", h, p["heads"])
        return torch.einsum("hk,kj->j", h, p["low"] @ p["rank"])

    return of_model(apply, params, normals(B, 5))


def shifts_outside_ops():
    params = {"b": normals(5, seed=1), "c": normals(3, 1, seed=2), "d": normals(1)[0]}

    def loss_fn(p, x):  # (3, 5)
        y = torch.tanh(x + p["b"]) + p["c"]
        return (p["d"] + y).square().sum()

    return Case(loss_fn, params, (normals(B, 3, 5),))


def regularised():
    params = {"w": normals(3, 5, seed=1), "b": normals(3, seed=2)}

    def loss_fn(p, x, y):
        return losses.cross_entropy(F.linear(x, p["w"], p["b"]), y) + 0.1 * p["w"].square().sum()

    return Case(loss_fn, params, (normals(B, 5), labels()))


def transformed_first():
    params = {"w": normals(3, 5, seed=1), "g": normals(3, 1, seed=2), "mask": normals(3, 5, seed=3)}

    def apply(p, x):
        direction = p["w"] / p["w"].norm(dim=1, keepdim=True)
        return F.linear(x, direction * p["g"]) + F.linear(x, torch.sigmoid(p["mask"]))

    return of_model(apply, params, normals(B, 5))


def slices():
    params = {"qkv": normals(9, 5, seed=1)}

    def apply(p, x):
        q, k, v = p["qkv"].chunk(3)
        return F.linear(x, q) * F.linear(x, k) + F.linear(x, v)

    return of_model(apply, params, normals(B, 5))


def unused():
    params = {"w": normals(3, 5, seed=1), "unused": normals(2, seed=2), "empty": normals(0, 3)}
    return of_model(lambda p, x: F.linear(x, p["w"]), params, normals(B, 5))._replace(
        dense=frozenset({"unused", "empty"})
    )


class Layer(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor


def nested():
    params = {"layers": [Layer(normals(6, 5, seed=1), normals(6, seed=2)), Layer(normals(3, 6, seed=3), normals(3))]}

    def apply(p, x):
        for layer in p["layers"]:
            x = torch.tanh(F.linear(x, layer.weight, layer.bias))
        return x

    return of_model(apply, params, normals(B, 5))


def inner_transform():
    params = {"w": normals(5, 5, seed=1)}

    def loss_fn(p, x):
        return (
            vmap(lambda row: torch.tanh(F.linear(row, p["w"])))(x).sum()
            + grad(lambda w: F.linear(x, w).sin().sum())(p["w"]).sum()
        )

    return Case(loss_fn, params, (normals(B, 2, 5),), frozenset({"w"}))


def stop_gradient(change):
    """A parameter used as it is and, changed without a gradient, once more."""

    def make():
        def loss_fn(p, x):
            y = F.linear(x, p["w"])
            return (y * change(p["w"], x)).sin().sum()

        return Case(loss_fn, {"w": normals(3, 5, seed=1)}, (normals(B, 5),))

    return make


def without_grad(view):
    def change(w, x):
        with torch.no_grad():
            fixed = view(w)
        return F.linear(x, fixed)

    return change


STOPPED = {
    "cloned without grad": without_grad(lambda w: w.clone()),
    "viewed without grad": without_grad(lambda w: w.t().t()),
    "cast to integers": lambda w, x: w.to(torch.int64).sum(),
    "cast to bool": lambda w, x: w.to(torch.bool).sum(),
    "cast to complex": lambda w, x: w.to(torch.complex128).abs().sum(),
    "seen as another type": lambda w, x: F.linear(x, w.view(D)),
    "detached": lambda w, x: F.linear(x, w.detach()),
}


def keywords():
    params = {"a": normals(5, 4, seed=1), "b": normals(3, 4, seed=2), "c": normals(4, seed=3), "d": normals(4, seed=4)}

    def apply(p, x):
        h = torch.tanh(torch.mm(x[None], mat2=p["a"]))
        h = F.layer_norm(h, normalized_shape=(4,), weight=p["c"], bias=p["d"])
        return F.linear(weight=p["b"], input=torch.mv(h.T @ h, vec=p["c"]))

    return of_model(apply, params, normals(B, 5))


def degenerate_shapes():
    params = {
        "scalar": normals(1, seed=1)[0],
        "none": normals(3, 0),
        "b": normals(3, seed=2),
        "one": normals(1, 3, seed=3),
    }

    def loss_fn(p, x):
        y = torch.einsum("td,->td", x, p["scalar"]) + F.linear(x[:, :0], p["none"], p["b"])
        return torch.einsum("td,dh->th", y, p["one"]).sin().sum() + (y * p["scalar"]).sum()

    return Case(loss_fn, params, (normals(B, 2, 3),))


class Squared(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(w):
        return w * w

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


def custom_function():
    params = {"w": normals(3, 5, seed=1)}
    return of_model(lambda p, x: F.linear(x, p["w"]) + F.linear(x, Squared.apply(p["w"])), params, normals(B, 5))


def norms_net():
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, bias=False),
        nn.InstanceNorm2d(4, affine=True), nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 8), nn.RMSNorm(8),
        nn.Linear(8, 3),
    )  # fmt: skip
    for p in net.parameters():
        nn.init.normal_(p, generator=torch.Generator().manual_seed(p.numel()))
    return of_module(net, normals(B, 2, 6, 6))


def frozen_batch_norm():
    net = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).eval()
    return of_module(net, normals(B, 2, 6))


def attention():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.attention(x, x, x)[0].mean(1))

    return of_module(Net(), normals(B, 5, 8))


def batched_products():
    params = {
        "right": normals(2, 3, 4, seed=1), "left": normals(2, 3, 3, seed=2), "b": normals(4, seed=3),
        "c": normals(2, 3, 1, seed=4), "both": normals(3, 4, 2, seed=5), "whole": normals(4, 3, seed=6),
        "one": normals(1, 3, 3, seed=7),
    }  # fmt: skip

    def apply(p, x):  # (2, 3, 3)
        h = torch.baddbmm(p["c"], p["left"], torch.tanh(x))
        h = torch.tanh(torch.bmm(h, p["right"]))  # (2, 3, 4)
        h = torch.addmm(p["b"], h[0], h[1].t() @ h[1], alpha=0.5, beta=2.0)
        h = F.bilinear(h, h.sin(), p["both"].transpose(1, 2).repeat(1, 2, 1)[:, :, :4].flip(0), None)
        h = torch.matmul(p["one"], torch.tanh(h) + x) + torch.matmul(p["left"], x @ x)
        return h.mean((0, 1)) @ p["whole"].t()[:, :3]

    return of_model(apply, params, normals(B, 2, 3, 3))


def elementwise_products():
    params = {
        "scale": normals(5, seed=1), "gate": normals(3, 1, seed=2), "under": normals(5, seed=3).abs() + 1,
        "over": normals(3, 5, seed=4), "log": normals(5, seed=5), "one": normals(1, seed=6)[0],
    }  # fmt: skip

    def loss_fn(p, x):  # (3, 5)
        y = p["gate"] * (x * p["scale"]).tanh() / p["under"] + p["over"] / (1 + x.square())
        y = torch.exp(p["log"]) * y + torch.where(x > 0, p["over"], y) + p["one"] * x
        return (torch.sigmoid(p["gate"]) * y - p["under"]).sin().sum()

    return Case(loss_fn, params, (normals(B, 3, 5),))


def tokens_and_positions():
    params = {
        "token": normals(1, 1, 4, seed=1), "positions": normals(1, 9, 4, seed=2), "first": normals(2, 4, seed=3),
        "parts": normals(2, 4, seed=4), "more": normals(4, seed=5), "a": normals(2, 4, seed=6),
        "b": normals(1, 4, seed=7),
    }  # fmt: skip

    def apply(p, x):  # (5, 4)
        h = torch.cat([p["token"].expand(1, -1, -1)[0], x, p["first"]])  # (8, 4)
        h = torch.tanh(h + p["positions"][0, : len(h)])
        h = h * torch.stack([p["more"], *p["parts"].unbind(0)]).sum(0)
        return (h @ torch.cat([p["a"], p["b"]]).t()).mean(0)

    return of_model(apply, params, normals(B, 5, 4))


def scales_and_shifts_of_norms():
    params = {name: normals(4, seed=i) for i, name in enumerate(("lw", "lb", "rw", "gw", "gb", "iw", "ib", "bw", "bb"))}
    mean, var = normals(4, seed=20), normals(4, seed=21).square() + 0.5

    def loss_fn(p, x):  # (4, 3, 4)
        y = F.layer_norm(x, (4,), p["lw"], p["lb"]) + F.rms_norm(x, (4,), p["rw"])
        y = F.group_norm(y[None], 2, p["gw"], p["gb"]).sin()
        y = F.instance_norm(y, weight=p["iw"], bias=p["ib"]).sin() + y
        return F.batch_norm(y, mean, var, p["bw"], p["bb"]).sin().sum()

    return Case(loss_fn, params, (normals(B, 4, 3, 4),))


def computed_weights():
    params = {
        "v": normals(4, 5, seed=1), "g": normals(4, 1, seed=2), "kernel": normals(4, 2, 3, seed=3),
        "gain": normals(4, seed=4), "up": normals(4, 2, seed=5), "down": normals(2, 4, seed=6),
        "cast": normals(3, 4, seed=7),
    }  # fmt: skip

    def apply(p, x):  # (2, 5)
        flat = p["kernel"].reshape(1, 4, -1)
        kernel = F.batch_norm(flat, None, None, p["gain"], training=True, momentum=0.0).reshape_as(p["kernel"])
        h = torch.tanh(F.conv1d(x[None], kernel, padding=1))[0]  # (4, 5)
        h = torch.tanh(F.linear(h, torch._weight_norm(p["v"], p["g"], 0)))  # (4, 4)
        h = h + F.linear(h, p["up"] @ p["down"]) + F.linear(F.linear(h, p["v"][:, :4]), p["v"][:, :4].t())
        return F.linear(h.mean(0), p["cast"].to(D).clone())

    return of_model(apply, params, normals(B, 2, 5))


def weights_changed_in_place():
    params = {"w": normals(4, 5, seed=1), "u": normals(4, 5, seed=2), "s": normals(5, seed=3), "b": normals(4, seed=4)}

    def apply(p, x):  # (3, 5)
        w = p["w"] * 2
        w += p["u"]
        w.mul_(p["s"])
        h = F.linear(x, w)
        h.add_(p["b"])
        h *= p["b"].exp()
        y = torch.zeros_like(h)
        y[:, 1:] = h[:, 1:]
        return y.mean(0)

    return of_model(apply, params, normals(B, 3, 5))


def bags_of_embeddings():
    params = {name: normals(6, 3, seed=i) for i, name in enumerate(("sum", "mean", "max"))}

    def loss_fn(p, tokens, weights):
        bags = [F.embedding_bag(tokens, p[mode], mode=mode, padding_idx=1) for mode in ("mean", "max")]
        bags.append(F.embedding_bag(tokens, p["sum"], mode="sum", per_sample_weights=weights))
        flat = F.embedding_bag(tokens.flatten(), p["mean"], torch.tensor([0, 2, 2]), mode="sum")
        return torch.stack(bags).sin().sum() + flat.square().sum()

    return Case(loss_fn, params, ((torch.arange(4 * B).view(B, 2, 2) * 5) % 6, normals(B, 2, 2, seed=9)))


CASES = {
    fn.__name__: fn
    for fn in (
        tutorial_cnn, linear, mlp, sequence_linear, tied_linear_and_embedding, one_linear_used_twice,
        one_convolution_on_two_inputs, one_leaf_at_two_places, views_of_parameters, products, shifts_outside_ops,
        regularised, transformed_first, slices, unused, nested, inner_transform, custom_function,
        norms_net, frozen_batch_norm, attention, keywords, degenerate_shapes, batched_products, elementwise_products,
        tokens_and_positions, scales_and_shifts_of_norms, computed_weights, weights_changed_in_place,
        bags_of_embeddings,
    )
}  # fmt: skip
CASES |= {name: stop_gradient(change) for name, change in STOPPED.items()}
