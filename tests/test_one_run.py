"""The audit of one run: its bounds against closed forms and published numbers, and runs with and without faults."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from zoo import difference

from functorch_mnist import losses, models, optim, privacy, random, train, tree
from functorch_mnist.privacy import Automatic, Flat, Global, PerGroup, PerLayer, Poisson, Quantile, Secret, Shuffled
from functorch_mnist.privacy.gaussian import gaussian_epsilon
from functorch_mnist.privacy.one_run import _largest, binomial_p_value, gaussian_refuted

private = "functorch_mnist.train.private"


def phi(x):
    return math.erfc(-x / math.sqrt(2)) / 2


def tail(guesses, correct, chance):
    """P[Binomial(r, chance) >= v]."""
    return math.fsum(
        math.comb(guesses, k) * chance**k * (1 - chance) ** (guesses - k) for k in range(correct, guesses + 1)
    )


# The bounds


@pytest.mark.parametrize(
    ("canaries", "guesses", "correct", "delta", "published"),
    [(1000, 100, 75, 1e-4, 0.673), (100_000, 1510, 1439, 1e-5, 2.675)],
)
def test_the_bound_is_the_published_one(canaries, guesses, correct, delta, published):
    # Steinke et al., appendix D and section 7; the second of them is cut off, not rounded
    found = _largest(lambda epsilon: binomial_p_value(canaries, guesses, correct, epsilon, delta) < 0.05)
    assert found == pytest.approx(published, abs=1e-3)


@given(st.integers(1, 40), st.data(), st.floats(0, 6), st.floats(0, 0.01))
def test_the_p_value_is_its_definition_by_integers(guesses, data, epsilon, delta):
    correct = data.draw(st.integers(0, guesses))
    chance, canaries = 1 / (1 + math.exp(-epsilon)), guesses + 7
    beta = tail(guesses, correct, chance)
    steepest = max([0, *((tail(guesses, correct - i, chance) - beta) / i for i in range(1, correct + 1))])
    expected = min(1.0, beta + 2 * canaries * delta * steepest)
    assert binomial_p_value(canaries, guesses, correct, epsilon, delta) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 3.0])
def test_randomized_response_is_rejected_as_rarely_as_is_said_and_hardly_rarer(epsilon):
    rate, guesses = 1 / (1 + math.exp(-epsilon)), 400
    least = next(v for v in range(guesses) if binomial_p_value(guesses, guesses, v, epsilon, 0.0) < 0.05)
    assert 0.03 < tail(guesses, least, rate) < 0.05


@pytest.mark.parametrize("mu", [0.0, 0.3, 1.0, 2.5])
def test_one_guess_is_right_as_often_as_half_of_mu_says(mu):
    assert not gaussian_refuted(1, 1, 1, mu, phi(mu / 2) - 1e-9)
    assert gaussian_refuted(1, 1, 1, mu, phi(mu / 2) + 1e-9)


@pytest.mark.parametrize("canaries", [1, 2, 5, 40, 200])
@pytest.mark.parametrize("mu", [0.1, 1.0, 2.0])
def test_a_gaussian_mechanism_guessed_coin_by_coin_is_refuted_more_rarely_than_is_said(canaries, mu):
    for chance in (0.5, 0.05, 1e-3):
        for correct in range(canaries + 1):
            if gaussian_refuted(canaries, canaries, correct, mu, chance):
                assert tail(canaries, correct, phi(mu / 2)) < chance


@pytest.mark.parametrize(("canaries", "guesses", "correct"), [(2, 2, 2), (6, 4, 3), (12, 12, 9), (20, 8, 8)])
@pytest.mark.parametrize("mu", [0.2, 1.0])
def test_the_gaussian_bound_is_the_most_that_all_inequalities_allow(canaries, guesses, correct, mu):
    linprog = pytest.importorskip("scipy.optimize").linprog
    normal = torch.distributions.Normal(0.0, 1.0)
    z = torch.linspace(-7, 4, 600, dtype=torch.float64)
    x, slope = normal.cdf(z), (-mu * z - mu**2 / 2).exp()  # the derivative of Φ(z + μ) by Φ(z)
    above = normal.cdf(z + mu) - slope * x  # tangents, above the curve
    rows, limits = [], []
    for c in range(1, guesses + 1):
        right = torch.tensor([v * (v >= c) for v in range(guesses + 1)]) / canaries
        wrong = torch.tensor([(guesses - v) * (v >= c - 1) for v in range(guesses + 1)]) / canaries
        rows.append(right - slope[:, None] * wrong)
        limits.append(above)
    target = [-float(v >= correct) for v in range(guesses + 1)]
    most = -linprog(target, torch.cat(rows).numpy(), torch.cat(limits).numpy(), [[1.0] * (guesses + 1)], [1.0]).fun
    assert not gaussian_refuted(canaries, guesses, correct, mu, most - 1e-3)
    assert gaussian_refuted(canaries, guesses, correct, mu, most + 1e-3)


@pytest.mark.parametrize("mu", [0.5, 2.0])
def test_simulated_gaussian_mechanisms_are_not_above_their_epsilon_more_often_than_is_said(mu):
    true = gaussian_epsilon(mu, 1e-5)
    noise, coins = random.normal(random.key(0), (100, 200)), random.bernoulli(random.key(1), 0.5, (100, 200))
    found = [privacy.lower_bound(z + mu * coin, coin) for z, coin in zip(noise, coins, strict=True)]
    for name, least in (("epsilon", 0.2), ("gaussian", 0.3), ("independent", 0.8)):
        bounds = [getattr(one, name) for one in found]
        assert sum(bound > true for bound in bounds) <= 9  # of 100 at 0.95: fewer than 98 of 100 times
        assert max(bounds) > least * true


def test_the_bounds_grow_with_right_guesses_and_fall_with_confidence_delta_and_canaries():
    included = torch.arange(400) % 2 == 0
    noise = random.normal(random.key(0), (400,))
    found = [privacy.lower_bound(noise + mu * included, included) for mu in (0.0, 1.0, 2.0, 4.0, 8.0)]
    for less, more in pairwise(found):
        assert less.correct < more.correct or more.correct == more.guesses
        assert less.epsilon <= more.epsilon
        assert less.mu <= more.mu
        assert less.independent <= more.independent
    assert found[0].epsilon == found[0].mu == found[0].gaussian == found[0].independent == 0
    assert found[-1].correct == found[-1].guesses == 80
    scores = noise + 2 * included
    sure = privacy.lower_bound(scores, included, confidence=0.999)
    assert 0 < sure.epsilon < found[2].epsilon
    assert 0 < sure.mu < found[2].mu
    assert 0 < sure.independent < found[2].independent
    rare = privacy.lower_bound(scores, included, delta=1e-9)
    assert rare.epsilon >= found[2].epsilon
    assert rare.gaussian > found[2].gaussian  # of the same μ
    for test in (
        lambda m: _largest(lambda epsilon: binomial_p_value(m, 80, 75, epsilon, 1e-5) < 0.05),
        lambda m: _largest(lambda mu: gaussian_refuted(m, 80, 75, mu, 0.05)),
    ):
        assert test(100) > test(1000)


@given(st.integers(2, 60), st.data(), st.floats(0, 1e-3))
def test_what_refutes_one_number_refutes_all_below_it(guesses, data, delta):
    correct = data.draw(st.integers(0, guesses))
    values = [binomial_p_value(100, guesses, correct, 0.25 * n, delta) for n in range(20)]
    assert all(a <= b + 1e-12 for a, b in pairwise(values)) or min(values) > 0.05
    refuted = [gaussian_refuted(100, guesses, correct, 0.25 * n, 0.05) for n in range(20)]
    assert refuted == sorted(refuted, reverse=True)


def test_scores_count_by_their_order():
    included = random.bernoulli(random.key(0), 0.5, (200,))
    scores = random.normal(random.key(1), (200,)) + included
    assert privacy.lower_bound(scores, included) == privacy.lower_bound(scores.exp(), included)
    order = random.permutation(random.key(2), 200)
    found, again = privacy.lower_bound(scores, included), privacy.lower_bound(scores[order], included[order])
    assert again._replace(independent=0) == found._replace(independent=0)  # whose threshold is of the first canaries


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda s, i: privacy.lower_bound(s[:3], i), "scores must be"),
        (lambda s, i: privacy.lower_bound(s, i.float()), "included bool"),
        (lambda s, i: privacy.lower_bound(s[:1], i[:1]), "from 1 to half of the canaries. Found 1 and 1"),
        (lambda s, i: privacy.lower_bound(s, i, guesses_per_side=9), "from 1 to half"),
        (lambda s, i: privacy.lower_bound(s, i, delta=0.0), "delta and confidence must be in"),
        (lambda s, i: privacy.lower_bound(s, i, confidence=1.0), "delta and confidence must be in"),
    ],
)
def test_what_is_no_set_of_scores_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call(torch.zeros(10), torch.zeros(10, dtype=torch.bool))


# Runs with canaries

N, M = 40, 1000
X, Y = random.normal(random.key(1), (N, 6)), torch.arange(N) % 3
MODEL = models.linear(6, 3)


def loss_fn(params, x, y, key):
    return losses.cross_entropy(MODEL.apply(params, x), y)


def planted_run(mechanism, *, rule=Flat(0.5), optimizer=None, canaries=M, seed=0):  # noqa: B008
    optimizer = optim.sgd(0.3, momentum=0.9) if optimizer is None else optimizer
    return train.plant_canaries(
        loss_fn, MODEL.init(random.key(0)), optimizer, (X, Y), clipping=rule, mechanism=mechanism, canaries=canaries,
        key=random.key(seed),
    )  # fmt: skip


def fitted(planted, mechanism, *, rule=Flat(0.5), steps, seed=0, state=None, chunk_sizes=None):  # noqa: B008
    total = len(planted.examples[0])
    step = train.make_private_step(
        planted.loss_fn, planted.optimizer, clipping=rule, mechanism=mechanism, examples=total, chunk_sizes=chunk_sizes
    )
    if state is None:
        state = train.init_private_state(planted.params, planted.optimizer, random.key(0), rule)
    return train.fit_private(step, state, planted.examples, secret=Secret(seed), steps=steps)


def calibrated(rate, steps, budget=4.0):
    sigma = privacy.calibrated(lambda sigma: Poisson(rate, sigma), budget=budget, delta=1e-5, steps=steps)
    return Poisson(rate, sigma)


@pytest.mark.parametrize(("rate", "steps"), [(1.0, 5), (0.5, 20)])
def test_ten_runs_show_two_fifths_of_their_epsilon_and_never_more_than_it(rate, steps):
    mechanism = calibrated(rate, steps)
    found = []
    for seed in range(10):
        planted = planted_run(mechanism, seed=100 + seed)
        found.append(planted.lower_bound(fitted(planted, mechanism, steps=steps, seed=seed)))
    for one in found:
        assert 0.2 * 4 < one.epsilon < one.gaussian < 4
        assert 0.4 * 4 < one.independent < 4
    assert sum(one.gaussian for one in found) > 10 * 0.4 * 4


class Unclipped(Flat):
    """Says that it clips."""

    def factors(self, norms, state=()):
        return tree.map(torch.ones_like, norms)


@pytest.mark.parametrize("rate", [1.0, 0.5])
@pytest.mark.parametrize(
    "fault", ["half the noise", "no clip", "noise divided by the chunks", "canaries counted twice"]
)
def test_a_run_with_a_planted_fault_shows_more_than_its_epsilon(fault, rate, monkeypatch):
    mechanism, rule, sizes = calibrated(rate, 10), Flat(0.5), None

    def less_noise(*args, noise_multiplier, **kwargs):
        return privacy.noisy_mean(*args, noise_multiplier=noise_multiplier / (2 if "half" in fault else 3), **kwargs)

    if "noise" in fault:
        monkeypatch.setattr(f"{private}.noisy_mean", less_noise)
    if fault == "no clip":
        rule = Unclipped(0.5)
    if "twice" in fault:
        once = privacy.chunks
        monkeypatch.setattr(privacy, "chunks", lambda drawn, sizes: 2 * once(drawn, sizes))
    if "chunks" in fault:
        sizes = (math.ceil(rate * (N + M) / 3),)
    planted = planted_run(mechanism)
    state = fitted(planted, mechanism, rule=rule, steps=10, chunk_sizes=sizes)
    assert planted.lower_bound(state).independent > 1.25 * 4


@pytest.mark.parametrize("average", [False, True])
def test_the_model_is_trained_as_without_canaries(average):
    mechanism, rule = Poisson(0.5, 1e-7), Flat(0.5)  # the noise is drawn anew for more parameters
    optimizer = optim.sgd(0.3, momentum=0.9)
    optimizer = optim.exponential_moving_average(optimizer, decay=0.9) if average else optimizer
    planted = planted_run(mechanism, optimizer=optimizer, canaries=50)
    state = fitted(planted, mechanism, steps=8)
    step = train.make_private_step(loss_fn, optimizer, clipping=rule, mechanism=mechanism, examples=N)
    plain = train.fit_private(
        step, train.init_private_state(MODEL.init(random.key(0)), optimizer, random.key(0), rule), (X, Y),
        secret=Secret(0), steps=8,
    )  # fmt: skip
    assert difference(state.params.model, MODEL.init(random.key(0))) > 0.05
    assert difference(state.params.model, plain.params) < 1e-5
    assert difference(state.optimizer.optimizer, plain.optimizer) < 1e-5
    assert not state.params.canaries.any()


def test_the_noise_on_the_model_is_that_of_its_own_examples():
    mechanism, rule = Poisson(0.5, 2.0), Flat(0.5)
    planted = train.plant_canaries(
        lambda w, x, key: (w * 0).sum(), torch.zeros(20_000), optim.sgd(1.0), (torch.ones(10),), clipping=rule,
        mechanism=mechanism, canaries=100, key=random.key(0),
    )  # fmt: skip
    moved = fitted(planted, mechanism, steps=1).params.model
    assert moved.std().item() == pytest.approx(2.0 * 0.5 / (0.5 * 10), rel=0.03)


RULES = {
    "flat": (Flat(0.5), 1.0),
    "automatic": (Automatic(0.5), 1.0),
    "global": (Global(2.0), 0.99),
    "per-layer": (PerLayer(0.5), 2**-0.5),  # the model is one layer
    "per-group": (PerGroup({"model/": 0.3, "canaries": 0.4}), 0.8),
}


@pytest.mark.parametrize(("rule", "kept"), RULES.values(), ids=RULES)
def test_a_canary_moves_its_own_number_alone_and_one_that_is_not_in_moves_nothing(rule, kept):
    planted = planted_run(Poisson(0.5, 1.0), rule=rule, canaries=30)
    keys = random.split(random.key(0), N + 30)
    sums = privacy.clipped_sums(
        planted.loss_fn, planted.params, *[rows[N:] for rows in planted.examples], keys[N:], clipping=rule
    )
    expected = kept * rule.sensitivity() * planted.included
    assert torch.allclose(sums.grads.canaries[:, 0], expected, rtol=3e-4, atol=0)
    assert not any(leaf.any() for leaf in tree.leaves(sums.grads.model))
    assert sums.seen["loss"] == 0
    own = privacy.clipped_sums(
        planted.loss_fn, planted.params, *[rows[:N] for rows in planted.examples], keys[:N], clipping=rule
    )
    assert not own.grads.canaries.any()
    assert any(leaf.any() for leaf in tree.leaves(own.grads.model))


@pytest.mark.parametrize(("rule", "kept"), RULES.values(), ids=RULES)
@pytest.mark.parametrize("mechanism", [Poisson(1.0, 0.9), Poisson(0.3, 1.7), Shuffled(4, 1.1)], ids=str)
def test_scores_are_log_likelihood_ratios_of_what_is_let_out(mechanism, rule, kept):
    planted = planted_run(mechanism, rule=rule, canaries=5)
    rate, sigma = mechanism.sampling_rate, mechanism.noise_multiplier
    params, state, expected = planted.params, planted.optimizer.init(planted.params), torch.zeros(5).double()
    for step in range(3):
        x = 2 * random.normal(random.key(step), (5, 1))
        mean = rule.sensitivity() * x / (mechanism.sampling_rate * (N + 5))
        grads = train.CanaryParams(tree.zeros_like(params.model), mean)
        params, state = planted.optimizer.update(params, state, grads)
        for i, value in enumerate(x[:, 0].tolist()):
            out, drawn = (math.exp(-((value - place) ** 2) / (2 * sigma**2)) for place in (0, kept))
            expected[i] += math.log(((1 - rate) * out + rate * drawn) / out)
    assert torch.allclose(state.scores.double(), expected, rtol=1e-3, atol=1e-4)


def test_coins_are_fair_and_hang_on_their_key():
    planted = planted_run(Poisson(0.5, 1.0))
    assert torch.equal(planted.included, planted_run(Poisson(0.1, 2.0)).included)
    assert not torch.equal(planted.included, planted_run(Poisson(0.5, 1.0), seed=1).included)
    assert 430 < planted.included.sum() < 570
    number = planted.examples[-1]
    assert torch.equal(number[N:] < M, planted.included)
    assert (number[:N] == -1).all()
    assert [len(rows) for rows in planted.examples] == [N + M] * 3


def test_shuffled_runs_show_no_more_than_their_epsilon():
    mechanism = Shuffled(4, 1.8)
    claimed = privacy.epsilon(mechanism, steps=12, delta=1e-5, accountant="gaussian")
    for seed in range(3):
        planted = planted_run(mechanism, seed=seed)
        found = planted.lower_bound(fitted(planted, mechanism, steps=12, seed=seed))
        assert 0.1 * claimed < found.gaussian < claimed
        assert 0.2 * claimed < found.independent < claimed


def test_scores_are_the_same_for_any_chunks_and_after_a_stop():
    mechanism = Poisson(0.3, 1.0)
    planted = planted_run(mechanism, canaries=60)
    whole = fitted(planted, mechanism, steps=4)
    stopped = fitted(planted, mechanism, steps=4, state=fitted(planted, mechanism, steps=2))
    assert torch.equal(whole.optimizer.scores, stopped.optimizer.scores)
    parts = fitted(planted, mechanism, steps=4, chunk_sizes=(7,))
    assert torch.allclose(whole.optimizer.scores, parts.optimizer.scores, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("traced")
def test_a_compiled_step_has_the_sums_and_scores_of_an_eager_one():
    planted = planted_run(Poisson(0.5, 1.0), canaries=20)

    def step(params, state, *rows):
        grads = privacy.clipped_sums(planted.loss_fn, params, *rows, clipping=Flat(0.5)).grads
        return planted.optimizer.update(params, state, grads)

    keys = random.split(random.key(0), N + 20)
    arguments = planted.params, planted.optimizer.init(planted.params), *planted.examples, keys
    assert difference(train.compiled(step)(*arguments), step(*arguments)) < 1e-6


def test_what_cannot_be_planted_is_refused():
    with pytest.raises(ValueError, match="must be the same in all steps"):
        planted_run(Poisson(0.5, 1.0), rule=Quantile(0.5, count_stddev=3.0))
    with pytest.raises(ValueError, match=r"at least 2 canaries\. Found 1"):
        planted_run(Poisson(0.5, 1.0), canaries=1)
    for rows, said in (((X[:0],), "there must be an example"), ((X, Y[:3]), "one leading size")):
        with pytest.raises(ValueError, match=said):
            train.plant_canaries(
                loss_fn, torch.zeros(()), optim.sgd(0.1), rows, clipping=Flat(0.5), mechanism=Poisson(0.5, 1.0),
                key=random.key(0),
            )  # fmt: skip
    with pytest.raises(ValueError, match="every parameter must be in a group"):
        planted_run(Poisson(0.5, 1.0), rule=PerGroup({"model/": 1.0}))
