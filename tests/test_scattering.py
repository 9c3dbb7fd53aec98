"""The scattering transform against convolutions written out, Kymatio's numbers, and its laws."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vmap

from functorch_mnist import random
from functorch_mnist.models.wavelets import scattering, scattering_filters

FILTERS = scattering_filters(28, 28)
# Kymatio 0.3.0's Scattering2D (frontend numpy, float64) of `pattern(28, 28)` with J = 2, L = 8: channel, row, column.
KYMATIO = {
    (0, 3, 3): 0.4783084036724624,
    (1, 0, 0): 0.04532910193569493,
    (8, 2, 5): 0.04402894337581247,
    (9, 6, 6): 0.0376933560806715,
    (16, 3, 1): 0.03234595368205539,
    (17, 0, 0): 0.010071964372118034,
    (17, 3, 3): 0.007018052024598165,
    (40, 6, 2): 0.00224140307127509,
    (63, 2, 4): 0.009941404182987397,
    (80, 5, 5): 0.008431965675398069,
}
# The same of `pattern(32, 16)` with J = 3, L = 4.
KYMATIO_OF_THREE_SCALES = {
    (0, 0, 0): 0.41578290275608587,
    (5, 3, 1): 0.03950940444114745,
    (12, 2, 0): 0.007135066650087616,
    (13, 0, 1): 0.005820638708434737,
    (20, 1, 1): 0.006026654308163241,
    (44, 3, 0): 0.003517056134837409,
    (60, 2, 1): 0.003881976600716109,
}


def pattern(height, width):
    row, column = torch.arange(height)[:, None], torch.arange(width)
    return (7 * row**2 + 3 * row * column + column**2) % 31 / 31


def draw(*shape):
    return random.uniform(random.key(3), shape, 0, 1)


def strokes(*shift):
    """A ring, four pixels wide, drawn smoothly; its centre moved."""
    row, column = torch.arange(28)[:, None] - 13.5 - shift[0], torch.arange(28) - 13.5 - shift[1]
    return torch.exp(-((torch.hypot(row, column) - 7) ** 2) / 4)


def gabor(sigma, xi, theta, slant, reach=24):
    """The equation at the top of the module, on the pixels from -reach to reach: no periods, no spectra."""
    y, x = torch.meshgrid(*[torch.arange(-reach, reach + 1.0, dtype=torch.float64)] * 2, indexing="ij")
    r0, r1 = y * math.cos(theta) + x * math.sin(theta), x * math.cos(theta) - y * math.sin(theta)
    bump = slant / (2 * math.pi * sigma**2) * torch.exp(-(r0**2 + slant**2 * r1**2) / (2 * sigma**2))
    return torch.polar(bump, xi * r0)


def morlet(j, theta, angles):
    sigma, xi, slant = 0.8 * 2**j, 3 * math.pi / 4 / 2**j, 4 / angles
    wave, bump = gabor(sigma, xi, theta, slant), gabor(sigma, 0.0, theta, slant)
    return wave - wave.sum() / bump.sum() * bump


def convolved(image, kernel):
    """`image ⋆ kernel`, the sum of products over space, the image repeated periodically."""
    height, width = image.shape
    y, x = torch.meshgrid(*[torch.arange(len(kernel)) - len(kernel) // 2] * 2, indexing="ij")
    folded = torch.zeros(height, width, dtype=torch.complex128)
    folded.index_put_((y % height, x % width), kernel, accumulate=True)
    rows = (torch.arange(height)[:, None] - torch.arange(height)) % height  # u - v
    columns = (torch.arange(width)[:, None] - torch.arange(width)) % width
    return torch.einsum("acbd,bd->ac", folded[rows[:, None, :, None], columns[None, :, None, :]], image.to(folded))


def by_the_equations(image, scale, angles):
    """The features, every convolution on the full grid and written out in space."""
    step = 2**scale
    padded = torch.nn.functional.pad(image.double()[None], (step,) * 4, mode="reflect")[0]
    phi = gabor(0.8 * 2 ** (scale - 1), 0.0, 0.0, 1.0)
    psi = {
        (j, i): morlet(j, (angles // 2 - 1 - i) * math.pi / angles, angles) for j in range(scale) for i in range(angles)
    }
    first = {index: convolved(padded, psi[index]).abs() for index in psi}
    second = [convolved(first[a], psi[b]).abs() for a in psi for b in psi if b[0] > a[0]]
    images = [padded, *first.values(), *second]
    return torch.stack([convolved(u, phi).real[step:-step:step, step:-step:step] for u in images])


@pytest.mark.parametrize(("height", "width", "angles"), [(8, 6, 3), (4, 10, 2), (6, 6, 8)])
def test_at_one_scale_the_features_are_the_convolutions_written_out(height, width, angles):
    image = draw(height, width)
    found = scattering(image, scattering_filters(height, width, scale=1, angles=angles))
    expected = by_the_equations(image, 1, angles)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)  # float32


def test_at_two_scales_the_features_are_the_equations_but_for_what_coarse_grids_leave_out():
    image = draw(16, 12)
    found = scattering(image, scattering_filters(16, 12, angles=4)).double()
    expected = by_the_equations(image, 2, 4)
    torch.testing.assert_close(found[:5], expected[:5], rtol=0, atol=1e-6)  # on the full grid, nothing is left out
    for order in (slice(5, 9), slice(9, 25)):
        off = (found[order] - expected[order]).norm() / expected[order].norm()
        assert 0 < off < 0.1


@pytest.mark.parametrize(
    ("size", "scale", "angles", "published"),
    [((28, 28), 2, 8, KYMATIO), ((32, 16), 3, 4, KYMATIO_OF_THREE_SCALES)],
)
def test_the_features_are_those_of_kymatio(size, scale, angles, published):
    found = scattering(pattern(*size), scattering_filters(*size, scale=scale, angles=angles))
    for index, theirs in published.items():
        order = 0 if index[0] == 0 else 1 if index[0] <= scale * angles else 2
        expected = theirs * (3.1415 / math.pi) ** (order + 1)  # each of their filters divides by a π of 3.1415
        assert found[index].item() == pytest.approx(expected, rel=1e-5)


@given(
    st.integers(1, 3), st.integers(1, 5), st.integers(2, 4), st.integers(2, 4), st.lists(st.integers(0, 3), max_size=2)
)
def test_there_is_a_channel_per_path_and_a_pixel_per_step(scale, angles, rows, columns, lead):
    filters = scattering_filters(rows * 2**scale, columns * 2**scale, scale=scale, angles=angles)
    features = scattering(draw(*lead, rows * 2**scale, columns * 2**scale), filters)
    channels = 1 + scale * angles + scale * (scale - 1) // 2 * angles**2
    assert features.shape == (*lead, channels, rows, columns)
    assert features.dtype == torch.float32


def test_features_of_a_batch_are_the_stack_of_those_of_its_images():
    images = draw(3, 7, 28, 28)  # more than are taken together
    features = scattering(images, FILTERS)
    for x, expected in ((images[0, 0], features[0, 0]), (images[2, 6], features[2, 6]), (images[1], features[1])):
        torch.testing.assert_close(scattering(x, FILTERS), expected, rtol=0, atol=1e-6)
    mapped = vmap(vmap(lambda x: scattering(x, FILTERS)))(images)
    torch.testing.assert_close(mapped, features, rtol=0, atol=1e-6)


def test_the_same_call_gives_the_same_bits():
    images = draw(20, 28, 28)
    assert torch.equal(scattering(images, FILTERS), scattering(images, scattering_filters(28, 28)))


def test_a_multiple_of_an_image_has_the_multiple_of_its_features():
    image = draw(28, 28)
    assert torch.equal(scattering(4 * image, FILTERS), 4 * scattering(image, FILTERS))  # a power of two rounds nothing


def test_all_but_the_averages_forget_a_constant():
    image = draw(28, 28)
    features, moved = scattering(image, FILTERS), scattering(image + 0.5, FILTERS)
    torch.testing.assert_close(moved[0], features[0] + 0.5, rtol=0, atol=1e-5)
    torch.testing.assert_close(moved[1:], features[1:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_a_constant_image_has_only_its_average(scale):
    features = scattering(torch.ones(16, 32), scattering_filters(16, 32, scale=scale))
    torch.testing.assert_close(features[0], torch.ones_like(features[0]), rtol=0, atol=2e-5)
    assert features[1:].abs().max() < 1e-5


def test_transposing_an_image_mirrors_the_angles():
    image, filters = draw(16, 24), scattering_filters(16, 24)
    mirrored = [(2 - i) % 8 for i in range(8)]  # θ becomes π/2 - θ
    first = scattering(image, filters)[1:17].unflatten(0, (2, 8))
    second = scattering(image, filters)[17:].unflatten(0, (8, 8))
    of_transposed = scattering(image.mT, scattering_filters(24, 16))
    atol = 1e-6  # float32
    torch.testing.assert_close(of_transposed[1:17].unflatten(0, (2, 8)), first[:, mirrored].mT, rtol=0, atol=atol)
    expected = second[mirrored][:, mirrored].mT
    torch.testing.assert_close(of_transposed[17:].unflatten(0, (8, 8)), expected, rtol=0, atol=atol)


def test_a_grating_is_heard_at_its_own_scale_and_angle():
    for j in (0, 1):
        xi = 3 * math.pi / 4 / 2**j
        for i in range(8):
            theta = (3 - i) * math.pi / 8
            row, column = torch.arange(28.0)[:, None], torch.arange(28.0)
            grating = torch.cos(xi * (row * math.cos(theta) + column * math.sin(theta)))
            loudest = scattering(grating, FILTERS)[1:17, 3, 3].argmax().item()
            assert loudest == 8 * j + i


def test_features_change_less_than_pixels_when_strokes_move_by_one():
    still, moved = strokes(0, 0), strokes(0, 1)
    of_still, of_moved = scattering(still, FILTERS), scattering(moved, FILTERS)
    change = (of_moved - of_still).norm() / of_still.norm()
    assert change < 0.6 * (moved - still).norm() / still.norm()


@given(st.integers(0, 2**31))
def test_features_are_no_further_apart_than_images(seed):
    a, b = random.uniform(random.key(seed), (2, 28, 28), 0, 1)
    of_a, of_b = scattering(torch.stack([a, b]), FILTERS)
    assert (of_a - of_b).norm() <= (a - b).norm()


@pytest.mark.parametrize(
    ("height", "width", "settings", "words"),
    [
        (30, 28, {}, "multiples of 2\\^scale = 4 .* Found 30 by 28"),
        (28, 26, {}, "Found 28 by 26"),
        (4, 8, {}, "above it. Found 4 by 8"),
        (0, 0, {}, "Found 0 by 0"),
        (28, 28, {"scale": 3}, "2\\^scale = 8"),
        (28, 28, {"scale": 0}, "at least 1. Found 0 and 8"),
        (28, 28, {"angles": 0}, "at least 1. Found 2 and 0"),
    ],
)
def test_sizes_that_no_grid_divides_are_refused(height, width, settings, words):
    with pytest.raises(ValueError, match=words):
        scattering_filters(height, width, **settings)


def test_images_of_another_size_or_type_are_refused():
    for shape in ((28,), (28, 32), (3, 32, 28), ()):
        with pytest.raises(ValueError, match=r"must be \(\.\.\., 28, 28\)"):
            scattering(torch.zeros(shape), FILTERS)
    for dtype in (torch.uint8, torch.float64):
        with pytest.raises(TypeError, match="must be float32"):
            scattering(torch.zeros(28, 28, dtype=dtype), FILTERS)
