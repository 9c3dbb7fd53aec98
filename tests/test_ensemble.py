"""What several models say together, and whether a classifier is as sure as it is right."""

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vmap

from functorch_mnist import calibration, ensemble, losses, random

OUTPUTS = random.normal(random.key(0), (5, 30, 4)) * 2
LABELS = random.randint(random.key(1), (30,), 0, 4)


def test_the_mean_is_of_probabilities_and_no_worse_than_the_average_model():
    torch.testing.assert_close(ensemble.mean(OUTPUTS).exp(), OUTPUTS.softmax(-1).mean(0))
    together = losses.cross_entropy(ensemble.mean(OUTPUTS), LABELS)
    assert bool((together <= losses.cross_entropy(OUTPUTS, LABELS.expand(5, 30)).mean(0) + 1e-6).all())
    torch.testing.assert_close(ensemble.mean(OUTPUTS[:1]), OUTPUTS[0].log_softmax(-1))


def test_a_vote_counts_models_and_breaks_ties_by_the_mean():
    found, given_classes = ensemble.vote(OUTPUTS), OUTPUTS.argmax(-1)
    for place in range(30):
        votes = torch.bincount(given_classes[:, place], minlength=4)
        torch.testing.assert_close(found[place], votes / 5)
        tied = [k for k in range(4) if votes[k] == votes.max()]
        best = max(tied, key=lambda k: ensemble.mean(OUTPUTS)[place, k].item())
        assert found[place].argmax() == best


def test_disagreement_is_the_share_of_pairs_that_differ():
    given_classes = OUTPUTS.argmax(-1)
    pairs = [(given_classes[a] != given_classes[b]).float() for a, b in combinations(range(5), 2)]
    torch.testing.assert_close(ensemble.disagreement(OUTPUTS), torch.stack(pairs).mean(0))
    assert bool((ensemble.disagreement(OUTPUTS[:1]) == 0).all())


def test_mutual_information_is_the_entropy_of_the_mean_less_the_mean_entropy():
    def entropy(p):
        return -(p * p.log()).sum(-1)

    probs = OUTPUTS.softmax(-1)
    expected = entropy(probs.mean(0)) - entropy(probs).mean(0)
    torch.testing.assert_close(ensemble.mutual_information(OUTPUTS), expected, rtol=1e-4, atol=1e-5)
    same = ensemble.mutual_information(OUTPUTS[:1].expand(3, 30, 4))
    torch.testing.assert_close(same, torch.zeros(30), rtol=0, atol=1e-6)
    certain = torch.eye(3)[:, None].log()  # each of three models sure of another class
    torch.testing.assert_close(ensemble.mutual_information(certain), torch.full((1,), math.log(3)))


@pytest.mark.parametrize("call", [ensemble.mean, ensemble.vote, ensemble.disagreement, ensemble.mutual_information])
def test_no_model_and_no_classes_are_refused(call):
    for outputs in (OUTPUTS[:0], torch.zeros(4)):
        with pytest.raises(ValueError, match="at least one model"):
            call(outputs)


@given(st.integers(1, 20))
def test_reliability_is_its_definition_for_any_number_of_bins(bins):
    probs = OUTPUTS[0].double().softmax(-1)
    found = calibration.reliability(probs, LABELS, bins=bins)
    confidence, right = probs.amax(-1), (probs.argmax(-1) == LABELS).double()
    error = 0.0
    for b in range(bins):
        inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
        assert int(found.examples[b]) == int(inside.sum())
        if inside.any():
            assert found.accuracy[b].item() == pytest.approx(right[inside].mean().item())
            assert found.confidence[b].item() == pytest.approx(confidence[inside].mean().item())
            error += abs(right[inside].mean().item() - confidence[inside].mean().item()) * int(inside.sum()) / 30
        else:
            assert bool(found.accuracy[b].isnan())
    assert found.expected_error.item() == pytest.approx(error)
    assert found.maximum_error >= found.expected_error - 1e-12


def test_a_classifier_that_draws_its_labels_from_its_probabilities_is_calibrated():
    probs = (random.normal(random.key(2), (40_000, 3)) * 1.5).softmax(-1)
    labels = (random.uniform(random.key(3), (40_000, 1)) > probs.cumsum(-1)).sum(-1).clamp(max=2)
    assert calibration.reliability(probs, labels).expected_error < 0.01
    assert calibration.temperature(probs.log(), labels).item() == pytest.approx(1.0, abs=0.03)
    assert calibration.temperature(probs.log() * 3, labels).item() == pytest.approx(3.0, abs=0.1)


def test_the_temperature_has_the_least_cross_entropy_and_scales_with_the_outputs():
    labels = torch.where(torch.arange(30) % 2 == 0, LABELS, OUTPUTS[0].argmax(-1))  # right more often than not

    def loss(scale):
        return losses.cross_entropy(OUTPUTS[0].double() / scale, labels).mean()

    best = calibration.temperature(OUTPUTS[0], labels)
    assert 0.02 < best < 50
    assert loss(best) <= min(loss(best * 0.999), loss(best * 1.001))
    torch.testing.assert_close(calibration.temperature(OUTPUTS[0] / 2, labels), best / 2)
    torch.testing.assert_close(vmap(calibration.temperature, (0, None))(OUTPUTS, labels)[0], best)


def test_the_temperature_ends_at_its_range_where_there_is_no_best():
    right = torch.tensor([[3.0, 0.0], [0.0, 3.0]])
    assert calibration.temperature(right, torch.tensor([0, 1])).item() == pytest.approx(0.01)
    assert calibration.temperature(right, torch.tensor([1, 0])).item() == pytest.approx(100.0)
    assert calibration.temperature(torch.zeros(2, 2), torch.tensor([1, 0])).item() == pytest.approx(1.0)


def test_the_brier_score_is_its_definition():
    probs = OUTPUTS[0].softmax(-1)
    expected = (probs.double() - torch.nn.functional.one_hot(LABELS, 4)).square().sum(-1).mean()
    torch.testing.assert_close(calibration.brier(probs, LABELS), expected)


@pytest.mark.parametrize("call", [calibration.reliability, calibration.temperature, calibration.brier])
def test_calibration_refuses_what_does_not_fit(call):
    probs = OUTPUTS[0].softmax(-1)
    for labels, error in ((LABELS[:-1], ValueError), (LABELS.float(), TypeError)):
        with pytest.raises(error):
            call(probs, labels)
    with pytest.raises(ValueError, match="at least one"):
        call(probs[:0], LABELS[:0])
    with pytest.raises(ValueError, match="bins"):
        calibration.reliability(probs, LABELS, bins=0)
    with pytest.raises(ValueError, match="steps"):
        calibration.temperature(probs, LABELS, steps=0)
