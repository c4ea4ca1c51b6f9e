"""Depthwise 3x3 convolution of channels-last tokens on a GPU by Triton, and what is added to it, in one pass.

A program takes a tile of positions by channels and walks down the rows of an image. A lane holds P adjacent positions
of 16 bytes of channels, one tensor each (a tuple): it reads P + 2 columns of a row, of which its neighbours read two
as well, so that those come from L1. A row counts for three rows of the result: it ends the sum of the row above, and
goes on with its own and starts the one below, which stay in registers. So every row is read once.

Shapes: B batch, H W grid, C channels; a tile is LW lanes of P positions by BC channels; taps in the order of memory.
"""

# What kernels take are pointers, blocks and constants, of which only the last have types.
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from gspn2_kernels.memory import VECTOR, batch_unit, by_pixel

# Positions of a lane, of VECTOR bytes of channels: with nine weights and two rows of sums, as many as registers hold.
POSITIONS = 2
LANES = 128
# Programs that run at the same time on an H100: three on each of 132 multiprocessors.
PROGRAMS = 396
# Rows of a program: fewer cost more for the rows above and below, more leave multiprocessors idle at the end.
FEWEST_ROWS, MOST_ROWS = 2, 32
_RUNTIME = ("H", "W", "rows", "strips", "sab", "sbb", "srb", "sob", "sgb")


def forward(a: Tensor, weight: Tensor, base: Tensor | None) -> Tensor:
    """Compute base + depthwise3x3(a, weight).

    Args:
        a: (B, H, W, C).
        weight: (C, 1, 3, 3).
        base: (B, H, W, C), or None for 0.

    Returns:
        (B, H, W, C), contiguous, in the dtype of a.
    """
    return convolve(a, weight, base)


def backward(dout: Tensor, a: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of a and weight from that of the result, dout (B, H, W, C)."""
    return convolve(dout, weight, None, flip=True), _weight_gradient(dout, a, weight)


def convolve(
    a: Tensor,
    weight: Tensor | None,
    base: Tensor | None,
    row: Tensor | None = None,
    residual: Tensor | None = None,
    gamma: Tensor | None = None,
    *,
    flip: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Compute residual + gamma * (base + row + depthwise3x3(a, weight)); what is None is left out.

    Args:
        a: (B, H, W, C).
        weight: (C, 1, 3, 3).
        base: (B, H, W, C).
        row: (B, C).
        residual: (B, H, W, C).
        gamma: (C,).
        flip: Turn the weight by 180 degrees.
        out: Where the result goes (B, H, W, C), in any dtype; by default a new tensor in the dtype of a.
    """
    batch, height, width, channels = a.shape
    if out is None:
        out = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    if out.numel() == 0:
        return out
    lanes, block = _tile(width, channels, a.element_size())
    columns = triton.cdiv(width, lanes * POSITIONS) * triton.cdiv(channels, block) * batch
    rows = _rows(columns, height, PROGRAMS)
    a, (base, residual) = by_pixel(a), (None if t is None else by_pixel(t) for t in (base, residual))
    weight, row, gamma = (None if t is None else t.contiguous() for t in (weight, row, gamma))
    _convolution_kernel[(columns * triton.cdiv(height, rows),)](
        a, weight, base, row, residual, gamma, out, height, width, rows,
        **_strides("a", a), **_strides("b", base), **_strides("r", residual), **_strides("o", out),
        C=channels, FLIP=flip, LW=lanes, BC=block, P=POSITIONS, num_warps=LANES // 32,
    )  # fmt: skip
    return out


def _weight_gradient(dout: Tensor, a: Tensor, weight: Tensor) -> Tensor:
    """Sum dout times a shifted by each tap: a share of every program by the kernel, the shares by torch."""
    batch, height, width, channels = a.shape
    if a.numel() == 0:
        return torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
    lanes, block = _tile(width, channels, a.element_size())
    blocks = triton.cdiv(channels, block)
    columns = triton.cdiv(width, lanes * POSITIONS) * batch
    # Pieces that are small beside what a program sums up: so the programs, which run all at once, end together.
    rows = _rows(columns * blocks, height, 4 * PROGRAMS)
    pieces = columns * triton.cdiv(height, rows)
    strips = triton.cdiv(pieces, max(1, PROGRAMS // blocks))
    shares = torch.empty(triton.cdiv(pieces, strips), channels, 9, dtype=torch.float32, device=a.device)
    a, dout = by_pixel(a), by_pixel(dout)
    _weight_gradient_kernel[(shares.shape[0] * blocks,)](
        a, dout, shares, height, width, rows, strips, pieces, **_strides("a", a), **_strides("g", dout),
        C=channels, LW=lanes, BC=block, P=POSITIONS, num_warps=LANES // 32,
    )  # fmt: skip
    return shares.sum(0).view(weight.shape).to(weight.dtype)


def _tile(width: int, channels: int, itemsize: int) -> tuple[int, int]:
    """Choose lanes along the line and channels of a tile: those that read least, halos and idle lanes counted."""

    def cost(lanes: int) -> int:
        positions, block = lanes * POSITIONS, LANES // lanes * VECTOR // itemsize
        return -(-width // positions) * (positions + 2) * -(-channels // block) * block

    lanes = min((8, 4), key=cost)
    return lanes, LANES // lanes * VECTOR // itemsize


def _rows(columns: int, height: int, pieces: int) -> int:
    """Choose how many rows a column of tiles is cut into, so that `columns` of them make that many pieces or more."""
    rows = min(max(columns * height // pieces, FEWEST_ROWS), MOST_ROWS)
    return triton.cdiv(height, triton.cdiv(height, rows))


def _strides(name: str, t: Tensor | None) -> dict[str, int]:
    """Name the batch stride, in units that keep vectors aligned, the unit and the stride of a position."""
    batch, position = (0, 0) if t is None else (t.stride(0), t.stride(2))
    unit = 1 if t is None else batch_unit(t)
    return {f"s{name}b": batch // unit, f"U{name.upper()}": unit, f"S{name.upper()}": position}


@triton.jit(do_not_specialize=_RUNTIME)
def _convolution_kernel(
    a, weight, base, row, residual, gamma, out, H, W, rows, sab, sbb, srb, sob,
    C: tl.constexpr, SA: tl.constexpr, UA: tl.constexpr, SB: tl.constexpr, UB: tl.constexpr, SR: tl.constexpr,
    UR: tl.constexpr, SO: tl.constexpr, UO: tl.constexpr, FLIP: tl.constexpr, LW: tl.constexpr, BC: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """Compute some rows of a tile; a, base, residual and out have batch strides s?b U? and strides S? of a position."""
    o_q, o_c, first, last, i_b = _place(tl.program_id(0), H, W, rows, C, LW, BC, P)
    nothing = _zeros(LW, BC, P)
    if weight is not None:
        w = _taps(weight, o_c, C, FLIP)
        above = _read(a, i_b * sab * UA, first - 1, H, W, o_q, o_c, C, SA, 1, P)
        here = _read(a, i_b * sab * UA, first, H, W, o_q, o_c, C, SA, 1, P)
        ending = _add(_add(nothing, above, w, 0, P), here, w, 1, P)
        starting = _add(nothing, here, w, 0, P)
    for i in range(first, last):
        b_base = _read(base, i_b * sbb * UB, i, H, W, o_q, o_c, C, SB, 0, P)
        b_residual = _read(residual, i_b * srb * UR, i, H, W, o_q, o_c, C, SR, 0, P)
        b_row, b_gamma = _read_channels(row, i_b * C, o_c, C, LW, BC), _read_channels(gamma, 0, o_c, C, LW, BC)
        if weight is not None:
            below = _read(a, i_b * sab * UA, i + 1, H, W, o_q, o_c, C, SA, 1, P)
            b_sum = _add(ending, below, w, 2, P)
            ending = _add(starting, below, w, 1, P)
            starting = _add(nothing, below, w, 0, P)
        else:
            b_sum = nothing
        p_o = out + i_b * sob * UO + i * W.to(tl.int64) * SO + (o_q * SO)[:, None] + o_c[None, :]
        for p in tl.static_range(P):
            b_o = b_sum[p]
            if base is not None:
                b_o += b_base[p].to(tl.float32)
            if row is not None:
                b_o += b_row[0]
            if gamma is not None:
                b_o *= b_gamma[0]
            if residual is not None:
                b_o += b_residual[p].to(tl.float32)
            there = (o_q + p < W)[:, None] & (o_c < C)[None, :]
            tl.store(p_o + p * SO, b_o.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=_RUNTIME)
def _weight_gradient_kernel(
    a, dout, shares, H, W, rows, strips, pieces, sab, sgb, C: tl.constexpr, SA: tl.constexpr, UA: tl.constexpr,
    SG: tl.constexpr, UG: tl.constexpr, LW: tl.constexpr, BC: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Sum dout times shifted a over `strips` of the `pieces` of a block of channels, into shares (programs, C, 9).

    A row of a meets the three rows of dout that it counts for, of which two stay in registers from row to row.
    """
    i_c, i_s = tl.program_id(0) % tl.cdiv(C, BC), tl.program_id(0) // tl.cdiv(C, BC)
    b_w = _zeros(LW, BC, 9)
    for i_p in range(i_s * strips, tl.minimum(i_s * strips + strips, pieces)):
        o_q, o_c, first, last, i_b = _place(i_p * tl.cdiv(C, BC) + i_c, H, W, rows, C, LW, BC, P)
        above = _read(dout, i_b * sgb * UG, first - 1, H, W, o_q, o_c, C, SG, 0, P)
        here = _read(dout, i_b * sgb * UG, first, H, W, o_q, o_c, C, SG, 0, P)
        for i in range(first, last):
            below = _read(dout, i_b * sgb * UG, i + 1, H, W, o_q, o_c, C, SG, 0, P)
            b_a = _read(a, i_b * sab * UA, i, H, W, o_q, o_c, C, SA, 1, P)
            b_w = _correlate(b_w, b_a, (below, here, above), P)
            above = here
            here = below
    o_c = i_c * BC + tl.arange(0, BC)
    for k in tl.static_range(9):
        tl.store(shares + (i_s * C + o_c) * 9 + k, tl.sum(b_w[k], 0), mask=o_c < C)


@triton.jit
def _place(i, H, W, rows, C: tl.constexpr, LW: tl.constexpr, BC: tl.constexpr, P: tl.constexpr):
    """Tell the first position of each lane, the channels, the first row and the one after the last, and the image."""
    o_c = i % tl.cdiv(C, BC) * BC + tl.arange(0, BC)
    i = i // tl.cdiv(C, BC)
    o_q = (i % tl.cdiv(W, LW * P) * LW + tl.arange(0, LW)) * P
    i = i // tl.cdiv(W, LW * P)
    first = i % tl.cdiv(H, rows) * rows
    return o_q, o_c, first, tl.minimum(first + rows, H), (i // tl.cdiv(H, rows)).to(tl.int64)


@triton.jit
def _zeros(LW: tl.constexpr, BC: tl.constexpr, N: tl.constexpr):
    """Make N tiles of zeros."""
    b: tl.tuple = ()
    for _ in tl.static_range(N):
        b = b + (tl.zeros((LW, BC), tl.float32),)
    return b


@triton.jit
def _taps(weight, o_c, C: tl.constexpr, FLIP: tl.constexpr):
    """Read the nine weights of each channel."""
    w: tl.tuple = ()
    for k in tl.static_range(9):
        o_k = 8 - k if FLIP else k
        w = w + (tl.load(weight + o_c * 9 + o_k, mask=o_c < C, other=0.0).to(tl.float32)[None, :],)
    return w


@triton.jit
def _read(t, o_image, i_r, H, W, o_q, o_c, C: tl.constexpr, S: tl.constexpr, HALO: tl.constexpr, P: tl.constexpr):
    """Read row i_r of an image: the positions of a lane, and HALO on either side; 0 outside the image."""
    b: tl.tuple = ()
    if t is not None:
        p_t = t + o_image + i_r * W.to(tl.int64) * S + (o_q * S)[:, None] + o_c[None, :]
        for p in tl.static_range(-HALO, P + HALO):
            there = (i_r >= 0) & (i_r < H) & (o_q + p >= 0) & (o_q + p < W)
            b = b + (tl.load(p_t + p * S, mask=there[:, None] & (o_c < C)[None, :], other=0.0),)
    return b


@triton.jit
def _read_channels(t, o_image, o_c, C: tl.constexpr, LW: tl.constexpr, BC: tl.constexpr):
    """Read one number a channel for a whole tile, so that it comes as vectors; from L1, not kept in registers."""
    b: tl.tuple = ()
    if t is not None:
        o = tl.zeros((LW, BC), tl.int32) + o_c[None, :]
        b = b + (tl.load(t + o_image + o, mask=o < C, other=0.0).to(tl.float32),)
    return b


@triton.jit
def _add(b_sum, b_a, w, K: tl.constexpr, P: tl.constexpr):
    """Add to the sums of a row what row K of the three taps sees of another."""
    b: tl.tuple = ()
    for p in tl.static_range(P):
        b_p = b_sum[p]
        for k in tl.static_range(3):
            b_p += w[3 * K + k] * b_a[p + k].to(tl.float32)
        b = b + (b_p,)
    return b


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
