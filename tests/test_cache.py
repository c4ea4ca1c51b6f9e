"""Images held on the device, and views of them against those that workers make."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image

from gspn2convert.cache import ImageCache
from gspn2convert.data import batches, open_images
from gspn2convert.demo_data import FILE
from gspn2convert.errors import UserError
from gspn2convert.images import ImageSet
from gspn2convert.recipe import Augment
from helpers import pictures
from helpers.photos import PLAIN, middle, photo, smooth

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = pictures.CONFIG | {"crop_pct": 1.0, "crop_mode": "squash"}
CPU = torch.device("cpu")


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
