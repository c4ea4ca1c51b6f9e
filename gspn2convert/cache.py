"""Training views made on the device, from images that were decoded once.

Workers that decode, crop and recolour give some hundred views a second and core; a GPU that trains a small ViT
takes thousands. Here the decoded images stay on the device as bytes, and a batch of views is a few operations there.
A view depends on the seed, the step and its place in the batch: not on the number of processes.

Shapes: M images, B views of one process, C channels, S side of a stored image, h w size of a view.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from gspn2convert.data import ImageSet, load, once, own_share, training_order
from gspn2convert.errors import UserError
from gspn2convert.images import UnreadableImage
from gspn2convert.recipe import Augment
from gspn2convert.views import Views, channel_moments, own_draws

# Of the free memory, for training needs some too.
SHARE_OF_MEMORY = 0.6
LOOKED_AT = 64  # images, to see how large they are
ASPECT = math.log(4 / 3)  # crops are at most so much wider or higher than square, as timm's are
LUMA = (0.299, 0.587, 0.114)  # of ITU-R BT.601, as Pillow and torchvision have it


class ImageCache:
    """Images of a set on the device, all stretched to one square size, as uint8.

    Args:
        images: the set.
        indices: which images; each is decoded once.
        data_config: the teacher's, see `vit.data_config`; its input size is that of the views.
        augment: how views are made; it decides how large an image must be for its smallest crop.
        device: where the images stay.
        workers: processes that decode.

    Attributes:
        pixels: (M, C, S, S) uint8. S is the side from which the smallest crop fills a view, or that of the largest
            image where they are smaller.
        aspects: (M,) width of each image over its height.

    Raises:
        UserError: the images do not fit, or more than 1 % are unreadable.
    """

    def __init__(
        self,
        images: ImageSet,
        indices: Sequence[int],
        data_config: dict[str, Any],
        augment: Augment,
        *,
        device: torch.device,
        workers: int = 0,
    ) -> None:
        channels, *size = data_config["input_size"]
        self.size, self.augment = (int(size[0]), int(size[1])), augment
        wanted = math.ceil(max(size) / math.sqrt(augment.scale[0]))
        side = min(wanted, _largest_side(images, indices))
        self._check_memory(len(indices) * channels * side * side, images, device)
        self.pixels = torch.empty(len(indices), channels, side, side, dtype=torch.uint8, device=device)
        self.aspects = torch.empty(len(indices), device=device)
        views, done = Views(images, indices, functools.partial(_stretched, side=side), 0), 0
        for pixels, _, aspects in load(views, once(len(indices), 64), workers):
            self.pixels[done : done + len(pixels)] = pixels.to(device)
            self.aspects[done : done + len(pixels)] = aspects.to(device)
            done += len(pixels)
        mean, std = channel_moments(data_config)
        self.mean, self.std = (torch.tensor(each, device=device).view(-1, 1, 1) for each in (mean, std))

    @staticmethod
    def _check_memory(needed: int, images: ImageSet, device: torch.device) -> None:
        if device.type != "cuda":
            return
        torch.cuda.empty_cache()  # else what torch holds in reserve would count as taken
        free = torch.cuda.mem_get_info(device)[0]
        if needed > SHARE_OF_MEMORY * free:
            raise UserError(
                f"the images of {images.name!r} take {needed / 2**30:.1f} GiB decoded, and {free / 2**30:.1f} GiB are "
                "free on the GPU; leave --cache out, or give fewer images"
            )

    def batches(
        self, batch_size: int, seed: int, first_step: int, steps: int, *, rank: int = 0, world: int = 1
    ) -> Iterator[Tensor]:
        """Give the views of the steps from `first_step` to `steps`, epoch after epoch in a new order.

        Args:
            batch_size: views per step, of all processes together.
            seed: decides order and views; those of step s depend on the seed and s alone.
            first_step: the first step to give, counted from 0.
            steps: the step to stop before.
            rank: number of this process.
            world: number of processes; each gets its part of every step's views.

        Returns:
            Iterator over normalised float32 views (B, C, h, w) on the device, one batch a step.

        Raises:
            UserError: the batch cannot be shared out evenly.
        """
        own = own_share(batch_size, rank, world)
        order = training_order(len(self.pixels), batch_size, own, seed, range(first_step, steps))
        return self._views(order, batch_size, own, seed, first_step)

    def _views(
        self, order: Iterator[list[tuple[int, int]]], batch_size: int, own: range, seed: int, first_step: int
    ) -> Iterator[Tensor]:
        device = self.pixels.device
        for step, keys in enumerate(order, first_step):
            places = torch.tensor([position for _, position in keys], device=device)
            drawn = own_draws(batch_size, 8, own, seed, "views", step)
            yield self.view(places, drawn.to(device, non_blocking=True))

    def view(self, places: Tensor, draws: Tensor) -> Tensor:
        """Make views.

        Args:
            places: (B,) which of the images.
            draws: (B, 8) random numbers from 0 to 1: area, aspect and place of the crop, flip, three colour factors.

        Returns:
            Normalised views (B, C, h, w), float32.
        """
        boxes = crop_boxes(draws, self.aspects[places], self.augment)
        views = cut(self.pixels[places].float().div_(255), boxes, self.size)
        if self.augment.color_jitter:
            views = recolour(views, 1 + self.augment.color_jitter * (2 * draws[:, 5:] - 1))
        return (views.clamp_(0, 1) - self.mean) / self.std


def crop_boxes(draws: Tensor, aspects: Tensor, augment: Augment) -> Tensor:
    """Random crops of whole images.

    The share of the area is uniform in `augment.scale`, the aspect log-uniform from 3/4 to 4/3, as timm has them; a
    crop that would be wider or higher than its image is cut to it.

    Args:
        draws: (B, 5 or more) numbers from 0 to 1.
        aspects: (B,) width over height of the images.
        augment: what is asked for.

    Returns:
        (B, 4): the crop's centre x, y and its half width and half height, where the image is the square from -1 to 1;
        a negative half width is a crop that is mirrored.
    """
    low, high = augment.scale
    area = low + (high - low) * draws[:, 0]
    aspect = torch.exp(ASPECT * (2 * draws[:, 1] - 1))
    half_width = (area * aspect / aspects).sqrt().clamp_max(1)
    half_height = (area / aspect * aspects).sqrt().clamp_max(1)
    x, y = (1 - half_width) * (2 * draws[:, 2] - 1), (1 - half_height) * (2 * draws[:, 3] - 1)
    mirror = 1 - 2 * (draws[:, 4] < 0.5).float() if augment.flip else torch.ones_like(x)
    return torch.stack([x, y, mirror * half_width, half_height], 1)


def cut(images: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut crops out of images and resize them, bicubic, or bilinear where the images are larger than the crops.

    Args:
        images: (B, C, S, S) float.
        boxes: (B, 4) of `crop_boxes`.
        size: h, w of the crops.

    Returns:
        (B, C, h, w).
    """
    x, y, half_width, half_height = boxes.T
    zero = torch.zeros_like(x)
    affine = torch.stack([half_width, zero, x, zero, half_height, y], 1).view(-1, 2, 3)
    # Where crops are much reduced, several samples a pixel are averaged, for details too fine would turn into others.
    # Up to 1.6 times one bilinear sample is as sharp as antialiased bicubic resizing, and four would be less sharp.
    fine = [max(1, math.ceil(images.shape[-1] / (1.6 * side))) for side in size]
    shape = [*images.shape[:2], fine[0] * size[0], fine[1] * size[1]]
    grid = F.affine_grid(affine, shape, align_corners=False)
    mode = "bilinear" if images.shape[-1] > max(size) else "bicubic"
    views = F.grid_sample(images, grid, mode=mode, padding_mode="reflection", align_corners=False)
    return F.avg_pool2d(views, fine) if max(fine) > 1 else views


def recolour(images: Tensor, factors: Tensor) -> Tensor:
    """Change brightness, then contrast, then saturation, each by a factor, as torchvision's ColorJitter does.

    Args:
        images: (B, C, h, w) from 0 to 1; grey images, C = 1, have no saturation.
        factors: (B, 3), 1 for no change.
    """
    brightness, contrast, saturation = (factor.view(-1, 1, 1, 1) for factor in factors.T)
    images = (images * brightness).clamp(0, 1)
    level = _grey(images).mean((2, 3), keepdim=True)
    images = (level + (images - level) * contrast).clamp(0, 1)
    if images.shape[1] == 1:
        return images
    grey = _grey(images)
    return grey + (images - grey) * saturation


def _grey(images: Tensor) -> Tensor:
    if images.shape[1] == 1:
        return images
    return (images * images.new_tensor(LUMA).view(-1, 1, 1)).sum(1, keepdim=True)


def _largest_side(images: ImageSet, indices: Sequence[int]) -> int:
    """Side of the largest of some images, from all over the set."""
    sides = [1]
    for index in indices[:: max(1, len(indices) // LOOKED_AT)]:
        try:
            sides.append(max(images.image(index)[0].size))
        except UnreadableImage:
            continue  # counted when its turn comes
    return max(sides)


def _stretched(image: Image.Image, side: int) -> Tensor:
    """An image as (C, side, side) uint8."""
    resized = image if image.size == (side, side) else image.resize((side, side), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(resized))
    return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()
