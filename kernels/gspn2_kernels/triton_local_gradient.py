"""The gradient of a depthwise 3x3 convolution's weight on a GPU by Triton; see `triton_local`.

Shapes: B batch, H W grid, C channels; a tile is LW lanes of P positions by BC channels; taps in the order of memory.
"""

# What kernels take are pointers, blocks and constants, of which only the last have types.
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from gspn2_kernels.memory import VECTOR, by_pixel, cdiv
from gspn2_kernels.triton_local_tiles import PROGRAMS, SIZES, place, read, rows_of_a_program, strides, zeros

# Positions of a lane, of VECTOR bytes of channels: with nine sums and three rows, as many as registers hold.
POSITIONS = 2
LANES = 128


def weight_gradient(dout: Tensor, a: Tensor, weight: Tensor) -> Tensor:
    """Sum dout times a shifted by each tap: a share of every program by the kernel, the shares by torch.

    Args:
        dout: Gradient of the result (B, H, W, C).
        a: (B, H, W, C).
        weight: (C, 1, 3, 3).

    Returns:
        Of the shape and dtype of weight.
    """
    batch, height, width, channels = a.shape
    if a.numel() == 0:
        return torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
    lanes, block = _tile(width, channels, a.element_size())
    blocks = cdiv(channels, block)
    columns = cdiv(width, lanes * POSITIONS) * batch
    # Pieces that are small beside what a program sums up: so the programs, which run all at once, end together.
    rows = rows_of_a_program(columns * blocks, height, 4 * PROGRAMS)
    pieces = columns * cdiv(height, rows)
    strips = cdiv(pieces, max(1, PROGRAMS // blocks))
    shares = torch.empty(cdiv(pieces, strips), channels, 9, dtype=torch.float32, device=a.device)
    a, dout = by_pixel(a), by_pixel(dout)
    _weight_gradient_kernel[(shares.shape[0] * blocks,)](
        a, dout, shares, height, width, rows, strips, pieces, **strides("a", a), **strides("g", dout),
        C=channels, LW=lanes, BC=block, P=POSITIONS, num_warps=LANES // 32,
    )  # fmt: skip
    return shares.sum(0).view(weight.shape).to(weight.dtype)


def _tile(width: int, channels: int, itemsize: int) -> tuple[int, int]:
    """Choose lanes along the line and channels of a tile: those that read least, halos and idle lanes counted."""

    def cost(lanes: int) -> int:
        positions, block = lanes * POSITIONS, LANES // lanes * VECTOR // itemsize
        return cdiv(width, positions) * (positions + 2) * cdiv(channels, block) * block

    lanes = min((8, 4), key=cost)
    return lanes, LANES // lanes * VECTOR // itemsize


@triton.jit(do_not_specialize=SIZES)
def _weight_gradient_kernel(
    a, dout, shares, H, W, rows, strips, pieces, sab, sgb, C: tl.constexpr, SA: tl.constexpr, UA: tl.constexpr,
    SG: tl.constexpr, UG: tl.constexpr, LW: tl.constexpr, BC: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Sum dout times shifted a over `strips` of the `pieces` of a block of channels, into shares (programs, C, 9).

    A row of a meets the three rows of dout that it counts for, of which two stay in registers from row to row.
    """
    i_c, i_s = tl.program_id(0) % tl.cdiv(C, BC), tl.program_id(0) // tl.cdiv(C, BC)
    b_w = zeros(LW, BC, 9)
    for i_p in range(i_s * strips, tl.minimum(i_s * strips + strips, pieces)):
        o_q, o_c, first, last, i_b = place(i_p * tl.cdiv(C, BC) + i_c, H, W, rows, C, LW, BC, P)
        p_a, p_g = a + i_b * sab * UA, dout + i_b * sgb * UG
        above = read(p_g, first - 1, H, W, o_q, o_c, C, SG, 0, P)
        here = read(p_g, first, H, W, o_q, o_c, C, SG, 0, P)
        for i in range(first, last):
            below = read(p_g, i + 1, H, W, o_q, o_c, C, SG, 0, P)
            b_a = read(p_a, i, H, W, o_q, o_c, C, SA, 1, P)
            b_w = _correlate(b_w, b_a, (below, here, above), P)
            above = here
            here = below
    o_c = i_c * BC + tl.arange(0, BC)
    for k in tl.static_range(9):
        tl.store(shares + (i_s * C + o_c) * 9 + k, tl.sum(b_w[k], 0), mask=o_c < C)


@triton.jit
def _correlate(b_w, b_a, b_g, P: tl.constexpr):
    """Add to the sums of each tap the products of a row of a and the row of dout that it sees through that tap."""
    b: tl.tuple = ()
    for k in tl.static_range(9):
        b_k = b_w[k]
        for p in tl.static_range(P):
            b_k += b_g[k // 3][p].to(tl.float32) * b_a[p + k % 3].to(tl.float32)
        b = b + (b_k,)
    return b
