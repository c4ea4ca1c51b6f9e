"""Layouts in memory that a caller's tokens (B, N, C), or tensors of each direction (B, H, W, 4, ...), may have."""

import torch.nn.functional as F
from torch import Tensor

# Each makes of contiguous tokens others of their shape that are not contiguous.
OF_TOKENS = {
    "every second token": lambda t: t.repeat(1, 2, 1)[:, ::2],
    "tokens first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "channels apart": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "part of the channels": lambda t: F.pad(t, (1, 2))[..., 1:-2],
}


def planar(t: Tensor) -> Tensor:
    """Lay the directions outermost."""
    return t.movedim(3, 0).contiguous().movedim(0, 3)
