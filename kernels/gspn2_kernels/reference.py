"""The reference line scan: the truth that every backend is compared with.

Shapes: B batch, H W grid, C channels, G groups, K = 3 neighbours; T lines along the scan, M positions in a line.
"""

import torch
from torch import Tensor

DIRECTIONS = ("down", "up", "right", "left")


def line_scan_ref(x: Tensor, lam: Tensor, logits: Tensor, u: Tensor, segment: int = 0) -> Tensor:
    """Scan the grid in four directions, line by line; differentiable plain torch in the dtype of the state.

    Args:
        x: Activations (B, H, W, C).
        lam: Input scale of each direction (B, H, W, 4, C).
        logits: Propagation logits of each direction (B, H, W, 4, G, K).
        u: Output gate of each direction (B, H, W, 4, C).
        segment: Lines after which a scan restarts, counted in scan order; 0 for one scan over the whole grid.

    Returns:
        u * h of each direction (B, H, W, 4, C) in the dtype of x. The state h is fp64 for fp64 inputs, else fp32.
    """
    state = state_dtype(x)
    per_direction = (lam.to(state) * x.to(state).unsqueeze(3), logits.to(state), u.to(state))
    outputs = []
    for direction in range(len(DIRECTIONS)):
        line_axis = 1 if direction < 2 else 2
        backwards = [0] if direction % 2 else []
        value, logit, gate = (t.select(3, direction).movedim(line_axis, 0).flip(backwards) for t in per_direction)
        y = gate * _scan(value, neighbour_weights(logit), segment)
        outputs.append(y.flip(backwards).movedim(0, line_axis))
    return torch.stack(outputs, dim=3).to(x.dtype)


def state_dtype(x: Tensor) -> torch.dtype:
    """Tell the dtype of weights and state: fp32, whatever the inputs are, unless they are fp64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def neighbour_weights(logits: Tensor) -> Tensor:
    """Normalise sigmoids over the neighbours that exist: (..., M, G, K) logits to weights of the same shape.

    s / sum(s) is written as the softmax of log(s), which stays finite where every sigmoid underflows.
    """
    weights = torch.nn.functional.logsigmoid(logits)
    outside = torch.zeros(logits.shape[-3], 1, 3, dtype=torch.bool, device=logits.device)
    outside[:1, :, 0] = True
    outside[-1:, :, 2] = True
    return weights.masked_fill(outside, -torch.inf).softmax(-1)


def _scan(value: Tensor, weights: Tensor, segment: int) -> Tensor:
    """Run h_i = W_i h_(i-1) + value_i over the first axis: (T, B, M, C) and (T, B, M, G, K) to (T, B, M, C)."""
    if value.numel() == 0:
        return value
    weights = weights.repeat_interleave(value.shape[-1] // weights.shape[-2], dim=-2)
    states = [value[0]]
    for i in range(1, value.shape[0]):
        if segment and i % segment == 0:
            states.append(value[i])
            continue
        left, middle, right = weights[i].unbind(-1)
        previous = torch.nn.functional.pad(states[-1], (0, 0, 1, 1))
        states.append(left * previous[:, :-2] + middle * previous[:, 1:-1] + right * previous[:, 2:] + value[i])
    return torch.stack(states)
