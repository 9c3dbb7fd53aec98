"""Each kind of term, under each of its strategies, against sample gradients written out as sums, in float64."""

import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import D, normals

from functorch_mnist import per_sample, tree
from functorch_mnist.per_sample import forms, strategies
from functorch_mnist.per_sample.algebra import Factored
from functorch_mnist.per_sample.calls import Called, CallForm, Slot
from functorch_mnist.per_sample.layout import Layout, View, kernel_layout, layout
from functorch_mnist.per_sample.lookups import Lookup
from functorch_mnist.per_sample.terms import (
    Absent,
    Convolution,
    Dense,
    Outer,
    Parts,
    Term,
    Viewed,
)
from functorch_mnist.per_sample.uses import Sum, merge
from functorch_mnist.per_sample.weights import Made, Pulled, Weight

EXACT = 1e-10


class Case(NamedTuple):
    term: Term
    grads: Tensor
    """(B, *w), written out."""
    reach: Tensor | None = None
    factors: tuple[Tensor, Tensor] | None = None
    """Those of the second moment."""


def outer(strategy, t, h, d, groups=1, kind="plain"):
    def make(seed, b):
        a, g = normals(b, groups, t, d, seed=seed), normals(b, groups, t, h, seed=seed + 1)
        blocks = torch.zeros(b, groups, h, d, dtype=D)
        for i, m, s in itertools.product(range(b), range(groups), range(t)):
            blocks[i, m] += torch.outer(g[i, m, s], a[i, m, s])
        if kind == "plain":
            read, grads = layout((h, d)), blocks[:, 0]
        elif kind == "inputs first":
            read, grads = layout((d, h), outputs=(1,)), blocks[:, 0].mT
        elif kind == "groups":
            read, grads = layout((groups, h, d), groups=(0,), outputs=(1,)), blocks
        else:  # groups last, inputs first
            read = layout((d, h, groups), groups=(2,), outputs=(1,), inputs=(0,))
            grads = torch.stack([torch.stack([blocks[i, m].T for m in range(groups)], -1) for i in range(b)])
        reach = None if t == 1 else (a.norm(dim=-1) * g.norm(dim=-1)).sum((1, 2))
        pair = (torch.einsum("bgti,bgtj->gij", a, a), torch.einsum("bgti,bgtj->gij", g, g))
        return Case(Outer(a, g, read, strategy), grads, reach, pair)

    return make


def convolution(strategy, sizes, kernel, channels=2, outputs=4, groups=1, n=1, stride=1, padding=0, dilation=1):
    space = len(kernel)
    stride, padding, dilation = (x if isinstance(x, tuple) else (x,) * space for x in (stride, padding, dilation))

    def make(seed, b):
        image = normals(b, n, channels, *sizes, seed=seed)
        spans = [s + 2 * p - d * (k - 1) - 1 for s, p, d, k in zip(sizes, padding, dilation, kernel, strict=True)]
        positions = [span // step + 1 for span, step in zip(spans, stride, strict=True)]
        cotangent = normals(b, n, outputs, *positions, seed=seed + 1)
        padded = F.pad(image, [p for p in reversed(padding) for _ in range(2)])
        c, h = channels // groups, outputs // groups
        shape = (outputs, c, *kernel)
        grads = torch.zeros(b, *shape, dtype=D)
        reach = torch.zeros(b, dtype=D)
        inputs, cotangents = torch.zeros(groups, c * math.prod(kernel), c * math.prod(kernel), dtype=D), 0
        for place in itertools.product(*map(range, positions)):
            window = padded[
                (slice(None),) * 3
                + tuple(
                    slice(i * s, i * s + d * (k - 1) + 1, d)
                    for i, s, d, k in zip(place, stride, dilation, kernel, strict=True)
                )
            ]  # (B, N, channels, *kernel)
            g = cotangent[(..., *place)]  # (B, N, outputs)
            reach += (g.norm(dim=-1) * window.flatten(2).norm(dim=-1)).sum(1)
            moments = []
            for m in range(groups):
                mine, out = window[:, :, m * c : (m + 1) * c], g[:, :, m * h : (m + 1) * h]
                grads[:, m * h : (m + 1) * h] += torch.einsum("bnh,bn...->bh...", out, mine)
                a = mine.movedim(2, -1).flatten(2)
                inputs[m] += torch.einsum("bni,bnj->ij", a, a)
                moments.append(torch.einsum("bni,bnj->ij", out, out))
            cotangents = cotangents + torch.stack(moments)
        term = Convolution(image, cotangent, shape, stride, padding, dilation, groups, strategy)
        return Case(term, grads, None if math.prod(positions) * n == 1 else reach, (inputs, cotangents))

    return make


def lookup(strategy, t, v, h):
    def make(seed, b):
        rows = torch.randint(0, v, (b, t), generator=torch.Generator().manual_seed(seed))
        live = rows != 1
        g = normals(b, t, h, seed=seed + 1) * live[..., None]
        grads, counts = torch.zeros(b, v, h, dtype=D), torch.zeros(v, dtype=D)
        for i, s in itertools.product(range(b), range(t)):
            grads[i, rows[i, s]] += g[i, s]
            counts[rows[i, s]] += float(live[i, s])
        moment = torch.einsum("bti,btj->ij", g, g)[None]
        return Case(Lookup(rows, g, live, (v, h), strategy), grads, g.norm(dim=-1).sum(1), (counts, moment))

    return make


def pulled(kind, strategy="gram", t=3):
    scale, left, right = normals(4, 5, seed=90), normals(4, 2, seed=91), normals(2, 5, seed=92)
    whole, parameter = Weight((0,)), normals(6, 5, seed=93)

    def make(seed, b):
        inner = outer(strategy, t, 4, 5)(seed, b)
        if kind in ("rows", "chunk"):
            op, args, output = (
                (Tensor.__getitem__, (whole, slice(1, 5)), None)
                if kind == "rows"
                else (torch.split, (whole, [2, 4]), 1)
            )
            grads, start = torch.zeros(b, 6, 5, dtype=D), 1 if kind == "rows" else 2
            grads[:, start : start + 4] = inner.grads
            term = Pulled(inner.term, (parameter,), _weight((0,), op, args, output), 0)
            return Case(term, grads, inner.reach)
        if kind == "index":  # a row twice
            weight = _weight((0,), Tensor.__getitem__, (whole, torch.tensor([0, 2, 3, 3])), None)
            grads = torch.zeros(b, 6, 5, dtype=D)
            for row, at in enumerate([0, 2, 3, 3]):
                grads[:, at] += inner.grads[:, row]
            return Case(Pulled(inner.term, (parameter,), weight, 0), grads)
        if kind == "scaled":
            weight = _weight((0,), torch.mul, (whole, scale), None)
            return Case(Pulled(inner.term, (parameter[:4],), weight, 0), inner.grads * scale)
        leaf = 3 if kind == "left" else 5
        weight = _weight((3, 5), torch.matmul, (Weight((3,)), Weight((5,))), None)
        grads = inner.grads @ right.T if kind == "left" else left.T @ inner.grads
        return Case(Pulled(inner.term, (left, right), weight, leaf), grads)

    return make


WEIGHTS: dict[Any, Weight] = {}


def _weight(leaves, op, args, output):
    """The same weight for the same op: two batches are of one weight."""
    key = (leaves, op, output, repr(args[1:]))
    return WEIGHTS.setdefault(key, Weight(leaves, Made(op, args, {}, output)))


def _op(x, weight, other, *, more):
    return [weight * other * x, torch.tensor(3), weight.sum() * more]


CALL = CallForm(
    (3, 4), (Weight((1,)),), _op, (Slot("saved"), Slot("weight"), Slot("other")), {"more": Slot("saved", 1)}
)


def called(seed, b):
    x, more = normals(b, 3, 4, seed=seed), normals(b, 2, seed=seed + 1)
    one, two = normals(b, 3, 4, seed=seed + 2), normals(b, 2, seed=seed + 3)
    other, weight = normals(4, seed=94), normals(3, 4, seed=95)
    grads = torch.zeros(b, 3, 4, dtype=D)
    for i in range(b):
        grads[i] = one[i] * other * x[i] + (two[i] * more[i]).sum()
    return Case(Called((x, more), (other,), weight, (one, two), CALL), grads)


VIEW = View((2, 3, 4), (2, 0, 1), (4, 6))


def viewed(seed, b):
    inner = outer("gram", 3, 4, 6)(seed, b)
    grads = torch.zeros(b, 2, 3, 4, dtype=D)
    for i, j, k in itertools.product(range(2), range(3), range(4)):
        grads[:, i, j, k] = inner.grads[:, k, 3 * i + j]
    return Case(Viewed(inner.term, VIEW), grads, inner.reach, inner.factors)


def viewed_dense(seed, b):
    values = normals(b, 4, 6, seed=seed)
    grads = torch.stack([values[:, k].reshape(b, 2, 3) for k in range(4)], -1)
    return Case(Viewed(Dense(values), VIEW), grads)


def summed(seed, b):
    one, two, three = outer("gram", 3, 4, 5)(seed, b), outer("outer product", 1, 4, 5)(seed + 5, b), normals(b, 4, 5)
    grads = one.grads + two.grads + three
    reach = one.reach + two.grads.flatten(1).norm(dim=1) + three.flatten(1).norm(dim=1)
    return Case(Sum((one.term, two.term, Dense(three)), "build"), grads, reach)


def tied(t, s, view=None):
    """A table of 7 rows that is an embedding at s positions and a linear map at t."""

    def make(seed, b):
        rows, e = (
            torch.randint(0, 7, (b, s), generator=torch.Generator().manual_seed(seed)),
            normals(b, s, 3, seed=seed),
        )
        a, g = normals(b, 1, t, 3, seed=seed + 1), normals(b, 1, t, 7, seed=seed + 2)
        grads = torch.einsum("btv,bth->bvh", g[:, 0], a[:, 0])
        for i, k in itertools.product(range(b), range(s)):
            grads[i, rows[i, k]] += e[i, k]
        linear: Term = Outer(a, g, layout((7, 3)), "pairs")
        if view == "transposed":
            linear = Viewed(Outer(a, g, layout((3, 7), outputs=(1,)), "pairs"), View((7, 3), (1, 0), (3, 7)))
        live = torch.ones(b, s, dtype=torch.bool)
        term = merge([Lookup(rows, e, live, (7, 3), "pairs"), linear], "pairs")
        assert isinstance(term, Sum)
        reach = e.norm(dim=-1).sum(1) + (a.norm(dim=-1) * g.norm(dim=-1)).sum((1, 2))
        return Case(term, grads, reach)

    return make


def dense_values(seed, b):
    return Case(Dense(normals(b, 3, 4, seed=seed)), normals(b, 3, 4, seed=seed))


def absent(seed, b):
    return Case(Absent(torch.zeros(1, dtype=D).expand(b, 3, 4)), torch.zeros(b, 3, 4, dtype=D))


def parts(seed, b):
    values = normals(b, 3, 4, seed=seed)
    return Case(Parts((values[:2], values[2:])), values)


def one_part(seed, b):
    return Case(Parts((normals(b, 3, 4, seed=seed),)), normals(b, 3, 4, seed=seed))


CASES = {
    "called": called,
    "viewed": viewed,
    "viewed, dense": viewed_dense,
    "sum": summed,
    "tied, few positions": tied(2, 3),
    "tied, many positions": tied(5, 9),
    "tied, transposed": tied(2, 4, "transposed"),
    "dense": dense_values,
    "absent": absent,
    "parts": parts,
    "one part": one_part,
    **{f"pulled, {kind}": pulled(kind) for kind in ("rows", "chunk", "index", "scaled", "left", "right")},
    **{f"pulled, {kind}, build": pulled(kind, "build", 7) for kind in ("rows", "scaled")},
}
for _strategy in ("outer product", "gram", "build"):
    CASES |= {
        f"one position, {_strategy}": outer(_strategy, 1, 3, 4),
        f"one position, fewer inputs, {_strategy}": outer(_strategy, 1, 6, 2),
        f"one position, inputs first, {_strategy}": outer(_strategy, 1, 3, 4, kind="inputs first"),
        f"one position, groups, {_strategy}": outer(_strategy, 1, 3, 4, 2, "groups"),
        f"one position, groups last, {_strategy}": outer(_strategy, 1, 4, 3, 2, "groups last"),
        f"convolution of one position, {_strategy}": convolution(_strategy, (3, 2), (3, 2)),
        f"convolution of one position, groups, {_strategy}": convolution(_strategy, (3, 2), (3, 2), 4, 6, groups=2),
        f"convolution of one position and a rest, {_strategy}": convolution(_strategy, (4, 3), (3, 2), stride=2),
    }
for _strategy in ("gram", "build"):
    CASES |= {
        f"few positions, {_strategy}": outer(_strategy, 2, 12, 14),
        f"many positions, {_strategy}": outer(_strategy, 9, 3, 4),
        f"many positions, fewer inputs, {_strategy}": outer(_strategy, 9, 5, 2),
        f"inputs first, {_strategy}": outer(_strategy, 3, 5, 4, kind="inputs first"),
        f"groups, {_strategy}": outer(_strategy, 3, 5, 4, 2, "groups"),
        f"groups, many positions, {_strategy}": outer(_strategy, 8, 2, 3, 3, "groups"),
        f"groups last, {_strategy}": outer(_strategy, 3, 4, 5, 2, "groups last"),
        f"convolution 1d, {_strategy}": convolution(_strategy, (9,), (3,), stride=2, padding=1),
        f"convolution 1d, dilated, {_strategy}": convolution(_strategy, (9,), (3,), dilation=2, padding=2),
        f"convolution 2d, {_strategy}": convolution(_strategy, (6, 5), (3, 2), stride=(1, 2), padding=(1, 0)),
        f"convolution 2d, one channel, {_strategy}": convolution(_strategy, (5, 4), (2, 3), 1, 3, padding=(0, 1)),
        f"convolution 2d, groups, {_strategy}": convolution(_strategy, (5, 4), (2, 3), 4, 6, 2, stride=2, padding=1),
        f"convolution 2d, depthwise, {_strategy}": convolution(_strategy, (5, 4), (2, 3), 3, 6, 3),
        f"convolution 2d, images, {_strategy}": convolution(_strategy, (4, 4), (2, 3), 2, 3, n=3, dilation=(2, 1)),
        f"convolution 2d, one position, images, {_strategy}": convolution(_strategy, (2, 3), (2, 3), 2, 3, n=3),
        f"convolution 2d, wide, {_strategy}": convolution(
            _strategy, (5, 6), (3, 3), 5, 2, stride=(2, 1), padding=(0, 1)
        ),
        f"convolution 2d, wide, groups, {_strategy}": convolution(
            _strategy, (5, 6), (3, 3), 10, 4, 2, n=2, dilation=(1, 2), padding=(1, 2)
        ),
        f"convolution 1d, wide, {_strategy}": convolution(_strategy, (8,), (5,), 7, 2, padding=1, stride=2),
        f"convolution 3d, {_strategy}": convolution(
            _strategy, (3, 4, 4), (2, 2, 3), 2, 3, stride=(1, 2, 1), padding=(0, 1, 1)
        ),
        f"convolution 3d, wide, {_strategy}": convolution(_strategy, (3, 4, 4), (2, 3, 3), 2, 3, dilation=(2, 1, 1)),
        f"lookup, few positions, {_strategy}": lookup(_strategy, 3, 9, 2),
        f"lookup, many positions, {_strategy}": lookup(_strategy, 9, 4, 3),
    }

B = 5
TABLE = [pytest.param(make, id=name) for name, make in CASES.items()]


def close(found, expected):
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)


def flat(grads):
    return grads.reshape(len(grads), -1)


def poisoned(term):
    """The term with NaN in what example 1 holds."""

    def spoil(x):
        return x.index_fill(0, torch.tensor([1]), math.nan) if x.is_floating_point() and len(x) == B else x

    if isinstance(term, Parts):
        return Parts(spoil(torch.cat(term.values)).split([len(v) for v in term.values]))
    if isinstance(term, Pulled):
        return Pulled(poisoned(term.term), term.params, term.weight, term.leaf)
    return term if isinstance(term, Absent) else tree.map(spoil, term)


@pytest.mark.parametrize("make", TABLE)
def test_every_quantity_of_a_term_is_that_of_gradients_written_out(make):
    case, other = make(0, B), make(20, 3)
    weights, direction = normals(B, seed=50), normals(*case.grads.shape[1:], seed=51)
    rows = case.grads.shape[1]
    left, right = normals(2, rows, seed=52), normals(3, math.prod(case.grads.shape[2:]), seed=53)
    for term, theirs in ((case.term, other.term), (case.term.built(), other.term.built())):
        close(term.grads(), case.grads)
        close(term.square_norms(), flat(case.grads).square().sum(1))
        close(term.weighted_sum(weights), torch.einsum("b,b...->...", weights, case.grads))
        close(term.dot(direction), flat(case.grads) @ direction.flatten())
        close(term.gram(theirs), flat(case.grads) @ flat(other.grads).T)
        close(term.second_moment(), case.grads.square().sum(0))
        close(term.project(left, right), left @ case.grads.reshape(B, rows, -1) @ right.T)


@pytest.mark.parametrize("make", TABLE)
def test_a_masked_term_is_exactly_zero_where_it_holds_nan(make):
    case, keep = make(0, B), torch.tensor([True, False, True, False, True])
    term = poisoned(case.term).masked(keep)
    grads = case.grads * keep.view(-1, *[1] * (case.grads.dim() - 1))
    direction = normals(*case.grads.shape[1:], seed=51)
    for found in (term, term.built()):
        close(found.grads(), grads)
        close(found.square_norms(), flat(grads).square().sum(1))
        close(found.weighted_sum(torch.ones(B, dtype=D)), grads.sum(0))
        close(found.dot(direction), flat(grads) @ direction.flatten())
        close(found.second_moment(), grads.square().sum(0))
        assert torch.equal(found.square_norms()[~keep], torch.zeros(2, dtype=D))
        assert torch.equal(found.grads()[~keep], torch.zeros_like(grads[~keep]))


@pytest.mark.parametrize("make", TABLE)
def test_the_reach_of_a_term_is_the_sum_of_norms_over_positions(make):
    case = make(0, B)
    if case.reach is None:
        assert case.term.reach() is None
    else:
        close(case.term.reach(), case.reach)
        assert (case.reach >= flat(case.grads).norm(dim=1) * (1 - EXACT)).all()


@pytest.mark.parametrize("make", TABLE)
def test_the_kronecker_factors_of_a_term_are_sums_over_its_positions(make):
    case = make(0, B)
    pair = case.term.kronecker()
    assert (pair is None) == (case.factors is None)
    if pair is None:
        return
    close(pair.inputs, case.factors[0])
    close(pair.cotangents, case.factors[1])
    assert pair.diagonal == (case.factors[0].dim() == 1)
    matrices = pair.matrices(case.grads[0])
    inputs = len(pair.inputs) if pair.diagonal else pair.inputs.shape[-1]
    assert matrices.shape == (len(pair.cotangents), pair.cotangents.shape[-1], inputs)
    close(pair.parameter(matrices), case.grads[0])
    if pair.diagonal:
        close(matrices[0], case.grads[0].T)


def test_each_strategy_is_tabled_at_sizes_that_choose_it_and_at_others():
    chosen = {
        (1, 3, 4): "outer product",
        (2, 12, 14): "gram",
        (9, 3, 4): "build",
        (3, 5, 4): "build",
    }
    for (t, h, d), strategy in chosen.items():
        form = forms.MatrixForm(layout((h, d)), (0, 1))
        sizes = forms.Sizes(1, t, d, h)
        assert strategies._cheapest(sizes, form.costs(sizes), form.factors(sizes)).strategy == strategy


@pytest.mark.parametrize("count", [127, 193, 300])
@pytest.mark.parametrize("strategy", ["gram", "build"])
def test_a_convolution_in_parts_keeps_the_order_of_its_examples(count, strategy):
    case = convolution(strategy, (3, 4), (3, 3), 4, 1)(0, count)
    weights, direction = normals(count, seed=50), normals(*case.grads.shape[1:], seed=51)
    for term in (case.term, case.term.built()):
        close(term.grads(), case.grads)
        close(term.square_norms(), flat(case.grads).square().sum(1))
        close(term.weighted_sum(weights), torch.einsum("b,b...->...", weights, case.grads))
        close(term.dot(direction), flat(case.grads) @ direction.flatten())


def test_gradients_are_built_where_products_take_them_and_factors_are_no_smaller():
    for t, strategy, built in ((5, "build", True), (2, "build", True), (1, "build", False), (5, "gram", False)):
        term = outer(strategy, t, 4, 4)(0, B).term  # 16 numbers, factors of 8 T
        assert isinstance(term.built(), Dense if built else Outer)
    smaller = convolution("build", (4,), (2,), 1, 4)(0, B).term  # 8 numbers, factors of 4 + 12
    larger = convolution("build", (2,), (2,), 4, 4)(0, B).term  # 32 numbers, factors of 8 + 4
    exactly = convolution("build", (1,), (1,), 2, 2)(0, B).term  # 4 numbers, factors of 2 + 2
    assert isinstance(smaller.built(), Parts)
    assert isinstance(exactly.built(), Parts)
    assert isinstance(larger.built(), Convolution)
    assert isinstance(Viewed(outer("build", 9, 4, 6)(0, B).term, VIEW).built().term, Dense)


def test_inner_products_of_unlike_terms_come_from_their_gradients():
    mine, theirs = outer("gram", 3, 3, 4)(0, B), dense_values(9, 3)
    expected = flat(mine.grads) @ flat(theirs.grads).T
    close(mine.term.gram(theirs.term), expected)
    close(theirs.term.gram(mine.term), expected.T)
    close(absent(0, B).term.gram(theirs.term), torch.zeros(B, 3, dtype=D))
    look, values = lookup("gram", 3, 3, 4)(0, B), dense_values(9, 3)
    close(look.term.gram(values.term), flat(look.grads) @ flat(values.grads).T)
    conv, kernels = convolution("gram", (5,), (3,))(0, B), normals(3, 4, 2, 3, seed=9)
    close(conv.term.gram(Dense(kernels)), flat(conv.grads) @ flat(kernels).T)
    view, other = viewed(0, B), View((2, 3, 4), (0, 1, 2), (4, 6))
    inner = outer("gram", 3, 4, 6)(5, 3)
    close(view.term.gram(Viewed(inner.term, other)), flat(view.grads) @ flat(inner.grads).T)
    pull, longer = pulled("rows")(0, B), pulled("chunk")(5, 3)
    close(pull.term.gram(longer.term), flat(pull.grads) @ flat(longer.grads).T)
    close(
        outer("gram", 3, 3, 4)(0, B).term.gram(outer("gram", 5, 3, 4)(7, 3).term),
        flat(outer("gram", 3, 3, 4)(0, B).grads) @ flat(outer("gram", 5, 3, 4)(7, 3).grads).T,
    )


def test_uses_of_one_parameter_are_one_term():
    one, two, sparse = outer("gram", 3, 4, 6)(0, B), outer("gram", 2, 4, 6)(5, B), normals(B, 4, 6, seed=9)
    assert merge([one.term], "build") is one.term
    merged = merge([one.term, two.term], "build")
    assert isinstance(merged, Outer)
    close(merged.grads(), one.grads + two.grads)
    both = merge([Viewed(one.term, VIEW), Viewed(two.term, VIEW)], "build")
    assert isinstance(both, Viewed)
    assert isinstance(both.term, Outer)
    close(both.grads(), VIEW.backward(one.grads + two.grads))
    unlike = merge([one.term, Dense(sparse)], "build")
    assert isinstance(unlike, Sum)
    close(unlike.grads(), one.grads + sparse)
    turned = View((2, 3, 4), (0, 1, 2), (4, 6))
    apart = merge([Viewed(one.term, VIEW), Viewed(two.term, turned)], "build")
    assert isinstance(apart, Sum)
    close(apart.grads(), VIEW.backward(one.grads) + turned.backward(two.grads))
    square, across = outer("gram", 2, 4, 4)(0, B), outer("gram", 2, 4, 4, kind="inputs first")(5, B)
    crossed = merge([square.term, across.term], "build")
    assert isinstance(crossed, Outer)  # the factors of a transpose are swapped
    close(crossed.grads(), square.grads + across.grads)


@pytest.mark.parametrize("name", [n for n in CASES if "build" not in n and not n.startswith(("pulled", "called"))])
def test_half_precision_is_summed_in_single(name):
    case, other = CASES[name](0, B), CASES[name](20, 3)
    half, theirs = (tree.map(lambda x: x.bfloat16() if x.is_floating_point() else x, c.term) for c in (case, other))
    exact, also = (tree.map(lambda x: x.to(D) if x.is_floating_point() else x, t) for t in (half, theirs))
    direction = normals(*case.grads.shape[1:], seed=51).float()
    summed_first = isinstance(case.term, Sum)  # the gradients' sum is in half precision
    for quantity, *args in (("square_norms",), ("dot", direction), ("gram", theirs), ("second_moment",)):
        found = getattr(half, quantity)(*args)
        against = [also if x is theirs else x.to(D) for x in args]
        expected = getattr(exact, quantity)(*against)
        assert found.dtype == (D if quantity == "square_norms" else torch.float32), quantity
        bound = 2e-2 if summed_first or quantity in ("second_moment", "gram") else 2e-5
        assert (found - expected).abs().max() <= bound * max(1.0, expected.abs().max()), quantity


def test_gradients_made_wide_are_in_single_precision_and_integers_stay():
    rows, g = torch.tensor([[0, 2]]), torch.ones(1, 2, 3, dtype=torch.bfloat16)
    term = Lookup(rows, g, torch.ones(1, 2, dtype=torch.bool), (4, 3), "gram")
    wide = Factored(torch.zeros(1, dtype=torch.bfloat16), (term,), {"w": torch.zeros(4, 3)}).wide()
    assert wide.losses.dtype == wide.terms[0].g.dtype == torch.float32
    assert (wide.terms[0].rows.dtype, wide.terms[0].live.dtype) == (torch.int64, torch.bool)


def test_rounding_widens_a_leaf_bound_by_sixteen_units_of_the_squared_reach():
    eps = torch.finfo(torch.float32).eps
    a, g = torch.ones(2, 1, 2, 1), torch.tensor([[1.0, -1.0], [3.0, 1.0]]).view(2, 1, 2, 1)
    term = Outer(a, g, layout((1, 1)), "gram")  # 1 - 1 and 3 + 1, both with a reach of their absolute values
    bounds = Factored(torch.zeros(2), (term,), {"w": torch.zeros(1, 1)}).leaf_bounds()["w"]
    expected = torch.tensor([math.sqrt(16 * eps * 4), math.sqrt(16 + 16 * eps * 16)])
    torch.testing.assert_close(bounds, expected, rtol=1e-7, atol=0)


def test_a_leaf_bound_takes_squares_below_zero_as_zero_and_leaves_sums_as_they_are():
    class Cancelled(Dense):
        def square_norms(self, by):
            return by.given(torch.full((1,), -1.0, dtype=D))

        def reach(self, by):
            return by.given(torch.ones(1, dtype=D), root=True)

    eps = torch.finfo(torch.float32).eps
    values = torch.full((1, 1), 3.0)
    params = [torch.zeros(1), torch.zeros(1)]
    bounds = Factored(torch.zeros(1), (Cancelled(values), Dense(values)), params).leaf_bounds()
    assert torch.equal(bounds[0], torch.tensor([4 * math.sqrt(eps)]))
    assert torch.equal(bounds[1], torch.tensor([3.0]))


@pytest.mark.parametrize("rule", [2.0, lambda norms: torch.where(norms > 0, 2.0 / norms, 1.0).clamp(max=1)])
@pytest.mark.parametrize("bad", [1e200, 1e308, math.inf, -math.inf, math.nan])
def test_an_example_of_infinite_norm_is_left_out_and_counted_beside_finite_ones(bad, rule):
    x = torch.tensor([[3.0, 4.0], [bad, 1.0], [0.0, 0.0], [0.6, 0.8]], dtype=D)

    def loss_fn(params, x):
        return params @ x

    clipped = per_sample.clipped_sum(loss_fn, torch.zeros(2, dtype=D), x, max_norm=rule)
    torch.testing.assert_close(clipped.grads, torch.tensor([1.2 + 0.6, 1.6 + 0.8], dtype=D))
    assert clipped.nonfinite == 1
    assert not clipped.norms[1].isfinite()
    assert torch.equal(clipped.norms[[0, 2]], torch.tensor([5.0, 0.0], dtype=D))


@pytest.mark.parametrize("padding_idx", [None, 1, 3, 0, -1, -3, -4])
def test_the_row_of_a_padding_index_of_either_sign_gets_no_gradient(padding_idx):
    rows = torch.tensor([[0, 1, 3, 3], [2, 2, 1, 0], [1, 1, 1, 1]])
    table, c = normals(4, 3, seed=1), normals(3, 4, 3, seed=2)

    def loss_fn(table, rows, c):
        return (F.embedding(rows, table, padding_idx) * c).sum()

    expected = torch.zeros(3, 4, 3, dtype=D)
    for i in range(3):
        for t, row in enumerate(rows[i].tolist()):
            if padding_idx is None or row != padding_idx % 4:
                expected[i, row] += c[i, t]
    close(per_sample.grads(loss_fn, table, rows, c), expected)
    close(per_sample.factored(loss_fn, table, rows, c).grads(), expected)
    close(per_sample.norms(loss_fn, table, rows, c), flat(expected).norm(dim=1))
    close(per_sample.gram(loss_fn, table, (rows, c)), flat(expected) @ flat(expected).T)
    counts = torch.tensor([float((rows == v).sum()) for v in range(4)], dtype=D)
    if padding_idx is not None:
        counts[padding_idx] = 0
    close(per_sample.kronecker(loss_fn, table, rows, c)[""].inputs, counts)


def test_a_layout_reads_a_parameter_as_matrices_and_back():
    v = torch.arange(24.0).view(2, 3, 4)
    read = layout((2, 3, 4), groups=(1,), outputs=(2,))
    assert read == Layout((2, 3, 4), (2, 3, 4), (1, 2, 0), (3, 4, 2))
    expected = torch.stack([v[:, m].T for m in range(3)])
    assert torch.equal(read.matrices(v), expected)
    assert torch.equal(read.parameter(expected), v)
    assert torch.equal(read.parameter(torch.stack([expected, -expected])), torch.stack([v, -v]))
    kernel = torch.arange(48.0).view(4, 3, 2, 2)
    matrices = kernel_layout((4, 3, 2, 2), 2).matrices(kernel)
    assert matrices.shape == (2, 2, 12)
    for m, h, i, j, c in itertools.product(range(2), range(2), range(2), range(2), range(3)):
        assert matrices[m, h, (i * 2 + j) * 3 + c] == kernel[m * 2 + h, c, i, j]


@pytest.mark.parametrize("name", ["called", "pulled, left"])
def test_a_direction_in_single_precision_is_taken_by_half_precision_ops(name):
    case = CASES[name](0, B)
    half = tree.map(lambda x: x.bfloat16(), case.term)
    direction = normals(*case.grads.shape[1:], seed=51)
    expected = flat(case.grads) @ direction.flatten()
    found = half.dot(direction.float())
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() <= 5e-2 * max(1.0, expected.abs().max())


class Stored(TorchDispatchMode):
    """The most numbers that a tensor made on the way stores."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]
        self.most = max([self.most, *[x.untyped_storage().nbytes() // x.element_size() for x in tensors]])
        return out


INNER = ("square_norms", "gram", "dot", "weighted_sum")
STORING = {
    "few positions": (outer("gram", 2, 30, 40), 30 * 40 * B, (*INNER, "project", "reach")),
    "many positions": (outer("build", 60, 3, 4), 60 * 60 * B, (*INNER, "second_moment", "project")),
    "one position": (outer("outer product", 1, 30, 40), 30 * 40 * B, (*INNER, "second_moment", "project")),
    "convolution, few positions": (
        convolution("gram", (2, 3), (2, 2), 20, 30),
        30 * 80 * B,
        (*INNER, "project", "reach"),
    ),
    "convolution, many positions": (convolution("build", (12, 12), (3, 3), 4, 2), 100 * 36 * B, (*INNER, "project")),
    "convolution, one position": (
        convolution("outer product", (2, 2), (2, 2), 20, 30),
        30 * 80 * B,
        (*INNER, "second_moment"),
    ),
    "lookup, few positions": (lookup("gram", 3, 400, 10), 400 * 10 * B, (*INNER, "second_moment", "reach")),
    "lookup, many positions": (lookup("build", 60, 4, 3), 60 * 60 * B, INNER),
    "view": (viewed, 24 * B, ("square_norms", "dot", "weighted_sum", "reach")),
    "rows of a parameter": (pulled("rows"), 30 * B, (*INNER, "reach")),
    "absent": (absent, 12 * B, (*INNER, "second_moment")),
}


@pytest.mark.parametrize("name", STORING)
def test_a_quantity_stores_neither_gradients_nor_pairs_of_positions_where_its_strategy_spares_them(name):
    make, limit, quantities = STORING[name]
    case, other = make(0, B), make(20, 3)
    rows, numbers = case.grads.shape[1], math.prod(case.grads.shape[2:])
    options = {
        "gram": (other.term,),
        "dot": (normals(*case.grads.shape[1:], seed=51),),
        "weighted_sum": (normals(B, seed=50),),
        "project": (normals(2, rows, seed=52), normals(3, numbers, seed=53)),
    }
    for quantity in quantities:
        with Stored() as stored:
            getattr(case.term, quantity)(*options.get(quantity, ()))
        assert 0 < stored.most < limit, quantity


def test_inner_products_of_many_examples_store_no_more_pairs_of_positions_than_there_are_factors():
    case, other = outer("gram", 4, 20, 20)(0, 32), outer("gram", 4, 20, 20)(20, 31)
    factors = sum(x.numel() for term in (case.term, other.term) for x in term.factors())
    with Stored() as stored:
        found = case.term.gram(other.term)
    assert stored.most <= factors < 32 * 4 * 31 * 4  # of all pairs
    expected = case.grads.flatten(1) @ other.grads.flatten(1).T
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
