"""Views: images as a model sees them, made from a seed, an epoch and an index and from nothing else.

Shape letters: B batch, C channels, H W image size.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import Dataset

from gspn2convert.images import ImageSet, UnreadableImage
from gspn2convert.recipe import Augment
from gspn2convert.stream import Row
from gspn2convert.tally import TOLERATED


@dataclass
class View:
    """One image as the model sees it; an image that cannot be read is stood in for by another one that can."""

    pixels: Tensor | None  # (C, H, W); None where none of the next images can be read
    label: int
    aspect: float  # width of the image over its height
    index: int  # of the image that was asked for
    problem: str  # why that one cannot be read, empty if it can


class Views(Dataset[View]):
    """Views by (epoch, position in `indices`), or of a stream by (epoch, row)."""

    def __init__(
        self, images: ImageSet, indices: Sequence[int], transform: Callable[[Image.Image], Tensor], seed: int
    ) -> None:
        self.images, self._indices, self._seed = images, indices, seed
        self._transform = transform

    def __getitem__(self, key: tuple[int, int | Row]) -> View:
        epoch, place = key
        index = place.index if isinstance(place, Row) else int(self._indices[place])
        problem = ""
        for candidate, row in self._candidates(place):
            try:
                image, label = self.images.image(candidate, row)
            except UnreadableImage as error:
                problem = problem or str(error)
            else:
                with _seeded(self._seed, epoch, index):
                    return View(self._transform(image), label, image.width / image.height, index, problem)
        return View(None, -1, 1.0, index, problem)

    def _candidates(self, place: int | Row) -> Iterator[tuple[int, Row | None]]:
        """The image that was asked for, and those that may stand in for it: the next ones, of a stream any at hand."""
        count = len(self._indices)
        if isinstance(place, Row):
            yield place.index, place
            place = place.index % count
        # So many unreadable images in a row would be too many even if all others could be read.
        for step in range(min(count, max(16, int(count * TOLERATED) + 1))):
            yield int(self._indices[(place + step) % count]), None  # of an array's elements seeds would be others


def make_transform(
    data_config: dict[str, Any], augment: Augment | None, in_chans: int
) -> Callable[[Image.Image], Tensor]:
    """Make the teacher's evaluation view, or training views: crops, mirrored or not, in slightly other colours."""
    channels, *size = data_config["input_size"]
    assert channels == in_chans, f"the images have {in_chans} channels, the teacher takes {channels}"
    mean, std = channel_moments(data_config)
    how = data_config["interpolation"]
    shared = {"interpolation": how, "mean": mean, "std": std, "input_size": tuple(size)}
    if augment is None:
        return create_transform(**shared, crop_pct=data_config["crop_pct"], crop_mode=data_config["crop_mode"])
    jitter = augment.color_jitter
    return create_transform(
        **shared,
        is_training=True,
        scale=augment.scale,
        hflip=0.5 if augment.flip else 0.0,
        # Grey images have no saturation to change.
        color_jitter=(jitter, jitter, jitter if channels == 3 else 0.0),
    )


def channel_moments(data_config: dict[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation by which pixels are normalised, a value for each channel."""
    channels = data_config["input_size"][0]
    moments = (tuple(data_config[key]) for key in ("mean", "std"))
    # timm keeps three values for models whose input was changed to grey.
    mean, std = (each if len(each) == channels else (sum(each) / len(each),) * channels for each in moments)
    return mean, std


def collate(views: list[View]) -> tuple[Tensor | None, Tensor, Tensor, list[tuple[int, str]]]:
    """Stack pixels, labels and aspects of views; there are no pixels if one of them has none."""
    pixels = [view.pixels for view in views if view.pixels is not None]
    labels = torch.tensor([view.label for view in views])
    aspects = torch.tensor([view.aspect for view in views])
    asked = [(view.index, view.problem) for view in views]
    return torch.stack(pixels) if len(pixels) == len(views) else None, labels, aspects, asked


def _number(*key: int | str) -> int:
    """Hash a key to 63 bits, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


def generator(*key: int | str) -> torch.Generator:
    """Return a generator of its own for a key."""
    return torch.Generator().manual_seed(_number(*key))


def own_draws(batch_size: int, count: int, own: range, *key: int | str) -> Tensor:
    """Random numbers (B, count) from 0 to 1 for a process's own places in a batch of all processes together."""
    return torch.rand(batch_size, count, generator=generator(*key))[own.start : own.stop]


@contextmanager
def _seeded(*key: int) -> Iterator[None]:
    """Seed the global generators that timm's transforms draw from, and put them back afterwards."""
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_number(*key))
        random.seed(_number(*key))
        try:
            yield
        finally:
            random.setstate(state)
