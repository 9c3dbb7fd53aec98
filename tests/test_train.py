"""Steps, the loop and evaluation."""

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad

from functorch_mnist import data, losses, models, optim, random, train, tree
from functorch_mnist.distributed import World

MODEL = models.mlp((6, 8, 3))


def loss_fn(params, x, y):
    return losses.cross_entropy(MODEL.apply(params, x), y)


def noisy_loss_fn(params, x, y, key):
    """A loss of one example that draws from its key."""
    return losses.cross_entropy(MODEL.apply(params, x + 0.1 * random.normal(key, x.shape)), y)


def examples(n):
    return random.normal(random.key(n), (n, 6)), random.randint(random.key(n), (n,), 0, 3)


def start(optimizer):
    return train.init_state(MODEL.init(random.key(0)), optimizer, random.key(1))


def assert_equal(a, b):
    assert tree.paths(a) == tree.paths(b)
    for path, x, y in zip(tree.paths(a), tree.leaves(a), tree.leaves(b), strict=True):
        assert torch.equal(x, y), path


def test_a_step_is_the_mean_gradient_then_the_optimizer():
    optimizer = optim.sgd(0.1, momentum=0.9)
    state, (x, y) = start(optimizer), examples(5)
    new, aux = train.make_step(loss_fn, optimizer)(state, x, y)

    def mean_loss(params):
        return F.cross_entropy(MODEL.apply(params, x), y)

    params, optimizer_state = optimizer.update(state.params, state.optimizer, grad(mean_loss)(state.params))
    torch.testing.assert_close(tree.leaves(new.params), tree.leaves(params))
    torch.testing.assert_close(tree.leaves(new.optimizer), tree.leaves(optimizer_state))
    torch.testing.assert_close(aux["loss"], 5 * mean_loss(state.params))
    assert new.step == 1
    assert torch.equal(new.key, state.key)


def test_the_loss_of_an_example_and_the_losses_of_a_batch_give_one_gradient():
    state, (x, y) = start(optim.sgd(0.1)), examples(5)
    one, one_aux = train.gradient(loss_fn)(state.params, x, y)
    all_, all_aux = train.batch_gradient(loss_fn)(state.params, x, y)
    torch.testing.assert_close(tree.leaves(one), tree.leaves(all_))
    torch.testing.assert_close(one_aux, all_aux)


@given(st.lists(st.booleans(), min_size=1, max_size=6), st.sampled_from([0.0, float("nan"), float("inf")]))
def test_a_masked_example_adds_exactly_nothing_whatever_it_holds(mask, filling):
    mask = torch.tensor(mask)
    x, y = examples(len(mask))
    x[~mask], y[~mask] = filling, 99
    params = MODEL.init(random.key(0))
    for estimator in (train.gradient(loss_fn), train.batch_gradient(loss_fn)):
        sums, aux = estimator(params, x, y, mask=mask)
        if not mask.any():
            assert not tree.ravel(sums).any()
            assert aux["loss"] == 0
            continue
        expected, expected_aux = estimator(params, x[mask], y[mask])
        torch.testing.assert_close(tree.leaves(sums), tree.leaves(expected), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(aux, expected_aux, rtol=1e-5, atol=1e-6)


def test_a_loss_that_is_not_one_number_per_example_is_refused_by_shape():
    params, batch = MODEL.init(random.key(0)), examples(5)
    one = train.gradient(lambda params, x, y: MODEL.apply(params, x))
    with pytest.raises(ValueError, match=r"one example must be 0-d\. Found \(3,\)"):
        one(params, *batch)
    for losses_fn, found in [
        (lambda params, x, y: loss_fn(params, x, y).mean(), r"\(\)"),
        (lambda params, x, y: loss_fn(params, x, y)[:, None], r"\(5, 1\)"),
    ]:
        with pytest.raises(ValueError, match=rf"per example, \(5,\)\. Found {found}\. Is there a mean"):
            train.batch_gradient(losses_fn)(params, *batch, mask=torch.ones(5, dtype=torch.bool))


def test_an_estimator_is_taken_as_it_is():
    estimator = train.Estimator(
        lambda params, *batch, mask: (tree.map(torch.ones_like, params), {"loss": batch[0].sum()})
    )
    state = start(optim.sgd(1.0))
    new, aux = train.make_step(estimator, optim.sgd(1.0))(state, torch.ones(4), divisor=8)
    torch.testing.assert_close(tree.ravel(new.params), tree.ravel(state.params) - 1 / 8)
    assert aux["loss"] == 4


def test_an_empty_batch_with_a_divisor_is_a_step_without_a_gradient():
    state = start(optim.sgd(1.0))
    for estimator in (train.gradient(loss_fn), train.batch_gradient(loss_fn)):
        batch = torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64)
        new, aux = train.make_step(estimator, optim.sgd(1.0))(state, *batch, divisor=8)
        assert_equal(new.params, state.params)
        assert aux["loss"] == 0


def test_a_step_changes_none_of_its_arguments():
    optimizer = optim.sgd(0.1, momentum=0.9)
    state, batch = start(optimizer), examples(4)
    before = [leaf.clone() for leaf in tree.leaves((state, batch))]
    train.make_step(loss_fn, optimizer)(state, *batch)
    assert all(map(torch.equal, tree.leaves((state, batch)), before))


def test_a_state_whose_parameters_were_cast_after_init_is_refused():
    optimizer = optim.sgd(0.1, momentum=0.9)
    state, (x, y) = start(optimizer), examples(4)
    cast = state._replace(params=tree.map(torch.Tensor.double, state.params))
    with pytest.raises(
        ValueError, match=r"sgd: the state must be .* Found velocity/0\.weight: torch.float32 .*float64"
    ):
        train.make_step(loss_fn, optimizer)(cast, x.double(), y)


@pytest.mark.parametrize(
    "batch, options, fault",
    [
        ((torch.zeros(3, 6), torch.zeros(2, dtype=torch.int64)), {}, r"Found shapes \[\(3, 6\), \(2,\)\]"),
        (examples(3), {"mask": torch.ones(2, dtype=torch.bool), "divisor": 3}, r"mask must be bool \(3,\)"),
        (examples(3), {"mask": torch.ones(3), "divisor": 3}, "mask must be bool"),
        (examples(3), {"mask": torch.ones(3, dtype=torch.bool)}, "needs a divisor"),
        ((), {}, "at least one tensor"),
        ((torch.tensor(1.0),), {}, "one leading size"),
        ((torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64)), {}, "must have an example"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(batch, options, fault):
    optimizer = optim.sgd(0.1)
    with pytest.raises(ValueError, match=fault):
        train.make_step(loss_fn, optimizer)(start(optimizer), *batch, **options)


def test_the_compiled_step_equals_the_eager_one_over_steps_and_compiles_once():
    optimizer = optim.clip_by_global_norm(optim.sgd(optim.cosine(0.1, steps=5), momentum=0.9), max_norm=0.5)
    step = train.make_step(noisy_loss_fn, optimizer)
    fused = train.compiled(step)
    a = b = start(optimizer)
    x, y = examples(4)
    mask = torch.tensor([True, True, True, False])
    torch._dynamo.utils.counters.clear()
    for number in range(4):
        keys = random.split(random.key(number), 4)
        a, aux = step(a, x, y, keys, mask=mask, divisor=torch.tensor(3.0 - number % 2))
        b, fused_aux = fused(b, x, y, keys, mask=mask, divisor=torch.tensor(3.0 - number % 2))
        torch.testing.assert_close(fused_aux, aux)
    torch.testing.assert_close(tree.leaves(b), tree.leaves(a), rtol=1e-5, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.usefixtures("traced")
@torch._dynamo.config.patch(recompile_limit=2)
def test_many_steps_can_be_compiled_in_one_process():
    for number in range(3):
        step = train.make_step(lambda w, x, number=number: (w - number * x) ** 2, optim.sgd(0.5))
        state = train.init_state(torch.tensor(0.0), optim.sgd(0.5), random.key(0))
        new, _ = train.compiled(step)(state, torch.tensor([1.0]))
        assert new.params.item() == number


class Scaled:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, x, *, shift=0.0):
        return self.factor * x + shift


@pytest.mark.usefixtures("traced")
@torch._dynamo.config.patch(recompile_limit=2)
@pytest.mark.parametrize(
    "make",
    [Scaled, lambda n: Scaled(n).__call__, lambda n: functools.partial(torch.mul, n)],
    ids=["object", "bound method", "partial"],
)
def test_many_callables_of_every_kind_can_be_compiled_in_one_process(make):
    for number in range(3):
        assert train.compiled(make(number))(torch.tensor(2.0)) == 2 * number


@pytest.mark.usefixtures("traced")
def test_a_compiled_function_takes_its_keyword_arguments_and_defaults():
    scaled = train.compiled(Scaled(3.0))
    assert [scaled(torch.tensor(2.0)), scaled(torch.tensor(2.0), shift=torch.tensor(1.0))] == [6, 7]


def fitted(epochs, batch_size, *, state=None, loss=None, callbacks=(), pad=False, until=None, n=10):
    optimizer = optim.sgd(0.1, momentum=0.9)
    return train.fit(
        train.make_step(noisy_loss_fn, optimizer),
        start(optimizer) if state is None else state,
        examples(n),
        epochs=epochs,
        batch_size=batch_size,
        loss=loss,
        callbacks=callbacks,
        pad=pad,
        until=until,
    )


@given(st.integers(1, 6), st.integers(0, 3))
def test_fit_makes_every_step_and_sees_every_example_once_an_epoch(batch_size, epochs):
    seen = []
    state = fitted(epochs, batch_size, callbacks=[seen.append])
    per_epoch = -(-10 // batch_size)
    assert state.step == epochs * per_epoch == len(seen)
    assert [p.step for p in seen] == list(range(1, len(seen) + 1))
    assert [p.examples for p in seen if p.epoch_ended] == [10] * epochs
    assert [p.epoch for p in seen if p.epoch_ended] == list(range(epochs))


@given(st.integers(1, 6), st.integers(0, 9))
def test_a_run_that_goes_on_from_any_step_ends_bit_equal(batch_size, stop):
    seen = []
    whole = fitted(3, batch_size, callbacks=[seen.append])
    middle = seen[min(stop, len(seen) - 1)]
    again = []
    resumed = fitted(3, batch_size, state=middle.state, loss=middle.loss, callbacks=[again.append])
    assert_equal(resumed, whole)
    assert [p.loss.item() for p in again] == [p.loss.item() for p in seen[middle.step :]]


@pytest.mark.parametrize("pad", [False, True])
def test_the_loss_of_progress_is_the_sum_of_the_epochs_losses_so_far(pad):
    seen = []
    fitted(2, 4, callbacks=[seen.append], pad=pad)
    assert [p.examples for p in seen] == [4, 8, 10] * 2
    total = 0.0
    for number, progress in enumerate(seen):
        total = (0.0 if number % 3 == 0 else total) + progress.aux["loss"].item()
        assert progress.loss.dtype == torch.float64
        assert progress.loss.item() == pytest.approx(total, rel=1e-12)


def test_padding_the_last_batch_changes_nothing_but_rounding():
    padded, short = fitted(2, 4, pad=True), fitted(2, 4)
    torch.testing.assert_close(tree.leaves(padded), tree.leaves(short), rtol=1e-5, atol=1e-6)


def test_an_examples_key_depends_on_the_step_and_the_example_alone():
    drawn = train.epoch_draws(random.key(3), 5, epoch=2, batch_size=2)
    order_key, noise_key = random.split(random.key(3)).unbind(0)
    assert torch.equal(drawn.examples, data.epoch_order(5, key=order_key, epoch=2))
    for place, (example, key) in enumerate(zip(drawn.examples.tolist(), drawn.keys, strict=True)):
        assert torch.equal(key, random.fold_in(random.fold_in(noise_key, 2 * 3 + place // 2), example))


def test_a_repeated_example_has_another_key_each_time():
    drawn = train.epoch_draws(
        random.key(3), 6, epoch=0, batch_size=6, order=lambda key, epoch: torch.tensor([4, 1, 4, 4, 1, 0])
    )
    noise_key = random.fold_in(random.split(random.key(3))[1], 0)
    for number, key in zip([4, 1, 4 + 6, 4 + 12, 1 + 6, 0], drawn.keys, strict=True):
        assert torch.equal(key, random.fold_in(noise_key, number))


def test_the_draws_of_several_keys_are_those_of_each():
    keys = random.split(random.key(1), 3)
    together = train.epoch_draws(keys, 7, epoch=1, batch_size=3)
    for place, key in enumerate(keys):
        alone = train.epoch_draws(key, 7, epoch=1, batch_size=3)
        assert torch.equal(together.examples[place], alone.examples)
        assert torch.equal(together.keys[place], alone.keys)


def test_an_order_of_another_length_is_refused():
    with pytest.raises(ValueError, match=r"an order must be int64 \(4,\)"):
        train.epoch_draws(random.key(0), 4, epoch=0, batch_size=2, order=lambda key, epoch: torch.arange(3))


def test_training_ends_where_it_is_told_to():
    told = []
    fitted(5, 4, until=lambda progress: progress.epoch == 1, callbacks=[told.append])
    assert [progress.epoch for progress in told if progress.epoch_ended] == [0, 1]


def test_each_epoch_has_another_order_and_each_run_of_a_key_the_same():
    orders = [data.epoch_order(50, key=random.key(0), epoch=epoch) for epoch in (0, 1, 0)]
    assert torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0], orders[1])
    assert all(torch.equal(order.sort().values, torch.arange(50)) for order in orders)


@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 5))
def test_batches_cut_the_order_and_pad_it_with_a_mask(n, batch_size, skipped):
    order = data.epoch_order(n, key=random.key(n), epoch=0)
    short = list(data.batches(order, batch_size=batch_size, start=skipped, pad=False))
    padded = list(data.batches(order, batch_size=batch_size, start=skipped, pad=True))
    rest = order[skipped * batch_size :]
    assert torch.equal(torch.cat([b.examples for b in short] or [rest]), rest)
    assert len(short) == max(0, data.steps_per_epoch(n, batch_size) - skipped)
    for a, b in zip(short, padded, strict=True):
        assert len(b.examples) == batch_size
        assert torch.equal(b.examples[b.mask], a.examples)


@pytest.mark.parametrize(
    "call",
    [
        lambda: data.batches(torch.arange(0), batch_size=2, pad=False),
        lambda: data.batches(torch.arange(3), batch_size=0, pad=False),
        lambda: data.batches(torch.arange(3), batch_size=1, start=-1, pad=False),
        lambda: fitted(1, 0),
        lambda: fitted(-1, 2),
        lambda: train.fit(lambda *_, **__: None, start(optim.sgd(0.1)), (torch.zeros(0, 6),), epochs=1, batch_size=1),
        lambda: train.fit(
            lambda *_, **__: None, start(optim.sgd(0.1)), (torch.zeros(2), torch.zeros(3)), epochs=1, batch_size=1
        ),
        lambda: train.predictions(lambda params, x: x, (), torch.zeros(0, 3)),
        lambda: train.predictions(lambda params, x: x, (), torch.zeros(2, 3), batch_size=0),
    ],
)
def test_numbers_outside_their_range_are_refused(call):
    with pytest.raises(ValueError, match="Found"):
        for _ in call():
            pass


@given(st.integers(1, 12), st.integers(1, 5))
def test_evaluation_counts_do_not_depend_on_the_batch_size(n, batch_size):
    params, (x, y) = MODEL.init(random.key(0)), examples(n)
    whole = train.evaluate(MODEL.apply, losses.cross_entropy, params, x, y, batch_size=n)
    parts = train.evaluate(MODEL.apply, losses.cross_entropy, params, x, y, batch_size=batch_size)
    assert torch.equal(whole.confusion, parts.confusion)
    assert whole.total == n
    assert whole.correct == int((MODEL.apply(params, x).argmax(-1) == y).sum())
    torch.testing.assert_close(parts.loss, F.cross_entropy(MODEL.apply(params, x), y).double())


@pytest.mark.parametrize(
    "labels, error, fault",
    [
        (torch.tensor([0, 1]), ValueError, r"share their leading axes\. Found \(3, 3\) and \(2,\)"),
        (torch.tensor([0.0, 1.0, 2.0]), TypeError, r"must be integers.*float32"),
        (torch.tensor([0, 1, 3]), ValueError, r"in \[0, 3\).*Found 3"),
        (torch.tensor([-1, 1, 2]), ValueError, r"in \[0, 3\).*Found -1"),
    ],
)
def test_labels_that_do_not_fit_the_model_are_refused(labels, error, fault):
    with pytest.raises(error, match=f"evaluate: .*{fault}"):
        train.evaluate(lambda params, x: x, losses.cross_entropy, (), torch.eye(3), labels)


def test_fit_refuses_a_bare_tensor_for_its_examples():
    with pytest.raises(TypeError, match=r"tuple of tensors.*\(x,\)"):
        train.fit(lambda: None, start(optim.sgd(0.1)), torch.zeros(4, 6), epochs=1, batch_size=1)


def test_accuracy_and_recall_are_those_of_the_confusion_matrix():
    outputs = torch.eye(3)[torch.tensor([0, 0, 1, 2])]
    labels = torch.tensor([0, 1, 1, 1])
    result = train.evaluate(lambda params, x: x, losses.cross_entropy, (), outputs, labels)
    assert result.confusion.tolist() == [[1, 0, 0], [1, 1, 1], [0, 0, 0]]
    assert result.accuracy == 0.5
    assert result.recall[:2].tolist() == pytest.approx([1, 1 / 3])
    assert result.recall[2].isnan()


def test_in_bfloat16_parameters_gradients_and_loss_stay_float32_and_close():
    params, (x, y) = MODEL.init(random.key(0)), examples(40)
    apply = train.in_precision(MODEL.apply, torch.bfloat16)
    seen = []

    def probe(params, x, key=None):
        seen.append((params["0.weight"].dtype, x.dtype))
        return MODEL.apply(params, x, key)

    train.in_precision(probe, torch.bfloat16)(params, x)
    assert seen == [(torch.bfloat16, torch.bfloat16)]

    def total(apply):
        return train.batch_gradient(lambda params, x, y: losses.cross_entropy(apply(params, x), y))(params, x, y)

    (low, low_aux), (full, full_aux) = total(apply), total(MODEL.apply)
    assert all(g.dtype == torch.float32 for g in tree.leaves(low))
    assert low_aux["loss"].dtype == torch.float32
    # bfloat16 keeps 8 bits: each number is within 2⁻⁸, and a few roundings add up.
    assert tree.norm(tree.map(torch.sub, low, full)) < 0.03 * tree.norm(full)
    torch.testing.assert_close(low_aux, full_aux, rtol=0.01, atol=0)


SCALE = 2.0


@pytest.mark.usefixtures("traced")
def test_a_compiled_function_follows_a_global_of_its_caller(monkeypatch):
    scaled = train.compiled(lambda x: SCALE * x)
    assert scaled(torch.ones(())) == 2
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    assert scaled(torch.ones(())) == 3


def test_a_precision_leaves_whole_numbers_whole():
    def look_up(params, x, key=None):
        return torch.nn.functional.embedding(x, params["table"])

    found = train.in_precision(look_up, torch.bfloat16)({"table": torch.arange(600.0)[:, None]}, torch.tensor([3, 257]))
    assert torch.equal(found, torch.tensor([[3.0], [256.0]]))  # bfloat16 has no 257


def test_float32_precision_is_the_function_itself():
    assert train.in_precision(MODEL.apply, torch.float32) is MODEL.apply


@pytest.mark.usefixtures("traced")
def test_the_watching_estimator_is_the_plain_one_with_norms_and_noise_beside_it():
    def loss_fn(w, x):
        return (w * x).sum().sin()

    w = torch.linspace(-1, 1, 4, dtype=torch.float64)
    x = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(7) != 2
    poisoned = x.index_fill(0, torch.tensor([2]), torch.nan)
    plain = train.gradient(loss_fn)(w, x[mask])
    rows = torch.func.vmap(torch.func.grad(loss_fn), in_dims=(None, 0))(w, x[mask])
    for watching in (train.gradient_with_noise(loss_fn), train.compiled(train.gradient_with_noise(loss_fn))):
        grads, aux = watching(w, poisoned, mask=mask)
        torch.testing.assert_close(grads, plain[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(aux["loss"], plain[1]["loss"], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(aux["norms"][mask], rows.norm(dim=1), rtol=1e-12, atol=1e-12)
        assert aux["norms"][2] == 0
        torch.testing.assert_close(aux["trace"], rows.var(0).sum(), rtol=1e-10, atol=1e-12)
        square = rows.mean(0).square().sum() - aux["trace"] / 6
        torch.testing.assert_close(aux["square_norm"], square, rtol=1e-10, atol=1e-12)


def test_watching_an_empty_batch_changes_nothing():
    grads, aux = train.gradient_with_noise(lambda w, x: w * x)(torch.tensor(2.0), torch.zeros(0))
    assert grads == 0
    assert aux["loss"] == 0
    assert aux["norms"].shape == (0,)
    assert aux["trace"].isnan()


def bent(w, x, y):
    """A loss of one example that bends, with a parameter that is factored and one that is not."""
    return (torch.tanh(x @ w["a"]) * w["b"] - y).square().sum() / 2


def normal(seed, *shape):
    return random.normal(random.key(seed), shape).double()


BENT = {"a": normal(0, 3, 2), "b": normal(1, 2)}
ROWS, HELD_OUT = (normal(2, 5, 3), normal(3, 5, 2)), (normal(4, 7, 3), normal(5, 7, 2))


def shapley(utility, players):
    """The Shapley value of each, from its definition: 2^n sums."""
    every = [frozenset(s) for size in range(players + 1) for s in itertools.combinations(range(players), size)]
    found = {some: utility(sorted(some)) for some in every}
    weights = [1 / (players * math.comb(players - 1, size)) for size in range(players)]
    return torch.stack(
        [sum(weights[len(s)] * (found[s | {i}] - found[s]) for s in every if i not in s) for i in range(players)]
    )


def flat_loss(held_out):
    """The mean validation loss of raveled parameters."""
    return lambda vector: torch.func.vmap(bent, in_dims=(None, 0, 0))(tree.unravel(BENT, vector), *held_out).mean()


def sample_rows(batch):
    rows = torch.func.vmap(grad(bent), in_dims=(None, 0, 0))(BENT, *batch)
    return torch.cat([leaf.flatten(1) for leaf in tree.leaves(rows)], 1)


@pytest.mark.parametrize("order", [1, 2])
def test_values_are_the_shapley_values_of_the_expanded_loss_by_all_subsets(order):
    point, rate = tree.ravel(BENT), 0.3 / 5
    gradient, hessian = grad(flat_loss(HELD_OUT))(point), torch.func.jacrev(grad(flat_loss(HELD_OUT)))(point)
    rows = sample_rows(ROWS)

    def lowered(some):
        move = -rate * rows[some].sum(0)
        return -gradient @ move - (move @ hessian @ move / 2 if order == 2 else 0)

    _, aux = train.gradient_with_data_values(bent, HELD_OUT, order=order)(BENT, *ROWS)
    values = train.data_values(aux, lr=0.3)
    torch.testing.assert_close(values, shapley(lowered, 5), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(values.sum(), lowered(range(5)), rtol=1e-10, atol=1e-10)


def test_values_of_second_order_are_exact_where_the_validation_loss_is_quadratic():
    def quadratic(w, x, y):
        return (x @ w - y).square() / 2

    w, (x, y), (vx, vy) = normal(0, 3), (ROWS[0], ROWS[1][:, 0]), (HELD_OUT[0], HELD_OUT[1][:, 0])
    rows = (x @ w - y)[:, None] * x

    def lowered(some):
        return ((vx @ w - vy).square() - (vx @ (w - 0.1 * rows[some].sum(0)) - vy).square()).mean() / 2

    _, aux = train.gradient_with_data_values(quadratic, (vx, vy), order=2)(w, x, y)
    values = train.data_values(aux, lr=0.1, divisor=1)
    torch.testing.assert_close(values, shapley(lowered, 5), rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("order", [1, 2])
def test_the_valuing_estimator_is_the_plain_one_with_products_beside_it(order):
    mask, key = torch.arange(5) != 2, random.key(7)
    poisoned = [x.index_fill(0, torch.tensor([2]), torch.nan) for x in ROWS]
    plain, plain_aux = train.gradient(bent)(BENT, *[x[mask] for x in ROWS])
    which = random.randint(key, (3,), 0, 7)
    drawn = flat_loss([x[which] for x in HELD_OUT])
    point, rows = tree.ravel(BENT), sample_rows(ROWS)[mask]
    valuing = train.gradient_with_data_values(bent, HELD_OUT, validation_batch=3, order=order)
    for estimator in (valuing, train.compiled(valuing)):
        grads, aux = estimator(BENT, *poisoned, mask=mask, key=key)
        torch.testing.assert_close(grads, plain, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(aux["loss"], plain_aux["loss"], rtol=1e-12, atol=1e-12)
        assert aux["count"] == 4
        torch.testing.assert_close(aux["gradient_dot"][mask], rows @ grad(drawn)(point), rtol=1e-10, atol=1e-10)
        if order == 2:
            turned = torch.func.jacrev(grad(drawn))(point) @ rows.sum(0)
            torch.testing.assert_close(aux["gradient_hessian_gradient"][mask], rows @ turned, rtol=1e-10, atol=1e-10)
        assert train.data_values(aux, lr=0.1)[2] == 0


def test_the_smoothed_validation_gradient_is_the_moving_average_of_each_steps_draw():
    estimator = train.gradient_with_data_values(bent, HELD_OUT, validation_batch=2, ema_decay=0.6)
    step = train.make_step(estimator, optim.sgd(0.0))
    state = train.init_state(BENT, optim.sgd(0.0), random.key(3), estimator)
    draws, rows = [], sample_rows(ROWS)
    for number in range(3):
        state, aux = step(state, *ROWS)
        which = random.randint(random.fold_in(random.fold_in(random.key(3), 2), number), (2,), 0, 7)
        draws.append(grad(flat_loss([x[which] for x in HELD_OUT]))(tree.ravel(BENT)))
        weights = [0.6**ago for ago in range(number, -1, -1)]
        mean = sum(w * d for w, d in zip(weights, draws, strict=True)) / sum(weights)
        torch.testing.assert_close(aux["gradient_dot"], rows @ mean, rtol=1e-10, atol=1e-10)
    assert not torch.equal(draws[0], draws[1])
    keeping = train.make_step(
        train.gradient_with_data_values(bent, HELD_OUT, ema_decay=0.6, refresh=False), optim.sgd(0.0)
    )
    new, aux = keeping(state, *ROWS)
    torch.testing.assert_close(aux["gradient_dot"], rows @ mean, rtol=1e-10, atol=1e-10)
    assert_equal(new.estimator, state.estimator)


def test_valuing_an_empty_batch_changes_nothing():
    grads, aux = train.gradient_with_data_values(bent, HELD_OUT, order=2)(BENT, *[x[:0] for x in ROWS])
    assert not tree.ravel(grads).any()
    assert aux["loss"] == aux["count"] == 0
    assert aux["gradient_dot"].shape == aux["gradient_hessian_gradient"].shape == (0,)


@pytest.mark.parametrize(
    "options",
    [
        {"validation_batch": 0},
        {"ema_decay": 1.0},
        {"ema_decay": -0.1},
        {"order": 3},
        {"validation": (torch.zeros(0),)},
        {"refresh": False},
        {"refresh": False, "ema_decay": 0.5, "order": 2},
    ],
)
def test_what_cannot_be_valued_is_refused(options):
    with pytest.raises(ValueError, match=r"gradient_with_data_values: .*Found"):
        train.gradient_with_data_values(bent, **{"validation": HELD_OUT, **options})


def test_values_of_second_order_need_the_whole_batch_in_one_place():
    for order, world in [(1, World(shards=2)), (2, World())]:
        train.make_step(train.gradient_with_data_values(bent, HELD_OUT, order=order), optim.sgd(0.1), world)
    for world in (World(shards=2), World(0, 2, group="0")):
        with pytest.raises(ValueError, match=r"all rows of a batch in one place\. Found a world of 2 parts"):
            train.make_step(train.gradient_with_data_values(bent, HELD_OUT, order=2), optim.sgd(0.1), world)


@pytest.mark.parametrize("pad", [False, True])
def test_progress_says_which_examples_the_rows_of_aux_are_of(pad):
    x, y = examples(10)
    seen = []

    def estimate(params, x, y, key, *, mask):
        return params, {"loss": x.sum(), "x": x}

    step = train.make_step(train.Estimator(estimate), optim.sgd(0.0))
    train.fit(step, start(optim.sgd(0.0)), (x, y), epochs=2, batch_size=4, pad=pad, callbacks=[seen.append])
    for progress in seen:
        assert torch.equal(progress.aux["x"], x[progress.drawn])
    for epoch in (seen[:3], seen[3:]):  # each example once, and no padding
        assert sorted(torch.cat([one.drawn for one in epoch]).tolist()) == list(range(10))


def test_a_watch_is_made_at_the_first_step_and_then_at_every_so_many():
    made = []

    def step_named(name):
        def step(state, *batch, mask=None, divisor=None):
            made.append(name)
            return state._replace(step=state.step + 1), {"loss": torch.zeros(())}

        return step

    state = train.init_state(torch.zeros(()), optim.sgd(0.1), random.key(0))
    fit = functools.partial(train.fit, step_named("plain"), state, (torch.zeros(10),), epochs=1, batch_size=2)
    fit(watch=train.Watch(step_named("watched"), 2))
    assert made == ["watched", "plain", "watched", "plain", "watched"]
    with pytest.raises(ValueError, match=r"watch.every must be at least 1"):
        fit(watch=train.Watch(step_named("watched"), 0))
