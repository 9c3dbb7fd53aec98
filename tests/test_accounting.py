"""What steps spend: against published figures, other accountants and laws that any account keeps."""

import dataclasses
import json
import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functorch_mnist import privacy
from functorch_mnist.privacy import Entry, Event, Ledger, Poisson, Shuffled
from functorch_mnist.privacy.gaussian import gaussian_delta, gaussian_epsilon
from functorch_mnist.privacy.pld import _interval, _largest, pld_epsilon
from functorch_mnist.privacy.rdp import ORDERS, converted, rdp
from functorch_mnist.privacy.step_audit import highest_rate

POISSON = ("rdp-old", "rdp", "pld")
DELTA = 1e-5
TABLE = [
    # rate, noise multiplier, steps, ε by the accountants above
    (240 / 60_000, 1.3, 15 * 250, (1.160, 0.922, 0.839)),  # Opacus, examples/mnist_README.md
    (240 / 60_000, 1.1, 60 * 250, (2.905, 2.503, 2.305)),
    (240 / 60_000, 0.7, 45 * 250, (6.859, 6.093, 5.435)),
    (256 / 60_000, 1.12, 60 * 234, (2.920, 2.516, 2.317)),  # TensorFlow Privacy, tutorials/README.md
    (256 / 60_000, 0.6, 30 * 234, (9.747, 8.764, 7.686)),
    (256 / 60_000, 1.2, 10 * 234, (1.198, 0.931, 0.795)),
    (0.01, 4.0, 10_000, (1.259, 1.035, 0.960)),  # Abadi et al. 2016, the worked example
]

few = settings(max_examples=6)

rates = st.floats(1e-4, 1.0)
noises = st.floats(0.5, 20.0)
counts = st.integers(1, 5000)
deltas = st.floats(1e-9, 1e-2)


@pytest.mark.parametrize(("rate", "sigma", "steps", "expected"), TABLE)
def test_the_accountants_give_the_published_figures(rate, sigma, steps, expected):
    found = [privacy.epsilon(Poisson(rate, sigma), steps=steps, delta=DELTA, accountant=name) for name in POISSON]
    assert found == pytest.approx(list(expected), abs=0.01)


# Other accountants


@few
@given(rates.filter(lambda q: q < 1), noises)
def test_the_renyi_accountant_equals_that_of_opacus(rate, sigma):
    analysis = pytest.importorskip("opacus.accountants.analysis.rdp")
    orders = ORDERS[:110]
    theirs = analysis.compute_rdp(q=rate, noise_multiplier=sigma, steps=1, orders=orders)
    kept = [i for i, value in enumerate(theirs) if math.isfinite(value)]
    assert rdp(rate, sigma, [orders[i] for i in kept]) == pytest.approx([theirs[i] for i in kept], rel=1e-5, abs=1e-11)


@pytest.mark.parametrize("order", [1.1, 2.5, 4.0, 10.9])
@pytest.mark.parametrize(("rate", "sigma"), [(0.9, 20.0), (0.5, 4.0), (0.1, 1.0), (0.004, 20.0), (0.1, 0.5)])
def test_the_renyi_divergence_is_the_integral_of_its_definition(rate, sigma, order):
    step = sigma / 1000
    z = torch.arange(-14 * sigma, 14 * sigma + order, step, dtype=torch.float64)
    density = -z.square() / 2 / sigma**2 - math.log(sigma * math.sqrt(2 * math.pi))  # all in logarithms
    one = torch.tensor(math.log1p(-rate), dtype=torch.float64)
    ratio = torch.logaddexp(one, math.log(rate) + (2 * z - 1) / 2 / sigma**2)
    moment = torch.logsumexp(density + order * ratio, 0) + math.log(step)
    expected = moment.item() / (order - 1)
    assert rdp(rate, sigma, [order]) == [pytest.approx(expected, rel=1e-7, abs=1e-11)]


@given(rates, noises, counts, deltas)
def test_the_renyi_accountant_equals_that_of_dp_accounting(rate, sigma, steps, delta):
    dp = pytest.importorskip("dp_accounting")
    orders = [order for order in ORDERS if order == int(order)]  # between them its orders are less exact
    accountant = pytest.importorskip("dp_accounting.rdp").RdpAccountant(orders)
    event = dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(sigma)) if rate < 1 else dp.GaussianDpEvent(sigma)
    theirs = accountant.compose(event, steps).get_epsilon(delta)
    divergences = [steps * divergence for divergence in rdp(rate, sigma, orders)]
    ours = converted(divergences, orders, delta=delta, conversion="improved")
    assert theirs == 0 or ours == pytest.approx(theirs, rel=1e-6, abs=1e-9)  # 0 by a bound of its own for a large δ


@few
@given(st.floats(1e-3, 1.0), st.floats(0.6, 8.0), st.integers(1, 2000), st.floats(1e-7, 1e-3))
def test_the_pld_accountant_equals_that_of_dp_accounting(rate, sigma, steps, delta):
    dp = pytest.importorskip("dp_accounting")
    accountant = pytest.importorskip("dp_accounting.pld").PLDAccountant(value_discretization_interval=1e-3)
    event = dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(sigma)) if rate < 1 else dp.GaussianDpEvent(sigma)
    theirs = accountant.compose(event, steps).get_epsilon(delta)
    ours = privacy.epsilon(Poisson(rate, sigma), steps=steps, delta=delta)
    assert theirs - 0.02 - 0.02 * theirs <= ours <= theirs + 1e-3  # whose interval is never below ours


@given(noises, st.integers(1, 200), deltas)
def test_without_sampling_the_loss_distribution_is_the_exact_gaussian(sigma, steps, delta):
    exact = gaussian_epsilon(math.sqrt(steps) / sigma, delta)
    found = privacy.epsilon(Poisson(1.0, sigma), steps=steps, delta=delta)
    assert exact - 1e-6 <= found <= exact + 0.002 + 0.002 * exact


@pytest.mark.parametrize("steps", [197, 200])
def test_rounding_takes_no_epsilon_below_the_exact_one(steps):
    exact = gaussian_epsilon(math.sqrt(steps) / 0.5, 1e-9)
    assert privacy.epsilon(Poisson(1.0, 0.5), steps=steps, delta=1e-9) >= exact
    assert privacy.epsilon(Poisson(1.0, 0.5), steps=steps, delta=1e-13) == math.inf


@given(st.floats(0.01, 20.0), deltas)
def test_the_exact_gaussian_is_the_least_epsilon_of_its_delta(mu, delta):
    epsilon = gaussian_epsilon(mu, delta)
    assert gaussian_delta(mu, epsilon) <= delta
    assert epsilon == 0 or gaussian_delta(mu, epsilon * (1 - 1e-6)) > delta


def test_the_bound_of_an_audits_error_rate_is_that_of_clopper_and_pearson():
    assert highest_rate(0, 20, 0.05) == pytest.approx(1 - 0.05 ** (1 / 20), rel=1e-12)  # (1 - p)²⁰ = 0.05
    assert highest_rate(19, 20, 0.05) == pytest.approx(0.95 ** (1 / 20), rel=1e-12)  # 1 - p²⁰ = 0.05
    assert highest_rate(20, 20, 0.05) == 1
    for errors in (1, 7, 300):
        rate = highest_rate(errors, 500, 0.01)
        chance = math.fsum(math.comb(500, k) * rate**k * (1 - rate) ** (500 - k) for k in range(errors + 1))
        assert chance == pytest.approx(0.01, rel=1e-8)


# Laws


@few
@given(rates, noises, counts, deltas)
def test_the_accountants_are_ordered_and_spend_more_for_more_steps_less_noise_and_a_higher_rate(q, sigma, steps, delta):
    for accountant in POISSON:

        def spent(q=q, sigma=sigma, steps=steps, delta=delta, by=accountant):
            return privacy.epsilon(Poisson(q, sigma), steps=steps, delta=delta, accountant=by)

        slack = 1 + (5e-3 if accountant == "pld" else 1e-9)  # of its grid
        assert spent() <= spent(steps=2 * steps) * slack + 1e-3
        assert spent() <= spent(sigma=sigma / 1.5) * slack + 1e-3
        assert spent() <= spent(q=min(1.0, 1.5 * q)) * slack + 1e-3
        assert spent() <= spent(delta=delta / 10) * slack + 1e-9
        assert spent(steps=0) == 0
    old, improved, pld = (
        privacy.epsilon(Poisson(q, sigma), steps=steps, delta=delta, accountant=name) for name in POISSON
    )
    assert pld <= 1.01 * improved + 1e-3
    assert improved <= old


@pytest.mark.parametrize(
    ("rate", "sigma", "steps"),
    [(1e-6, 0.6, 1000), (1e-9, 100.0, 10**8), (0.5, 1e3, 10**6), (1e-3, 0.06, 3), (1e-300, 1.0, 5)],
)
def test_extreme_steps_have_a_finite_account_in_seconds(rate, sigma, steps):
    pld = pld_epsilon((Event(rate, sigma, steps),), DELTA)
    assert 0 <= pld < math.inf
    assert pld <= 1.02 * privacy.epsilon(Poisson(rate, sigma), steps=steps, delta=DELTA, accountant="rdp") + 1e-2


def test_hardly_any_noise_is_no_privacy_and_no_number():
    assert privacy.epsilon(Poisson(0.1, 1e-3), steps=10, delta=DELTA) == math.inf
    assert privacy.epsilon(Poisson(0.1, 1e-200), steps=10, delta=DELTA, accountant="rdp") == math.inf
    assert privacy.epsilon(Shuffled(10, 1e-3), steps=10, delta=DELTA, accountant="gaussian") > 1e5


def test_many_steps_composed_in_blocks_are_the_steps_composed_at_once():
    below, above = (pld_epsilon((Event(0.004, 2.0, steps),), DELTA) for steps in (4095, 4097))
    assert 0 < above - below < 1e-3


def test_losses_are_rounded_to_a_quarter_of_the_deviation_of_a_steps_loss_within_what_is_feasible():
    assert _interval([Event(0.001, 2.0, 1)]) == pytest.approx(0.001 * math.sqrt(math.exp(1 / 4) - 1) / 4, rel=1e-12)
    assert _interval([Event(0.9, 400.0, 1)]) == pytest.approx(0.9 * math.sqrt(math.exp(1 / 400**2) - 1) / 4, rel=1e-12)
    assert _interval([Event(1.0, 300.0, 1)]) == pytest.approx(1 / 300 / 4, rel=1e-12)  # 1 / σ is the smaller
    assert _interval([Event(0.5, 1.0, 1)]) == 1e-3  # the greatest
    assert _interval([Event(1e-9, 100.0, 1)]) == 1e-7  # the least
    assert _interval([Event(1.0, 1.0, 10**6)]) == pytest.approx(16 * 2**10 / 1e6, rel=1e-12)  # 2²⁰ is next above
    assert _interval([Event(1.0, 0.05, 1)]) == pytest.approx(8 * (10 / 0.05 + 1 / (2 * 0.05**2)) / 1e6, rel=1e-12)


def test_the_largest_loss_is_that_of_noise_at_ten_deviations():
    for sigma in (0.5, 2.0):
        for q in (1.0, 0.3, 1e-4):
            z = 1 + 10 * sigma  # from an example at 1
            loss = math.log(1 - q + q * math.exp((2 * z - 1) / (2 * sigma**2)))
            assert _largest(q, sigma) == pytest.approx(loss, rel=1e-12)
    assert _largest(0.25, 0.02) == pytest.approx(10 / 0.02 + 1 / (2 * 0.02**2) + math.log(0.25), rel=1e-12)


def test_mistake_1_a_shuffle_has_no_account_by_amplification():
    for accountant in ("pld", "rdp", "rdp-old"):
        spent = privacy.epsilon(Shuffled(10, 1.0), steps=10, delta=DELTA, accountant=accountant)
        assert spent >= gaussian_epsilon(1.0, DELTA)
        assert spent == privacy.epsilon(Poisson(1.0, 1.0), steps=1, delta=DELTA, accountant=accountant)
    with pytest.raises(ValueError, match=r"gaussian must be of releases without sampling\. Found Event\(rate=0\.1"):
        privacy.epsilon(Poisson(0.1, 1.0), steps=10, delta=DELTA, accountant="gaussian")
    one_epoch = privacy.epsilon(Shuffled(10, 1.0), steps=10, delta=DELTA, accountant="gaussian")
    assert one_epoch == gaussian_epsilon(1.0, DELTA)
    assert privacy.epsilon(Shuffled(10, 1.0), steps=11, delta=DELTA, accountant="gaussian") == gaussian_epsilon(
        math.sqrt(2), DELTA
    )


# Several mechanisms


@pytest.mark.parametrize("accountant", POISSON)
def test_parts_of_a_run_are_composed_into_the_account_of_the_whole(accountant):
    parts = [Event(0.01, 1.2, 300), Event(0.01, 1.2, 700)]
    whole = privacy.epsilon(Poisson(0.01, 1.2), steps=1000, delta=DELTA, accountant=accountant)
    assert privacy.composed(parts, delta=DELTA, accountant=accountant) == whole
    assert privacy.composed([], delta=DELTA, accountant=accountant) == 0


def test_gaussians_of_several_noises_are_composed_as_one():
    events = [Event(1.0, 4.0, 3), Event(1.0, 2.0, 1)]
    exact = gaussian_epsilon(math.sqrt(3 / 16 + 1 / 4), DELTA)
    assert privacy.composed(events, delta=DELTA, accountant="gaussian") == pytest.approx(exact, rel=1e-12)
    assert exact <= privacy.composed(events, delta=DELTA) <= exact * (1 + 1e-3)
    assert exact < privacy.composed(events, delta=DELTA, accountant="rdp") < 1.3 * exact


def test_different_samplings_are_composed_as_by_dp_accounting():
    dp = pytest.importorskip("dp_accounting")
    accountant = pytest.importorskip("dp_accounting.pld").PLDAccountant(value_discretization_interval=1e-3)
    events = [Event(0.01, 1.0, 500), Event(0.2, 3.0, 40), Event(1.0, 8.0, 2)]
    for rate, sigma, count in events:
        one = dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(sigma)) if rate < 1 else dp.GaussianDpEvent(sigma)
        accountant.compose(one, count)
    theirs = accountant.get_epsilon(DELTA)
    assert privacy.composed(events, delta=DELTA) == pytest.approx(theirs, rel=2e-3)
    sum_of_parts = sum(privacy.composed([event], delta=DELTA / 3) for event in events)
    assert max(privacy.composed([event], delta=DELTA) for event in events) < theirs < sum_of_parts


def test_a_step_without_noise_has_no_privacy():
    for accountant in POISSON:
        assert privacy.epsilon(Poisson(0.1, 0.0), steps=1, delta=DELTA, accountant=accountant) == math.inf
        assert privacy.composed([Event(0.1, 9.0, 1), Event(0.1, 0.0, 1)], delta=DELTA) == math.inf
    assert privacy.epsilon(Poisson(0.1, 0.0), steps=0, delta=DELTA) == 0


# Correlated noise


def test_banded_noise_is_accounted_as_dp_sgd_of_b_times_the_rate_in_a_bth_of_the_steps():
    mechanism = privacy.BandMF(0.01, 1.1, bands=8, steps=1000)
    spent = privacy.epsilon(mechanism, steps=1000, delta=DELTA)
    assert spent == privacy.epsilon(Poisson(0.08, 1.1), steps=125, delta=DELTA)
    assert mechanism.events(1001) == [Event(0.08, 1.1, 126)]
    assert mechanism.events(20, start=12) == [Event(0.08, 1.1, 2)]  # a part of a block counts as the block
    one = privacy.BandMF(0.01, 1.1, bands=1, steps=1000)
    assert one.events(1000) == Poisson(0.01, 1.1).events(1000)
    assert one.strategy is None


@pytest.mark.parametrize(("correlation", "parameter"), [("bisr", 6), ("cgd", 0.7)])
def test_noise_in_a_fixed_order_is_accounted_by_the_worst_pattern_of_participations(correlation, parameter):
    mechanism, steps = privacy.FixedOrder(5, 2.0, correlation, parameter), 17
    c = mechanism.strategy.coefficients(steps)
    matrix = torch.stack([torch.cat([c.new_zeros(t), c[: steps - t]]) for t in range(steps)], 1)
    worst = max(matrix[:, first::5].sum(1).norm().item() for first in range(5))  # all entries are positive
    exact = gaussian_epsilon(worst / 2.0, DELTA)
    assert privacy.epsilon(mechanism, steps=steps, delta=DELTA, accountant="gaussian") == pytest.approx(exact, rel=1e-9)
    independent = privacy.FixedOrder(5, 2.0, "cgd", 0.0)
    plain = privacy.epsilon(Shuffled(5, 2.0), steps=steps, delta=DELTA, accountant="gaussian")
    assert privacy.epsilon(independent, steps=steps, delta=DELTA, accountant="gaussian") == pytest.approx(plain)


# Users


def test_a_user_of_one_example_spends_what_the_example_does():
    one = Poisson(0.05, 1.5)
    spent = privacy.epsilon(one, steps=200, delta=DELTA)
    assert privacy.user_epsilon(one, examples_per_user=1, steps=200, delta=DELTA) == pytest.approx(spent, rel=1e-3)


def test_a_user_whose_examples_all_join_is_a_gaussian_of_so_many_sensitivities():
    found = privacy.user_epsilon(Poisson(1.0, 8.0), examples_per_user=4, steps=3, delta=DELTA)
    exact = gaussian_epsilon(4 * math.sqrt(3) / 8, DELTA)
    assert exact - 1e-9 <= found <= exact * (1 + 2e-3)


def test_the_account_of_a_users_examples_lies_between_one_example_and_all_that_join_together():
    mechanism, steps = Poisson(0.02, 4.0), 500
    spent = [privacy.user_epsilon(mechanism, examples_per_user=k, steps=steps, delta=DELTA) for k in (1, 2, 8)]
    assert spent == sorted(spent)
    together = privacy.epsilon(Poisson(1 - 0.98**8, 4.0 / 8), steps=steps, delta=DELTA)  # whenever one does
    assert privacy.epsilon(mechanism, steps=steps, delta=DELTA) < spent[2] < together
    with pytest.raises(ValueError, match="examples must be sampled"):
        privacy.user_epsilon(Poisson(0.1, 1.0, unit="user"), examples_per_user=2, steps=1, delta=DELTA)
    with pytest.raises(ValueError, match="at least 1"):
        privacy.user_epsilon(mechanism, examples_per_user=0, steps=1, delta=DELTA)


# Calibration


@few
@given(st.floats(0.05, 20.0), st.floats(1e-3, 1.0), st.integers(1, 2000), st.sampled_from(POISSON))
def test_calibrated_noise_spends_the_budget_and_not_more(budget, rate, steps, accountant):
    def spent(sigma):
        return privacy.epsilon(Poisson(rate, sigma), steps=steps, delta=DELTA, accountant=accountant)

    sigma = privacy.calibrated(
        lambda sigma: Poisson(rate, sigma), budget=budget, delta=DELTA, steps=steps, accountant=accountant
    )
    assert spent(sigma) <= budget
    assert spent(0.99 * sigma) >= budget * (1 - 5e-3) or sigma <= 0.051


def test_calibrated_noise_is_the_least_of_four_digits_and_is_found_in_few_accounts():
    for rate, budget, steps in ((1e-6, 0.01, 1000), (0.07, 2.93, 586), (1.0, 0.05, 10), (0.5, 20.0, 1)):
        tried = []

        def mechanism(sigma, tried=tried, rate=rate):
            tried.append(sigma)
            return Poisson(rate, sigma)

        sigma = privacy.calibrated(mechanism, budget=budget, delta=DELTA, steps=steps)
        unit = 10.0 ** (math.floor(math.log10(sigma)) - 3)
        less, given = (privacy.epsilon(Poisson(rate, s), steps=steps, delta=DELTA) for s in (sigma - unit, sigma))
        assert given <= budget < less
        assert len(set(tried)) <= 14


@few
@given(st.floats(0.5, 20.0), st.floats(1e-3, 0.2), st.floats(0.6, 3.0), st.sampled_from(POISSON))
def test_most_steps_are_the_last_within_the_budget(budget, rate, sigma, accountant):
    def spent(steps):
        return privacy.epsilon(Poisson(rate, sigma), steps=steps, delta=DELTA, accountant=accountant)

    most = privacy.max_steps(Poisson(rate, sigma), budget=budget, delta=DELTA, accountant=accountant)
    assert spent(most) <= budget
    assert spent(most + 1) > budget


def test_a_budget_that_no_step_uses_up_has_no_end_of_steps():
    assert privacy.max_steps(Poisson(1e-12, 50.0), budget=50.0, delta=DELTA, accountant="rdp") == privacy.MAX_STEPS


def test_a_budget_that_no_noise_keeps_is_refused():
    with pytest.raises(ValueError, match="no noise up to 1e6"):
        privacy.calibrated(lambda sigma: Poisson(1.0, sigma), budget=1e-9, delta=1e-12, steps=10**6, accountant="rdp")


def test_a_curve_is_epsilon_at_each_number_of_steps():
    mechanism = Poisson(0.01, 1.0)
    assert privacy.epsilon_curve(mechanism, steps=[0, 10, 100], delta=DELTA) == [
        privacy.epsilon(mechanism, steps=steps, delta=DELTA) for steps in (0, 10, 100)
    ]


# Refusals


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0, -1.0, 10**400, True, "1"])
def test_mistake_11_numbers_that_mean_nothing_are_refused(bad):
    refused = pytest.raises((ValueError, TypeError), match="must be")
    with refused:
        Poisson(bad, 1.0)
    for make in (lambda: Poisson(0.1, bad), lambda: Shuffled(10, bad)):
        if bad == 0:
            assert make().noise_multiplier == 0  # whose ε is infinite
            continue
        with refused:
            make()
    for accountant in POISSON:
        with refused:
            privacy.epsilon(Poisson(0.1, 1.0), steps=10, delta=bad, accountant=accountant)
    with refused:
        privacy.calibrated(lambda sigma: Poisson(0.1, sigma), budget=bad, delta=DELTA, steps=10)
    with refused:
        privacy.max_steps(Poisson(0.1, 1.0), budget=bad, delta=DELTA)


@pytest.mark.parametrize("steps", [-1, 1.5, True, math.nan, 10**8 + 1])
def test_mistake_11_steps_that_are_none_are_refused(steps):
    with pytest.raises(ValueError, match="steps must be a whole number from 0"):
        privacy.epsilon(Poisson(0.1, 1.0), steps=steps, delta=DELTA)


def test_more_than_certain_sampling_delta_one_and_unknown_accountants_are_refused():
    with pytest.raises(ValueError, match="at most 1"):
        Poisson(1.0000001, 1.0)
    with pytest.raises(ValueError, match="δ must be"):
        privacy.epsilon(Poisson(0.1, 1.0), steps=1, delta=1.0)
    with pytest.raises(ValueError, match="must be of pld, rdp, rdp-old, gaussian"):
        privacy.epsilon(Poisson(0.1, 1.0), steps=1, delta=DELTA, accountant="moments")


def test_without_dp_accounting_the_pld_accountant_says_what_to_install_and_the_renyi_one_works(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting.pld", None)
    mechanism = Poisson(0.0123, 1.2345)  # not known from before
    with pytest.raises(ImportError, match=r"pip install dp-accounting"):
        privacy.epsilon(mechanism, steps=10, delta=DELTA)
    assert privacy.epsilon(mechanism, steps=10, delta=DELTA, accountant="rdp") > 0


# The ledger

ENTRY = Entry(Poisson(0.1 + 0.2, 1 / 3), "Flat(max_norm=1.0)", "abc", 7)
CORRELATED = (
    Entry(privacy.BandMF(0.01, 1.1, 8, 1000), "a", "b", 7),
    Entry(privacy.FixedOrder(5, 2.0, "cgd", 0.7), "a", "b", 7),
)
LEDGER = Ledger((ENTRY, Entry(Shuffled(3, 1e-300), "Flat(max_norm=1.0)", "abc", 5, start=3, before=((0, 4),))))


@pytest.mark.parametrize("ledger", [LEDGER, Ledger((ENTRY,)), Ledger(CORRELATED), Ledger()])
def test_a_ledger_comes_back_from_json_bit_for_bit(ledger):
    assert Ledger.from_json(json.loads(json.dumps(ledger.to_json()))) == ledger


@pytest.mark.parametrize(
    "change",
    [
        {"steps": -1}, {"steps": 1.0}, {"steps": True}, {"steps": None}, {"data": 3}, {"clipping": None}, {"less": 1},
        {"start": -1}, {"before": [[0, 0.5]]},
        {"before": [[1]]}, {"mechanism": None}, {"mechanism": []}, {"mechanism": {"kind": "Poisson"}},
        {"mechanism": {"kind": "Laplace", "rate": 0.1, "noise_multiplier": 1.0}},
        {"mechanism": {"kind": "Poisson", "rate": math.nan, "noise_multiplier": 1.0}},
        {"mechanism": {"kind": "Poisson", "rate": 0.1, "noise_multiplier": "1"}},
        {"mechanism": {"kind": "Poisson", "rate": 0.1, "noise_multiplier": 1.0, "unit": "street"}},
        {"mechanism": {"kind": ["Poisson"], "rate": 0.1, "noise_multiplier": 1.0}},
    ],
)  # fmt: skip
def test_what_is_no_ledger_is_refused(change):
    with pytest.raises(ValueError, match="must be what to_json makes"):
        Ledger.from_json([{**LEDGER.to_json()[0], **change}])


@pytest.mark.parametrize("values", [None, 3, "ledger", {}, {"mechanism": {}}, [[]], [3]])
def test_values_of_another_kind_are_no_ledger(values):
    with pytest.raises(ValueError, match="must be what to_json makes"):
        Ledger.from_json(values)


def test_a_ledger_of_several_runs_and_mechanisms_is_one_composition():
    runs = [Entry(Poisson(0.01, 1.0), "a", "mnist", 500), Entry(Poisson(0.01, 1.0), "b", "mnist", 100)]
    search = Ledger((Entry(Poisson(0.2, 3.0), "a", "mnist", 40),)) + Ledger(tuple(runs))
    found = search.epsilon(delta=DELTA)
    assert found == privacy.composed([Event(0.2, 3.0, 40), Event(0.01, 1.0, 600)], delta=DELTA)
    assert search.relation == "one example added or removed, their number public"
    mixed = search + Ledger((Entry(Shuffled(10, 6.0), "a", "mnist", 10),))
    assert mixed.epsilon(delta=DELTA) > found
    assert mixed.relation == "one example replaced by one without gradient"  # which Poisson's account covers as well
    assert Ledger().epsilon(delta=DELTA) == 0
    with pytest.raises(ValueError, match="one kind of neighbour"):
        (search + Ledger((Entry(Poisson(0.1, 1.0, unit="user"), "a", "mnist", 1),))).epsilon(delta=DELTA)


def test_steps_that_a_resume_makes_again_are_counted_twice():
    entry = Entry(Poisson(0.01, 1.0), "a", "mnist", 400).resumed(400, seen=500)
    whole = dataclasses.replace(entry, steps=600)  # 500 and the 200 after step 400
    assert Ledger((whole,)).epsilon(delta=DELTA) == privacy.epsilon(Poisson(0.01, 1.0), steps=700, delta=DELTA)


def test_a_shuffled_run_that_goes_on_within_an_epoch_pays_for_examples_that_came_twice():
    entry = Entry(Shuffled(10, 1.0), "a", "mnist", 5).resumed(5, seen=5)
    whole = Ledger((dataclasses.replace(entry, steps=10),))
    assert whole.epsilon(delta=DELTA, accountant="gaussian") == gaussian_epsilon(math.sqrt(2), DELTA)
    entry = dataclasses.replace(Entry(Shuffled(10, 1.0), "a", "mnist", 10).resumed(10, seen=10), steps=20)
    assert Ledger((entry,)).epsilon(delta=DELTA, accountant="gaussian") == gaussian_epsilon(math.sqrt(2), DELTA)
    parts = Entry(Poisson(0.1, 1.0), "a", "mnist", 5).resumed(5, seen=5).resumed(5, seen=5)
    whole = dataclasses.replace(parts, steps=9)  # steps know nothing of each other
    assert Ledger((whole,)).epsilon(delta=DELTA) == privacy.epsilon(Poisson(0.1, 1.0), steps=9, delta=DELTA)
