"""Layers and losses against torch's own, and the laws that hold for all of them."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, vmap

from functorch_mnist import layers, losses, random

leads = st.lists(st.integers(1, 3), max_size=2).map(tuple)


def draw(*shape):
    return random.normal(random.key(len(shape)), shape).double()


def stacked(fn, lead, *inputs):
    """`fn` of each example, in a Python loop."""
    rows = [x.flatten(0, len(lead) - 1) if lead else x[None] for x in inputs]
    out = torch.stack([fn(*example) for example in zip(*rows, strict=True)])
    return out.unflatten(0, lead) if lead else out[0]


@given(leads)
def test_every_layer_of_a_batch_is_the_stack_of_its_examples(lead):
    x, w, b = draw(*lead, 2, 5, 6), draw(3, 2, 3, 3), draw(3)
    key = random.fold_in(random.key(7), torch.arange(len(x.view(-1, 2, 5, 6)))).view(*lead, 2)
    laws = [
        (lambda x: layers.conv2d(x, w, b), (x,)),
        (layers.max_pool2d, (x,)),
        (layers.channels_last, (x,)),
        (layers.flatten, (x,)),
        (layers.log_softmax, (x,)),
        (lambda x: layers.linear(x, draw(4, 6), draw(4)), (x,)),
        (lambda x, key: layers.dropout(x, key, rate=0.5), (x, key)),
        (lambda x, key: layers.channel_dropout(x, key, rate=0.5), (x, key)),
    ]
    for fn, inputs in laws:
        torch.testing.assert_close(fn(*inputs), stacked(fn, lead, *inputs), rtol=0, atol=1e-12)


@given(leads)
def test_image_linear_is_linear_of_the_flat_images_in_either_precision(lead):
    x, w, b = draw(*lead, 2, 5, 6), draw(4, 60), draw(4)
    expected = F.linear(x.reshape(*lead, 60), w, b)
    torch.testing.assert_close(layers.image_linear(x, w, b), expected, rtol=1e-12, atol=1e-12)
    low = layers.image_linear(x.float(), w.float(), b.float())
    torch.testing.assert_close(low.double(), expected, rtol=0, atol=1e-5)  # 60 products of numbers near 1


@pytest.mark.parametrize("lead", [(47,), (48,), (7, 7)])
def test_image_linear_of_few_and_of_many_images_is_linear(lead):
    x, w, b = draw(*lead, 2, 5, 6).float(), draw(4, 60).float(), draw(4).float()
    expected = F.linear(x.reshape(*lead, 60), w, b)
    torch.testing.assert_close(layers.image_linear(x, w, b), expected, rtol=0, atol=1e-5)


@given(leads, st.integers(1, 2), st.integers(0, 2))
def test_conv2d_equals_torch(lead, stride, padding):
    x, w, b = draw(*lead, 2, 6, 7), draw(3, 2, 3, 3), draw(3)
    expected = F.conv2d(x.reshape(-1, 2, 6, 7), w, b, stride, padding)
    actual = layers.conv2d(x, w, b, stride=stride, padding=padding)
    torch.testing.assert_close(actual, expected.view(*lead, *expected.shape[1:]), rtol=0, atol=1e-12)


# Few distinct values, so that windows tie; NaN and infinities among them.
pixels = st.lists(st.sampled_from([-1.0, 0.0, 1.0, float("inf"), float("nan")]), min_size=2 * 5 * 6, max_size=2 * 5 * 6)


@given(pixels)
def test_max_pool2d_by_comparison_has_torchs_values_and_gradients_ties_and_nan_included(values):
    x = torch.tensor(values, dtype=torch.float64).view(2, 5, 6)
    for stride, cotangent in ((2, draw(2, 2, 3)), (1, draw(2, 4, 5))):
        for fn in (layers._max_pool2d_by_comparison, lambda x, stride: layers.max_pool2d(x, stride=stride)):
            value, vjp = torch.func.vjp(partial(fn, stride=stride), x)
            expected, expected_vjp = torch.func.vjp(partial(F.max_pool2d, kernel_size=2, stride=stride), x)
            assert torch.equal(value.nan_to_num(7), expected.nan_to_num(7))
            torch.testing.assert_close(vjp(cotangent)[0], expected_vjp(cotangent)[0], rtol=0, atol=1e-14)


def test_max_pool2d_with_another_window_equals_torch():
    x = draw(2, 3, 7, 9)
    assert torch.equal(layers.max_pool2d(x, 3), F.max_pool2d(x, 3))


def test_flatten_and_channels_last_change_the_format_and_no_number():
    x = draw(2, 3, 4, 5)
    last = layers.channels_last(x)
    assert torch.equal(last, x)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(layers.flatten(last), x.reshape(2, 60))
    one = layers.channels_last(draw(2, 1, 4, 5))
    assert one.stride() == (20, 1, 5, 1)


def test_the_gradient_through_flatten_is_stored_channels_last():
    x = layers.channels_last(draw(2, 3, 4, 5))
    _, vjp = torch.func.vjp(layers.flatten, x)
    (gradient,) = vjp(draw(2, 60))
    assert torch.equal(gradient, draw(2, 60).view(2, 3, 4, 5))
    assert gradient.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", layers.ACTIVATIONS)
def test_an_activation_is_its_formula(name):
    x = draw(50)
    formulas = {
        "relu": x.clamp(min=0),
        "sigmoid": 1 / (1 + torch.exp(-x)),
        "tanh": (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()),
    }
    torch.testing.assert_close(layers.ACTIVATIONS[name](x), formulas[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layer", [layers.dropout, layers.channel_dropout])
def test_dropout_keeps_the_expectation_and_the_rate(layer):
    x = torch.ones(20_000, 4, 1, 2)
    y = layer(x, random.split(random.key(1), 20_000), rate=0.25)
    assert y.unique().tolist() == pytest.approx([0, 4 / 3])
    # 80,000 masks at least: the mean of the kept part has a standard deviation of 0.0016.
    assert (y != 0).double().mean().item() == pytest.approx(0.75, abs=0.008)


def test_channel_dropout_drops_whole_channels():
    y = layers.channel_dropout(torch.ones(100, 8, 3, 3), random.split(random.key(1), 100), rate=0.5)
    assert torch.equal(y.amin((-2, -1)), y.amax((-2, -1)))


def test_a_dropped_number_is_zero_whatever_it_was():
    x = torch.full((1000,), float("nan"))
    assert set(layers.dropout(x, random.key(0), rate=0.5).nan_to_num(7).tolist()) == {0.0, 7.0}


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_a_dropout_rate_outside_its_range_is_refused(rate):
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\)"):
        layers.dropout(torch.ones(3), random.key(0), rate=rate)


def test_dropout_of_a_batch_needs_one_key_per_example():
    with pytest.raises(ValueError, match="share their leading axes"):
        layers.dropout(torch.ones(4, 3), random.split(random.key(0), 5), rate=0.5)


@given(leads, st.booleans(), st.sampled_from([0.0, 0.1, 1.0]))
def test_cross_entropy_equals_torch_per_example(lead, weighted, smoothing):
    outputs = 3 * draw(*lead, 5)
    labels = random.randint(random.key(3), lead, 0, 5)
    weights = torch.tensor([1.0, 0.5, 2.0, 0.0, 3.0], dtype=torch.float64) if weighted else None
    expected = F.cross_entropy(
        outputs.view(-1, 5), labels.view(-1), weight=weights, label_smoothing=smoothing, reduction="none"
    ).view(lead)
    actual = losses.cross_entropy(outputs, labels, class_weights=weights, label_smoothing=smoothing)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_cross_entropy_of_log_probabilities_is_that_of_the_logits():
    logits, labels = draw(4, 10), torch.tensor([0, 1, 2, 3])
    a, b = losses.cross_entropy(logits, labels), losses.cross_entropy(logits.log_softmax(-1), labels)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_losses_of_bfloat16_outputs_are_float32():
    outputs = torch.ones(2, 3, dtype=torch.bfloat16)
    assert losses.cross_entropy(outputs, torch.tensor([0, 1])).dtype == torch.float32
    assert losses.mse(outputs, torch.zeros(2, 3)).dtype == torch.float32


@given(leads)
def test_mse_equals_torch_per_example(lead):
    outputs, targets = draw(*lead, 3), draw(*lead, 3).flip(-1)
    expected = F.mse_loss(outputs, targets, reduction="none").mean(-1)
    assert torch.equal(losses.mse(outputs, targets), expected)


def test_losses_work_under_vmap_and_grad():
    outputs, labels = draw(4, 10), torch.tensor([0, 1, 2, 9])
    batched = vmap(grad(lambda o, y: losses.cross_entropy(o, y, label_smoothing=0.1)))(outputs, labels)
    summed = grad(lambda o: losses.cross_entropy(o, labels, label_smoothing=0.1).sum())(outputs)
    torch.testing.assert_close(batched, summed, rtol=1e-12, atol=1e-12)
    assert torch.equal(vmap(lambda y: losses.one_hot(y, 10))(labels), F.one_hot(labels, 10).float())


def test_accuracy_counts_the_unmasked_examples():
    outputs, labels = torch.eye(4), torch.tensor([0, 1, 0, 3])
    assert [int(n) for n in losses.accuracy(outputs, labels)] == [3, 4]
    mask = torch.tensor([True, False, True, False])
    assert [int(n) for n in losses.accuracy(outputs, labels, mask)] == [1, 2]


def test_shapes_that_do_not_agree_are_refused():
    with pytest.raises(ValueError, match="leading axes"):
        losses.cross_entropy(torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="one shape"):
        losses.mse(torch.zeros(2, 3), torch.zeros(3))
    with pytest.raises(ValueError, match="label_smoothing"):
        losses.cross_entropy(torch.zeros(3), torch.tensor(0), label_smoothing=1.5)
    with pytest.raises(ValueError, match=r"class_weights must be \(K,\), \(3,\)\. Found \(1,\)"):
        losses.cross_entropy(torch.zeros(3), torch.tensor(0), class_weights=torch.ones(1))
    with pytest.raises(ValueError, match=r"accuracy: .*leading axes\. Found \(2, 3\) and \(1,\)"):
        losses.accuracy(torch.zeros(2, 3), torch.tensor([0]))
    for mask in (torch.ones(2), torch.ones(1, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"mask must be bool \(2,\)"):
            losses.accuracy(torch.zeros(2, 3), torch.tensor([0, 1]), mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
def test_labels_that_are_not_integers_are_refused(dtype):
    for fn in (losses.cross_entropy, losses.accuracy):
        with pytest.raises(TypeError, match=f"labels must be integers.*{dtype}"):
            fn(torch.zeros(2, 3), torch.zeros(2, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_every_integer_type_give_one_loss(dtype):
    outputs, labels = draw(3, 5), torch.tensor([4, 0, 2])
    assert torch.equal(losses.cross_entropy(outputs, labels.to(dtype)), losses.cross_entropy(outputs, labels))


@given(leads, st.sampled_from([1, 2, 4]))
def test_group_norm_equals_torch_and_gives_each_group_mean_0_and_variance_1(lead, groups):
    x = 3 * draw(*lead, 4, 5, 6) + 1
    found = layers.group_norm(x, groups)
    expected = F.group_norm(x.reshape(-1, 4, 5, 6), groups).view(x.shape)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    parts = found.unflatten(-3, (groups, -1)).flatten(-3)
    torch.testing.assert_close(parts.mean(-1), torch.zeros(*lead, groups).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(parts.var(-1, correction=0), torch.ones(*lead, groups).double(), rtol=0, atol=1e-4)


def test_group_norm_refuses_groups_that_do_not_divide_the_channels():
    for groups in (0, 3):
        with pytest.raises(ValueError, match="groups must divide the channels, 4"):
            layers.group_norm(draw(4, 5, 6), groups)


def test_a_tempered_sigmoid_is_tanh_by_default_and_lies_between_its_bounds():
    x = torch.linspace(-8, 8, 101).double()
    torch.testing.assert_close(layers.tempered_sigmoid(x), x.tanh(), rtol=0, atol=1e-15)
    found = layers.tempered_sigmoid(x, scale=1.58, temperature=3.0, offset=0.71)
    assert -0.7101 < found.min() < -0.7099
    assert 0.8699 < found.max() < 0.8701
    assert found[50].item() == pytest.approx(1.58 / 2 - 0.71, rel=1e-5)
