"""Training images mixed with one another, for teacher and student alike.

The teacher answers for blends and pasted cuts of pairs of images as it does for images (mixup and CutMix; Beyer et al.,
2022, on "function matching").

Shapes: B images of one process, C channels, H W image size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gspn2convert.errors import UserError
from gspn2convert.views import own_draws


def mix_batches(
    batches: Iterator[Tensor], share: float, batch_size: int, own: range, seed: int, first_step: int
) -> Iterator[Tensor]:
    """Mix each batch's images with their neighbours in it.

    Args:
        batches: this process's images (B, C, H, W) from a step on.
        share: of the images that are mixed, 0 to 1.
        batch_size: images a step, of all processes together.
        own: this process's places among them.
        seed: decides what is mixed and how; step s depends on the seed and s alone.
        first_step: number of the first step.
    """
    for step, images in enumerate(batches, first_step):
        drawn = own_draws(batch_size, 5, own, seed, "mix", step)
        yield mix(images, drawn.to(images.device, non_blocking=True), share)


def check_pairs(place: str, batch_size: int, processes: int) -> None:
    """Make sure that neighbours are with the same process.

    Args:
        place: of the stage in the recipe.
        batch_size: images a step, of all processes together; a multiple of `processes`.
        processes: number of them.

    Raises:
        UserError: each has an odd number of images.
    """
    if batch_size // processes % 2:
        raise UserError(
            f"{place}.batch_size {batch_size}: augment.mix mixes images in pairs, so each of {processes} processes "
            f"needs an even number of them; make it a multiple of {2 * processes}, or augment.mix 0"
        )


def mix(images: Tensor, draws: Tensor, share: float) -> Tensor:
    """Mix images with their neighbours: 0 with 1, 1 with 0, 2 with 3, and so on.

    Half of the mixed ones are blends, in any proportion; into the others a rectangle of the neighbour is pasted at the
    place that it has there, of any size and of the image's own shape.

    Args:
        images: (B, C, H, W), B even.
        draws: (B, 5) random numbers from 0 to 1: whether, how, what share of the neighbour, left and top of its
            rectangle.
        share: of the images that are mixed.

    Returns:
        (B, C, H, W).
    """
    neighbours = images.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    whether, how, weight, left, top = draws.view(-1, 5, 1, 1, 1).unbind(1)
    side = weight.sqrt()
    height, width = images.shape[-2:]
    y = ((torch.arange(height, device=images.device) + 0.5) / height).view(-1, 1) - (1 - side) * top
    x = (torch.arange(width, device=images.device) + 0.5) / width - (1 - side) * left
    inside = ((y >= 0) & (y < side) & (x >= 0) & (x < side)).to(images.dtype)
    amount = torch.where(how < 0.5, weight, inside) * (whether < share)
    return torch.lerp(images, neighbours, amount.to(images.dtype))
