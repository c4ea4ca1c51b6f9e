"""The means of an image's regions: equal parts of its grid, whose borders may cut through patches.

Shapes: B batch, H W grid, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def region_means(patches: Tensor, side: int) -> Tensor:
    """Means of the equal parts of a grid.

    Args:
        patches: (B, H, W, C).
        side: rows and columns of parts; a patch that a border cuts counts on both sides by its share.

    Returns:
        (B, side^2, C), row by row.
    """
    height, width = patches.shape[1:3]
    rows = _overlaps(height, side, patches)
    # Sizes of an export or a compilation are not compared: that would settle them.
    alike = not torch.compiler.is_compiling() and height == width
    columns = rows if alike else _overlaps(width, side, patches)
    means = (columns @ patches) * (side / width)
    means = (rows @ means.flatten(2)) * (side / height)
    return means.unflatten(2, (side, -1)).flatten(1, 2)


def _overlaps(size: int, side: int, like: Tensor) -> Tensor:
    """How much of each position of a line is in each of its parts, (side, size).

    Multiples of 1 / side, which are exact in any dtype where that is a power of two.
    """
    wide = torch.promote_types(like.dtype, torch.float32)
    edges = torch.arange(side + 1, device=like.device, dtype=wide).unsqueeze(1) * size / side
    # How much of each position lies before each edge; few operations, for on a GPU each is a launch.
    before = (edges - torch.arange(size, device=like.device, dtype=wide)).clamp(0, 1)
    return before.diff(dim=0).to(like.dtype)
