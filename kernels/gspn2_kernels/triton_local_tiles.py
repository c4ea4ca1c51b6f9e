"""Tiles of positions by channels that walk down the rows of an image: what kernels of the local perception share.

Shapes: B batch, H W grid, C channels; a tile is LW lanes of P positions by BC channels; taps in the order of memory.
"""

# What kernels take are pointers, blocks and constants, of which only the last have types.
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl
from torch import Tensor

from gspn2_kernels.memory import MULTIPROCESSORS, batch_unit, cdiv

# Programs that run at the same time: three on each multiprocessor.
PROGRAMS = 3 * MULTIPROCESSORS
# Rows of a program: fewer cost more for the rows above and below, more leave multiprocessors idle at the end.
FEWEST_ROWS, MOST_ROWS = 2, 32
SIZES = ("H", "W", "rows", "strips", "pieces", "sab", "ssb", "sbb", "sob", "sgb")


def rows_of_a_program(columns: int, height: int, pieces: int) -> int:
    """Choose how many rows a column of tiles is cut into, so that `columns` of them make that many pieces or more."""
    rows = min(max(columns * height // pieces, FEWEST_ROWS), MOST_ROWS)
    return cdiv(height, cdiv(height, rows))


def strides(name: str, t: Tensor | None) -> dict[str, int]:
    """Name the batch stride, in units that keep vectors aligned, the unit and the stride of a position."""
    batch, position = (0, 0) if t is None else (t.stride(0), t.stride(2))
    unit = 1 if t is None else batch_unit(t)
    return {f"s{name}b": batch // unit, f"U{name.upper()}": unit, f"S{name.upper()}": position}


@triton.jit
def place(i, H, W, rows, C: tl.constexpr, LW: tl.constexpr, BC: tl.constexpr, P: tl.constexpr):
    """Tell the first position of each lane, the channels, the first row and the one after the last, and the image."""
    o_c = i % tl.cdiv(C, BC) * BC + tl.arange(0, BC)
    i = i // tl.cdiv(C, BC)
    o_q = (i % tl.cdiv(W, LW * P) * LW + tl.arange(0, LW)) * P
    i = i // tl.cdiv(W, LW * P)
    first = i % tl.cdiv(H, rows) * rows
    return o_q, o_c, first, tl.minimum(first + rows, H), (i // tl.cdiv(H, rows)).to(tl.int64)


@triton.jit
def zeros(LW: tl.constexpr, BC: tl.constexpr, N: tl.constexpr):
    """Make N tiles of zeros."""
    b: tl.tuple = ()
    for _ in tl.static_range(N):
        b = b + (tl.zeros((LW, BC), tl.float32),)
    return b


@triton.jit
def inner(b, P: tl.constexpr):
    """Leave out the halo of a row."""
    b_i: tl.tuple = ()
    for p in tl.static_range(P):
        b_i = b_i + (b[p + 1],)
    return b_i


@triton.jit
def read(t, i_r, H, W, o_q, o_c, C: tl.constexpr, S: tl.constexpr, HALO: tl.constexpr, P: tl.constexpr):
    """Read row i_r of an image: the positions of a lane, and HALO on either side; 0 outside the image."""
    b: tl.tuple = ()
    if t is not None:
        p_t = t + i_r * W.to(tl.int64) * S + (o_q * S)[:, None] + o_c[None, :]
        for p in tl.static_range(-HALO, P + HALO):
            there = (i_r >= 0) & (i_r < H) & (o_q + p >= 0) & (o_q + p < W)
            b = b + (tl.load(p_t + p * S, mask=there[:, None] & (o_c < C)[None, :], other=0.0),)
    return b


@triton.jit
def normed_row(b, statistics, i_r, H, W, o_q, P: tl.constexpr):
    """Norm row i_r with its halo by the statistics, if there are any; 0 outside the image."""
    b_z: tl.tuple = ()
    if statistics is None:
        b_z = b
    else:
        # Both numbers of a position at once.
        p_s = statistics.to(tl.pointer_type(tl.int64)) + (i_r * W + o_q)[:, None]
        for p in tl.static_range(-1, P + 1):
            there = (i_r >= 0) & (i_r < H) & (o_q + p >= 0) & (o_q + p < W)
            both = tl.load(p_s + p, mask=there[:, None], other=0)
            b_f, b_m = both.to(tl.int32).to(tl.float32, bitcast=True), (both >> 32).to(tl.int32)
            b_z = b_z + (b[p + 1].to(tl.float32) * b_f - b_m.to(tl.float32, bitcast=True),)
    return b_z


@triton.jit
def read_channels(t, nothing, o_image, o_c, C: tl.constexpr, LW: tl.constexpr, BC: tl.constexpr):
    """Read one number a channel for a whole tile, so that it comes as vectors."""
    b = nothing
    if t is not None:
        o = tl.zeros((LW, BC), tl.int32) + o_c[None, :]
        b = tl.load(t + o_image + o, mask=o < C, other=0.0).to(tl.float32)
    return b


@triton.jit
def taps(weight, scale, o_c, C: tl.constexpr, FLIP: tl.constexpr):
    """Read the nine weights of each channel, times its scale."""
    b_s = 1.0
    if scale is not None:
        b_s = tl.load(scale + o_c, mask=o_c < C, other=0.0).to(tl.float32)[None, :]
    w: tl.tuple = ()
    for k in tl.static_range(9):
        o_k = 8 - k if FLIP else k
        w = w + (tl.load(weight + o_c * 9 + o_k, mask=o_c < C, other=0.0).to(tl.float32)[None, :] * b_s,)
    return w


@triton.jit
def constants(
    row, o_image, weight, shift, o_q, o_c, W, C: tl.constexpr, LW: tl.constexpr, BC: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """Sum what all positions get, and what the nine weights make of what a norm adds to each channel, in inner rows."""
    b: tl.tuple = ()
    for _ in tl.static_range(P):
        b = b + (tl.zeros((LW, BC), tl.float32) + read_channels(row, 0.0, o_image, o_c, C, LW, BC),)
    if shift is not None:
        w = taps(weight, shift, o_c, C, False)
        b = _of_columns(b, w[0] + w[3] + w[6], w[1] + w[4] + w[7], w[2] + w[5] + w[8], o_q, W, P)
    return b


@triton.jit
def without_border(b_sum, weight, shift, K: tl.constexpr, at_border, o_q, o_c, W, C: tl.constexpr, P: tl.constexpr):
    """Take from the sums of a row at a border what `constants` counts of a row that is none, seen by taps K and on."""
    b = b_sum
    if shift is not None:
        w, sign = taps(weight, shift, o_c, C, False), tl.where(at_border, -1.0, 0.0)
        b = _of_columns(b_sum, sign * w[K], sign * w[K + 1], sign * w[K + 2], o_q, W, P)
    return b


@triton.jit
def _of_columns(b_sum, b_l, b_m, b_r, o_q, W, P: tl.constexpr):
    """Add what comes from the left, the same and the right column, of which the first and the last lack one."""
    b: tl.tuple = ()
    for p in tl.static_range(P):
        b_p = b_sum[p] + b_m + tl.where((o_q + p > 0)[:, None], b_l, 0.0)
        b = b + (b_p + tl.where((o_q + p < W - 1)[:, None], b_r, 0.0),)
    return b
