"""Random changes of images, and shares of mixtures."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, vmap

from functorch_mnist import data, random
from functorch_mnist.data import Augmentation, augmented

KINDS = {
    "shift": Augmentation(shift=2.0),
    "rotate": Augmentation(rotate=30.0),
    "scale": Augmentation(scale=0.2),
    "shear": Augmentation(shear=0.3),
    "elastic": Augmentation(elastic=1.5),
    "erase": Augmentation(erase=0.6),
    "all": Augmentation(2.0, 10.0, 0.1, 0.1, 1.0, 0.3),
}
IMAGES = random.uniform(random.key(0), (4, 2, 12, 9))
KEYS = random.split(random.key(1), 4)


@pytest.mark.parametrize("kind", KINDS)
def test_an_images_change_hangs_on_its_key_alone(kind):
    found = augmented(IMAGES, KEYS, KINDS[kind])
    assert found.shape == IMAGES.shape
    assert not torch.equal(found, IMAGES)
    for i in range(4):
        assert torch.equal(augmented(IMAGES[i], KEYS[i], KINDS[kind]), found[i])
    assert torch.equal(vmap(lambda x, k: augmented(x, k, KINDS[kind]))(IMAGES, KEYS), found)
    lead = augmented(IMAGES.view(2, 2, 2, 12, 9), KEYS.view(2, 2, 2), KINDS[kind])
    assert torch.equal(lead.view_as(IMAGES), found)
    assert torch.equal(augmented(IMAGES.flip(1), KEYS, KINDS[kind]), found.flip(1))  # channels change together


def test_strengths_of_zero_change_nothing():
    assert augmented(IMAGES, KEYS, Augmentation()) is IMAGES
    zeros = Augmentation(*[torch.tensor(0.0)] * 6)
    torch.testing.assert_close(augmented(IMAGES, KEYS, zeros), IMAGES, rtol=0, atol=1e-5)


def test_the_compiled_change_is_the_eager_one():
    call = torch.compile(lambda x, k: augmented(x, k, KINDS["all"]), fullgraph=True, backend="eager")
    torch.testing.assert_close(call(IMAGES, KEYS), augmented(IMAGES, KEYS, KINDS["all"]), rtol=0, atol=1e-5)


def affine(images, maps):
    """What torch makes of maps from half images to half images."""
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def draws(count=4):
    """What the images' moves are drawn from: (5, N)."""
    return random.uniform(random.split(KEYS, 3)[:, 0], (5,), -1.0, 1.0).unbind(-1)


@pytest.mark.parametrize("kind", ["shift", "rotate", "scale", "shear"])
def test_each_change_is_the_affine_map_it_says(kind):
    right, down, turn, size, lean = draws()
    nothing, one = torch.zeros(4), torch.ones(4)
    ratio = 12 / 9
    angle = torch.deg2rad(30 * turn)
    factor = 1.2**-size
    maps = {
        "shift": [one, nothing, right * 2 * 2 / 9, nothing, one, down * 2 * 2 / 12],
        "rotate": [angle.cos(), -angle.sin() * ratio, nothing, angle.sin() / ratio, angle.cos(), nothing],
        "scale": [factor, nothing, nothing, nothing, factor, nothing],
        "shear": [one, lean * 0.3 * ratio, nothing, nothing, one, nothing],
    }
    expected = affine(IMAGES, torch.stack(maps[kind], -1).view(4, 2, 3))
    torch.testing.assert_close(augmented(IMAGES, KEYS, KINDS[kind]), expected, rtol=0, atol=1e-5)


def test_a_quarter_turn_is_a_permutation_of_pixels():
    keys = random.split(random.key(5), 2000)
    turn = random.uniform(random.split(keys, 3)[:, 0], (5,), -1.0, 1.0)[:, 2]
    i = int((turn - 0.5).abs().argmin())
    image = random.uniform(random.key(2), (1, 9, 9))
    found = augmented(image, keys[i], Augmentation(rotate=90.0 / turn[i].item()))  # exactly a quarter
    torch.testing.assert_close(found, image.rot90(1, (-2, -1)), rtol=0, atol=1e-5)


def test_an_elastic_field_has_the_standard_deviation_it_says():
    """A ramp of slope 1 shows each pixel's own displacement."""
    ramp = torch.arange(64.0).expand(1, 64, 64)
    keys = random.split(random.key(3), 200)
    found = augmented(ramp.expand(200, 1, 64, 64), keys, Augmentation(elastic=1.5))
    moved = (found - ramp)[:, 0, 10:-10, 10:-10]
    assert moved.std().item() == pytest.approx(1.5, rel=0.05)
    step = (moved[..., 1:] - moved[..., :-1]).std().item()
    assert step < 0.5  # smooth


def test_erasing_blanks_one_rectangle_and_nothing_else():
    ones = torch.ones(300, 1, 20, 20)
    found = augmented(ones, random.split(random.key(4), 300), Augmentation(erase=0.5))
    sizes = []
    for image in found[:, 0]:
        rows, columns = (image == 0).any(1), (image == 0).any(0)
        assert torch.equal(image == 0, rows[:, None] & columns)
        sizes.append([int(rows.sum()), int(columns.sum())])
    assert max(map(max, sizes)) in (10, 11)
    assert set(found.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("name", ["shift", "rotate", "scale", "shear", "elastic"])
def test_the_derivative_by_a_strength_equals_finite_differences(name):
    images, target = IMAGES.double(), IMAGES.double().flip(0)
    start = torch.tensor(getattr(KINDS["all"], name), dtype=torch.float64)

    def loss(strength):
        return (augmented(images, KEYS, Augmentation(**{name: strength})) - target).square().mean()

    slope = (loss(start + 1e-6) - loss(start - 1e-6)) / 2e-6
    torch.testing.assert_close(grad(loss)(start), slope, rtol=1e-5, atol=1e-9)
    assert slope.abs() > 1e-6


def test_changes_refuse_what_does_not_fit():
    with pytest.raises(TypeError, match="floats"):
        augmented(IMAGES.to(torch.uint8), KEYS, KINDS["all"])
    with pytest.raises(ValueError, match="leading axes"):
        augmented(IMAGES, KEYS[:3], KINDS["all"])
    for value in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="rotate must be a number of float32, at least 0"):
            augmented(IMAGES, KEYS, Augmentation(rotate=value))
    with pytest.raises(ValueError, match="a tensor shift must be 0-d"):
        augmented(IMAGES, KEYS, Augmentation(shift=torch.ones(4)))


@pytest.mark.parametrize("alpha", [0.1, 0.4, 1.0, 3.0])
def test_shares_have_the_moments_of_the_beta_distribution(alpha):
    shares = data.mixup_weights(alpha)(random.split(random.key(0), 40_000)).double()
    assert shares.min() >= 0
    assert shares.max() <= 1
    variance = 1 / (4 * (2 * alpha + 1))
    assert shares.mean().item() == pytest.approx(0.5, abs=5 * math.sqrt(variance / 40_000))
    assert shares.var().item() == pytest.approx(variance, rel=0.03)
    # The fourth moment about the middle, from those of x and 1 - x.
    kurtosis = (shares - 0.5).pow(4).mean() / shares.var().square()
    assert kurtosis.item() == pytest.approx(3 - 6 / (2 * alpha + 3), rel=0.03)


def test_a_share_hangs_on_its_key_and_a_bad_parameter_is_refused():
    keys, shares = random.split(random.key(0), 5), data.mixup_weights(0.4)
    each = torch.stack([shares(key) for key in keys])
    assert torch.equal(shares(keys), each)
    assert torch.equal(vmap(shares)(keys), each)
    for alpha in (0.0, -1.0, 1000.0, math.nan):
        with pytest.raises(ValueError, match=r"from 0\.05 to 100"):
            data.mixup_weights(alpha)
