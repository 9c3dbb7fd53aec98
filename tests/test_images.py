"""Changes of images: shifts against slices, straightening against the moments of ink that it is to bring about."""

import pytest
import torch
from torch.func import vmap

from functorch_mnist import data, random


def moments(image):
    """The ink's mean row and column, from the middle, and the covariance of the two over the variance of rows."""
    height, width = image.shape
    rows = (torch.arange(height).double() - (height - 1) / 2)[:, None].expand(height, width)
    columns = (torch.arange(width).double() - (width - 1) / 2).expand(height, width)
    ink = image.double() / image.double().sum()
    row, column = (ink * rows).sum(), (ink * columns).sum()
    down = rows - row
    return row.item(), column.item(), ((ink * down * (columns - column)).sum() / (ink * down**2).sum()).item()


def stroke(slant, row=0.0, column=0.0):
    """A leaning Gaussian stroke."""
    rows = (torch.arange(28).double() - 13.5)[:, None] - row
    columns = torch.arange(28).double() - 13.5 - column
    return torch.exp(-(rows**2) / 30 - (columns - slant * rows) ** 2 / 3)


@pytest.mark.parametrize("slant", [-0.8, 0.0, 0.5])
@pytest.mark.parametrize("place", [(0.0, 0.0), (2.5, -3.0)])
def test_an_upright_image_is_centred_and_does_not_lean(slant, place):
    image = stroke(slant, *place)
    row, column, leaning = moments(image)
    assert abs(row - place[0]) < 0.3
    assert abs(leaning - slant) < 0.1
    row, column, leaning = moments(data.deskewed(image))
    assert abs(row) < 0.05
    assert abs(column) < 0.05
    assert abs(leaning) < 0.02
    torch.testing.assert_close(data.deskewed(image), stroke(0.0), rtol=0, atol=0.12)  # interpolation blurs


def test_what_is_upright_already_stays_and_so_does_a_blank_image():
    image = stroke(0.0)
    torch.testing.assert_close(data.deskewed(image), image, rtol=0, atol=1e-6)
    assert torch.equal(data.deskewed(torch.zeros(3, 28, 28)), torch.zeros(3, 28, 28))


def test_upright_sees_each_image_alone_whatever_its_scale_and_leading_axes():
    images = torch.stack([stroke(0.5), 40 * stroke(-0.3, 1.0, 2.0), torch.zeros(28, 28).double()])
    alone = torch.stack([data.deskewed(image) for image in images])
    for lead in ((3,), (1, 3, 1)):
        found = data.deskewed(images.view(*lead, 28, 28)).view(3, 28, 28)
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-12)
    torch.testing.assert_close(data.deskewed(images[1] / 40), alone[1] / 40, rtol=0, atol=1e-12)


def test_upright_refuses_bytes():
    with pytest.raises(TypeError, match="must be floats"):
        data.deskewed(torch.zeros(28, 28, dtype=torch.uint8))


def test_shifts_are_all_moves_and_each_is_as_likely():
    image, pixels, draws = torch.arange(1, 31).view(5, 6), 1, 4500
    found = data.shifted(image.expand(draws, 5, 6), random.split(random.key(0), draws), pixels=pixels)
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1))
    moves = [padded[1 - down : 6 - down, 1 - right : 7 - right] for down in (-1, 0, 1) for right in (-1, 0, 1)]
    counts = [(found == move).all(-1).all(-1).sum().item() for move in moves]
    assert sum(counts) == draws
    assert sum((count - draws / 9) ** 2 / (draws / 9) for count in counts) < 26.1  # chi-square, 8 degrees, 0.1 %


def test_a_shift_hangs_on_its_key_alone_and_moves_channels_together():
    images = random.normal(random.key(1), (4, 3, 7, 8))
    keys = random.split(random.key(2), 4)
    alone = torch.stack([data.shifted(*one, pixels=3) for one in zip(images, keys, strict=True)])
    assert torch.equal(data.shifted(images, keys, pixels=3), alone)
    assert torch.equal(vmap(lambda x, key: data.shifted(x, key, pixels=3))(images, keys), alone)
    channels = torch.stack([data.shifted(images[:, c], keys, pixels=3) for c in range(3)], 1)
    assert torch.equal(channels, alone)
    assert torch.equal(data.shifted(images, keys, pixels=0), images)


def test_shifts_that_mean_nothing_are_refused():
    keys = random.split(random.key(0), 4)
    for images, pixels, message in (
        (torch.zeros(4, 7, 8), -1, "pixels must be at least 0"),
        (torch.zeros(3, 7, 8), 1, "leading axes of the keys"),
        (torch.zeros(4, 8), 1, "leading axes of the keys"),
    ):
        with pytest.raises(ValueError, match=message):
            data.shifted(images, keys, pixels=pixels)
