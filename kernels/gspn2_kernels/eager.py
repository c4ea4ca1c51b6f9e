"""The line scan and its gradient in vectorised plain torch: the backend of every device without one of its own.

Shapes: B batch, H W grid, C channels, G groups, c = C/G channels of a group, K = 3 neighbours;
T lines along the scan, M positions in a line, D directions that are scanned together.

Lines come first in every buffer, so that a step reads and writes contiguous memory, and every step works in place:
the buffer holds the input of the recurrence before it and the state after it. Nothing is flipped: a reverse scan
walks the lines backwards.
"""

import torch
from torch import Tensor

from gspn2_kernels.operands import empty_result
from gspn2_kernels.reference import state_dtype


def line_scan_fwd(x: Tensor, lam: Tensor, logits: Tensor, u: Tensor, segment: int) -> Tensor:
    """Compute `gspn2::line_scan`; arguments and result as in `line_scan_ref`."""
    y = empty_result(x, lam)
    if y.numel() == 0:
        return y
    x, lam, u, y_groups = (_split_groups(t, logits) for t in (*_in_state_dtype(x, lam, u), y))
    logits = logits.to(state_dtype(logits))
    x = x.unsqueeze(3).expand_as(lam)
    for directions in _scanned_together(x):
        h = _products(x, lam, directions)
        _propagate(h, _weights(logits, directions), directions, segment)
        for k, direction in enumerate(directions):
            torch.mul(_lines(u, direction), h[:, k], out=_lines(y_groups, direction))
    return y


def line_scan_bwd(
    dy: Tensor, x: Tensor, lam: Tensor, logits: Tensor, u: Tensor, segment: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of x, lam, logits and u from dy (B, H, W, 4, C); h is computed again, not saved.

    The derivation is in `kernels/README.md`. With g the gradient of h, summed over the lines that follow:
    du = h dy, dlam = x g, dx = sum over directions of lam g, and the logits as in `_weight_gradients`.
    """
    dtype = x.dtype
    dx = torch.zeros(x.shape, dtype=state_dtype(x), device=x.device)
    dlam, dlogits, du = (torch.empty(t.shape, dtype=dtype, device=x.device) for t in (lam, logits, u))
    if lam.numel() == 0:
        return dx.to(dtype), dlam, dlogits.zero_(), du
    dy, x, lam, u = (_split_groups(t, logits) for t in _in_state_dtype(dy, x, lam, u))
    dx_groups, dlam_groups, du_groups = (_split_groups(t, logits) for t in (dx, dlam, du))
    logits = logits.to(state_dtype(logits))
    x = x.unsqueeze(3).expand_as(lam)
    for directions in _scanned_together(x):
        weights = _weights(logits, directions)
        h = _products(x, lam, directions)
        _propagate(h, weights, directions, segment)
        g = _products(u, dy, directions)
        _propagate_adjoint(g, weights, directions, segment)
        dw = _weight_gradients(g, h, weights, directions, segment)
        for k, direction in enumerate(directions):
            h_k, g_k = h[:, k], g[:, k]
            torch.mul(_lines(dy, direction), h_k, out=_lines(du_groups, direction))
            torch.mul(_lines(x, direction), g_k, out=_lines(dlam_groups, direction))
            dx_groups.movedim(_line_axis(direction), 0).addcmul_(_lines(lam, direction), g_k)
            # 1 - sigmoid(a) as sigmoid(-a), which keeps its digits where the sigmoid is close to 1.
            complement = torch.sigmoid(-_lines(logits, direction))
            torch.mul(complement.movedim(-1, 0), dw[:, :, k], out=_lines(dlogits, direction).movedim(-1, 0))
    return dx.to(dtype), dlam, dlogits, du


def _in_state_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.to(state_dtype(t)) for t in tensors)


def _split_groups(t: Tensor, logits: Tensor) -> Tensor:
    """View (..., C) as (..., G, c)."""
    return t.unflatten(-1, (logits.shape[4], -1))


def _scanned_together(x: Tensor) -> tuple[tuple[int, ...], ...]:
    """Pair the directions that walk the lines in the same sense, if their lines are equally long."""
    return ((0, 2), (1, 3)) if x.shape[1] == x.shape[2] else ((0,), (1,), (2,), (3,))


def _line_axis(direction: int) -> int:
    return 1 if direction < 2 else 2


def _lines(t: Tensor, direction: int) -> Tensor:
    """View one direction of (B, H, W, 4, ...) as lines in image order (T, B, M, ...)."""
    return t.select(3, direction).movedim(_line_axis(direction), 0)


def _products(a: Tensor, b: Tensor, directions: tuple[int, ...]) -> Tensor:
    """Multiply two (B, H, W, 4, G, c) tensors into lines (T, D, B, M, G, c)."""
    lines, *rest = _lines(a, directions[0]).shape
    out = torch.empty(lines, len(directions), *rest, dtype=a.dtype, device=a.device)
    for k, direction in enumerate(directions):
        torch.mul(_lines(a, direction), _lines(b, direction), out=out[:, k])
    return out


def _weights(logits: Tensor, directions: tuple[int, ...]) -> Tensor:
    """Normalise logits (B, H, W, 4, G, K) into weights (K, T, D, B, M, G), see `reference.neighbour_weights`.

    Neighbours come first: a softmax over a last axis of three runs ten times slower.
    """
    lines = torch.stack([_lines(logits, direction).movedim(-1, 0) for direction in directions], dim=2)
    weights = torch.nn.functional.logsigmoid(lines)
    weights[0, :, :, :, 0] = -torch.inf
    weights[2, :, :, :, -1] = -torch.inf
    return weights.softmax(0)


def _order(lines: int, directions: tuple[int, ...]) -> range:
    return range(lines - 1, -1, -1) if directions[0] % 2 else range(lines)


def _steps(lines: int, directions: tuple[int, ...], segment: int) -> list[tuple[int, int]]:
    """List (previous line, line) in scan order, without the lines at which a scan starts."""
    order = _order(lines, directions)
    return [(order[i - 1], order[i]) for i in range(1, lines) if not segment or i % segment]


def _line_views(t: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """List the lines of (T, D, B, M, ...): whole, without the first position, without the last.

    Views are cheap to make all at once and expensive one by one in a loop over small lines.
    """
    return t.unbind(0), t[:, :, :, 1:].unbind(0), t[:, :, :, :-1].unbind(0)


def _stencil(weights: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """List the weights (D, B, M, G, 1) of each line: the middle, the left from position 1, the right up to M - 2."""
    w0, w1, w2 = weights.unsqueeze(-1)
    return w1.unbind(0), w0[:, :, :, 1:].unbind(0), w2[:, :, :, :-1].unbind(0)


def _propagate(h: Tensor, weights: Tensor, directions: tuple[int, ...], segment: int) -> None:
    """Turn lam * x into the state h (T, D, B, M, G, c) in place."""
    whole, later, earlier = _line_views(h)
    middle, left, right = _stencil(weights)
    for previous, line in _steps(h.shape[0], directions, segment):
        whole[line].addcmul_(middle[line], whole[previous])
        later[line].addcmul_(left[line], earlier[previous])
        earlier[line].addcmul_(right[line], later[previous])


def _propagate_adjoint(g: Tensor, weights: Tensor, directions: tuple[int, ...], segment: int) -> None:
    """Turn u * dy into the gradient of the state (T, D, B, M, G, c) in place: the transposed steps, last first."""
    whole, later, earlier = _line_views(g)
    middle, left, right = _stencil(weights)
    for previous, line in reversed(_steps(g.shape[0], directions, segment)):
        whole[previous].addcmul_(middle[line], whole[line])
        earlier[previous].addcmul_(left[line], later[line])
        later[previous].addcmul_(right[line], earlier[line])


def _weight_gradients(g: Tensor, h: Tensor, weights: Tensor, directions: tuple[int, ...], segment: int) -> Tensor:
    """Compute w_k (dw_k - sum_m w_m dw_m) as (K, T, D, B, M, G), for all lines at once.

    The weights of a position sum to 1, so dw_k counts only against dw_1: these are sums over a group of g times
    the *difference* of neighbouring states, and keep the digits that a common mode of h would cost.
    """
    previous, line = slice(None, -1), slice(1, None)
    if directions[0] % 2:
        previous, line = line, previous
    left, right = (torch.zeros(g.shape[:-1], dtype=g.dtype, device=g.device) for _ in range(2))
    difference = h[previous, :, :, 1:] - h[previous, :, :, :-1]
    torch.sum(g[line, :, :, 1:] * difference, -1, out=left[line, :, :, 1:])
    torch.sum(g[line, :, :, :-1] * difference, -1, out=right[line, :, :, :-1])
    if segment:
        starts = list(_order(g.shape[0], directions)[::segment])
        left[starts], right[starts] = 0, 0
    left.neg_()
    w0, w1, w2 = weights
    mean = w0 * left + w2 * right
    return torch.stack((w0 * (left - mean), -w1 * mean, w2 * (right - mean)))
