"""Labels outside [0, K) are refused by one sentence, wherever they meet outputs; in a masked row they do not matter."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.func import grad, vmap

from functorch_mnist import attribution, calibration, losses, per_sample, random, train

OUTPUTS = random.normal(random.key(0), (4, 3))
LABELS = torch.tensor([0, 2, 1, 0])
PARAMS = {"w": random.normal(random.key(1), (3, 5))}
X = random.normal(random.key(2), (4, 5))

OF_OUTPUTS = {
    "cross_entropy": losses.cross_entropy,
    "smoothed": lambda outputs, labels: losses.cross_entropy(outputs, labels, label_smoothing=0.1),
    "adjusted": lambda outputs, labels: losses.cross_entropy(
        losses.logit_adjusted(outputs, torch.tensor([0.5, 0.3, 0.2]).log()), labels
    ),
    "focal": losses.focal,
    "accuracy": losses.accuracy,
    "one_hot": lambda outputs, labels: losses.one_hot(labels, 3),
    "log_odds": attribution.log_odds,
    "scores": lambda outputs, labels: attribution.scores(
        lambda params, x: x + params["w"], {"w": torch.zeros(3)}, outputs, labels=labels
    ),
    "brier": lambda outputs, labels: calibration.brier(outputs.softmax(-1), labels),
}
NAMES = dict.fromkeys(("smoothed", "adjusted", "scores"), "cross_entropy")


def outputs_fn(params, x):
    return params["w"] @ x


def loss_fn(params, x, y):
    return losses.cross_entropy(outputs_fn(params, x), y)


TRANSFORMED = {
    "vmap": lambda x, y: vmap(loss_fn, (None, 0, 0))(PARAMS, x, y),
    "grad of vmap": lambda x, y: grad(lambda p: vmap(loss_fn, (None, 0, 0))(p, x, y).sum())(PARAMS),
    "vmap of grad": lambda x, y: vmap(grad(loss_fn), (None, 0, 0))(PARAMS, x, y),
    "two vmaps": lambda x, y: vmap(vmap(loss_fn, (None, 0, 0)), (None, None, 0))(PARAMS, x, y[None]),
    "norms": lambda x, y: per_sample.norms(loss_fn, PARAMS, x, y),
    "clipped_sum": lambda x, y: per_sample.clipped_sum(loss_fn, PARAMS, x, y, max_norm=1.0),
    "scores": lambda x, y: attribution.scores(outputs_fn, PARAMS, x, labels=y),
    "gradient": lambda x, y: train.gradient(loss_fn)(PARAMS, x, y),
}


def with_label(bad):
    return LABELS.index_fill(0, torch.tensor([2]), bad)


def refusal(where, bad, classes=3):
    return rf"^{where}: labels must be in \[0, {classes}\)\. Found {bad}\. Leave out such examples, or mask them\.$"


@pytest.mark.parametrize("bad", [-100, -1, 3])
@pytest.mark.parametrize("name", OF_OUTPUTS)
def test_a_label_out_of_range_is_refused_by_name(name, bad):
    OF_OUTPUTS[name](OUTPUTS, LABELS)
    with pytest.raises(ValueError, match=refusal(NAMES.get(name, name), bad)):
        OF_OUTPUTS[name](OUTPUTS, with_label(bad))


@pytest.mark.parametrize("bad", [-1, 3])
@pytest.mark.parametrize("name", TRANSFORMED)
def test_a_label_out_of_range_is_refused_beneath_transforms(name, bad):
    TRANSFORMED[name](X, LABELS)
    with pytest.raises(ValueError, match=refusal("cross_entropy", bad)):
        TRANSFORMED[name](X, with_label(bad))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_labels_of_every_integer_type_are_looked_at(dtype):
    outputs = torch.zeros(2, 5)
    assert losses.cross_entropy(outputs, torch.tensor([0, 4], dtype=dtype)).shape == (2,)
    with pytest.raises(ValueError, match=refusal("cross_entropy", 5, classes=5)):
        losses.cross_entropy(outputs, torch.tensor([0, 5], dtype=dtype))


def test_a_compiled_function_refuses_them_too_and_is_otherwise_what_it_was():
    fused = train.compiled(TRANSFORMED["norms"])
    torch._dynamo.utils.counters.clear()
    torch.testing.assert_close(fused(X, LABELS), TRANSFORMED["norms"](X, LABELS))
    for bad in (-100, 3):
        with pytest.raises(RuntimeError, match=r"y: labels must be in \[0, 3\)\. Leave out such examples"):
            fused(X, with_label(bad))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


IN_GRAPHS = ["cross_entropy", "focal", "accuracy", "one_hot", "log_odds", "grad of vmap", "vmap of grad"]


@pytest.mark.parametrize("name", IN_GRAPHS)
def test_a_graph_holds_the_refusal(name):
    fn, first = (OF_OUTPUTS[name], OUTPUTS) if name in OF_OUTPUTS else (TRANSFORMED[name], X)
    fused = torch.compile(fn, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(fused(first, LABELS), fn(first, LABELS))
    with pytest.raises(RuntimeError, match="labels must be in"):
        fused(first, with_label(3))


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("bad", [-100, 3])
def test_a_label_in_a_masked_row_does_not_matter(bad, chunk_size):
    mask = torch.arange(4) != 2
    batch, kept = (X, with_label(bad)), (X[mask], LABELS[mask])
    found = per_sample.norms(loss_fn, PARAMS, *batch, mask=mask, chunk_size=chunk_size)
    torch.testing.assert_close(found[mask], per_sample.norms(loss_fn, PARAMS, *kept))
    assert found[2] == 0
    clipped = per_sample.clipped_sum(loss_fn, PARAMS, *batch, mask=mask, chunk_size=chunk_size, max_norm=0.5)
    torch.testing.assert_close(clipped.grads, per_sample.clipped_sum(loss_fn, PARAMS, *kept, max_norm=0.5).grads)
    scored = attribution.scores(outputs_fn, PARAMS, X, labels=batch[1], mask=mask, chunk_size=chunk_size)
    for column, expected in zip(scored, attribution.scores(outputs_fn, PARAMS, kept[0], labels=kept[1]), strict=True):
        torch.testing.assert_close(column[mask], expected)
        assert column[2] == 0
    sums, _ = train.gradient(loss_fn)(PARAMS, *batch, mask=mask)
    torch.testing.assert_close(sums, train.gradient(loss_fn)(PARAMS, *kept)[0])
    assert [int(n) for n in losses.accuracy(OUTPUTS, batch[1], mask)] == [
        int(n) for n in losses.accuracy(OUTPUTS[mask], LABELS[mask])
    ]


def test_no_labels_are_in_range_and_tensors_without_numbers_are_not_looked_at():
    assert losses.cross_entropy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)).shape == (0,)
    outputs, labels = torch.zeros(4, 3, device="meta"), torch.zeros(4, dtype=torch.int64, device="meta")
    mode = FakeTensorMode()
    fakes = mode.from_tensor(OUTPUTS), mode.from_tensor(with_label(3))
    for outs, ys in ((outputs, labels), fakes):
        assert losses.cross_entropy(outs, ys).shape == (4,)
        assert vmap(grad(losses.cross_entropy))(outs, ys).shape == (4, 3)
