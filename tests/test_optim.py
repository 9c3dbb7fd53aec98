"""The optimizer against `torch.optim.SGD`, bit for bit; schedules against their formulas; gradients through updates."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad

from functorch_mnist import optim, random, tree

SHAPES = {"w": (7, 5), "inner": {"b": (3,), "s": ()}}


def numbers(seed):
    """A tree of random numbers, by hand so that it is nested."""
    keys = random.split(random.key(seed), 3)
    return {
        "w": random.normal(keys[0], (7, 5)),
        "inner": {"b": random.normal(keys[1], (3,)), "s": random.normal(keys[2])},
    }


def by_torch(settings, lr, steps, dtype):
    """Parameters after some steps of `torch.optim.SGD` with given gradients."""
    params = [p.to(dtype).requires_grad_() for p in tree.leaves(numbers(0))]
    optimizer = torch.optim.SGD(params, lr=lr, **settings)
    for number in range(steps):
        for p, g in zip(params, tree.leaves(numbers(1 + number)), strict=True):
            p.grad = g.to(dtype)
        optimizer.step()
    return [p.detach() for p in params]


def by_us(settings, lr, steps, dtype):
    optimizer = optim.sgd(lr, **settings)
    params = tree.map(lambda p: p.to(dtype), numbers(0))
    state = optimizer.init(params)
    for number in range(steps):
        params, state = optimizer.update(params, state, tree.map(lambda g: g.to(dtype), numbers(1 + number)))
    assert int(state.updates) == steps
    return tree.leaves(params)


@st.composite
def settings(draw):
    chosen = {
        "momentum": draw(st.sampled_from([0.0, 0.5, 0.9])),
        "dampening": draw(st.sampled_from([0.0, 0.1, 0.5])),
        "weight_decay": draw(st.sampled_from([0.0, 1e-3, 0.1])),
        "nesterov": draw(st.booleans()),
        "maximize": draw(st.booleans()),
    }
    if chosen["nesterov"]:
        chosen |= {"momentum": 0.9, "dampening": 0.0}
    return chosen


@given(
    settings(), st.sampled_from([0.0, 0.01, 0.3]), st.integers(0, 12), st.sampled_from([torch.float32, torch.float64])
)
def test_sgd_equals_torch_optim_bit_for_bit(settings, lr, steps, dtype):
    ours, theirs = by_us(settings, lr, steps, dtype), by_torch(settings, lr, steps, dtype)
    assert all(map(torch.equal, ours, theirs))


@given(settings(), st.sampled_from([torch.float32, torch.float64]))
def test_a_tensor_learning_rate_gives_what_the_number_gives(settings, dtype):
    ours = by_us(settings, torch.tensor(0.25, dtype=dtype), 5, dtype)
    torch.testing.assert_close(ours, by_us(settings, 0.25, 5, dtype), rtol=1e-6, atol=1e-7)


def test_a_schedule_gives_the_learning_rate_of_each_update():
    rates = torch.tensor([0.5, 0.0, 0.25])
    optimizer = optim.sgd(lambda count: rates[count])
    params, state = torch.tensor([1.0]), optimizer.init(torch.tensor([1.0]))
    seen = []
    for _ in range(3):
        params, state = optimizer.update(params, state, torch.tensor([1.0]))
        seen.append(params.item())
    assert seen == [0.5, 0.5, 0.25]


def test_update_changes_none_of_its_arguments():
    optimizer = optim.sgd(0.1, momentum=0.9, dampening=0.1, weight_decay=0.1)
    params, grads = numbers(0), numbers(1)
    state = optimizer.init(params)
    _, state = optimizer.update(params, state, grads)
    before = [leaf.clone() for leaf in tree.leaves((params, state, grads))]
    optimizer.update(params, state, grads)
    assert all(map(torch.equal, tree.leaves((params, state, grads)), before))


def test_without_momentum_the_state_holds_no_velocity():
    assert len(tree.leaves(optim.sgd(0.1).init(numbers(0)))) == 1


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "dampening": 0.5}])
def test_the_gradient_through_updates_equals_finite_differences(settings):
    """The derivative of a validation loss by the learning rate, through eight updates of a linear regression."""
    x, validation = random.normal(random.key(0), (20, 3)).double(), random.normal(random.key(1), (20, 3)).double()
    target = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)

    def loss(w, x):
        return (x @ w - x @ target).square().mean()

    def validation_loss(lr):
        optimizer = optim.sgd(lr, weight_decay=0.01, **settings)
        w = torch.zeros(3, dtype=torch.float64)
        state = optimizer.init(w)
        for _ in range(8):
            w, state = optimizer.update(w, state, grad(loss)(w, x))
        return loss(w, validation)

    lr = torch.tensor(0.03, dtype=torch.float64)
    slope = (validation_loss(lr + 1e-6) - validation_loss(lr - 1e-6)) / 2e-6
    torch.testing.assert_close(grad(validation_loss)(lr), slope, rtol=1e-7, atol=0)
    assert slope.abs() > 1e-2


def test_updates_compile_as_one_graph_and_a_schedule_does_not_recompile():
    optimizer = optim.sgd(optim.cosine(0.1, steps=4), momentum=0.9, dampening=0.1)
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    fused = torch.compile(lambda *args: optimizer.update(*args), fullgraph=True, dynamic=False, backend=backend)
    a = b = (numbers(0), optimizer.init(numbers(0)))
    for number in range(4):
        a, b = optimizer.update(*a, numbers(number)), fused(*b, numbers(number))
    torch.testing.assert_close(tree.leaves(a), tree.leaves(b))
    assert len(graphs) == 1


@given(st.floats(0.01, 20), st.floats(0.01, 20))
def test_clip_by_global_norm_equals_torch(max_norm, scale):
    grads = tree.map(lambda g: g * scale, numbers(1))
    params = [torch.zeros_like(g).requires_grad_() for g in tree.leaves(grads)]
    for p, g in zip(params, tree.leaves(grads), strict=True):
        p.grad = g.clone()
    torch.nn.utils.clip_grad_norm_(params, max_norm)
    seen = optim.Optimizer(lambda params: (), lambda params, state, grads: (grads, state))
    clipped, _ = optim.clip_by_global_norm(seen, max_norm=max_norm).update(grads, (), grads)
    torch.testing.assert_close(tree.leaves(clipped), [p.grad for p in params], rtol=1e-6, atol=1e-9)


def test_clipping_keeps_zero_gradients_zero():
    seen = optim.Optimizer(lambda params: (), lambda params, state, grads: (grads, state))
    clipped, _ = optim.clip_by_global_norm(seen, max_norm=1.0).update((), (), torch.zeros(3))
    assert torch.equal(clipped, torch.zeros(3))


def rates(schedule, counts):
    return [schedule(torch.tensor(count)).item() for count in counts]


def test_schedules_are_their_formulas():
    counts = range(13)
    assert rates(optim.constant(0.3), counts) == pytest.approx([0.3] * 13)
    cosine = [0.2 * (0.1 + 0.9 * (1 + math.cos(math.pi * min(t / 10, 1))) / 2) for t in counts]
    assert rates(optim.cosine(0.2, steps=10, final=0.1), counts) == pytest.approx(cosine)
    assert rates(optim.step_decay(0.2, every=4), counts) == pytest.approx([0.2 * 0.1 ** (t // 4) for t in counts])


def test_one_cycle_goes_up_then_down_and_stays():
    values = rates(optim.one_cycle(1.0, steps=10, warmup=0.4, start=0.2, final=0.1), range(13))
    assert values == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 0.85, 0.7, 0.55, 0.4, 0.25, 0.1, 0.1, 0.1])


@pytest.mark.parametrize(
    "make",
    [
        lambda: optim.sgd(-0.1),
        lambda: optim.sgd(float("nan")),
        lambda: optim.sgd(float("inf")),
        lambda: optim.sgd(1e300),
        lambda: optim.sgd(0.1, momentum=-1),
        lambda: optim.sgd(0.1, weight_decay=float("inf")),
        lambda: optim.sgd(0.1, dampening=float("nan"), momentum=0.9),
        lambda: optim.sgd(0.1, nesterov=True),
        lambda: optim.sgd(0.1, nesterov=True, momentum=0.9, dampening=0.1),
        lambda: optim.cosine(0.1, steps=0),
        lambda: optim.cosine(-0.1, steps=3),
        lambda: optim.one_cycle(0.1, steps=3, warmup=0),
        lambda: optim.one_cycle(0.1, steps=3, warmup=1),
        lambda: optim.step_decay(0.1, every=0),
        lambda: optim.step_decay(0.1, every=2.5),
        lambda: optim.cosine(0.1, steps=1.5),
        lambda: optim.one_cycle(0.1, steps=float("inf")),
        lambda: optim.sgd(torch.ones(1)),
        lambda: optim.constant(float("nan")),
        lambda: optim.clip_by_global_norm(optim.sgd(0.1), max_norm=0),
        lambda: optim.clip_by_global_norm(optim.sgd(0.1), max_norm=float("nan")),
    ],
)
def test_numbers_outside_their_range_are_refused(make):
    with pytest.raises(ValueError, match="Found"):
        make()


@pytest.mark.parametrize("lr", ["0.1", None, [0.1]])
def test_a_learning_rate_of_another_type_is_refused(lr):
    with pytest.raises(TypeError, match=f"schedule. Found {type(lr).__name__}"):
        optim.sgd(lr)


def test_gradients_of_another_shape_are_refused_by_path():
    params = {"layer": {"w": torch.ones(3), "b": torch.ones(2)}}
    grads = {"layer": {"w": torch.ones(3), "b": torch.ones(5, 2)}}
    for optimizer in (optim.sgd(0.1), optim.sgd(0.1, momentum=0.9)):
        with pytest.raises(ValueError, match=r"layer/b: \(5, 2\) for \(2,\)\. Are they per example"):
            optimizer.update(params, optimizer.init(params), grads)


@pytest.mark.parametrize("leaf", [torch.tensor([1, 2]), 3.0, None])
def test_a_parameter_that_is_not_a_float_tensor_is_refused_by_name(leaf):
    with pytest.raises(TypeError, match="layer/w"):
        optim.sgd(0.1).init({"layer": {"w": leaf}})


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95])
def test_an_average_is_its_formula_and_leaves_the_parameters_alone(decay):
    inner = optim.sgd(0.1, momentum=0.9)
    optimizer = optim.averaging(inner, decay=decay)
    alone = averaged = numbers(0)
    state, inner_state = optimizer.init(averaged), inner.init(alone)
    expected = tree.map(torch.Tensor.double, alone)
    for t in range(1, 41):
        alone, inner_state = inner.update(alone, inner_state, numbers(t))
        averaged, state = optimizer.update(averaged, state, numbers(t))
        keep = min(decay, t / (t + 9))
        expected = tree.map(lambda a, w, keep=keep: keep * a + (1 - keep) * w, expected, alone)
    assert all(map(torch.equal, tree.leaves(averaged), tree.leaves(alone)))
    for found, leaf in zip(tree.leaves(state.average), tree.leaves(expected), strict=True):
        torch.testing.assert_close(found.double(), leaf, rtol=0, atol=1e-5)


def test_an_average_of_bfloat16_parameters_is_float32_and_a_decay_out_of_range_is_refused():
    optimizer = optim.averaging(optim.sgd(0.1), decay=0.9)
    params = tree.map(torch.Tensor.bfloat16, numbers(0))
    _, state = optimizer.update(params, optimizer.init(params), tree.map(torch.Tensor.bfloat16, numbers(1)))
    assert {leaf.dtype for leaf in tree.leaves(state.average)} == {torch.float32}
    for decay in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"decay must be in \[0, 1\)"):
            optim.averaging(optim.sgd(0.1), decay=decay)
