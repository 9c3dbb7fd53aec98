"""The benchmarks' networks are what they are called, and their sample gradients are factored."""

from functools import partial

import pytest
import torch

from benchmarks import definitions, networks, problems, quantities
from functorch_mnist import losses, models, per_sample, random, tree


def test_resnet18_has_as_many_parameters_as_its_architecture():
    convolutions = 3 * 64 * 9 + 4 * 64 * 64 * 9
    for inputs, outputs in ((64, 128), (128, 256), (256, 512)):
        convolutions += (inputs + 3 * outputs) * outputs * 9 + inputs * outputs  # and the shortcut's, 1x1
    norms = 2 * (5 * 64 + 5 * 128 + 5 * 256 + 5 * 512)
    assert convolutions + norms + 512 * 10 + 10 == 11_173_962
    assert sum(p.numel() for p in networks.ResNet18().parameters()) == 11_173_962


PROBLEMS = {
    "cnn": (problems.cnn, (1, 28, 28)),
    "mlp": (problems.mlp, (784,)),
    "resnet18": (problems.resnet18, (3, 32, 32)),
    "vit": (problems.vit, (3, 32, 32)),
    "sequence": (lambda batch_size: problems.sequence(16, batch_size), (16,)),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_problem_is_one_network_of_one_example_and_of_batches(name):
    make, shape = PROBLEMS[name]
    problem = make(2)
    assert problem.x.shape == (2, *shape)
    outputs = problem.apply(problem.params, problem.x)
    assert outputs.shape == (2, 10)
    torch.testing.assert_close(outputs, problem.loaded()(problem.x), rtol=1e-4, atol=1e-5)
    one = problem.apply(problem.params, problem.prepare(problem.stored[1]))
    torch.testing.assert_close(one, outputs[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_problem_is_the_same_each_time(name):
    make, _ = PROBLEMS[name]
    first, second = make(2), make(2)
    assert torch.equal(first.x, second.x) and torch.equal(first.labels, second.labels)
    assert all(torch.equal(p, second.params[path]) for path, p in first.params.items())
    assert first.module() is not first.module()


def test_a_causal_position_does_not_see_later_ones():
    block, x = networks.Block(8, 2, causal=True), torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))
    changed = torch.cat([x[:, :3], x[:, 3:] + 1], 1)
    before, after = block(x), block(changed)
    assert torch.equal(before[:, :3], after[:, :3]) and not torch.isclose(before[:, 3:], after[:, 3:]).all()


TRANSFORMERS = {
    "vit": (lambda: networks.vit(size=8, patch=4, width=12, depth=2, heads=3), (3, 8, 8)),
    "sequence": (lambda: networks.sequence(6, tokens=11, width=8, depth=1, heads=2), (6,)),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformers_sample_gradients_are_factored_and_those_of_vmap_grad(name):
    make, shape = TRANSFORMERS[name]
    module = make().double()
    draw = random.normal(random.key(1), (5, *shape)).double()
    x = draw if len(shape) == 3 else random.randint(random.key(1), (5, *shape), 0, 11)
    labels = random.randint(random.key(2), (5,), 0, 10)
    params, model = models.from_module(module, example_ndim=len(shape))

    def loss_fn(params, x, label):
        return losses.cross_entropy(model.apply(params, x), label)

    plan = per_sample.plan(loss_fn, params, x[0], labels[0], batch_size=5)
    assert not plan.slow
    assert all("norm" in row.path for row in plan.rows if row.way == "dense")
    dense = per_sample.grads(loss_fn, params, x, labels)
    expected = torch.stack([tree.norm([g[i] for g in dense.values()]) for i in range(5)])
    torch.testing.assert_close(per_sample.norms(loss_fn, params, x, labels), expected, rtol=1e-10, atol=0)


def test_clipped_steps_and_norms_are_their_definitions():
    problem = problems.mlp(8)
    defined = definitions.Definitions(problem, 6.0)
    assert defined.norms.min() < 6 < defined.norms.max()
    ours = partial(quantities.factored, problem, max_norm=6.0)
    for way in (ours, partial(ours, chunk_size=3), partial(quantities.dense, problem, max_norm=6.0)):
        work = quantities.clipped_step(way, compile=False)
        work.call()
        assert definitions.difference(work.outputs(), defined.clipped_step) < 1e-4
        work = quantities.quantity(way, "norms", compile=False)
        work.call()
        assert definitions.difference(work.outputs(), defined.norms) < 1e-5
