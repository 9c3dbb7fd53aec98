"""Random glyphs are as told, and discriminants of their classes are scipy's generalised eigenvectors."""

import numpy as np
import pytest
import torch

from benchmarks.studies import frontier
from functorch_mnist import data, losses, models, optim, privacy, random, train

GLYPHS = data.glyphs(random.key(3), 20, 3)
FEATURES = GLYPHS[:, :, ::4, ::4].flatten(-2).double()  # (20, 3, 49)


def found(features=FEATURES, count=12, shrinkage=0.5):
    return models.discriminants(features, count=count, shrinkage=shrinkage)


def within(features, shrinkage):
    inner = (features - features.mean(1, keepdim=True)).flatten(0, 1)
    covariance = inner.T @ inner / (features.shape[0] * (features.shape[1] - 1))
    return covariance + shrinkage * covariance.trace() / len(covariance) * torch.eye(len(covariance)).double()


def test_glyphs_are_images_of_ink_that_the_key_alone_gives():
    assert GLYPHS.shape == (20, 3, 28, 28) and GLYPHS.dtype == torch.float32
    assert GLYPHS.min() == 0 and GLYPHS.max() == 1
    assert torch.equal(GLYPHS, data.glyphs(random.key(3), 20, 3))
    assert not torch.equal(GLYPHS, data.glyphs(random.key(4), 20, 3))
    assert (GLYPHS.sum((-2, -1)) > 10).all()


def test_a_glyph_fills_a_box_of_18_pixels_and_half_a_pen():
    inked = GLYPHS.flatten(0, 1) > 0
    sides = torch.stack([inked.any(2).sum(1), inked.any(1).sum(1)], 1).amax(1)  # of the longer side
    assert ((sides >= 18) & (sides <= 18 + 2 * 2.7 + 1)).all()


def test_hands_write_a_glyph_alike_and_another_glyph_otherwise():
    flat = GLYPHS.flatten(-2)
    same = (flat[:, 0] - flat[:, 1]).square().mean()
    other = (flat[:-1, 0] - flat[1:, 0]).square().mean()
    assert same < 0.7 * other


def test_larger_images_have_a_wider_margin_and_the_same_strokes():
    assert torch.equal(data.glyphs(random.key(3), 2, 2, size=32)[..., 2:-2, 2:-2], data.glyphs(random.key(3), 2, 2))


@pytest.mark.parametrize("numbers", [(0, 1, 28), (1, 0, 28), (1, 1, 19)])
def test_numbers_of_no_glyphs_are_refused(numbers):
    classes, hands, size = numbers
    with pytest.raises(ValueError, match=f"Found {classes}, {hands} and {size}"):
        data.glyphs(random.key(0), classes, hands, size=size)


def test_discriminants_are_scipys_generalised_eigenvectors():
    linalg = pytest.importorskip("scipy.linalg")
    means = FEATURES.mean(1) - FEATURES.mean((0, 1))
    between = means.T @ means / len(means)
    values, vectors = linalg.eigh(between.numpy(), within(FEATURES, 0.5).numpy())
    ours = found()
    np.testing.assert_allclose(ours.ratios.numpy(), values[::-1][:12], rtol=1e-9)
    signs = np.sign((ours.directions.numpy() * vectors[:, ::-1][:, :12]).sum(0))
    np.testing.assert_allclose(ours.directions.numpy() * signs, vectors[:, ::-1][:, :12], rtol=0, atol=1e-8)


def test_directions_are_uncorrelated_within_classes():
    ours = found()
    identity = ours.directions.T @ within(FEATURES, 0.5) @ ours.directions
    torch.testing.assert_close(identity, torch.eye(12).double(), rtol=0, atol=1e-10)


def test_scaling_and_turning_the_features_changes_nothing_but_signs():
    turn = torch.linalg.qr(random.normal(random.key(0), (49, 49)).double())[0]
    plain = models.discriminated(FEATURES, found())
    turned = models.discriminated(3 * FEATURES @ turn, found(3 * FEATURES @ turn))
    torch.testing.assert_close(turned.abs(), plain.abs(), rtol=0, atol=1e-8)


def test_all_examples_have_length_one_but_the_mean_which_has_none():
    ours = found()
    lengths = torch.linalg.vector_norm(models.discriminated(FEATURES, ours), dim=-1)
    torch.testing.assert_close(lengths, torch.ones(20, 3).double(), rtol=0, atol=1e-12)
    assert not models.discriminated(ours.mean, ours).any()


def test_a_feature_that_varies_within_classes_alone_is_shrunk():
    features = torch.zeros(3, 2, 2)
    features[:, :, 0] = torch.tensor([-1.0, 0.0, 1.0])[:, None]
    features[:, 0, 1], features[:, 1, 1] = 5.0, -5.0
    directions = found(features, count=1, shrinkage=0.01).directions
    assert directions[1].abs() < 1e-6 * directions[0].abs()


@pytest.mark.parametrize(
    ("features", "settings", "word"),
    [
        (FEATURES[:, :1], {}, "V at least 2"),
        (FEATURES[0], {}, "must be \\(K, V, D\\)"),
        (FEATURES, {"count": 20}, "count must be from 1 to 19"),
        (FEATURES, {"count": 0}, "count must be from 1 to 19"),
        (FEATURES, {"shrinkage": 0.0}, "shrinkage must be above 0"),
        (FEATURES, {"shrinkage": float("inf")}, "shrinkage must be above 0"),
    ],
)
def test_what_has_no_discriminants_is_refused(features, settings, word):
    with pytest.raises(ValueError, match=word):
        found(features, **settings)


def test_the_largest_number_of_each_direction_is_above_0():
    directions = found().directions
    assert (directions.amax(0) == directions.abs().amax(0)).all()


def test_other_types_and_sizes_are_refused():
    with pytest.raises(TypeError, match="float32 or float64"):
        found(FEATURES.half())
    with pytest.raises(ValueError, match=r"must be \(\.\.\., 49\)"):
        models.discriminated(torch.zeros(3, 48), found())


def test_the_studys_closed_form_is_the_librarys_step(monkeypatch):
    """All images, almost no noise: the draw and the noise do not matter, so both ways must end with the same accuracy
    and almost the same weights."""
    monkeypatch.setattr(frontier, "_noise", lambda *_: 1e-9)
    seen = []
    averaging = optim.exponential_moving_average
    monkeypatch.setattr(
        frontier.optim,
        "exponential_moving_average",
        lambda inner, decay: recording(averaging(inner, decay=decay), seen),
    )
    x = models.discriminated(FEATURES, found()).float().flatten(0, 1)
    y = torch.arange(20).repeat_interleave(3) % 10
    split = data.Split(x, y)
    setting = frontier.Setting(batch_size=frontier.EXAMPLES, epochs=5, path_length=0.5, max_norm=0.1)
    frontier._closed_form(setting, split, split, seed=0)
    model, clipping = models.linear(12, 10, bias=False), privacy.Flat(0.1)
    optimizer = averaging(optim.sgd(0.5 / 5 / 0.1), decay=0.9)
    step = train.make_private_step(
        lambda params, x, y, key: losses.cross_entropy(model.apply(params, x), y), optimizer, clipping=clipping,
        mechanism=privacy.Poisson(1.0, 1e-9), examples=60,
    )  # fmt: skip
    state = train.init_private_state({"weight": torch.zeros(10, 12)}, optimizer, random.key(0), clipping)
    state = train.fit_private(step, state, split, secret=privacy.Secret(0), steps=5)
    torch.testing.assert_close(seen[-1], state.params["weight"], rtol=0, atol=1e-5)


def recording(optimizer, seen):
    def update(params, state, grads):
        params, state = optimizer.update(params, state, grads)
        seen.append(params)
        return params, state

    return optim.Optimizer(optimizer.init, update)


def test_the_studys_tables_are_made_from_its_record_alone():
    row = {"epsilon": 1.0, "seed": 0, "accuracy": 99.0, "spent": 0.99, "noise_multiplier": 2.0, "steps": 9}
    change = {"change": "none", "setting": frontier.Setting()._asdict(), "tried": [98.0], "accuracy": [98.0, 99.0]}
    record = {"frontier": [row, {**row, "seed": 1, "accuracy": 98.0}], "changes": [change]}
    tables = frontier.table(record)
    assert "| 1 | 0.990 | 2 | 9 | 98.50 ± 0.71 | 99.00 98.00 |" in tables["Frontier"]
    assert "| none | 98.50 ± 0.71 | +0.00 |" in tables["Changes"]
    assert all(point.source in tables["Published"] for point in frontier.PUBLISHED)
