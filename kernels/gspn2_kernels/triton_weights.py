"""The weights of the line scan: its logits, normalised once for all channels of a group, in the order of the scans.

A scan has few warps on each multiprocessor, and waits for what it computes: what does not depend on the state is done
before. Of three weights that add up to 1 the outer two are written.

Shapes: B batch, H W grid, G groups, K = 3 neighbours, T lines of M positions in a direction.
"""

# What kernels take are pointers, blocks and constants, of which only the last have types.
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from gspn2_kernels.memory import cdiv
from gspn2_kernels.triton_tiles import weights

# Rows and columns of a tile of pixels, and the tiles from which on a warp takes one alone.
_TILE, _MANY = 8, 1024


def line_weights(logits: Tensor, segment: int) -> Tensor:
    """Compute the weights of the outer neighbours of each position, those of the line before at its either side.

    Args:
        logits: (B, H, W, 4, G, K), pixels at equal distances, the stride of K 1.
        segment: Lines after which a scan restarts, or 0.

    Returns:
        (B, 4, G, T M, 2) in fp32: in planes, line after line. Both are 0 where a scan restarts.
    """
    batch, height, width, _, groups, _ = logits.shape
    out = logits.new_empty(batch, 4, groups, height * width, 2, dtype=torch.float32)
    tiles = cdiv(height, _TILE) * cdiv(width, _TILE)
    strides = dict(zip(("SA", "SAD", "SAG"), logits.stride()[2:5], strict=True))
    weights_kernel[(tiles, groups, batch)](
        logits, out, height, width, segment or height + width, logits.stride(0), **strides, TILE=_TILE,
        num_warps=1 if tiles * groups * batch >= _MANY else 2,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=("H", "W", "segment", "sab"))
def weights_kernel(
    logits, out, H, W, segment, sab, SA: tl.constexpr, SAD: tl.constexpr, SAG: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Write the weights of a tile of pixels: program (tile, group, image).

    Logits have batch stride sab and strides SA of a pixel, SAD of a direction, SAG of a group. Mostly their directions
    lie side by side, and the first brings the others along.
    """
    tile, i_g, i_b, o = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64), tl.arange(0, TILE * TILE)
    first_row, first_column = tile // tl.cdiv(W, TILE) * TILE, tile % tl.cdiv(W, TILE) * TILE
    o_k = tl.arange(0, 4)[None, :]
    for i_d in tl.static_range(4):
        # Pixels in the order of the direction's positions, so that runs of them are written.
        row = first_row + (o // TILE if i_d < 2 else o % TILE)
        column = first_column + (o % TILE if i_d < 2 else o // TILE)
        o_q = row * W + column if i_d < 2 else column * H + row
        there = ((row < H) & (column < W))[:, None]
        p_a = logits + i_b * sab + i_d * SAD + i_g * SAG + ((row * W + column) * SA)[:, None] + o_k
        b_a = tl.load(p_a, mask=there & (o_k < 3), other=0.0)
        b_w = outer_weights(b_a, i_d, row, column, H, W, segment, TILE * TILE)
        p_w = out + ((i_b * 4 + i_d) * tl.num_programs(1) + i_g) * (H * W * 2) + (o_q * 2)[:, None]
        tl.store(p_w + tl.arange(0, 2)[None, :], b_w, mask=there)


@triton.jit
def outer_weights(b_a, i_d, row, column, H, W, segment, rows: tl.constexpr):
    """Normalise the logits (rows, 4) of pixels in direction i_d; returns the outer weights (rows, 2)."""
    vertical = i_d < 2
    q, M = tl.where(vertical, column, row), tl.where(vertical, W, H)
    line = tl.where(vertical, row, column)
    line = tl.where(i_d % 2 == 1, tl.where(vertical, H, W) - 1 - line, line)
    w0, _, w2 = weights(b_a, q == 0, q == M - 1, tl.where(line % segment == 0, 0.0, 1.0), rows)
    return tl.join(w0, w2)
