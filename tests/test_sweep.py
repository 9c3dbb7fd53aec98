"""Many runs in one call, gradients through training, and descent by them."""

import math
import weakref

import pytest
import torch
from torch.func import vmap

from functorch_mnist import attribution, data, losses, optim, random, sweep, train, tree

N, BATCH, EPOCHS = 48, 16, 3
IMAGES = random.normal(random.key(0), (N, 6))
LABELS = (IMAGES @ random.normal(random.key(1), (6, 3))).argmax(-1)
EXAMPLES = (IMAGES, LABELS)


def outputs(params, x):
    hidden = torch.tanh(x @ params["a"])
    return hidden @ params["b"]


def losses_fn(smoothing):
    def of_batch(params, x, y, keys):
        noise = random.normal(keys, (6,)) * 0.01  # of the run's own keys
        return losses.cross_entropy(outputs(params, x + noise), y, label_smoothing=smoothing)

    return of_batch


def optimizer_of(hyper):
    return optim.sgd(optim.cosine(hyper["lr"], steps=9), momentum=hyper["momentum"], weight_decay=1e-3)


def init(hyper, key):
    a, b, train_key = random.split(key, 3).unbind(0)
    params = {"a": random.normal(a, (6, 8)) * 0.4, "b": random.normal(b, (8, 3)) * 0.4}
    return train.init_state(params, optimizer_of(hyper), train_key)


def step(hyper, state, *rows, mask, divisor):
    made = train.make_step(train.batch_gradient(losses_fn(hyper["smoothing"])), optimizer_of(hyper))
    return made(state, *rows, mask=mask, divisor=divisor)


def judge(_hyper, state):
    given = outputs(state.params, IMAGES)
    right = (given.argmax(-1) == LABELS).double().mean()
    return {"accuracy": right, "loss": losses.cross_entropy(given, LABELS).double().mean()}


PROGRAM = sweep.Program(init, step, judge)
RUNS = sweep.grid(lr=[0.1, 0.5, 2.0], momentum=[0.0, 0.9], smoothing=[0.1], seeds=[0, 1])


def made(runs=RUNS, width=4, *, compile=False, begun=None, batch_size=BATCH, **options):
    vmapped = sweep.VmappedStep(PROGRAM, EXAMPLES, batch_size=batch_size, compile=compile)
    begun = sweep.init_sweep(PROGRAM, runs, epochs=EPOCHS) if begun is None else begun
    return sweep.fit(vmapped, runs, begun, width=width, **options)


@pytest.fixture(scope="module")
def whole():
    """All twelve runs, four at once."""
    return made()


def rows(runs, which):
    return {name: column[which] for name, column in runs.items()}


def equal(found, expected):
    """Whether two trees are the same bits, NaN for NaN."""

    def bits(leaf):
        return leaf.nan_to_num(nan=-9.0) if leaf.is_floating_point() else leaf

    pairs = zip(tree.leaves(found), tree.leaves(expected), strict=True)
    return all(torch.equal(bits(a), bits(b)) for a, b in pairs)


def test_a_grid_has_all_combinations_and_settings_are_runs_of_one_but_for_the_seed():
    assert len(RUNS["seed"]) == 12
    assert {(lr, m, s) for lr, m, s in zip(*(RUNS[n].tolist() for n in ("lr", "momentum", "seed")), strict=True)} == {
        (torch.tensor(lr).item(), torch.tensor(m).item(), s)
        for lr in (0.1, 0.5, 2.0) for m in (0.0, 0.9) for s in (0, 1)
    }  # fmt: skip
    assert sweep.settings(RUNS).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_draws_lie_in_their_ranges_and_do_not_hang_on_how_many_there_are():
    ranges = {"lr": sweep.LogUniform(1e-3, 10.0), "momentum": sweep.Uniform(0.5, 0.9), "p": sweep.OneOf((1.0, 3.0))}
    many = sweep.random_search(random.key(0), 400, **ranges)
    few = sweep.random_search(random.key(0), 3, seeds=[5], lr=ranges["lr"])
    assert torch.equal(few["lr"], many["lr"][:3])
    assert few["seed"].tolist() == [5, 5, 5]
    assert many["lr"].min() >= 1e-3 * (1 - 1e-6)
    assert many["lr"].max() <= 10
    assert many["lr"].log().mean().item() == pytest.approx(math.log(0.1), abs=0.4)
    assert 0.5 <= many["momentum"].min() <= many["momentum"].max() <= 0.9
    assert set(many["p"].tolist()) == {1.0, 3.0}
    assert 150 < int((many["p"] == 1).sum()) < 250


@pytest.mark.parametrize(
    "call",
    [
        lambda: sweep.grid(lr=[]),
        lambda: sweep.grid(lr=[0.1], seeds=[]),
        lambda: sweep.grid(lr=[0.1], seeds=[1, 1]),
        lambda: sweep.grid(lr=[0.1], seeds=[-1]),
        lambda: sweep.random_search(random.key(0), 0, lr=sweep.Uniform(0, 1)),
        lambda: sweep.random_search(random.key(0), 1, lr=sweep.LogUniform(0.0, 1)),
        lambda: sweep.random_search(random.key(0), 1, lr=sweep.Uniform(2, 1)),
        lambda: sweep.random_search(random.key(0), 1, lr=sweep.OneOf(())),
        lambda: sweep.init_sweep(PROGRAM, {"lr": torch.zeros(2)}, epochs=1),
        lambda: sweep.init_sweep(PROGRAM, {"seed": torch.zeros(2), "lr": torch.zeros(3)}, epochs=1),
        lambda: sweep.init_sweep(PROGRAM, RUNS, epochs=0),
        lambda: made(width=0),
        lambda: made(patience=0),
        lambda: made(halving=sweep.Halving(0, 0.5)),
        lambda: made(halving=sweep.Halving(1, 1.0)),
        lambda: made(begun=sweep.init_sweep(PROGRAM, rows(RUNS, slice(3)), epochs=1)),
    ],
)
def test_what_makes_no_sweep_is_refused(call):
    with pytest.raises(ValueError, match=r"grid|random_search|sweep"):
        call()


@pytest.mark.parametrize("width", [2, 3, 12])
def test_runs_are_the_same_bits_at_any_width_from_two_on(whole, width):
    assert equal(made(width=width), whole)


def test_a_run_alone_is_the_same_bits_as_beside_others(whole):
    for k in (0, 7):
        alone = made(rows(RUNS, slice(k, k + 1)), width=2)
        assert equal(alone.states, tree.map(lambda leaf, k=k: leaf[k : k + 1], whole.states))
        assert equal(alone.losses, whole.losses[k : k + 1])
        assert equal(alone.scores, tree.map(lambda leaf, k=k: leaf[k : k + 1], whole.scores))


def test_a_loop_gives_the_same_up_to_rounding_and_the_same_bits_alone(whole):
    looped = made(width=1)
    torch.testing.assert_close(looped.states.params, whole.states.params, rtol=1e-4, atol=1e-5)
    alone = made(rows(RUNS, slice(3, 4)), width=1)
    assert equal(alone.states, tree.map(lambda leaf: leaf[3:4], looped.states))


def test_a_run_is_that_of_the_ordinary_loop(whole):
    k = 3
    hyper = {name: column[k] for name, column in RUNS.items()}
    one = train.make_step(train.batch_gradient(losses_fn(hyper["smoothing"])), optimizer_of(hyper))
    state = init(hyper, random.key(int(hyper["seed"])))
    state = train.fit(one, state, EXAMPLES, epochs=EPOCHS, batch_size=BATCH)
    found = tree.map(lambda leaf: leaf[k], whole.states)
    torch.testing.assert_close(found.params, state.params, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.step, state.step)
    assert torch.equal(found.key, state.key)


def test_the_last_batch_of_an_epoch_may_be_smaller():
    found = made(rows(RUNS, slice(2, 4)), width=2, batch_size=20)
    hyper = {name: column[2] for name, column in RUNS.items()}
    one = train.make_step(train.batch_gradient(losses_fn(hyper["smoothing"])), optimizer_of(hyper))
    state = init(hyper, random.key(int(hyper["seed"])))
    state = train.fit(one, state, EXAMPLES, epochs=EPOCHS, batch_size=20)
    torch.testing.assert_close(tree.map(lambda leaf: leaf[0], found.states.params), state.params, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("traced")
def test_compiled_lanes_equal_eager_ones_and_compile_once_for_each_width():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    vmapped = sweep.VmappedStep(PROGRAM, EXAMPLES, batch_size=BATCH, compile=True)
    found = sweep.fit(vmapped, RUNS, sweep.init_sweep(PROGRAM, RUNS, epochs=EPOCHS), width=6)
    torch.testing.assert_close(found.states.params, made(width=6).states.params, rtol=1e-4, atol=1e-5)
    assert list(vmapped._steps) == [6]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_a_sweep_that_goes_on_from_any_epoch_ends_bit_equal(whole):
    kept = []
    made(callbacks=[kept.append])
    assert [int(one.epoch) for one in kept] == [1, 2, 3]
    for one in kept:
        assert equal(made(begun=one), whole)


def test_a_failed_run_is_told_of_and_leaves_the_others_as_they_are(whole):
    bad = {name: torch.cat([column, column[:1]]) for name, column in RUNS.items()}
    bad["lr"] = torch.cat([RUNS["lr"], torch.tensor([1e30])])
    found = made(bad, width=13)
    assert [sweep.STATUSES[i] for i in found.ended.tolist()] == ["finished"] * 12 + ["failed"]
    assert found.failed.tolist()[:12] == [-1] * 12
    assert 0 <= int(found.failed[12]) < 4
    assert int(found.best_epoch[12]) == -1
    assert bool(found.at_best("accuracy")[12].isnan())
    assert equal(tree.map(lambda leaf: leaf[:12], found.states), whole.states)
    assert all(bool(leaf.isfinite().all()) for leaf in tree.leaves(found.best))


def test_halving_keeps_the_best_settings_with_all_their_seeds(whole):
    found = made(halving=sweep.Halving(1, 0.5))
    assert (~found.losses.isnan()).sum(1).reshape(6, 2).unique(dim=1).shape == (6, 1)  # seeds of a setting end together
    epochs = (~found.losses.isnan()).sum(1)[::2]
    assert sorted(epochs.tolist()) == [1, 1, 1, 2, 3, 3]
    first = found.score[:, 0].reshape(6, 2).mean(1)
    assert set(first.topk(3).indices.tolist()) == {i for i, e in enumerate(epochs.tolist()) if e > 1}
    finished = found.ended == 1
    assert equal(
        tree.map(lambda leaf: leaf[finished], found.states), tree.map(lambda leaf: leaf[finished], whole.states)
    )


def test_a_run_that_no_longer_improves_is_stopped_and_its_best_parameters_are_kept():
    found = made(sweep.grid(lr=[0.0, 0.5], momentum=[0.9], smoothing=[0.0]), width=2, patience=1)
    assert sweep.STATUSES[int(found.ended[0])] == "stopped"
    assert int((~found.losses[0].isnan()).sum()) == 2
    assert int(found.best_epoch[0]) == 0
    for k in range(2):
        params = tree.map(lambda leaf, k=k: leaf[k], found.best)
        given = outputs(params, IMAGES)
        assert (given.argmax(-1) == LABELS).double().mean() == found.at_best("accuracy")[k]


def test_each_width_is_measured_on_copies():
    vmapped = sweep.VmappedStep(PROGRAM, EXAMPLES, batch_size=BATCH, compile=False)
    begun = sweep.init_sweep(PROGRAM, RUNS, epochs=EPOCHS)
    before = tree.map(torch.clone, begun.states)
    found = sweep.measure_throughput(vmapped, RUNS, begun.states, [1, 4], steps=3)
    assert set(found.seconds) == {1, 4}
    assert found.best in (1, 4)
    assert equal(begun.states, before)
    assert str(found).endswith(f"trained {'in a loop' if found.best == 1 else '4 vmapped'}.")
    assert sweep.Throughput({1: 3.0, 8: 2.0}).best == 8


# Gradients through training.


def unrolled(hyper, *, steps, every=None, compile=False, backend=None):
    x, y = IMAGES.double(), LABELS
    keys = random.split(random.key(7), steps * BATCH).view(steps, BATCH, 2)
    weights_of = hyper.get("weights")

    def one(hyper, state, rows, keys):
        chosen = optim.sgd(hyper["lr"], momentum=hyper["momentum"], weight_decay=hyper["weight_decay"])

        def of_batch(params, rows, keys):
            moved = x[rows] + random.normal(keys, (6,)).double() * hyper["noise"]
            each = losses.cross_entropy(outputs(params, moved), y[rows])
            return each if weights_of is None else each * hyper["weights"][rows]

        return train.make_step(train.batch_gradient(of_batch), chosen)(state, rows, keys)[0]

    def loss_fn(hyper, state):
        return losses.cross_entropy(outputs(state.params, x), y).mean() + 0.01 * hyper["lr"]

    def inputs(t):
        return (torch.arange(t * BATCH, (t + 1) * BATCH) % N), keys[t]

    params = {
        "a": random.normal(random.key(2), (6, 8)).double() * 0.4,
        "b": random.normal(random.key(3), (8, 3)).double(),
    }
    start = train.init_state(params, optim.sgd(0.1, momentum=torch.tensor(0.5)), random.key(0))
    return sweep.Unrolled(one, loss_fn, compile=compile).hypergradient(hyper, start, inputs, steps=steps, every=every)


HYPER = {
    "lr": torch.tensor(0.3, dtype=torch.float64),
    "momentum": torch.tensor(0.7, dtype=torch.float64),
    "weight_decay": torch.tensor(0.01, dtype=torch.float64),
    "noise": torch.tensor(0.3, dtype=torch.float64),
    "weights": torch.ones(N, dtype=torch.float64),
}


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay", "noise", "weights"])
def test_hypergradients_equal_finite_differences(name):
    found = unrolled(HYPER, steps=11)
    step = 1e-5
    moved = torch.zeros(N, dtype=torch.float64).index_fill(0, torch.tensor([3, 20]), 1.0) if name == "weights" else 1.0
    high, low = (unrolled(HYPER | {name: HYPER[name] + side * step * moved}, steps=11).loss for side in (1, -1))
    slope = (found.grads[name] * moved).sum()
    torch.testing.assert_close(slope, (high - low) / (2 * step), rtol=1e-6, atol=1e-10)
    assert slope.abs() > 1e-7


@pytest.mark.parametrize("name", ["shift", "rotate", "elastic"])
def test_hypergradients_by_a_strength_of_augmentation_equal_finite_differences(name):
    images, keys = random.uniform(random.key(4), (6, 1, 8, 8)).double(), random.split(random.key(5), 24).view(4, 6, 2)
    labels, chosen = torch.arange(6) % 3, optim.sgd(0.1, momentum=0.5)

    def losses_of(params, x, y):
        return losses.cross_entropy(torch.tanh(x.flatten(1)) @ params, y)

    def one(strength, state, keys):
        changed = data.augmented(images, keys, data.Augmentation(**{name: strength}))
        return train.make_step(train.batch_gradient(losses_of), chosen)(state, changed, labels)[0]

    def through(strength):
        begun = train.init_state(random.normal(random.key(6), (64, 3)).double(), chosen, random.key(0))
        return sweep.hypergradient(
            one, lambda _, state: losses_of(state.params, images, labels).mean(), strength, begun,
            lambda t: (keys[t],), steps=4,
        )  # fmt: skip

    strength = torch.tensor({"shift": 1.3, "rotate": 20.0, "elastic": 0.7}[name], dtype=torch.float64)
    step = 1e-6 * strength
    slope = (through(strength + step).loss - through(strength - step).loss) / (2 * step)
    torch.testing.assert_close(through(strength).grads, slope, rtol=1e-6, atol=1e-10)
    assert slope.abs() > 1e-6


@pytest.mark.usefixtures("traced")
def test_hypergradients_are_the_same_bits_however_many_states_are_kept_and_compiled_up_to_rounding():
    found = [unrolled(HYPER, steps=10, every=every) for every in (None, 1, 3, 10, 50)]
    for other in found[1:]:
        assert equal(other, found[0])
    compiled = unrolled(HYPER, steps=10, compile=True)
    torch.testing.assert_close(compiled.grads, found[0].grads, rtol=1e-7, atol=1e-10)  # normals are float32


def test_hypergradients_keep_two_roots_of_states():
    steps, alive, most = 400, [0], [0]

    def step(lr, w):
        new = w - lr * w
        if torch._C._functorch.maybe_get_level(new) < 0:  # not one that is differentiated
            alive[0] += 1
            most[0] = max(most[0], alive[0])
            weakref.finalize(new, lambda: alive.__setitem__(0, alive[0] - 1))
        return new

    lr, w = (torch.tensor(value, dtype=torch.float64) for value in (0.001, 1.0))
    found = sweep.hypergradient(step, lambda _, w: w, lr, w, lambda t: (), steps=steps)
    torch.testing.assert_close(found.grads, torch.tensor(-steps * 0.999 ** (steps - 1), dtype=torch.float64))
    assert 2 * math.isqrt(steps) - 2 <= most[0] <= 2 * math.isqrt(steps) + 3


def test_a_gradient_through_training_refuses_what_does_not_fit():
    w = torch.tensor(1.0)
    with pytest.raises(ValueError, match="at least 1"):
        sweep.hypergradient(lambda h, s: s * h, lambda h, s: s, w, w, lambda t: (), steps=0)
    with pytest.raises(ValueError, match="0-d"):
        sweep.hypergradient(lambda h, s: s * h, lambda h, s: s.expand(2), w, w, lambda t: (), steps=1)
    with pytest.raises(TypeError, match="float tensors"):
        sweep.hypergradient(lambda h, s: s, lambda h, s: s, torch.tensor(1), w, lambda t: (), steps=1)


def test_descent_finds_the_least_loss_on_scales_of_very_different_size():
    def objective(hyper):
        lr, momentum = hyper["lr"], hyper["momentum"]
        loss = (lr.log() - math.log(0.02)).square() + 100 * (momentum - 0.8).square()
        return loss, {"lr": 2 * (lr.log() - math.log(0.02)) / lr, "momentum": 200 * (momentum - 0.8)}

    start = {"lr": torch.tensor(1e-4), "momentum": torch.tensor(0.0)}
    told = []
    found = sweep.tune(
        objective, start, scales={"lr": sweep.LOG, "momentum": sweep.LOG_FROM_ONE}, rounds=40, callback=told.append
    )
    assert found.hyper["lr"].item() == pytest.approx(0.02, rel=0.1)
    assert found.hyper["momentum"].item() == pytest.approx(0.8, abs=0.03)
    assert told == found.trials
    assert found.loss == min(trial.loss for trial in found.trials)


def test_descent_goes_back_from_where_training_does_not_stay_finite():
    def objective(hyper):
        lr = hyper["lr"]
        return (-lr, {"lr": -torch.ones(())}) if lr < 1 else (torch.tensor(math.inf), {"lr": torch.tensor(math.nan)})

    found = sweep.tune(objective, {"lr": torch.tensor(0.3)}, scales={"lr": sweep.LOG}, rounds=25)
    assert any(trial.loss == math.inf for trial in found.trials)
    assert 0.8 < found.hyper["lr"] < 1


def test_descent_keeps_a_finite_loss_whose_gradient_is_not():
    def objective(hyper):
        lr = hyper["lr"]
        return (lr, {"lr": torch.ones(()) if lr < 0.5 else torch.tensor(math.nan)})

    found = sweep.tune(objective, {"lr": torch.tensor(0.7)}, scales={"lr": sweep.LOG}, rounds=1)
    assert found.loss == pytest.approx(0.7)
    assert sweep.tune(objective, {"lr": torch.tensor(0.7)}, scales={"lr": sweep.LOG}, rounds=4).loss < 0.5


def test_descent_from_where_nothing_is_finite_tries_smaller_values():
    def objective(hyper):
        lr = hyper["lr"]
        return (lr, {"lr": torch.ones(())}) if lr < 1 else (torch.tensor(math.nan), {"lr": torch.tensor(0.0)})

    assert sweep.tune(objective, {"lr": torch.tensor(9.0)}, scales={"lr": sweep.LOG}, rounds=9).hyper["lr"] < 1


@pytest.mark.parametrize(
    "start", [{"lr": torch.tensor(0.0)}, {"momentum": torch.tensor(1.0)}, {"other": torch.ones(())}]
)
def test_descent_refuses_a_start_outside_its_scale(start):
    scales = {name: sweep.LOG_FROM_ONE if name == "momentum" else sweep.LOG for name in start if name != "other"}
    with pytest.raises(ValueError, match="tune"):
        sweep.tune(lambda hyper: (torch.zeros(()), hyper), start, scales=scales, rounds=1)


def test_lanes_map_draws_and_keys_of_each_run():
    keys = random.split(random.key(0), 3)
    drawn = train.epoch_draws(keys, N, epoch=1, batch_size=BATCH)
    each = vmap(lambda key: train.epoch_draws(key, N, epoch=1, batch_size=BATCH))(keys)
    assert torch.equal(drawn.examples, each.examples)
    assert torch.equal(drawn.keys, each.keys)


# ---- subsets


def test_a_run_on_a_subset_is_a_run_on_those_examples_alone():
    subsets = attribution.subsets(N, key=random.key(3), count=3, fraction=0.5)
    runs = rows(RUNS, torch.tensor([0, 0, 2, 4])) | {"subset": torch.tensor([0, 2, 1, 1])}
    runs["seed"] = torch.arange(4)
    vmapped = sweep.on_subsets(PROGRAM, EXAMPLES, subsets, batch_size=7, compile=False)  # the last batch is padded
    found = sweep.fit(vmapped, runs, sweep.init_sweep(vmapped.program, runs, epochs=2), width=4)
    for run in range(4):
        of_run = [x[subsets[runs["subset"][run]]] for x in EXAMPLES]
        alone = {name: column[[run, run]] for name, column in runs.items() if name != "subset"}
        plain = sweep.VmappedStep(PROGRAM, of_run, batch_size=7, compile=False)
        expected = sweep.fit(plain, alone, sweep.init_sweep(PROGRAM, alone, epochs=2), width=2)
        assert equal([leaf[run] for leaf in tree.leaves(found)[:-1]], [leaf[0] for leaf in tree.leaves(expected)[:-1]])


@pytest.mark.parametrize(
    ("subsets", "said"),
    [
        (torch.ones(2, N), r"bool \(R, 48\)"),
        (torch.ones(2, 7, dtype=torch.bool), r"bool \(R, 48\)"),
        (torch.ones(2, N).tril(10).bool(), "of one size, at least 1. Found 11 to 12"),
        (torch.zeros(2, N, dtype=torch.bool), "of one size, at least 1. Found 0 to 0"),
    ],
)
def test_subsets_that_no_run_can_be_trained_on_are_refused(subsets, said):
    with pytest.raises(ValueError, match=f"on_subsets: .*{said}"):
        sweep.on_subsets(PROGRAM, EXAMPLES, subsets, batch_size=7, compile=False)
