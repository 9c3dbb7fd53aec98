"""The linear datamodeling score against scores by hand, and its laws."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from zoo import D, normals

from functorch_mnist import attribution, losses, models, optim, random

KEY = random.key(0)
HALVES = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0]]).bool()  # of four examples, for three models


def score(influence, subsets, outputs):
    return attribution.linear_datamodeling_score(influence, subsets, outputs)


# ---- subsets


@given(examples=st.integers(1, 40), count=st.integers(1, 6), fraction=st.floats(0, 1), seed=st.integers(0, 3))
def test_subsets_have_the_size_asked_for_and_do_not_hang_on_their_number(examples, count, fraction, seed):
    found = attribution.subsets(examples, key=random.key(seed), count=count, fraction=fraction)
    assert found.shape == (count, examples)
    assert found.sum(1).tolist() == [round(fraction * examples)] * count
    more = attribution.subsets(examples, key=random.key(seed), count=count + 2, fraction=fraction)
    assert torch.equal(more[:count], found)


def test_each_example_is_in_about_as_many_subsets():
    found = attribution.subsets(20, key=KEY, count=2000, fraction=0.3).double().mean(0)
    assert (found - 0.3).abs().max() < 4.5 * math.sqrt(0.3 * 0.7 / 2000)


# ---- the score


def test_three_models_give_the_score_by_hand():
    influence = torch.tensor([[4.0, 1.0], [3.0, 1.0], [2.0, 1.0], [-5.0, 1.0]])
    outputs = torch.tensor([[0.1, 0.1], [0.2, 0.2], [0.3, 0.3]])
    # Sums of the first test example: 7, -3, 6, of ranks 3, 1, 2; the losses' fall has ranks 3, 2, 1. Spearman's
    # 1 - 6 Σ d² / (R (R² - 1)) with d = 0, -1, 1 is 1 - 12 / 24. The second has equal sums.
    assert torch.allclose(score(influence, HALVES, outputs), torch.tensor([0.5, 0.0], dtype=D), rtol=0, atol=1e-15)


def test_influences_of_a_linear_datamodel_have_a_score_of_one_and_their_negative_minus_one():
    influence, subsets = normals(12, 5), attribution.subsets(12, key=KEY, count=20, fraction=0.5)
    outputs = 3 - subsets.to(D) @ influence
    one = torch.ones(5, dtype=D)
    torch.testing.assert_close(score(influence, subsets, outputs), one, rtol=0, atol=1e-12)
    torch.testing.assert_close(score(-influence, subsets, outputs), -one, rtol=0, atol=1e-12)


@given(seed=st.integers(0, 20), factor=st.floats(0.01, 100), shift=st.floats(-10, 10))
def test_units_of_influence_and_rising_functions_of_losses_change_nothing(seed, factor, shift):
    influence, outputs = normals(9, 3, seed=seed), normals(6, 3, seed=seed + 1)
    subsets = attribution.subsets(9, key=random.key(seed), count=6, fraction=0.4)
    expected = score(influence, subsets, outputs)
    torch.testing.assert_close(score(factor * influence + shift, subsets, outputs), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(score(influence, subsets, outputs.exp()), expected, rtol=0, atol=1e-12)


@given(seed=st.integers(0, 20))
def test_the_order_of_examples_and_of_models_does_not_matter(seed):
    influence, outputs = normals(9, 3, seed=seed), normals(6, 3, seed=seed + 1)
    subsets = attribution.subsets(9, key=random.key(seed), count=6, fraction=0.4)
    a, b = (random.permutation(random.fold_in(KEY, seed), n) for n in (9, 6))
    moved = score(influence[a], subsets[b][:, a], outputs[b])
    torch.testing.assert_close(moved, score(influence, subsets, outputs), rtol=0, atol=1e-12)


def test_of_the_run_itself_the_unrolled_derivative_foretells_models_without_few_examples():
    model = models.mlp([4, 6, 3], activation=torch.tanh)
    params = {name: p.to(D) for name, p in model.init(KEY).items()}
    order = torch.stack([(torch.arange(8) * 3 + 8 * step) % 32 for step in range(12)])
    train, test = ((normals(n, 4, seed=n), (torch.arange(n) * 5) % 3) for n in (32, 6))
    run = attribution.Run(
        lambda p, x, y: losses.cross_entropy(model.apply(p, x), y), optim.sgd(0.1, momentum=0.5), params, train, order
    )
    subsets = attribution.subsets(32, key=KEY, count=12, fraction=0.9)
    outputs = attribution.retrained(run, test, subsets.to(D))
    at_one, inside = (attribution.unrolled(run, test, w) for w in (None, torch.full((32,), 0.9, dtype=D)))
    assert score(at_one, subsets, outputs).mean() > 0.95
    assert score(inside, subsets, outputs).mean() > 0.95
    assert not torch.equal(at_one, inside)


# ---- its interval


def test_the_interval_holds_the_mean_and_narrows_with_what_is_measured():
    def found(subset_count, tests):
        influence = normals(30, tests, seed=1)
        subsets = attribution.subsets(30, key=KEY, count=subset_count, fraction=0.5)
        outputs = 2 * normals(subset_count, tests, seed=2) - subsets.to(D) @ influence
        interval = attribution.datamodeling_interval(influence, subsets, outputs, key=random.key(3), resamples=60)
        assert interval.low < interval.mean < interval.high
        assert math.isclose(interval.mean, score(influence, subsets, outputs).mean(), rel_tol=1e-12)
        return interval.high - interval.low

    assert found(60, 40) < found(10, 40)
    assert found(60, 40) < found(60, 4)


def test_an_interval_comes_from_its_key():
    influence, outputs = normals(4, 3), normals(3, 3, seed=1)

    def found(key):
        return attribution.datamodeling_interval(influence, HALVES, outputs, key=key, resamples=9)

    assert found(KEY) == found(KEY)
    assert found(KEY)[1:] != found(random.key(1))[1:]


# ---- refusals

INFLUENCE, OUTPUTS = torch.ones(4, 2), torch.ones(3, 2)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: attribution.subsets(0, key=KEY, count=1, fraction=0.5), "subsets: examples and count"),
        (lambda: attribution.subsets(3, key=KEY, count=0, fraction=0.5), "subsets: examples and count"),
        (
            lambda: attribution.subsets(3, key=KEY, count=1, fraction=math.nan),
            "fraction from 0 to 1. Found 3, 1 and nan",
        ),
        (lambda: score(INFLUENCE.T, HALVES, OUTPUTS), r"Found torch.float32 \(2, 4\)"),
        (lambda: score(INFLUENCE, HALVES.float(), OUTPUTS), r"subsets \(R, N\) bool"),
        (lambda: score(INFLUENCE, HALVES, OUTPUTS.T), r"torch.float32 \(2, 3\)"),
        (lambda: score(INFLUENCE, HALVES, OUTPUTS.long()), "numbers in floating point"),
        (lambda: score(INFLUENCE[:, 0], HALVES, OUTPUTS), "linear_datamodeling_score: influence"),
        (lambda: score(INFLUENCE, HALVES[:1], OUTPUTS[:1]), "two subsets and one test example at least. Found 1 and 2"),
        (lambda: score(INFLUENCE[:, :0], HALVES, OUTPUTS[:, :0]), "Found 3 and 0"),
        (lambda: score(INFLUENCE * math.nan, HALVES, OUTPUTS), "influence must be finite. Found 8 of 8"),
        (lambda: score(INFLUENCE, HALVES, OUTPUTS / 0), "outputs must be finite. Found 6 of 6"),
        (
            lambda: attribution.datamodeling_interval(INFLUENCE, HALVES, OUTPUTS, key=KEY, resamples=0),
            "resamples must be at least 1",
        ),
        (lambda: attribution.datamodeling_interval(INFLUENCE, HALVES[:1], OUTPUTS[:1], key=KEY), "interval: two subs"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(call, said):
    with pytest.raises(ValueError, match=said):
        call()
