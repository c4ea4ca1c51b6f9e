"""Views made on the device, against slicing, Pillow, torchvision and the views that workers make."""

import logging
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.v2 import functional as reference

from gspn2convert.cache import ImageCache, crop_boxes, cut, recolour
from gspn2convert.data import batches, open_images
from gspn2convert.demo_data import FILE
from gspn2convert.errors import UserError
from gspn2convert.images import ImageSet
from gspn2convert.recipe import Augment

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = {
    "input_size": (3, 24, 32),
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.3, 0.4),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "squash",
}
CPU = torch.device("cpu")
WHOLE = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
PLAIN = Augment(scale=(1.0, 1.0), flip=False, color_jitter=0.0)


class Photos:
    """Images in memory, of which some cannot be decoded."""

    label_names = None

    def __init__(self, photos, broken=()):
        self.photos, self.broken = photos, broken

    def __len__(self):
        return len(self.photos)

    def read(self, index):
        if index in self.broken:
            raise OSError("image file is truncated")
        return self.photos[index], -1

    def where(self, index):
        return f"photo {index}"


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def smooth(height, width, channels=3):
    """Waves of at least half the image's length, at another phase in each channel; with a mean."""
    rows, columns = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    waves = [torch.sin(2 * math.pi * (rows + 1.5 * columns) + phase) for phase in range(channels)]
    return 0.6 + 0.3 * torch.stack(waves)


def photo(pixels):
    return Image.fromarray((255 * pixels).round().to(torch.uint8).permute(1, 2, 0).numpy())


def blots(count, size=(20, 16), seed=0):
    random = np.random.default_rng(seed)
    return [Image.fromarray(random.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)) for _ in range(count)]


def make(photos, augment, config=CONFIG, broken=(), indices=None, **options):
    images = ImageSet("photos", Photos(photos, broken), in_chans=config["input_size"][0])
    indices = range(len(photos)) if indices is None else indices
    return ImageCache(images, indices, config, augment, **{"device": CPU, **options})


def normal(pixels, config=CONFIG):
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return (pixels - mean) / std


def middle(count, **changes):
    """Draws of the middle of everything: crops at the centre, unmirrored, no change of colour."""
    draws = torch.full((count, 8), 0.5)
    for place, value in changes.items():
        draws[:, int(place.removeprefix("d"))] = value
    return draws


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


# The cache


def test_small_images_keep_their_size_and_every_pixel():
    images = open_images("demo", "train", in_chans=1)
    config = CONFIG | {"input_size": (1, 28, 28), "mean": (0.286,), "std": (0.353,)}
    cache = ImageCache(images, range(0, 600, 6), config, Augment(), device=CPU)
    with np.load(FILE) as arrays:
        expected = torch.tensor(arrays["train_images"][0:600:6]).unsqueeze(1)
    assert torch.equal(cache.pixels, expected)
    found = ImageCache(images, range(0, 600, 6), config, PLAIN, device=CPU).view(torch.arange(100), middle(100))
    torch.testing.assert_close(found, normal(expected / 255, config), atol=1e-4, rtol=0)


def test_large_images_are_stored_as_large_as_the_smallest_crop_needs():
    photos = [photo(smooth(60, 90)), photo(smooth(100, 40))]
    cache = make(photos, Augment(scale=(0.25, 1.0)))
    assert cache.pixels.shape == (2, 3, 64, 64)  # 32 / sqrt(0.25)
    for stored, original in zip(cache.pixels, photos, strict=True):
        expected = np.asarray(original.resize((64, 64), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(stored.permute(1, 2, 0).numpy(), expected)
    assert cache.aspects.tolist() == pytest.approx([1.5, 0.4])
    assert make(photos, Augment(scale=(0.01, 1.0))).pixels.shape[-1] == 100  # no larger than any image


@pytest.mark.parametrize("shape", [(48, 96), (96, 48)], ids=["wide", "high"])
def test_a_crop_of_a_photo_that_is_not_square_keeps_its_proportions(shape):
    """Half of the area at aspect 1 is, of a photo of 2 : 1, the square in its middle."""
    config = CONFIG | {"input_size": (3, 40, 40)}
    image = photo(smooth(*shape))
    cache = make([image], Augment(scale=(0.5, 0.5), flip=False, color_jitter=0.0), config)
    left, top = (shape[1] - 48) // 2, (shape[0] - 48) // 2
    square = image.crop((left, top, left + 48, top + 48)).resize((40, 40), Image.Resampling.BICUBIC)
    expected = normal(torch.tensor(np.asarray(square)).permute(2, 0, 1) / 255, config)
    found = cache.view(torch.tensor([0]), middle(1))[0]
    assert float((found - expected)[:, 2:-2, 2:-2].abs().max()) < 0.05  # of a deviation of 0.2: 0.01 of the range
    mirrored = make([image], Augment(scale=(0.5, 0.5), color_jitter=0.0), config).view(
        torch.tensor([0, 0]), torch.cat([middle(1, d4=0.2), middle(1, d4=0.8)])
    )
    torch.testing.assert_close(mirrored, torch.stack([found.flip(-1), found]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_constant_image_is_normalised_as_workers_do(channels):
    colour = (255, 102, 0)[:channels]
    # timm keeps three values for grey models.
    config = CONFIG | {"input_size": (channels, 24, 32)}
    image = Image.new("RGB" if channels == 3 else "L", (50, 30), colour if channels == 3 else colour[0])
    images = ImageSet("one colour", Photos([image, image]), in_chans=channels)
    augment = Augment(color_jitter=0.0)
    ((expected, _),) = batches(images, config, indices=[0, 1], batch_size=2, augment=augment, seed=0)
    (found,) = make([image, image], augment, config).batches(2, 0, 0, 1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_jitter_stays_within_its_strength():
    image = Image.new("RGB", (40, 40), (100, 100, 100))
    cache = make([image], Augment(scale=(1.0, 1.0), color_jitter=0.3))
    views = torch.cat(list(cache.batches(50, 0, 0, 4)))
    std, mean = (torch.tensor(CONFIG[key]).view(-1, 1, 1) for key in ("std", "mean"))
    grey = views * std + mean
    assert float(grey.std((1, 2, 3)).max()) < 1e-5  # of one colour, and grey
    factors = grey.mean((1, 2, 3)) / (100 / 255)  # contrast and saturation cannot change this image
    assert 0.7 - 1e-4 <= factors.min() < 0.72
    assert 1.28 < factors.max() <= 1.3 + 1e-4


def test_views_do_not_depend_on_processes_or_resume():
    cache = make(blots(10), Augment(color_jitter=0.2), indices=[1, 2, 3, 5, 6, 8, 9])
    whole = torch.stack(list(cache.batches(4, 3, 0, 6)))
    assert whole.shape == (6, 4, 3, 24, 32)
    halves = [torch.stack(list(cache.batches(4, 3, 0, 6, rank=rank, world=2))) for rank in (0, 1)]
    assert torch.equal(whole, torch.cat(halves, 1))
    for first_step in (1, 4, 6):
        resumed = list(cache.batches(4, 3, first_step, 6))
        assert torch.equal(whole[first_step:], torch.stack(resumed) if resumed else whole[6:])
    again = make(blots(10), Augment(color_jitter=0.2), indices=[1, 2, 3, 5, 6, 8, 9], workers=2)
    assert torch.equal(whole, torch.stack(list(again.batches(4, 3, 0, 6))))
    assert not torch.equal(whole[0], next(cache.batches(4, 4, 0, 6)))
    assert len({view.numpy().tobytes() for view in whole.flatten(0, 1)}) == 24
    with pytest.raises(UserError, match="batch_size 4 cannot be shared by 3 processes"):
        cache.batches(4, 3, 0, 6, world=3)


def test_making_views_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    list(make(blots(4), Augment()).batches(2, 0, 0, 3))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_every_epoch_sees_every_image_once_in_a_new_order():
    photos = [Image.new("RGB", (20, 16), (10 * number,) * 3) for number in range(10)]
    indices = [1, 2, 3, 5, 6, 8, 9]
    cache = make(photos, Augment(color_jitter=0.0), indices=indices)
    seen = torch.cat(list(cache.batches(4, 3, 0, 7)))
    order = ((seen[:, 0].mean((1, 2)) * 0.2 + 0.5) * 25.5).round().int().tolist()
    epochs = [order[start : start + 7] for start in range(0, 28, 7)]
    assert all(sorted(epoch) == indices for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


# What cannot be used


@pytest.mark.parametrize("workers", [0, 2])
def test_few_unreadable_images_are_stood_in_for(caplog, workers):
    photos = blots(200)
    with caplog.at_level(logging.WARNING):
        cache = make(photos, Augment(), broken=(57,), workers=workers)
    assert torch.equal(cache.pixels[57], cache.pixels[58])
    assert len({pixels.numpy().tobytes() for pixels in cache.pixels}) == 199
    assert len(caplog.records) == 1
    assert "photo 57" in caplog.text


def test_unreadable_images_are_counted_as_elsewhere():
    images = ImageSet("photos", Photos(blots(200), broken=(57,)))
    for _ in range(2):
        ImageCache(images, range(200), CONFIG, Augment(), device=CPU)
    assert (images.tally.seen, images.tally.unreadable) == (200, 1)
    with pytest.raises(UserError, match=r"^\d+ of \d+ images are unreadable.* first is photo 7:"):
        make(blots(400), Augment(), broken=range(7, 400, 20))
    with pytest.raises(UserError, match=r"^50 of 50 images are unreadable.* first is photo 0:"):
        make(blots(50), Augment(), broken=range(50))


def test_images_that_do_not_fit_are_an_error_before_any_is_decoded(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * 2**20, 8 * 2**20))
    images = ImageSet("photos", Photos(blots(300, size=(80, 64))))
    # 32 / sqrt(0.16) = 80: 300 x 3 x 80 x 80 bytes are 5.5 MiB.
    with pytest.raises(UserError, match=r"^the images of 'photos' take 0\.0 GiB decoded, and 0\.0 GiB are free on the"):
        ImageCache(images, range(300), CONFIG, Augment(scale=(0.16, 1.0)), device=torch.device("cuda"))
    assert images.tally.seen == 0
