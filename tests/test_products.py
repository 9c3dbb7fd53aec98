"""Products by either library of torch: the same numbers and gradients, wherever they are taken."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, jacrev, vjp, vmap

from functorch_mnist import machine, models, per_sample, products

SHAPES = [((300,), 160, 120), ((7, 50), 128, 128), ((2, 3, 60), 120, 161), ((8,), 5, 3), ((0,), 4, 3)]


@pytest.fixture(params=[False, True], ids=["products", "convolutions"])
def foreign(request, monkeypatch):
    """Whether MKL was written for another CPU, as on this machine or not."""
    monkeypatch.setattr(products, "_mkl_is_foreign", lambda: request.param)
    return request.param


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def convolutions(fn, *args):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        fn(*args)
    return sum(e.count for e in seen.key_averages() if e.key in ("aten::convolution", "aten::convolution_backward"))


@pytest.mark.parametrize(("lead", "inputs", "outputs"), SHAPES)
def test_linear_is_linear_with_its_gradients(foreign, lead, inputs, outputs):
    x, w, b = draw(*lead, inputs), draw(outputs, inputs, seed=1), draw(outputs, seed=2)
    cotangent = draw(*lead, outputs, seed=3)
    expected, pull = vjp(F.linear, x, w, b)
    found, pull_found = vjp(products.linear, x, w, b)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    for mine, theirs in zip(pull_found(cotangent), pull(cotangent), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=2e-3)
    torch.testing.assert_close(products.linear(x, w), x @ w.T, rtol=1e-5, atol=1e-4)
    rows = x.reshape(-1, inputs)
    torch.testing.assert_close(
        products.sum_of_outer(cotangent.reshape(-1, outputs), rows), cotangent.reshape(-1, outputs).T @ rows,
        rtol=1e-5, atol=2e-3,
    )  # fmt: skip


def test_large_products_in_float32_are_convolutions_where_mkl_is_foreign(foreign):
    x, w = draw(300, 160), draw(130, 160, seed=1)
    assert convolutions(products.linear, x, w) == foreign
    assert convolutions(products.sum_of_outer, x, x) == foreign
    narrow = [(x[:10], w), (draw(127, 160), draw(900, 160)), (x, w[:9]), (draw(900, 60), draw(900, 60))]
    for small, kernel in (*narrow, (x.double(), w.double()), (x.bfloat16(), w.bfloat16())):
        assert convolutions(products.linear, small, kernel) == 0


def test_a_matrix_for_each_example_is_no_convolution(foreign):
    x, w = draw(3, 200, 130), draw(3, 140, 130, seed=1)
    assert convolutions(lambda: vmap(products.linear)(x, w)) == 0
    torch.testing.assert_close(vmap(products.linear)(x, w), x @ w.mT, rtol=1e-5, atol=1e-4)
    shared = vmap(products.linear, (0, None))
    assert (convolutions(lambda: shared(x, w[0])) > 0) == foreign
    torch.testing.assert_close(shared(x, w[0]), x @ w[0].T, rtol=1e-5, atol=1e-4)


def test_a_product_is_taken_under_transforms_and_compiled(foreign):
    x, w = draw(6, 200, 130), draw(140, 130, seed=1)

    def loss(w, x):
        return products.linear(x, w).tanh().square().sum()

    expected = vmap(grad(lambda w, x: F.linear(x, w).tanh().square().sum()), (None, 0))(w, x)
    torch.testing.assert_close(vmap(grad(loss), (None, 0))(w, x), expected, rtol=1e-4, atol=1e-3)
    compiled = torch.compile(grad(loss), fullgraph=True)(w, x[0])
    torch.testing.assert_close(compiled, expected[0], rtol=1e-4, atol=1e-3)
    narrow = torch.cat([x[0]] * 90), w[:8, :4]  # of 18,000 rows
    curvature = jacrev(grad(lambda w: products.linear(narrow[0][:, :4] * 1e-2, w).pow(3).sum()))(narrow[1])
    expected = jacrev(grad(lambda w: F.linear(narrow[0][:, :4] * 1e-2, w).pow(3).sum()))(narrow[1])
    torch.testing.assert_close(curvature, expected, rtol=1e-4, atol=1e-5)


def test_clipped_sums_of_a_module_are_the_same_by_either_library(foreign):
    module = torch.nn.Sequential(torch.nn.Linear(160, 160), torch.nn.Tanh(), torch.nn.Linear(160, 3))
    params, model = models.from_module(module)
    x, y = draw(5, 70, 160), torch.arange(5) % 3

    def loss(w, x, y):
        return F.cross_entropy(model.apply(w, x).mean(0), y)

    found = per_sample.clipped_sum(loss, params, x, y, max_norm=0.1)
    dense = per_sample.grads(loss, params, x, y)
    norms = torch.stack([g.flatten(1).square().sum(1) for g in dense.values()]).sum(0).sqrt()
    torch.testing.assert_close(found.norms, norms, rtol=1e-5, atol=0)
    scales = (0.1 / norms).clamp(max=1)
    for name, g in dense.items():
        torch.testing.assert_close(found.grads[name], torch.einsum("b,b...->...", scales, g), rtol=1e-4, atol=1e-6)


def test_the_machine_says_who_made_it(monkeypatch, tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: A fast one\n")
    monkeypatch.setattr(machine, "Path", lambda _: info)
    assert (machine.vendor(), machine.processor()) == ("GenuineIntel", "A fast one")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    products._mkl_is_foreign.cache_clear()
    assert not products._mkl_is_foreign()
    info.write_text("vendor_id : AuthenticAMD\n")
    products._mkl_is_foreign.cache_clear()
    assert products._mkl_is_foreign() == torch.backends.mkldnn.is_available()
    products._mkl_is_foreign.cache_clear()
    info.unlink()
    assert isinstance(machine.vendor(), str)
    assert machine.processor()
