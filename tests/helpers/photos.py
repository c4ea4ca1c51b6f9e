"""Images whose views can be foretold: noise, smooth ones, photographs."""

import math

import torch
from PIL import Image

from gspn2convert.recipe import Augment

WHOLE = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
PLAIN = Augment(scale=(1.0, 1.0), flip=False, color_jitter=0.0)


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def smooth(height, width, channels=3):
    """Waves of at least half the image's length, at another phase in each channel; with a mean."""
    rows, columns = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    waves = [torch.sin(2 * math.pi * (rows + 1.5 * columns) + phase) for phase in range(channels)]
    return 0.6 + 0.3 * torch.stack(waves)


def photo(pixels):
    return Image.fromarray((255 * pixels).round().to(torch.uint8).permute(1, 2, 0).numpy())


def middle(count, **changes):
    """Draws of the middle of everything: crops at the centre, unmirrored, no change of colour."""
    draws = torch.full((count, 8), 0.5)
    for place, value in changes.items():
        draws[:, int(place.removeprefix("d"))] = value
    return draws
