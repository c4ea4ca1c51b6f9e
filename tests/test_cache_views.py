"""Views made on the device, against slicing, Pillow and torchvision."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.v2 import functional as reference

from gspn2convert.cache import crop_boxes, cut, recolour
from gspn2convert.recipe import Augment
from helpers.photos import PLAIN, WHOLE, middle, noise, photo, smooth

pytestmark = pytest.mark.usefixtures("one_thread")


# Cutting


@pytest.mark.parametrize("channels", [1, 3])
def test_the_whole_image_at_its_own_size_is_itself(channels):
    images = noise(2, channels, 23, 23)
    found = cut(images, WHOLE.expand(2, -1), (23, 23))
    torch.testing.assert_close(found, images, atol=1e-5, rtol=0)
    mirrored = cut(images, torch.tensor([[0.0, 0.0, -1.0, 1.0]] * 2), (23, 23))
    torch.testing.assert_close(mirrored, images.flip(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("top", "left", "height", "width"), [(0, 0, 18, 17), (2, 3, 17, 16), (3, 1, 17, 19)])
def test_a_box_of_whole_pixels_is_a_slice(top, left, height, width):
    side, images = 20, noise(2, 3, 20, 20)
    centre = (2 * left + width - side, 2 * top + height - side)
    boxes = torch.tensor([[*centre, width, height], [*centre, -width, height]]) / side
    expected = images[:, :, top : top + height, left : left + width].clone()
    expected[1] = expected[1].flip(-1)
    torch.testing.assert_close(cut(images, boxes, (height, width)), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("side", "size"), [(64, (32, 32)), (60, (40, 24)), (57, (38, 38)), (64, (24, 40))])
def test_a_smooth_image_is_reduced_as_pillow_and_torch_do(side, size):
    images = smooth(side, side).unsqueeze(0)
    found = cut(images, WHOLE, size)
    expected = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)
    inner = (..., slice(2, -2), slice(2, -2))  # at the border filters of different width see different parts
    # torch samples by a cubic of -0.75, resizes by one of -0.5: on these waves they differ by up to 5e-3.
    torch.testing.assert_close(found[inner], expected[inner], atol=6e-3, rtol=0)
    resized = np.asarray(photo(images[0]).resize(size[::-1], Image.Resampling.BICUBIC))
    torch.testing.assert_close(
        found[0][inner], (torch.tensor(resized).permute(2, 0, 1) / 255)[inner], atol=1e-2, rtol=0
    )  # rounded to bytes twice, 4e-3 more


@pytest.mark.parametrize("area", [0.5, 0.7, 1.0])
def test_a_view_is_as_sharp_as_the_image_that_pillow_reduces(area):
    """Of an image with as much detail at every scale as photographs have, stored as the cache of 224 px stores it."""
    spectrum = torch.fft.rfft2(noise(3, 354, 354) - 0.5)
    frequency = torch.hypot(torch.fft.fftfreq(354).view(-1, 1), torch.fft.rfftfreq(354)).clamp_min(1 / 354)
    image = torch.fft.irfft2(spectrum / frequency, s=(354, 354))
    image = (0.5 + 0.12 * image / image.std()).clamp(0, 1)
    half = area**0.5
    found = cut(image.unsqueeze(0), torch.tensor([[0.0, 0.0, half, half]]), (224, 224))[0]
    edge = 177 * (1 - half)
    box = (edge, edge, 354 - edge, 354 - edge)
    reduced = np.asarray(photo(image).resize((224, 224), Image.Resampling.BICUBIC, box=box))
    sharp, expected = (
        (each.diff(dim=-1) ** 2).mean() for each in (found, torch.tensor(reduced).permute(2, 0, 1) / 255)
    )
    assert 0.8 < sharp / expected < 1.25


def test_detail_too_fine_for_the_view_is_averaged():
    board = (torch.arange(64).view(-1, 1) + torch.arange(64)) % 2
    found = cut(board.float().view(1, 1, 64, 64), WHOLE, (32, 32))
    torch.testing.assert_close(found, torch.full_like(found, 0.5), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(224, 448), (448, 224), (224, 224)], ids=str)
def test_stripes_too_fine_for_one_axis_are_averaged_along_it(size):
    """A period of 4 of 709 pixels is finer than two of the 224 pixels, whatever the other axis has."""
    rows = (torch.arange(354) % 2).float().view(1, 1, 354, 1).expand(1, 1, 354, 709)
    stripes = F.interpolate(rows, (709, 709), mode="bilinear")
    image = stripes if size[0] == 224 else stripes.mT
    found = cut(image, WHOLE, size)[..., 8:-8, 8:-8]
    square = cut(image, WHOLE, (224, 224))[..., 8:-8, 8:-8]
    assert found.std() < 1.1 * square.std() < 0.1


# Boxes


@pytest.mark.parametrize("aspect", [1.0, 1.5, 0.6])
def test_crops_have_the_area_and_aspect_that_are_asked_for(aspect):
    draws, (low, high) = noise(20000, 8), (0.1, 0.4)  # so small that none of them needs to be cut
    x, y, width, height = crop_boxes(draws, torch.full((20000,), aspect), Augment(scale=(low, high), flip=False)).T
    area = width * height  # as shares of width and height of the image, so the same in pixels
    assert low - 1e-6 <= area.min() < low + 1e-3
    assert high - 1e-3 < area.max() <= high + 1e-6
    assert area.mean().item() == pytest.approx((low + high) / 2, abs=2e-3)
    assert area.std().item() == pytest.approx((high - low) / math.sqrt(12), abs=2e-3)
    logs = (width * aspect / height).log() / math.log(4 / 3)
    assert -1 - 1e-5 <= logs.min() < -0.999
    assert 0.999 < logs.max() <= 1 + 1e-5
    assert logs.mean().item() == pytest.approx(0, abs=2e-2)
    assert logs.std().item() == pytest.approx(1 / math.sqrt(3), abs=1e-2)
    assert np.corrcoef(area, logs)[0, 1] == pytest.approx(0, abs=0.03)
    for place, half in ((x, width), (y, height)):
        share = place / (1 - half)
        assert (place.abs() + half).max() <= 1 + 1e-6
        assert share.mean().item() == pytest.approx(0, abs=2e-2)
        assert share.std().item() == pytest.approx(1 / math.sqrt(3), abs=1e-2)


@pytest.mark.parametrize("aspect", [1.0, 16 / 9, 0.5, 4.0])
def test_crops_stay_in_the_image_and_are_cut_only_where_they_would_not(aspect):
    draws = noise(5000, 8, seed=1)
    boxes = crop_boxes(draws, torch.full((5000,), aspect), Augment(scale=(0.4, 1.0)))
    pixels_high, pixels_wide = 300.0, 300.0 * aspect
    cuts = 0
    for draw, (x, y, width, height) in zip(draws.tolist(), boxes.tolist(), strict=True):
        assert abs(x) + abs(width) <= 1 + 1e-6
        assert abs(y) + height <= 1 + 1e-6
        assert (width < 0) == (draw[4] < 0.5)
        # The crop in pixels, as one would write it down.
        area, shape = (0.4 + 0.6 * draw[0]) * pixels_high * pixels_wide, (3 / 4) * (16 / 9) ** draw[1]
        wide, high = math.sqrt(area * shape), math.sqrt(area / shape)
        assert abs(width) * pixels_wide == pytest.approx(min(wide, pixels_wide), rel=1e-4)
        assert height * pixels_high == pytest.approx(min(high, pixels_high), rel=1e-4)
        cuts += wide > pixels_wide or high > pixels_high
    assert 0 < cuts <= 5000


def test_the_whole_area_of_a_square_and_draws_of_the_middle_are_the_whole_image():
    assert crop_boxes(middle(1), torch.ones(1), PLAIN).tolist() == [pytest.approx(WHOLE[0].tolist(), abs=1e-6)]


# Colours


@pytest.mark.parametrize("channels", [1, 3])
def test_colours_change_as_with_torchvision(channels):
    images = noise(40, channels, 9, 14) * torch.linspace(0.5, 1, 40).view(-1, 1, 1, 1)
    factors = 1 + 0.8 * (2 * noise(40, 3, seed=2) - 1)
    before = images.clone()
    found = recolour(images, factors).clamp(0, 1)
    assert torch.equal(images, before)
    changed = [
        reference.adjust_saturation(
            reference.adjust_contrast(reference.adjust_brightness(image, factor[0]), factor[1]), factor[2]
        )
        for image, factor in zip(images, factors.tolist(), strict=True)
    ]
    # torchvision weighs red with 0.2989 where the standard, and Pillow, have 0.299.
    tolerance = 1e-6 if channels == 1 else 3e-4
    torch.testing.assert_close(found, torch.stack(changed), atol=tolerance, rtol=0)
    assert float((found - images).abs().max()) > 0.2
    torch.testing.assert_close(recolour(images, torch.ones(40, 3)), images, atol=1e-6, rtol=0)
