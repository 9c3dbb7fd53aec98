"""User-level training: whole users are sampled, clipped and accounted for."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from zoo import difference

from functorch_mnist import losses, models, optim, per_sample, privacy, random, train, tree
from functorch_mnist.distributed import World
from functorch_mnist.privacy import Draw, Flat, Poisson, Quantile, Secret, Users

IDS = torch.tensor([7, 7, -3, 7, 2**40, -3, 7, 7, 5, 5])
MODEL = models.linear(6, 3)
X, Y = random.normal(random.key(0), (10, 6)).double(), torch.arange(10) % 3


def loss_fn(params, x, y, key):
    return losses.cross_entropy(MODEL.apply(params, x), y)


FLAT = Flat(0.5)


def made(sigma=0.0, rate=1.0, most=100, rule=FLAT, **more):
    return train.make_private_step(
        loss_fn, optim.sgd(1.0), clipping=rule, mechanism=Poisson(rate, sigma, unit="user"),
        examples=Users(IDS, max_examples=most), **more,
    )  # fmt: skip


def begun(step):
    params = tree.map(torch.Tensor.double, MODEL.init(random.key(1)))
    return train.init_private_state(params, step.optimizer, random.key(2), step.clipping)


def test_a_step_moves_by_the_mean_of_the_users_clipped_summed_gradients():
    step = made()
    state = begun(step)
    found, seen = step(state, Secret(1).roots(), X, Y)
    dense = per_sample.grads(lambda p, x, y: loss_fn(p, x, y, None), state.params, X, Y)
    users = IDS.unique()
    total = tree.map(torch.zeros_like, state.params)
    for user in users:
        mine = tree.map(lambda g, rows=user == IDS: g[rows].sum(0), dense)
        factor = min(1.0, 0.5 / tree.norm(mine).item())
        total = tree.map(torch.add, total, tree.map(lambda g, factor=factor: factor * g, mine))
    expected = tree.map(lambda w, t: w - t / len(users), state.params, total)
    assert difference(found.params, expected) < 1e-10
    assert seen["count"] == 4  # users
    assert step.expected == 4


def test_no_user_moves_a_step_by_more_than_the_sensitivity_whatever_its_examples_are():
    step = made()
    state, roots = begun(step), Secret(1).roots()
    without = X.clone(), Y.clone()
    for scale in (1.0, 1e3):
        more = X.clone()
        more[IDS == 7] *= scale
        a, b = step(state, roots, more, Y)[0].params, step(state, roots, *without)[0].params
        assert tree.norm(tree.map(torch.sub, a, b)).item() * step.expected <= 2 * 0.5 + 1e-9  # a user that is replaced


def test_a_user_whose_gradient_is_not_finite_moves_nothing():
    step = made()
    state, roots = begun(step), Secret(1).roots()
    bad = X.clone()
    bad[3] = math.nan  # one example of user 7
    found, seen = step(state, roots, bad, Y)
    assert seen["nonfinite"] == 1
    others = made()
    dense = per_sample.clipped_sum(
        lambda p, x, y: loss_fn(p, x, y, None), state.params, X, Y, max_norm=0.5, group=IDS, mask=IDS != 7
    )
    expected = tree.map(lambda w, g: w - g / others.expected, state.params, dense.grads)
    assert difference(found.params, expected) < 1e-10


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=60), st.integers(1, 5), st.lists(st.integers(5, 20), min_size=1)
)
def test_chunks_hold_at_most_so_many_examples_of_each_drawn_user_all_in_one_chunk(ids, most, sizes):
    ids = torch.tensor(ids)
    users = Users(ids, max_examples=most)
    every = Draw(torch.arange(len(users)))
    batches = users.chunks(every, random.key(0), sizes)
    assert {len(batch.examples) for batch in batches} <= set(sizes)
    rows = [batch.examples[batch.mask] for batch in batches]
    assert torch.cat(rows).unique().numel() == sum(map(len, rows))  # none twice
    for user in ids.unique():
        own = [int((ids[part] == user).sum()) for part in rows]
        assert sum(own) == min(most, int((ids == user).sum()))
        assert sum(count > 0 for count in own) == 1


def test_the_examples_of_a_user_are_chosen_anew_in_each_step_and_alike():
    users = Users(torch.zeros(50, dtype=torch.int64), max_examples=10)
    one = Draw(torch.tensor([0]))
    drawn = [users.rows(one, random.fold_in(random.key(0), step))[0] for step in range(400)]
    counts = torch.cat(drawn).bincount(minlength=50).double()
    assert counts.sum() == 4000
    assert ((counts - 80).abs() < 5 * math.sqrt(400 * 0.2 * 0.8)).all()


def test_results_do_not_hang_on_the_chunks_and_a_resume_is_exact():
    results = []
    for sizes in ((10,), (5, 6), (5,)):
        step = made(1.0, 0.7, most=4, rule=Quantile(0.5, 3.0, 0.5), chunk_sizes=sizes)
        state = train.fit_private(step, begun(step), (X, Y), secret=Secret(3), steps=4)
        results.append(state)
    half = train.fit_private(step, begun(step), (X, Y), secret=Secret(3), steps=2)
    results.append(train.fit_private(step, half, (X, Y), secret=Secret(3), steps=4))
    for other in results[1:]:
        assert difference(other.params, results[0].params) < 1e-10
    assert tree.norm(results[0].params).isfinite()


@pytest.mark.usefixtures("traced")
def test_the_compiled_user_step_equals_the_eager_one():
    step = made(1.0, most=4, chunk_sizes=(10,))
    state = begun(step)
    eager, _ = step(state, Secret(3).roots(), X, Y)
    torch._dynamo.reset()
    found, _ = step.compiled()(state, Secret(3).roots(), X, Y)
    assert difference(found.params, eager.params) < 1e-6  # the noise is float32


def test_the_account_of_users_is_that_of_their_coins_and_says_what_is_protected():
    step = made(2.0, 0.1)
    assert step.mechanism.relation.startswith("one user added or removed")
    assert "each user with a chance of 0.1" in step.mechanism.sampling
    assert privacy.epsilon(step.mechanism, steps=100, delta=1e-5) == privacy.epsilon(
        Poisson(0.1, 2.0), steps=100, delta=1e-5
    )


def test_what_is_no_users_is_refused():
    for ids, kind in ((torch.zeros(3), TypeError), (torch.zeros(0, dtype=torch.int64), ValueError), ([1], TypeError)):
        with pytest.raises(kind, match="ids must be"):
            Users(ids, max_examples=1)
    with pytest.raises(ValueError, match="max_examples must be at least 1"):
        Users(IDS, max_examples=0)
    with pytest.raises(ValueError, match="must hold a user's examples"):
        Users(IDS, max_examples=4).chunks(Draw(torch.arange(4)), random.key(0), (3,))
    with pytest.raises(ValueError, match="on one process"):
        made(world=World(shards=2))
    with pytest.raises(ValueError, match="it must get the 10 examples"):
        step = made()
        step(begun(step), Secret(1).roots(), X[:5], Y[:5])
