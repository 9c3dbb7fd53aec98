"""Optimizers against `torch.optim`, bit for bit; schedules against their formulas; gradients through updates."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, vmap
from torch.optim.swa_utils import AveragedModel

from functorch_mnist import optim, random, tree

SHAPES = {"w": (7, 5), "inner": {"b": (3,), "s": ()}}


def numbers(seed):
    """A tree of random numbers, by hand so that it is nested."""
    keys = random.split(random.key(seed), 3)
    return {
        "w": random.normal(keys[0], (7, 5)),
        "inner": {"b": random.normal(keys[1], (3,)), "s": random.normal(keys[2])},
    }


def by_torch(make, steps, dtype):
    """Parameters after some steps of an optimizer of `torch.optim` with given gradients."""
    params = [p.to(dtype).requires_grad_() for p in tree.leaves(numbers(0))]
    optimizer = make(params)
    for number in range(steps):
        for p, g in zip(params, tree.leaves(numbers(1 + number)), strict=True):
            p.grad = g.to(dtype)
        optimizer.step()
    return [p.detach() for p in params]


def by_us(optimizer, steps, dtype):
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
    theirs = by_torch(partial(torch.optim.SGD, lr=lr, **settings), steps, dtype)
    assert all(map(torch.equal, by_us(optim.sgd(lr, **settings), steps, dtype), theirs))


@given(settings(), st.sampled_from([torch.float32, torch.float64]))
def test_tensor_hyperparameters_give_what_the_numbers_give(settings, dtype):
    # A momentum of 0 has no velocity to dampen, but a tensor is not read.
    used = [name for name in ("momentum", "weight_decay") if settings[name]]
    tensors = {name: torch.tensor(settings[name], dtype=dtype) for name in used}
    ours = by_us(optim.sgd(torch.tensor(0.25, dtype=dtype), **settings | tensors), 5, dtype)
    # Rounded once where a number is, twice where a tensor is.
    torch.testing.assert_close(ours, by_us(optim.sgd(0.25, **settings), 5, dtype), rtol=1e-6, atol=1e-6)


@st.composite
def adam_settings(draw):
    """Keywords of `torch.optim` and ours."""
    chosen = {
        "eps": draw(st.sampled_from([1e-8, 1e-3, 1.0])),
        "betas": (draw(st.floats(0, 0.999)), draw(st.floats(0, 0.9999))),
        "weight_decay": draw(st.sampled_from([0.0, 1e-3, 0.1])),
    }
    b1, b2 = chosen["betas"]
    return chosen, {"b1": b1, "b2": b2, "epsilon": chosen["eps"], "weight_decay": chosen["weight_decay"]}


ADAMS = pytest.mark.parametrize(
    ("ours", "theirs"), [(optim.adam, torch.optim.Adam), (optim.adamw, torch.optim.AdamW)], ids=["adam", "adamw"]
)


@ADAMS
@given(
    adam_settings(),
    st.sampled_from([0.0, 1e-3, 0.3]),
    st.integers(0, 12),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_adam_and_adamw_equal_torch_optim_bit_for_bit(ours, theirs, settings, lr, steps, dtype):
    expected = by_torch(partial(theirs, lr=lr, **settings[0]), steps, dtype)
    assert all(map(torch.equal, by_us(ours(lr, **settings[1]), steps, dtype), expected))


@ADAMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_defaults_of_adam_and_adamw_are_those_of_torch_optim(ours, theirs, dtype):
    expected = by_torch(partial(theirs, lr=1e-3), 200, dtype)
    assert all(map(torch.equal, by_us(ours(1e-3), 200, dtype), expected))


@ADAMS
@given(adam_settings(), st.sampled_from([torch.float32, torch.float64]))
def test_float64_tensors_change_no_bit_of_adam(ours, theirs, settings, dtype):
    numbers = settings[1] | {"lr": 0.01}
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
    tensors["weight_decay"] = numbers["weight_decay"]
    assert all(map(torch.equal, by_us(ours(**tensors), 5, dtype), by_us(ours(**numbers), 5, dtype)))


@ADAMS
def test_a_tensor_weight_decay_gives_what_the_number_gives(ours, theirs):
    decay = torch.tensor(0.1, dtype=torch.float64)
    found = by_us(ours(0.01, weight_decay=decay), 5, torch.float64)
    torch.testing.assert_close(found, by_us(ours(0.01, weight_decay=0.1), 5, torch.float64), rtol=1e-12, atol=1e-12)


def test_a_schedule_gives_the_learning_rate_of_each_update():
    rates = torch.tensor([0.5, 0.0, 0.25])
    optimizer = optim.sgd(lambda count: rates[count])
    params, state = torch.tensor([1.0]), optimizer.init(torch.tensor([1.0]))
    seen = []
    for _ in range(3):
        params, state = optimizer.update(params, state, torch.tensor([1.0]))
        seen.append(params.item())
    assert seen == [0.5, 0.5, 0.25]


@pytest.mark.parametrize(
    "optimizer",
    [
        optim.sgd(0.1, momentum=0.9, dampening=0.1, weight_decay=0.1),
        optim.adam(0.1, weight_decay=0.1),
        optim.stochastic_weight_averaging(optim.adamw(0.1), start=1),
    ],
)
def test_update_changes_none_of_its_arguments(optimizer):
    params, grads = numbers(0), numbers(1)
    state = optimizer.init(params)
    _, state = optimizer.update(params, state, grads)
    before = [leaf.clone() for leaf in tree.leaves((params, state, grads))]
    optimizer.update(params, state, grads)
    assert all(map(torch.equal, tree.leaves((params, state, grads)), before))


def test_without_momentum_the_state_holds_no_velocity_and_with_a_tensor_momentum_always():
    assert len(tree.leaves(optim.sgd(0.1).init(numbers(0)))) == 1
    assert len(tree.leaves(optim.sgd(0.1, momentum=torch.tensor(0.0)).init(numbers(0)))) == 4


ADAM = {"lr": 0.03, "b1": 0.8, "b2": 0.95, "epsilon": 1e-3, "weight_decay": 0.02}
SGD = {"lr": 0.03, "momentum": 0.8, "weight_decay": 0.02}
HYPERPARAMETERS = {
    **{f"sgd-{name}": (optim.sgd, SGD, name) for name in SGD},
    **{f"nesterov-{name}": (partial(optim.sgd, nesterov=True), SGD, name) for name in SGD},
    **{f"dampened-{name}": (partial(optim.sgd, dampening=0.5), SGD, name) for name in SGD},
    **{f"adam-{name}": (optim.adam, ADAM, name) for name in ADAM},
    **{f"adamw-{name}": (optim.adamw, ADAM, name) for name in ADAM},
    "constant": (lambda lr: optim.sgd(optim.constant(lr)), {"lr": 0.03}, "lr"),
    "cosine": (lambda lr: optim.adam(optim.cosine(lr, steps=9)), {"lr": 0.03}, "lr"),
    "one_cycle": (lambda lr: optim.adamw(optim.one_cycle(lr, steps=9)), {"lr": 0.03}, "lr"),
    "step_decay": (lambda lr: optim.sgd(optim.step_decay(lr, every=3)), {"lr": 0.03}, "lr"),
    "clip": (lambda n: optim.clip_by_global_norm(optim.sgd(0.03), max_norm=n), {"n": 2.0}, "n"),
}


@pytest.mark.parametrize(("make", "values", "name"), HYPERPARAMETERS.values(), ids=HYPERPARAMETERS)
def test_the_gradient_by_a_hyperparameter_equals_finite_differences(make, values, name):
    """The derivative of a validation loss through eight updates of a linear regression."""
    x, validation = random.normal(random.key(0), (20, 3)).double(), random.normal(random.key(1), (20, 3)).double()
    target = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)

    def loss(w, x):
        return (x @ w - x @ target).square().mean()

    def validation_loss(value):
        optimizer = make(**values | {name: value})
        w = torch.full((3,), 0.5, dtype=torch.float64)
        state = optimizer.init(w)
        for _ in range(8):
            w, state = optimizer.update(w, state, grad(loss)(w, x))
        return loss(w, validation)

    value = torch.tensor(values[name], dtype=torch.float64)
    slope = (validation_loss(value + 1e-5) - validation_loss(value - 1e-5)) / 2e-5
    torch.testing.assert_close(grad(validation_loss)(value), slope, rtol=1e-6, atol=0)
    assert slope.abs() > 1e-3


def test_the_gradient_of_an_average_by_its_decay_equals_finite_differences():
    def averaged(decay):
        optimizer = optim.exponential_moving_average(optim.sgd(0.1), decay=decay)
        w = torch.ones((), dtype=torch.float64)
        state = optimizer.init(w)
        for _ in range(8):
            w, state = optimizer.update(w, state, w)
        return state.average

    decay = torch.tensor(0.2, dtype=torch.float64)
    slope = (averaged(decay + 1e-5) - averaged(decay - 1e-5)) / 2e-5
    torch.testing.assert_close(grad(averaged)(decay), slope, rtol=1e-6, atol=0)


@pytest.mark.parametrize("make", [optim.adam, optim.adamw])
def test_gradients_through_adam_are_finite_and_the_update_nothing_where_gradients_are_zero(make):
    def after(values):
        optimizer = make(values["lr"], b1=values["b1"], b2=values["b2"], weight_decay=0.0)
        w = torch.ones(2)
        state = optimizer.init(w)
        for _ in range(3):
            w, state = optimizer.update(w, state, values["grads"])
        return w.sum(), w

    values = {name: torch.tensor(value) for name, value in {"lr": 0.1, "b1": 0.9, "b2": 0.99}.items()}
    slopes, w = grad(after, has_aux=True)(values | {"grads": torch.tensor([0.0, 1.0])})
    assert all(bool(leaf.isfinite().all()) for leaf in tree.leaves(slopes))
    assert w[0] == 1
    assert slopes["lr"] != 0


GRID = {name: [factor * value for factor in (0.5, 0.8, 1.02)] for name, value in (SGD | ADAM).items()} | {
    "max_norm": [0.5, 1.0, 9.0],
    "decay": [0.0, 0.3, 0.9],
}
VMAPPED = {
    "sgd": (partial(optim.sgd, nesterov=True), ["lr", "momentum", "weight_decay"]),
    "adam": (optim.adam, list(ADAM)),
    "adamw": (lambda lr, **rest: optim.adamw(optim.one_cycle(lr, steps=4), **rest), list(ADAM)),
    "wrapped": (
        lambda max_norm, decay: optim.exponential_moving_average(
            optim.stochastic_weight_averaging(
                optim.clip_by_global_norm(optim.sgd(0.1), max_norm=max_norm), start=1, every=2
            ),
            decay=decay,
        ),
        ["max_norm", "decay"],
    ),
}


@pytest.mark.parametrize(("make", "names"), VMAPPED.values(), ids=VMAPPED)
def test_a_vmap_over_hyperparameters_equals_a_loop(make, names):
    def run(values):
        optimizer = make(**dict(zip(names, values, strict=True)))
        params = tree.map(torch.Tensor.double, numbers(0))
        state = optimizer.init(params)
        for number in range(4):
            params, state = optimizer.update(params, state, tree.map(torch.Tensor.double, numbers(1 + number)))
        return params, state

    grid = torch.tensor([GRID[name] for name in names], dtype=torch.float64).T
    lanes = vmap(lambda values: run(values.unbind()))(grid)
    for lane, values in enumerate(grid):
        found = [leaf[lane] for leaf in tree.leaves(lanes)]
        torch.testing.assert_close(found, tree.leaves(run(values.unbind())), rtol=1e-10, atol=1e-10)


COMPILED = {
    "sgd": lambda: optim.sgd(optim.cosine(0.1, steps=4), momentum=0.9, dampening=0.1),
    "adamw": lambda: optim.stochastic_weight_averaging(
        optim.clip_by_global_norm(
            optim.adamw(optim.cosine(torch.tensor(0.1), steps=4), b1=torch.tensor(0.8)), max_norm=1
        ),
        start=2,
    ),
}


@pytest.mark.parametrize("make", COMPILED.values(), ids=COMPILED)
def test_updates_compile_as_one_graph_and_a_schedule_does_not_recompile(make):
    optimizer = make()
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


@pytest.mark.parametrize("max_norm", [0.5, torch.tensor(0.5, dtype=torch.float64)])
def test_clipping_keeps_the_type_of_every_gradient(max_norm):
    seen = optim.Optimizer(lambda params: (), lambda params, state, grads: (grads, state))
    types = [torch.bfloat16, torch.float32, torch.float64]
    grads = [torch.ones(shape, dtype=dtype) for shape in ((), (2,)) for dtype in types]
    clipped, _ = optim.clip_by_global_norm(seen, max_norm=max_norm).update((), (), grads)
    assert [g.dtype for g in clipped] == types * 2
    assert [g.flatten()[0].item() for g in clipped] == pytest.approx([0.5 / 3] * 6, rel=4e-3)  # bfloat16 has 8 bits


@pytest.mark.parametrize("make", [optim.sgd, partial(optim.sgd, momentum=0.9), optim.adam, optim.adamw])
def test_a_tree_without_parameters_is_updated_to_itself(make):
    optimizer = optim.exponential_moving_average(optim.clip_by_global_norm(make(0.1), max_norm=1.0), decay=0.9)
    params, state = optimizer.update({}, optimizer.init({}), {})
    assert params == {}
    assert state.updates == state.optimizer.updates == 1


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_schedule_of_a_tensor_is_computed_in_its_type(dtype):
    lr = torch.tensor(1 / 3, dtype=dtype)
    for count in range(13):
        t = count / 10
        expected = {
            optim.constant(lr): 1.0,
            optim.cosine(lr, steps=10): (1 + math.cos(math.pi * min(t, 1))) / 2,
            optim.one_cycle(lr, steps=10, warmup=0.5, start=0.1): 0.1 + 1.8 * t if t < 0.5 else max(2 * (1 - t), 0),
            optim.step_decay(lr, every=4): 0.1 ** (count // 4),
        }
        for schedule, factor in expected.items():
            found = schedule(torch.tensor(count))
            torch.testing.assert_close(found, lr * torch.tensor(factor, dtype=dtype), rtol=4e-7, atol=1e-7)
            if dtype == torch.float64:
                assert found.item() == pytest.approx(factor / 3, rel=1e-14, abs=1e-16)


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
        lambda: optim.cosine(0.1, steps=3, final=-0.1),
        lambda: optim.one_cycle(-0.1, steps=3),
        lambda: optim.one_cycle(0.1, steps=3, start=-0.1),
        lambda: optim.one_cycle(0.1, steps=3, final=math.nan),
        lambda: optim.step_decay(-0.1, every=3),
        lambda: optim.step_decay(0.1, every=3, factor=math.inf),
        lambda: optim.one_cycle(0.1, steps=3, warmup=0),
        lambda: optim.one_cycle(0.1, steps=3, warmup=1),
        lambda: optim.step_decay(0.1, every=0),
        lambda: optim.step_decay(0.1, every=2.5),
        lambda: optim.cosine(0.1, steps=1.5),
        lambda: optim.one_cycle(0.1, steps=float("inf")),
        lambda: optim.sgd(torch.ones(1)),
        lambda: optim.sgd(0.1, momentum=torch.ones(2)),
        lambda: optim.sgd(0.1, weight_decay=torch.ones(1, 1)),
        lambda: optim.adam(-0.1),
        lambda: optim.adam(torch.ones(1)),
        lambda: optim.adam(0.1, b1=1.0),
        lambda: optim.adam(0.1, b2=-0.1),
        lambda: optim.adam(0.1, b2=torch.ones(3)),
        lambda: optim.adam(0.1, epsilon=float("nan")),
        lambda: optim.adamw(0.1, b2=1.0),
        lambda: optim.adamw(0.1, weight_decay=-1),
        lambda: optim.cosine(torch.ones(2), steps=3),
        lambda: optim.exponential_moving_average(optim.sgd(0.1), decay=torch.ones(2)),
        lambda: optim.clip_by_global_norm(optim.sgd(0.1), max_norm=torch.ones(2)),
        lambda: optim.stochastic_weight_averaging(optim.sgd(0.1), start=-1),
        lambda: optim.stochastic_weight_averaging(optim.sgd(0.1), start=1.5),
        lambda: optim.stochastic_weight_averaging(optim.sgd(0.1), start=1, every=0),
        lambda: optim.constant(float("nan")),
        lambda: optim.clip_by_global_norm(optim.sgd(0.1), max_norm=0),
        lambda: optim.clip_by_global_norm(optim.sgd(0.1), max_norm=float("nan")),
    ],
)
def test_numbers_outside_their_range_are_refused(make):
    with pytest.raises(ValueError, match="Found"):
        make()


@pytest.mark.parametrize("lr", ["0.1", None, [0.1]])
@pytest.mark.parametrize("make", [optim.sgd, optim.adam, optim.adamw])
def test_a_learning_rate_of_another_type_is_refused(make, lr):
    with pytest.raises(TypeError, match=f"{make.__name__}: lr .* schedule. Found {type(lr).__name__}"):
        make(lr)


def test_gradients_of_another_shape_are_refused_by_path():
    params = {"layer": {"w": torch.ones(3), "b": torch.ones(2)}}
    grads = {"layer": {"w": torch.ones(3), "b": torch.ones(5, 2)}}
    for optimizer in (optim.sgd(0.1), optim.sgd(0.1, momentum=0.9), optim.adam(0.1), optim.adamw(0.1)):
        with pytest.raises(ValueError, match=r"layer/b: \(5, 2\) for \(2,\)\. Are they per example"):
            optimizer.update(params, optimizer.init(params), grads)


STATEFUL = {
    "sgd": (optim.sgd(0.1, momentum=0.9), "velocity/layer/w"),
    "adam": (optim.adam(0.1), "mean/layer/w"),
    "adamw": (optim.clip_by_global_norm(optim.adamw(0.1), max_norm=1.0), "mean/layer/w"),
    "exponential_moving_average": (optim.exponential_moving_average(optim.sgd(0.1), decay=0.9), "average/layer/w"),
    "stochastic_weight_averaging": (
        optim.stochastic_weight_averaging(optim.sgd(0.1), start=1),
        "average/layer/w",
    ),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_a_state_that_is_not_of_the_parameters_is_refused_by_its_leaf(name):
    optimizer, leaf = STATEFUL[name]
    params = {"layer": {"w": torch.ones(3), "b": torch.ones(2)}}
    state = optimizer.init(params)
    wide, meta = tree.map(torch.Tensor.double, params), tree.map(lambda w: w.to("meta"), params)
    longer = tree.map(lambda w: torch.cat([w, w]), params)
    for others, found in [
        (wide, rf"{leaf}: torch.float32 \(3,\) on cpu for torch.float64 \(3,\) on cpu"),
        (longer, rf"{leaf}: torch.float32 \(3,\) on cpu for torch.float32 \(6,\) on cpu"),
        (meta, r"updates: torch.int64 \(\) on cpu for torch.int64 \(\) on meta"),
    ]:
        with pytest.raises(ValueError, match=rf"^{name}: the state must be .* Found {found}\. "):
            optimizer.update(others, state, others)
        optimizer.update(others, optimizer.init(others), others)
    moved = state._replace(updates=state.updates.to("meta"))
    with pytest.raises(ValueError, match=r"updates: torch.int64 \(\) on meta for torch.int64 \(\) on cpu"):
        optimizer.update(params, moved, params)
    moved = tree.map(lambda leaf: leaf.to("meta") if leaf.dim() else leaf, state)
    with pytest.raises(ValueError, match=rf"{leaf}: torch.float32 \(3,\) on meta for torch.float32 \(3,\) on cpu"):
        optimizer.update(params, moved, params)


def test_a_state_with_other_leaves_than_the_parameters_is_refused():
    state = optim.sgd(0.1).init(torch.ones(2))
    with pytest.raises(ValueError, match=r"Found velocity: 0 tensors for 1\."):
        optim.sgd(0.1, momentum=0.9).update(torch.ones(2), state, torch.ones(2))


@pytest.mark.parametrize("leaf", [torch.tensor([1, 2]), 3.0, None])
def test_a_parameter_that_is_not_a_float_tensor_is_refused_by_name(leaf):
    for make in (optim.sgd, optim.adam, optim.adamw):
        with pytest.raises(TypeError, match=f"{make.__name__}: .*layer/w"):
            make(0.1).init({"layer": {"w": leaf}})


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95])
def test_an_average_is_its_formula_and_leaves_the_parameters_alone(decay):
    inner = optim.sgd(0.1, momentum=0.9)
    optimizer = optim.exponential_moving_average(inner, decay=decay)
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
    optimizer = optim.exponential_moving_average(optim.sgd(0.1), decay=0.9)
    params = tree.map(torch.Tensor.bfloat16, numbers(0))
    _, state = optimizer.update(params, optimizer.init(params), tree.map(torch.Tensor.bfloat16, numbers(1)))
    assert {leaf.dtype for leaf in tree.leaves(state.average)} == {torch.float32}
    for decay in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"decay must be in \[0, 1\)"):
            optim.exponential_moving_average(optim.sgd(0.1), decay=decay)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("start", "every"), [(0, 1), (1, 1), (5, 3), (2, 4), (30, 1)])
def test_stochastic_weight_averaging_equals_torch_bit_for_bit_and_the_mean(start, every, dtype):
    inner = optim.sgd(0.1, momentum=0.9)
    optimizer = optim.stochastic_weight_averaging(inner, start=start, every=every)
    alone = averaged = tree.map(lambda w: w.to(dtype), numbers(0))
    state, inner_state = optimizer.init(averaged), inner.init(alone)
    module = torch.nn.ParameterList(tree.leaves(alone))
    theirs, members = AveragedModel(module), []
    for t in range(21):
        if t:
            grads = tree.map(lambda g: g.to(dtype), numbers(t))
            alone, inner_state = inner.update(alone, inner_state, grads)
            averaged, state = optimizer.update(averaged, state, grads)
        if t >= start and (t - start) % every == 0:
            members.append(alone)
            for p, w in zip(module, tree.leaves(alone), strict=True):
                p.data = w
            theirs.update_parameters(module)
        expected = list(theirs.module) if members else tree.leaves(alone)
        assert all(map(torch.equal, tree.leaves(state.average), expected))
        mean = tree.map(lambda *ws: torch.stack(ws).double().mean(0), *(members or [alone]))
        # Each member of a running mean rounds it once more.
        found, tolerance = [a.double() for a in tree.leaves(state.average)], 16 * torch.finfo(dtype).eps
        torch.testing.assert_close(found, tree.leaves(mean), rtol=0, atol=tolerance)
    assert all(map(torch.equal, tree.leaves(averaged), tree.leaves(alone)))
