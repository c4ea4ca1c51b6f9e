"""What the kernels of the line scan know of its weights, from the reference's."""

import torch
from torch import Tensor

from gspn2_kernels.reference import neighbour_weights


def outer_weights(logits: Tensor, segment: int) -> Tensor:
    """Weights of the outer neighbours of each position, of logits (B, H, W, 4, G, 3): (B, 4, G, T M, 2)."""
    directions = []
    for d in range(4):
        lines = logits[:, :, :, d] if d < 2 else logits[:, :, :, d].transpose(1, 2)
        weights = neighbour_weights(lines)[..., ::2]
        order = torch.arange(lines.shape[1], device=logits.device)
        order = order.flip(0) if d % 2 else order
        restarts = order % (segment or lines.shape[1]) == 0
        weights = weights.masked_fill(restarts[:, None, None, None], 0.0)
        directions.append(weights.flatten(1, 2).transpose(1, 2))
    return torch.stack(directions, 1)
