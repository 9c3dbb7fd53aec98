"""Clipping rules, sampling, noise and the private step: what one example can do, and the mistakes that others made."""

import copy
import math
import pickle
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import vmap
from zoo import difference

from functorch_mnist import data, losses, models, optim, per_sample, privacy, random, train, tree
from functorch_mnist.privacy import (
    Automatic,
    BandMF,
    Draw,
    FixedOrder,
    Flat,
    Global,
    PerGroup,
    PerLayer,
    Poisson,
    Quantile,
    Secret,
    Shuffled,
)

RULES = {
    "flat": Flat(1.5),
    "automatic": Automatic(1.5),
    "global": Global(1.5),
    "per-layer": PerLayer(1.5),
    "per-group": PerGroup({"a": 0.5, "b.weight": 2.0, "b": 1.0}),
    "quantile": Quantile(0.5, count_stddev=3.0, initial_norm=1.5),
}
SIZES = {"a.weight": (2, 3), "b.weight": (4,), "b.bias": ()}
FLOAT = [0.0, 1e-30, 1e-20, 1e-3, 1.0, -1.5, 7.0, 1e6, -1e18, 1e25, 3e38, math.inf, -math.inf, math.nan]


def zeros(dtype=torch.float32):
    return {name: torch.zeros(shape, dtype=dtype) for name, shape in SIZES.items()}


def linear_loss(params, gradient):
    """A loss of one example whose gradient is what the example holds."""
    return (tree.ravel(params) * gradient).sum()


def sums(rule, rows, mask=None, state=None):
    state = rule.init() if state is None else state
    return privacy.clipped_sums(linear_loss, zeros(rows.dtype), rows, clipping=rule, clipping_state=state, mask=mask)


def moved(with_it, without):
    """By how much sums differ, in float64."""
    return tree.norm(tree.map(lambda a, b: a.double() - b.double(), with_it.grads, without.grads)).item()


# What one example can do


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@given(rows=st.lists(st.lists(st.sampled_from(FLOAT), min_size=11, max_size=11), min_size=1, max_size=3))
def test_no_example_moves_the_sum_by_more_than_the_sensitivity(rule, rows):
    rows = torch.tensor(rows)
    one = sums(rule, rows[:1])
    none = sums(rule, rows[:0])
    assert moved(one, none) <= float(rule.sensitivity(rule.init()))
    assert one.votes.norm() <= 0.5
    beside = torch.ones(len(rows), dtype=torch.bool)
    beside[0] = False
    added, left_out = sums(rule, rows), sums(rule, rows, mask=beside)
    assert moved(added, left_out) <= float(rule.sensitivity(rule.init())) * (1 + 1e-5)  # the sums are rounded
    assert all(leaf.isfinite().all() for leaf in tree.leaves((added.grads, added.votes)))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_random_gradients_of_all_lengths_keep_to_the_sensitivity(rule):
    lengths = 10 ** (6 * random.uniform(random.key(1), (2000, 1)) - 3)
    rows = random.normal(random.key(0), (2000, 11)) * lengths
    factors = rule.factors(
        {
            name: rows[:, part].norm(dim=1)
            for name, part in zip(SIZES, (slice(6), slice(6, 10), slice(10, 11)), strict=True)
        },
        rule.init(),
    )
    kept = torch.cat(
        [
            rows[:, part].double() * factors[name][:, None].double()
            for name, part in zip(SIZES, (slice(6), slice(6, 10), slice(10, 11)), strict=True)
        ],
        1,
    )
    bound = float(rule.sensitivity(rule.init()))
    assert kept.norm(dim=1).max() <= bound
    assert kept.norm(dim=1).max() >= 0.5 * bound  # the bound is not idle


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_mistake_4_one_example_that_is_not_finite_poisons_nothing(bad):
    good = random.normal(random.key(0), (5, 11))
    rows = torch.cat([good, torch.full((1, 11), bad)])
    for rule in RULES.values():
        found, expected = sums(rule, rows), sums(rule, good)
        assert moved(found, expected) < 1e-6
        assert found.seen["nonfinite"] == 1
        assert found.seen["loss"].isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["build", "gram"])
def test_positions_that_cancel_hide_nothing_from_the_clip(way, dtype):
    torch.manual_seed(0)
    w = torch.zeros(6, 8)

    def loss(w, a, g):
        return ((a.to(dtype) @ w.to(dtype).T).float() * g).sum()

    big, small = 10 ** torch.arange(0.0, 6.0, 0.25), 1e-3
    a = (big[:, None, None] * torch.randn(1, 1, 8) + small * torch.randn(len(big), 40, 8)).to(dtype).float()
    g = torch.tensor([1.0, -1.0] * 20)[:, None].expand(len(big), 40, 6) * torch.randn(1, 1, 6)
    plan = per_sample.plan(loss, w, a[0], g[0], batch_size=1).override("", way)
    found = per_sample.factored(loss, w, a, g.contiguous(), plan=plan).wide().built()
    rule = Flat(1.0)
    factors = rule.factors(found.leaf_bounds())
    for i in range(len(big)):
        alone = torch.zeros(len(big))
        alone[i] = factors[i]
        assert found.weighted_sum(alone).double().norm() <= 1


def test_bounds_of_norms_are_the_norms_but_for_rounding():
    model = models.small_cnn()
    params = tree.map(torch.Tensor.double, model.init(random.key(0)))
    x, y = random.normal(random.key(1), (4, 1, 28, 28)).double(), torch.arange(4)

    def loss(params, x, y):
        return losses.cross_entropy(model.apply(params, x), y)

    found = per_sample.factored(loss, params, x, y)
    assert difference(found.leaf_bounds(), found.leaf_norms()) < 1e-12
    assert all(
        (a >= b).all() for a, b in zip(*map(tree.leaves, (found.leaf_bounds(), found.leaf_norms())), strict=True)
    )


# The rules


@pytest.mark.parametrize(
    "rule",
    [Flat(1.5), Flat(torch.tensor(1.5)), Automatic(1.5), Global(1.5), PerLayer(1.5), Quantile(0.5, 3.0, 1.5)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_norm_that_is_rounded_down_by_a_little_lets_no_gradient_pass_the_bound(rule, dtype):
    eps = torch.finfo(dtype).eps
    norms = torch.cat([1.5 * (1 + eps * torch.arange(-40, 41, dtype=dtype)), torch.tensor([1e10, 1e20], dtype=dtype)])
    factors = rule.factors({"w": norms}, rule.init())["w"]
    kept = factors.double() * norms.double() * (1 + (12 if dtype == torch.float32 else 0) * eps)
    assert kept.max() <= 1.5
    assert kept.max() > 1.5 * (1 - 64 * eps)


def test_the_rules_are_their_formulas():
    norms = {
        "a.weight": torch.tensor([0.3, 4.0]),
        "b.weight": torch.tensor([0.0, 3.0]),
        "b.bias": torch.tensor([0.4, 0.0]),
    }
    whole = torch.tensor([0.5, 5.0])
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=0)
    for name in norms:
        close(Flat(1.0).factors(norms)[name], torch.tensor([1.0, 0.2]))
        close(Automatic(2.0, 0.1).factors(norms)[name], 2 / (whole + 0.1))
        close(Global(1.0).factors(norms)[name], torch.tensor([1.0, 0.0]))
        close(Quantile(0.5, 1.0).factors(norms, torch.tensor(2.0))[name], torch.tensor([1.0, 0.4]))
    share = 1 / math.sqrt(2)  # two layers
    close(PerLayer(1.0).factors(norms)["a.weight"], torch.tensor([1.0, share / 4]))
    close(PerLayer(1.0).factors(norms)["b.bias"], torch.tensor([1.0, share / 3]))
    groups = PerGroup({"a": 1.0, "b": 0.2, "b.weight": 6.0}).factors(norms)
    close(groups["a.weight"], torch.tensor([1.0, 0.25]))
    close(groups["b.weight"], torch.tensor([1.0, 1.0]))
    close(groups["b.bias"], torch.tensor([0.5, 1.0]))


def test_parameters_of_one_path_but_for_its_last_part_are_a_layer_and_others_are_not():
    norms = {"w1": 1.0, "w2": 2.0, "a.weight": 3.0, "a.bias": 4.0, "b": {"weight": 6.0, "bias": 8.0}}
    found = PerLayer(1.0).factors(tree.map(lambda norm: torch.tensor([norm]), norms))
    share = 1 / math.sqrt(4)
    expected = [share / 1, share / 2, share / 5, share / 5, share / 10, share / 10]
    assert torch.cat(tree.leaves(found)).tolist() == pytest.approx(expected, rel=1e-5)


def test_sensitivities_are_those_of_the_papers():
    assert [RULES[name].sensitivity() for name in ("flat", "automatic", "global", "per-layer")] == [1.5] * 4
    assert RULES["per-group"].sensitivity() == math.sqrt(0.25 + 4 + 1)
    assert RULES["quantile"].sensitivity(torch.tensor(0.7)) == torch.tensor(0.7)


def test_groups_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"every parameter must be in a group. Found 'b.weight'"):
        sums(PerGroup({"a": 1.0}), torch.zeros(1, 11))
    with pytest.raises(ValueError, match=r"every group must have a parameter. Found \['c'\]"):
        sums(PerGroup({"": 1.0, "c": 1.0}), torch.zeros(1, 11))
    with pytest.raises(ValueError, match=r"there must be a group. Found none"):
        PerGroup({})


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_mistake_11_clipping_norms_that_mean_nothing_are_refused(bad):
    for make in (Flat, Automatic, Global, PerLayer, lambda c: PerGroup({"": c}), lambda c: Quantile(0.5, c)):
        with pytest.raises(ValueError, match="must be above 0 and finite"):
            make(bad)
    with pytest.raises(TypeError, match="must be a number"):
        Flat("1")
    with pytest.raises(ValueError, match="from 0 to 1"):
        Quantile(1.5, 1.0)


def test_a_quantile_follows_the_norms_and_its_votes_are_paid_for():
    rule = Quantile(0.5, count_stddev=2.0, initial_norm=1e-2, lr=0.3)
    gradient, votes = rule.deviations(1.0)
    assert votes == 2.0
    assert gradient**-2 + (2 * votes) ** -2 == pytest.approx(1.0)  # Andrew et al., theorem 1
    rows = random.normal(random.key(0), (400, 11)) * torch.linspace(0.1, 4, 400)[:, None]
    state = rule.init()
    for t in range(150):
        found = sums(rule, rows, state=state)
        _, state = privacy.noisy_mean(
            zeros(), found, random.key(t), clipping=rule, clipping_state=state, noise_multiplier=1.0, expected=400
        )
    assert (rows.norm(dim=1) <= state).double().mean() == pytest.approx(0.5, abs=0.05)
    with pytest.raises(ValueError, match="votes alone would cost more"):
        Quantile(0.5, count_stddev=0.5).deviations(1.0)


@pytest.mark.parametrize("rate", [0.2, 10.0])
@pytest.mark.parametrize("quantile", [0.0, 0.5, 1.0])
def test_the_norm_of_a_quantile_stays_within_its_bounds_in_10_000_steps(quantile, rate):
    rule = Quantile(quantile, 10.0, lr=rate)
    deviations = torch.tensor([0.6, 10.0, 1e6, 1e12]) / 1e-3  # a thousandth of an example expected
    votes = random.normal(random.key(0), (10_000, 1))[..., None] * deviations
    state, seen = rule.init().expand(4), []
    for vote in votes:
        state = rule.adapt(state, vote)
        seen.append(state)
    seen = torch.stack(seen)
    assert rule.min_norm <= seen.min() <= seen.max() <= float(torch.tensor(rule.max_norm))
    assert len(seen[-1000:].unique()) > 1 or quantile != 0.5  # it still moves


def test_without_noise_a_run_takes_its_quantile_to_the_one_asked_for():
    rule, optimizer = Quantile(0.5, count_stddev=1.0), optim.sgd(0.0)
    step = train.make_private_step(
        lambda p, x, key: linear_loss(p, x), optimizer, clipping=rule, mechanism=Poisson(0.5, 0.0), examples=400
    )
    rows = random.normal(random.key(0), (400, 11)) * torch.linspace(0.1, 4, 400)[:, None]
    state = train.init_private_state(zeros(), optimizer, random.key(0), rule)
    state = train.fit_private(step, state, (rows,), secret=Secret(1), steps=120)
    assert (rows.norm(dim=1) <= state.estimator).double().mean() == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize(
    "changed", [{"lr": 11.0}, {"count_stddev": 1e13}, {"min_norm": 1.0}, {"max_norm": 0.01}, {"min_norm": 1e-13}]
)
def test_a_quantile_whose_norm_would_be_all_noise_is_refused(changed):
    with pytest.raises(ValueError, match="Quantile"):
        Quantile(**{"quantile": 0.5, "count_stddev": 10.0} | changed)


# Noise


def noise(rule, key, *, sigma=1.3, expected=4.0, like=None):
    params = zeros() if like is None else like
    found, _ = privacy.noisy_mean(
        params, privacy.zero_sums(params, rule), key, clipping=rule, clipping_state=rule.init(), noise_multiplier=sigma,
        expected=expected,
    )  # fmt: skip
    return found


def test_the_noise_has_the_stated_variance_and_no_correlation_across_parameters_and_steps():
    n, like = 200_000, {"a": torch.zeros(400, 500), "b": torch.zeros(200_000)}
    for rule, deviation in ((Flat(1.5), 1.3 * 1.5 / 4), (RULES["per-group"], None)):
        if deviation is None:
            rule, deviation = PerGroup({"a": 3.0, "b": 4.0}), 1.3 * 5 / 4
        drawn = [noise(rule, random.key(step), like=like) for step in (0, 1)]
        columns = torch.stack([leaf.flatten().double() for one in drawn for leaf in one.values()]) / deviation
        chi_square = columns.square().sum(1)  # mean n, variance 2 n
        assert ((chi_square - n).abs() < 5 * math.sqrt(2 * n)).all()
        assert (columns.mean(1).abs() < 5 / math.sqrt(n)).all()
        correlation = columns @ columns.T / n - torch.eye(4, dtype=torch.float64)
        assert (correlation - correlation.diag().diag()).abs().max() < 5 / math.sqrt(n)
        assert abs((columns.pow(4).mean() / 3).item() - 1) < 0.02  # normal, not only of that variance


def test_mistake_7_no_key_serves_two_streams():
    secret, seen = Secret(5), []
    draw_key, noise_key, example_key = random.split(secret.key(), 3).unbind(0)
    for root in (draw_key, noise_key, example_key):
        seen += [tuple(random.fold_in(root, step).tolist()) for step in range(20)]
    seen += [tuple(key.tolist()) for key in random.split(random.key(5), 40)]  # what is public of the same seed
    assert len(set(seen)) == len(seen)
    one = noise(Flat(1.0), random.key(0), like={"a": torch.zeros(50), "b": torch.zeros(50)})
    assert not torch.equal(one["a"], one["b"])


def test_mistake_8_two_runs_have_different_secrets_unless_a_seed_is_given_which_is_told():
    assert not torch.equal(Secret().key(), Secret().key())
    assert torch.equal(Secret(3).key(), Secret(3).key())
    assert Secret(3).reproduction
    assert not Secret().reproduction


def test_a_secret_does_not_show_and_refuses_to_be_written():
    secret = Secret(987654321)
    assert "987654321" not in repr(secret) + str(secret)
    for write in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="must not be written"):
            write(secret)


# Sampling


@given(st.integers(0, 300), st.floats(1e-3, 1), st.integers(0, 2**32))
def test_each_example_has_a_coin_of_its_own(total, rate, seed):
    key = random.key(seed)
    whole = privacy.poisson_mask(key, 0, total, rate)
    assert torch.equal(whole[: total // 2], privacy.poisson_mask(key, 0, total // 2, rate))
    assert (privacy.poisson_mask(key, 0, total, 1.0)).all()
    assert not privacy.poisson_mask(key, 0, total, 1e-12).any()


def test_the_chance_of_a_coin_is_the_rate_rounded_down_to_a_multiple_of_two_to_the_minus_32(monkeypatch):
    words = torch.tensor([0, 1, 2, 3, 2**31, 2**32 - 2, 2**32 - 1]) - 2**31
    monkeypatch.setattr(random, "bits", lambda key, shape: words.to(torch.int32))
    for rate, least in ((0.5, 0), (2.0, 2), (2.9, 2), (2**31 + 0.5, 2**31), (2**32 - 1.0, 2**32 - 1), (2**32, 2**32)):
        found = privacy.poisson_mask(random.key(0), 0, len(words), rate / 2**32)
        assert found.tolist() == [word < least for word in (words + 2**31).tolist()]


def test_mistake_9_ranks_take_parts_of_one_draw_and_share_no_coin():
    joined = privacy.poisson_mask(random.key(0), 0, 4000, 0.5)
    agree = (joined[:2000] == joined[2000:]).double().mean().item()  # two ranks' coins, which one stream makes equal
    assert agree == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(2000))
    rows = random.normal(random.key(1), (4000, 11))
    whole = sums(Flat(1.0), rows, mask=joined)
    parts = [sums(Flat(1.0), rows[part], mask=joined[part]) for part in (slice(2000), slice(2000, None))]
    assert moved(whole, tree.map(torch.add, *parts)) < 1e-4


def test_poisson_draws_have_the_stated_mean_and_variance_and_are_independent():
    n, q, steps = 2000, 0.03, 400
    mechanism = Poisson(q, 1.0)
    draws = torch.zeros(steps, n)
    for step in range(steps):
        draws[step, privacy.draw(mechanism, random.key(3), step=step, population=n).numbers] = 1
    sizes = draws.sum(1).double()
    assert sizes.mean().item() == pytest.approx(n * q, abs=5 * math.sqrt(n * q / steps))
    assert sizes.var().item() == pytest.approx(n * q * (1 - q), rel=0.35)
    both = (draws[:-1] * draws[1:]).sum(1).double().mean().item()
    assert both == pytest.approx(n * q * q, abs=5 * math.sqrt(n * q * q / steps))


def test_a_shuffled_epoch_sees_each_example_once_and_the_next_in_another_order():
    mechanism = Shuffled(7, 1.0)
    epochs = [
        [privacy.draw(mechanism, random.key(0), step=7 * epoch + step, population=50).numbers for step in range(7)]
        for epoch in (0, 1)
    ]
    for epoch in epochs:
        assert torch.equal(torch.cat(epoch).sort().values, torch.arange(50))
        assert {len(part) for part in epoch} == {7, 8}
    assert not torch.equal(torch.cat(epochs[0]), torch.cat(epochs[1]))
    assert mechanism.sampling_rate == 1 / 7


@given(st.integers(0, 500), st.lists(st.integers(1, 64), min_size=1, max_size=5))
def test_chunks_hold_each_drawn_example_once_in_the_given_sizes(drawn, sizes):
    index = torch.arange(1000, 1000 + drawn)
    batches = privacy.chunks(Draw(index), sizes)
    assert torch.equal(torch.cat([b.examples[b.mask] for b in batches]), index)
    assert {len(b.examples) for b in batches} <= set(sizes)
    assert len(batches) == max(1, -(-drawn // max(sizes)))
    smaller = [size for size in sizes if size < len(batches[-1].examples)]
    assert batches[-1].mask.sum() > max(smaller, default=-1)


def test_no_size_of_chunks_or_one_below_1_is_refused():
    for sizes in ((), (4, 0), (-1,)):
        with pytest.raises(ValueError, match="at least one size, each at least 1"):
            privacy.chunks(Draw(torch.arange(3)), sizes)
    for examples, most, count in ((0, 8, 5), (8, 0, 5), (8, 8, 0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            privacy.chunk_sizes(Poisson(0.1, 1.0), examples, max_size=most, count=count)


def test_more_sizes_of_chunks_pad_less():
    mechanism, padded = Poisson(256 / 60_000, 1.0), []
    drawn = [len(privacy.draw(mechanism, random.key(0), step=step, population=60_000)) for step in range(200)]
    for count in (1, 3, 5, 8):
        sizes = privacy.chunk_sizes(mechanism, 60_000, count=count)
        assert len(sizes) <= count
        rows = [sum(len(b.examples) for b in privacy.chunks(Draw(torch.arange(n)), sizes)) for n in drawn]
        padded.append(sum(rows) / sum(drawn) - 1)
    assert padded == sorted(padded, reverse=True)
    assert padded[-1] < 0.022


@pytest.mark.parametrize("expected", [1.5, 16, 64, 256, 512, 3000])
def test_the_sizes_of_chunks_pad_little_and_take_no_more_at_once_than_allowed(expected):
    mechanism, examples = Poisson(expected / 60_000, 1.0), 60_000
    sizes = privacy.chunk_sizes(mechanism, examples)
    assert list(sizes) == sorted(set(sizes))
    assert 1 <= len(sizes) <= 5
    assert sizes[0] >= 1
    assert sizes[-1] <= 1024
    drawn = [len(privacy.draw(mechanism, random.key(0), step=step, population=examples)) for step in range(200)]
    padded = [sum(len(b.examples) for b in privacy.chunks(Draw(torch.arange(n)), sizes)) for n in drawn]
    assert sum(padded) / sum(drawn) < 1 + 0.7 / math.sqrt(expected)


@pytest.mark.parametrize(
    ("expected", "sizes"),
    [
        (43, (38, 43, 48, 53, 63)),  # a deviation is 6.555
        (44, (40, 48, 56, 64)),  # the longest of 64 is the first whose sizes are multiples of 8
    ],
)
def test_sizes_of_chunks_are_multiples_of_8_from_a_longest_of_64_on(expected, sizes):
    assert privacy.chunk_sizes(Poisson(expected / 60_000, 1.0), 60_000) == sizes


def test_shuffled_batches_have_one_size_that_nearly_all_fill():
    assert privacy.chunk_sizes(Shuffled(7, 1.0), 50) == (8,)
    assert privacy.chunk_sizes(Poisson(1.0, 1.0), 50) == (50,)


def test_cyclic_poisson_takes_each_example_in_its_own_step_of_each_block_with_chance_b_q():
    mechanism, n = BandMF(0.1, 1.0, 4, 100), 4000
    drawn = torch.zeros(400, n)
    for step in range(400):
        drawn[step, privacy.draw(mechanism, random.key(3), step=step, population=n).numbers] = 1
    by_place = drawn.view(100, 4, n).sum(0)  # how often in each place of a block
    assert ((by_place > 0).sum(0) <= 1).all()  # always the same one
    rate = by_place.sum() / (100 * n)
    assert rate.item() == pytest.approx(0.4, abs=5 * math.sqrt(0.24 / (100 * n)))
    sizes = (by_place > 0).sum(1)
    assert ((sizes - n / 4).abs() < 5 * math.sqrt(n * 3 / 16)).all()
    for wrong in ((0.3, 4, 100), (0.1, 4, 3)):
        with pytest.raises(ValueError, match=r"bands must be at most 1 / rate and at most steps"):
            BandMF(wrong[0], 1.0, *wrong[1:])


def test_a_fixed_order_takes_each_example_every_so_many_steps():
    mechanism = FixedOrder(5, 1.0, "cgd", 0.5)
    drawn = [privacy.draw(mechanism, random.key(3), step=step, population=23).numbers for step in range(15)]
    assert torch.equal(torch.cat(drawn[:5]).sort().values, torch.arange(23))
    for step in range(10):
        assert torch.equal(drawn[step], drawn[step + 5])
    for wrong in (("cgd", 1.0), ("cgd", -0.1), ("bisr", 2.5), ("bisr", 0), ("dense", 1)):
        with pytest.raises(ValueError):
            FixedOrder(5, 1.0, *wrong)


@pytest.mark.parametrize(
    "mechanism", [BandMF(1e-9, 1.3, 3, 9), FixedOrder(1, 1.3, "bisr", 4), FixedOrder(1, 1.3, "cgd", 0.6)], ids=str
)
def test_the_noise_of_a_run_is_the_strategys_inverse_times_independent_draws_and_nothing_of_it_is_kept(mechanism):
    params, optimizer, steps = torch.zeros(5000), optim.sgd(1.0), 7
    step = train.make_private_step(
        lambda w, x, key: (w * 0).sum(), optimizer, clipping=Flat(2.0), mechanism=mechanism, examples=6
    )
    begun = train.init_private_state(params, optimizer, random.key(0), Flat(2.0))
    seen = []
    state = train.fit_private(
        step, begun, (torch.zeros(6),), secret=Secret(5), steps=steps, callbacks=(lambda p: seen.append(p.state),)
    )
    assert sum(leaf.numel() for leaf in tree.leaves(state)) == sum(leaf.numel() for leaf in tree.leaves(begun))
    moves = torch.stack([a.params - b.params for a, b in zip([begun, *seen], seen, strict=False)]) * step.expected
    root = Secret(5).roots()[1]
    draws = torch.stack([random.box_muller(random.fold_in(root, t), (5000,)) for t in range(steps)]).double()
    strategy = mechanism.strategy
    kappa = strategy.sensitivity(1) if isinstance(mechanism, BandMF) else 1.0
    inverse = torch.zeros(steps, steps, dtype=torch.float64)
    for t in range(steps):
        for k, weight in enumerate(strategy.weights(t).tolist()[: t + 1]):
            inverse[t, t - k] = weight
    expected = 1.3 * 2.0 * kappa * (inverse @ draws)
    assert difference(moves.double(), expected) < 1e-5
    assert (inverse - inverse.diag().diag()).abs().max() > 0.1  # it is correlated


@pytest.mark.parametrize("mechanism", [BandMF(0.2, 1.3, 3, 9), FixedOrder(4, 1.3, "bisr", 4)], ids=str)
def test_a_run_of_correlated_noise_goes_on_exactly_where_the_secret_is_the_same(mechanism):
    whole, _ = fitted(mechanism, steps=7)
    half, _ = fitted(mechanism, steps=4)
    rest, _ = fitted(mechanism, steps=7, start_at=half)
    assert all(torch.equal(a, b) for a, b in zip(*map(tree.leaves, (whole, rest)), strict=True))


# The step


MODEL = models.mlp([6, 5, 3], activation=torch.tanh)
X, Y = random.normal(random.key(0), (40, 6)).double(), torch.arange(40) % 3


EVERY = Poisson(1.0, 0.0)
"""All examples in each step, and no noise."""


def start(rule, optimizer):
    params = tree.map(torch.Tensor.double, MODEL.init(random.key(1)))
    return train.init_private_state(params, optimizer, random.key(2), rule)


def loss_fn(params, x, y, key):
    return losses.cross_entropy(MODEL.apply(params, x), y)


def fitted(mechanism, *, steps=5, sizes=(16, 4), rule=RULES["flat"], secret=None, compiled=False, start_at=None):
    optimizer = optim.sgd(0.1, momentum=0.9)
    step = train.make_private_step(
        loss_fn, optimizer, clipping=rule, mechanism=mechanism, examples=len(X), chunk_sizes=sizes
    )
    seen = []
    state = train.fit_private(
        step.compiled() if compiled else step,
        start(rule, optimizer) if start_at is None else start_at,
        (X, Y),
        secret=secret or Secret(4),
        steps=steps,
        callbacks=(seen.append,),
    )
    return state, seen


@pytest.mark.parametrize(
    "mechanism",
    [Poisson(0.4, 1.1), Shuffled(3, 1.1), BandMF(0.2, 1.1, 3, 9), FixedOrder(3, 1.1, "bisr", 4)],
    ids=lambda mechanism: type(mechanism).__name__,
)
@pytest.mark.parametrize("rule", [RULES["flat"], Quantile(0.5, 3.0, 1.5)])
def test_mistake_5_noise_comes_once_and_no_result_hangs_on_the_chunks(mechanism, rule):
    expected, _ = fitted(mechanism, sizes=(40,), rule=rule)
    for sizes in ((16, 4), (3,), (5, 1), (40, 40)):
        found, _ = fitted(mechanism, sizes=sizes, rule=rule)
        assert difference(found.params, expected.params) < 1e-12
        assert difference(found.estimator, expected.estimator) < 1e-6 if tree.leaves(found.estimator) else True


def test_the_compiled_private_step_equals_the_eager_one(monkeypatch):
    monkeypatch.setitem(globals(), "MODEL", models.linear(6, 3))  # the noise of each parameter takes seconds to compile
    torch._dynamo.reset()
    rule = Quantile(0.5, 3.0, 1.5)  # all that a step can do
    with torch._dynamo.config.patch(error_on_recompile=True):
        found, _ = fitted(Poisson(0.4, 1.1), rule=rule, sizes=(40,), compiled=True)
    expected, _ = fitted(Poisson(0.4, 1.1), rule=rule, sizes=(40,))
    assert difference(found.params, expected.params) < 1e-6  # the noise is float32


@pytest.mark.usefixtures("traced")
def test_a_compiled_step_takes_draws_of_any_number_of_chunks_of_any_size():
    optimizer, sizes = optim.sgd(0.1), tuple(range(1, 12))
    step = train.make_private_step(
        lambda w, x, key: w * x, optimizer, clipping=Flat(1.0), mechanism=Poisson(0.5, 1.0), examples=22,
        chunk_sizes=sizes,
    )  # fmt: skip
    state = train.init_private_state(torch.tensor(0.0), optimizer, random.key(0), Flat(1.0))
    run = partial(train.fit_private, state=state, examples=(torch.ones(22),), secret=Secret(0), steps=60)
    assert torch.allclose(run(step.compiled()).params, run(step).params, atol=1e-6)  # more than torch's limit of 8


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("examples", [40, 3000])
def test_a_private_step_compiles_two_graphs_by_default_and_one_for_its_draws(examples):
    optimizer = optim.sgd(0.1)
    step = train.make_private_step(
        lambda w, x, key: w * x, optimizer, clipping=Flat(1.0), mechanism=Poisson(0.5, 1.0), examples=examples
    ).compiled()
    assert len(step.sizes) == 1 < len(replace(step, is_compiled=False).sizes)
    state = train.init_private_state(torch.tensor(0.0), optimizer, random.key(0), Flat(1.0))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    train.fit_private(step, state, (torch.ones(examples),), secret=Secret(0), steps=8)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3


def test_mistake_2_the_divisor_is_the_expected_number_not_the_number_drawn():
    optimizer = optim.sgd(1.0)
    rows = torch.cat([torch.eye(11), torch.eye(11)]).double()
    step = train.make_private_step(
        lambda p, x, key: linear_loss(p, x), optimizer, clipping=Flat(1.0), mechanism=Poisson(0.5, 0.0), examples=22
    )
    assert step.expected == 11
    begun = train.init_private_state(zeros(torch.float64), optimizer, random.key(0), Flat(1.0))
    state, seen = step(begun, Secret(0).roots(), rows)
    drawn = privacy.draw(step.mechanism, Secret(0).roots()[0], step=0, population=22)
    assert seen["count"] == len(drawn) != 11
    assert torch.allclose(tree.ravel(state.params), -rows[drawn.numbers].sum(0) / 11, atol=1e-12)


def test_mistake_6_sums_are_sums_of_examples_and_not_means():
    rows = random.normal(random.key(0), (6, 11)) * 0.01
    whole, parts = sums(Flat(1.0), rows), [sums(Flat(1.0), rows[i : i + 1]) for i in range(6)]
    total = parts[0]
    for part in parts[1:]:
        total = tree.map(torch.add, total, part)
    assert moved(whole, total) < 1e-7
    assert torch.allclose(tree.ravel(whole.grads), rows.sum(0), atol=1e-6)


def test_mistake_3_an_empty_draw_is_legal_and_still_noised():
    rule, optimizer, roots, mechanism = Flat(1.5), optim.sgd(1.0), Secret(9).roots(), Poisson(1e-9, 2.0)
    step = train.make_private_step(
        loss_fn, optimizer, clipping=rule, mechanism=mechanism, examples=len(X), chunk_sizes=(8, 2)
    )
    state = start(rule, optimizer)
    found, seen = step(state, roots, X, Y)
    moves = tree.ravel(tree.map(torch.sub, found.params, state.params)) * step.expected
    expected = noise(rule, random.fold_in(roots[1], 0), sigma=2.0, expected=1.0, like=state.params)
    assert torch.allclose(moves, -tree.ravel(expected), atol=1e-9)
    assert seen["count"] == 0
    assert moves.std() > 1.2


def test_a_thousand_steps_of_empty_draws_equal_pure_noise():
    rule, optimizer, secret, sigma = Flat(1.5), optim.sgd(0.1), Secret(8), 1.3
    mechanism = Poisson(1e-11, sigma)
    step = train.make_private_step(
        loss_fn, optimizer, clipping=rule, mechanism=mechanism, examples=len(X), chunk_sizes=(2,)
    )
    begun, counts = start(rule, optimizer), []
    state = train.fit_private(
        step, begun, (X, Y), secret=secret, steps=1000,
        callbacks=(lambda progress: counts.append(int(progress.aux["count"])),),
    )  # fmt: skip
    assert counts == [0] * 1000
    walk = tree.ravel(tree.map(torch.sub, state.params, begun.params)) * step.expected / 2
    noise_key = secret.roots()[1]
    drawn = vmap(lambda key: tree.ravel(noise(rule, key, sigma=sigma, expected=2.0, like=begun.params)))
    expected = -0.1 * drawn(random.fold_in(noise_key, torch.arange(1000))).sum(0)
    assert torch.allclose(walk, expected, atol=1e-9)
    deviation = 0.1 * sigma * 1.5 / 2 * math.sqrt(1000)
    assert (walk / deviation).square().sum().item() == pytest.approx(len(walk), abs=5 * math.sqrt(2 * len(walk)))


def test_a_run_that_goes_on_equals_one_that_was_not_stopped_where_the_secret_is_the_same():
    mechanism = Poisson(0.4, 1.1)
    whole, seen = fitted(mechanism, steps=6)
    half, _ = fitted(mechanism, steps=3)
    rest, _ = fitted(mechanism, steps=6, start_at=half)
    assert all(torch.equal(a, b) for a, b in zip(*map(tree.leaves, (whole, rest)), strict=True))
    other, _ = fitted(mechanism, steps=6, start_at=half, secret=Secret())
    assert not torch.equal(tree.ravel(other.params), tree.ravel(whole.params))
    assert [p.step for p in seen] == list(range(1, 7))
    assert [p.epoch_ended for p in seen] == [False, True] * 3  # 40 examples are seen in 2.5 draws of 16, rounded to 2


def test_the_progress_of_a_private_run_counts_expected_examples_and_adds_up_an_epochs_losses():
    sizes = [14, 13, 13]  # of 40 in three parts
    _, seen = fitted(Shuffled(3, 1.1), steps=7)
    assert [p.step for p in seen] == [1, 2, 3, 4, 5, 6, 7]
    assert [p.epoch for p in seen] == [0, 0, 0, 1, 1, 1, 2]
    assert [p.epoch_ended for p in seen] == [False, False, True, False, False, True, False]
    assert [p.examples for p in seen] == [13, 27, 40, 13, 27, 40, 13]
    assert [int(p.aux["count"]) for p in seen] == [*sizes, *sizes, 14]
    draw_key = Secret(4).roots()[0]
    state, total = start(RULES["flat"], optim.sgd(0.1, momentum=0.9)), 0.0
    for step, progress in enumerate(seen):
        drawn = privacy.draw(Shuffled(3, 1.1), draw_key, step=step, population=40).numbers
        own = nn.functional.cross_entropy(MODEL.apply(state.params, X[drawn]), Y[drawn], reduction="sum").item()
        assert progress.aux["loss"].item() == pytest.approx(own, rel=1e-10)
        total = own if step % 3 == 0 else total + own
        assert progress.loss.item() == pytest.approx(total, rel=1e-10)
        state = progress.state


def test_the_counts_of_a_chunk_are_of_the_examples_that_count():
    rows = torch.zeros(6, 11)
    rows[:, 0] = torch.tensor([1.0, 5.0, math.nan, 5.0, math.inf, 2.0])
    mask = torch.tensor([True, True, True, False, False, True])
    for rule in (Flat(1.5), Global(1.5), PerLayer(1.5)):
        seen = sums(rule, rows, mask=mask).seen
        assert {name: int(seen[name]) for name in ("count", "clipped", "nonfinite")} == {
            "count": 4, "clipped": 2, "nonfinite": 1
        }  # fmt: skip


def test_no_secret_is_in_the_state():
    secret = Secret(77)
    state, _ = fitted(Poisson(0.4, 1.1), secret=secret)
    roots = [secret.key(), *secret.roots()]
    keys = [leaf for leaf in tree.leaves(state) if leaf.dtype == torch.int32]
    assert not any(torch.equal(key, root) for key in keys for root in roots)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # theirs, where the input needs no gradient
def test_one_private_step_without_noise_equals_opacus():
    opacus = pytest.importorskip("opacus")
    grad_sample = pytest.importorskip("opacus.grad_sample")
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 10)).double()
    params, model = models.from_module(module, example_ndim=3)
    x, y = torch.randn(12, 1, 8, 8).double(), torch.arange(12) % 10
    theirs = grad_sample.GradSampleModule(copy.deepcopy(module))
    optimizer = opacus.optimizers.DPOptimizer(
        torch.optim.SGD(theirs.parameters(), 0.5, momentum=0.9), noise_multiplier=0.0, max_grad_norm=0.7,
        expected_batch_size=12,
    )  # fmt: skip
    ours = optim.sgd(0.5, momentum=0.9)
    step = train.make_private_step(
        lambda p, x, y, key: losses.cross_entropy(model.apply(p, x), y), ours, clipping=Flat(0.7), mechanism=EVERY,
        examples=12,
    )  # fmt: skip
    state = train.init_private_state(params, ours, random.key(0), Flat(0.7))
    for _ in range(3):
        state, seen = step(state, Secret(0).roots(), x, y)
        assert seen["clipped"] > 0
        optimizer.zero_grad()
        nn.functional.cross_entropy(theirs(x), y, reduction="mean").backward()
        optimizer.step()
    expected = {name.removeprefix("_module."): p.detach() for name, p in theirs.named_parameters()}
    assert difference(state.params, {name: expected[name] for name in state.params}) < 1e-6


def test_no_more_steps_than_were_made_leave_the_state_as_it_is():
    rule, optimizer = RULES["flat"], optim.sgd(0.1, momentum=0.9)
    for steps in (0, 3):
        begun = start(rule, optimizer)._replace(step=torch.tensor(3 if steps else 0))
        state, seen = fitted(Poisson(0.4, 1.1), steps=steps, start_at=begun)
        assert state is begun
        assert seen == []


def test_a_step_gets_the_examples_that_it_was_made_for():
    def make(**changed):
        given = {"mechanism": Poisson(0.1, 1.0), "examples": len(X)} | changed
        return train.make_private_step(loss_fn, optim.sgd(0.1), clipping=Flat(1.0), **given)

    run = partial(train.fit_private, make(), start(Flat(1.0), optim.sgd(0.1)), secret=Secret(0))
    for examples in ((X, Y[:3]), (X[:0], Y[:0]), (X[:3], Y[:3])):
        with pytest.raises(ValueError, match="it must get the 40 examples that it was made for"):
            run(examples, steps=1)
    with pytest.raises(ValueError, match="steps must be at least 0"):
        run((X, Y), steps=-1)
    with pytest.raises(ValueError, match="must be at least 1"):
        make(examples=0)
    with pytest.raises(ValueError, match="Found examples"):
        make(mechanism=Poisson(0.1, 1.0, unit="user"))
    with pytest.raises(ValueError, match="Found users"):
        make(examples=privacy.Users(torch.arange(40), max_examples=2))


# The audit


def planted(fault, rule, sigma):
    """A step with a fault in it."""

    def release(rows, key):
        expected = float(len(rows)) if fault == "divides by the realised batch" else 8.0
        own = Flat(1e6) if fault == "does not clip" else rule
        noise = sigma * 1.5 / 1e6 if fault == "does not clip" else 0.3 * sigma if fault == "noise x 0.3" else sigma
        return privacy.pipeline(own, noise_multiplier=noise, expected=expected)(rows, key)

    return release


@pytest.mark.parametrize("sigma", [0.7, 1.1, 2.0])
def test_the_audit_finds_no_more_than_is_accounted_in_correct_code(sigma):
    for number, (name, rule) in enumerate(RULES.items()):
        if name == "per-group":
            continue  # the audit's model has one parameter
        length = 0.99 if name == "global" else 10.0
        found = privacy.audit(
            privacy.pipeline(rule, noise_multiplier=sigma, expected=8.0), noise_multiplier=sigma, max_norm=1.5,
            length=length, key=random.key(number),
        )  # fmt: skip
        assert found.passed
        assert found.lower_bound > 0.2 * found.claimed  # it has teeth
        assert found.steps == {0.7: 1, 1.1: 3, 2.0: 9}[sigma]  # (1.5 σ)², so that μ is near 1.5
        mu = math.sqrt(found.steps) / sigma
        below, above = mu / 2 - found.claimed / mu, -mu / 2 - found.claimed / mu  # Balle, Wang, theorem 8
        delta = (math.erfc(-below / math.sqrt(2)) - math.exp(found.claimed) * math.erfc(-above / math.sqrt(2))) / 2
        assert delta == pytest.approx(1e-5, rel=1e-6)


@pytest.mark.parametrize("sigma", [0.7, 1.1, 2.0])
@pytest.mark.parametrize("fault", ["noise x 0.3", "does not clip", "divides by the realised batch"])
def test_the_audit_catches_a_planted_fault(fault, sigma):
    found = privacy.audit(planted(fault, Flat(1.5), sigma), noise_multiplier=sigma, max_norm=1.5, key=random.key(0))
    assert not found.passed
    assert found.lower_bound > 1.2 * found.claimed


def test_the_audit_covers_the_step_that_training_makes():
    optimizer, sigma = optim.sgd(1.0), 1.1
    step = train.make_private_step(
        lambda w, g, key: w @ g, optimizer, clipping=Flat(1.5), mechanism=Poisson(1.0, sigma), examples=8
    )

    def release(rows, key):
        state = train.init_private_state(torch.zeros(rows.shape[1]), optimizer, random.key(0), Flat(1.5))
        batch = data.Batch(torch.arange(len(rows)), None)  # a draw cannot be mapped
        roots = random.split(key, 4)
        sums = step._parts.add(state, privacy.zero_sums(state.params, Flat(1.5)), roots, batch, None, rows)
        return -step._parts.end(state, sums, roots)[0].params

    assert privacy.audit(release, noise_multiplier=sigma, max_norm=1.5, key=random.key(0)).passed
    assert not privacy.audit(release, noise_multiplier=3 * sigma, max_norm=1.5, key=random.key(0)).passed


def test_an_audit_with_numbers_that_mean_nothing_is_refused():
    run = partial(privacy.audit, lambda rows, key: rows.sum(0), key=random.key(0))
    for numbers in ({"noise_multiplier": 0.0, "max_norm": 1.0}, {"noise_multiplier": 1.0, "max_norm": math.nan}):
        with pytest.raises(ValueError, match="above 0"):
            run(**numbers)
    with pytest.raises(ValueError, match="40 trials"):
        run(noise_multiplier=1.0, max_norm=1.0, trials=3)
