"""Classes of unequal sizes: losses and weights, sampling, the making of such sets, and what evaluation says of them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, vmap

from functorch_mnist import data, losses, random, train

LOGITS = random.normal(random.key(0), (6, 4)).double() * 3
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])
COUNTS = torch.tensor([3, 1, 0, 40])


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
def test_focal_loss_is_its_definition(gamma):
    weights = torch.tensor([1.0, 2.0, 0.5, 0.0], dtype=torch.float64)
    p = LOGITS.softmax(-1).gather(1, LABELS[:, None]).squeeze(1)
    expected = -weights[LABELS] * (1 - p) ** gamma * p.log()
    found = losses.focal(LOGITS, LABELS, gamma=gamma, class_weights=weights)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    if gamma == 0:
        torch.testing.assert_close(found, losses.cross_entropy(LOGITS, LABELS, class_weights=weights))


def test_focal_loss_and_its_derivatives_stay_finite_where_the_model_is_sure():
    sure = torch.tensor([[200.0, 0.0, 0.0], [-200.0, 0.0, 0.0]])
    labels = torch.zeros(2, dtype=torch.int64)

    def total(outputs, gamma):
        return losses.focal(outputs, labels, gamma=gamma).sum()

    for gamma in (0.5, 1.0, 2.0):
        slopes = grad(total, argnums=(0, 1))(sure, torch.tensor(gamma))
        assert all(bool(slope.isfinite().all()) for slope in slopes)
        assert slopes[0][0].abs().max() < 1e-6
    torch.testing.assert_close(losses.focal(sure, labels)[1], torch.tensor(200 + math.log(2)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["gamma", "label_smoothing", "strength", "beta"])
def test_losses_are_mapped_over_and_differentiated_by_their_hyperparameters(name):
    def loss(value):
        if name == "gamma":
            return losses.focal(LOGITS, LABELS, gamma=value).mean()
        if name == "label_smoothing":
            return losses.cross_entropy(LOGITS, LABELS, label_smoothing=value).mean()
        if name == "strength":
            adjusted = losses.logit_adjusted(LOGITS, torch.tensor([0.4, 0.3, 0.2, 0.1]).log(), strength=value)
            return losses.cross_entropy(adjusted, LABELS).mean()
        weights = losses.effective_number_weights(COUNTS, beta=value)
        return losses.cross_entropy(LOGITS, LABELS, class_weights=weights.double()).mean()

    values = torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64)
    torch.testing.assert_close(vmap(loss)(values), torch.stack([loss(v) for v in values]))
    torch.testing.assert_close(loss(values[0]), loss(0.2), rtol=1e-6, atol=1e-7)
    if name != "beta":  # float32 weights: too coarse for differences
        step = 1e-6
        slope = (loss(values[1] + step) - loss(values[1] - step)) / (2 * step)
        torch.testing.assert_close(grad(loss)(values[1]), slope, rtol=1e-7, atol=1e-9)


@given(st.lists(st.integers(0, 500), min_size=1, max_size=8), st.floats(0, 0.999))
def test_weights_have_a_mean_of_one_over_the_examples(counts, beta):
    n = torch.tensor(counts)
    for weights in (losses.balanced_weights(n), losses.effective_number_weights(n, beta=beta)):
        assert weights.shape == n.shape
        assert bool((weights[n == 0] == 0).all())
        total = int(n.sum())
        if total:
            assert (weights * n).sum().item() == pytest.approx(total, rel=1e-5)
    parts = (losses.balanced_weights(n) * n)[n > 0]
    if len(parts):
        torch.testing.assert_close(parts, parts[:1].expand_as(parts))


def test_effective_numbers_lie_between_equal_and_balanced_weights():
    n = torch.tensor([5000, 50])
    ratio = [float(w[1] / w[0]) for w in (losses.effective_number_weights(n, beta=b) for b in (0.0, 0.9, 0.999))]
    assert ratio[0] == 1
    assert ratio == sorted(ratio)
    assert ratio[2] == pytest.approx((1 - 0.999**5000) / (1 - 0.999**50), rel=1e-5)
    almost = losses.effective_number_weights(n, beta=1 - 1e-9)
    torch.testing.assert_close(almost, losses.balanced_weights(n), rtol=1e-4, atol=0)


def test_adjusted_logits_of_a_model_that_knows_nothing_are_the_priors():
    priors = torch.tensor([0.7, 0.2, 0.1])
    adjusted = losses.logit_adjusted(torch.zeros(5, 3), priors.log())
    torch.testing.assert_close(adjusted.softmax(-1), priors.expand(5, 3))
    outputs = random.normal(random.key(1), (5, 3))
    assert torch.equal(losses.logit_adjusted(outputs, priors.log(), strength=0.0), outputs)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: losses.focal(LOGITS, LABELS, gamma=-1), ValueError),
        (lambda: losses.focal(LOGITS, LABELS, gamma=math.nan), ValueError),
        (lambda: losses.focal(LOGITS, LABELS, gamma=torch.ones(2)), ValueError),
        (lambda: losses.focal(LOGITS, LABELS.double()), TypeError),
        (lambda: losses.focal(LOGITS, LABELS, class_weights=torch.ones(3)), ValueError),
        (lambda: losses.logit_adjusted(LOGITS, torch.zeros(3)), ValueError),
        (lambda: losses.logit_adjusted(LOGITS, torch.zeros(4), strength=math.inf), ValueError),
        (lambda: losses.balanced_weights(torch.ones(3)), TypeError),
        (lambda: losses.balanced_weights(torch.ones(3, 1).long()), ValueError),
        (lambda: losses.effective_number_weights(COUNTS, beta=1.0), ValueError),
        (lambda: losses.effective_number_weights(COUNTS, beta=-0.1), ValueError),
        (lambda: data.balanced_order(LABELS.double(), key=random.key(0), epoch=0), TypeError),
        (lambda: data.balanced_order(LABELS[:0], key=random.key(0), epoch=0), ValueError),
        (lambda: data.balanced_order(LABELS[None], key=random.key(0), epoch=0), ValueError),
    ],
)
def test_what_does_not_fit_is_refused(call, error):
    with pytest.raises(error):
        call()


def split_of(labels):
    return data.Split(torch.arange(len(labels))[:, None, None, None], labels)


def test_imbalance_keeps_its_parts_and_every_other_image_in_order():
    labels = torch.arange(1000) % 10
    found = data.imbalanced(split_of(labels), {8: 0.1, 9: 0.01, 7: 0.0}, key=random.key(0))
    assert torch.bincount(found.labels, minlength=10).tolist() == [100] * 7 + [0, 10, 1]
    places = found.images.flatten()
    assert torch.equal(places, places.sort().values)
    assert torch.equal(labels[places], found.labels)


def test_imbalance_is_nested_in_its_part_and_a_function_of_the_key_alone():
    labels = torch.arange(600) % 3
    kept = [
        set(data.imbalanced(split_of(labels), parts, key=random.key(seed)).images.flatten().tolist())
        for parts, seed in (({1: 0.2}, 0), ({1: 0.5}, 0), ({1: 0.5, 2: 0.1}, 0), ({1: 0.5}, 1))
    ]
    assert kept[0] < kept[1]
    assert {k for k in kept[2] if k % 3 == 1} == {k for k in kept[1] if k % 3 == 1}
    assert kept[1] != kept[3]


@pytest.mark.parametrize(("parts", "fault"), [({0: 1.1}, "in \\[0, 1\\]"), ({0: -0.1}, "1\\]"), ({5: 0.5}, "class 5")])
def test_imbalance_refuses_what_cannot_be(parts, fault):
    with pytest.raises(ValueError, match=fault):
        data.imbalanced(split_of(torch.tensor([0, 1])), parts, key=random.key(0))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 5))
def test_balanced_sampling_sees_classes_and_their_examples_equally_often(labels, epoch):
    labels = torch.tensor(labels)
    order = data.balanced_order(labels, key=random.key(3), epoch=epoch)
    assert order.shape == labels.shape
    assert order.dtype == torch.int64
    seen = torch.bincount(labels[order], minlength=5)[torch.bincount(labels, minlength=5) > 0]
    assert seen.max() - seen.min() <= 1
    often = torch.bincount(order, minlength=len(labels))
    for label in labels.unique():
        own = often[labels == label]
        assert own.max() - own.min() <= 1


def test_balanced_sampling_differs_by_epoch_and_key_alone():
    labels = torch.tensor([0] * 50 + [1] * 5)
    orders = [data.balanced_order(labels, key=random.key(k), epoch=e) for k, e in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0], orders[3])


def test_scores_of_an_evaluation_are_those_of_its_confusion_matrix():
    confusion = torch.tensor([[8, 2, 0], [1, 3, 0], [0, 0, 0]])
    found = train.Evaluation(confusion, torch.tensor(0.0))
    assert found.precision.tolist() == pytest.approx([8 / 9, 3 / 5, 0])
    f1 = [2 * (8 / 9) * 0.8 / (8 / 9 + 0.8), 2 * 0.6 * 0.75 / 1.35]
    assert found.f1.tolist() == pytest.approx([*f1, 0])
    assert found.macro_f1 == pytest.approx(sum(f1) / 2)  # the third class has no example
    assert found.balanced_accuracy == pytest.approx((0.8 + 0.75) / 2)
