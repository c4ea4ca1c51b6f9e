"""Depthwise 3x3 convolution of channels-last tokens on a GPU by Triton, and what is added to it, in one pass.

A program takes a tile of positions by channels and walks down the rows of an image. A lane holds P adjacent positions
of a few channels, one tensor each (a tuple): it reads P + 2 columns of a row, of which its neighbours read two as well,
so that those come from L1. A row counts for three rows of the result: it ends the sum of the row above, and goes on
with its own and starts the one below, which stay in registers. So every row is read once.

At the end of a mixer the tokens are those before its norm. A row is normed as it is read, but for the norm's weight,
which joins the nine weights of the convolution, and its bias, which is the same for all positions that see no border;
and it is the residual as well, for the row that it stands in.

Shapes: B batch, H W grid, C channels; a tile is LW lanes of P positions by BC channels; taps in the order of memory.
"""

# What kernels take are pointers, blocks and constants, of which only the last have types.
# mypy: disable-error-code="no-untyped-def"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gspn2_kernels.memory import by_pixel, cdiv
from gspn2_kernels.triton_local_gradient import weight_gradient
from gspn2_kernels.triton_local_tiles import (
    PROGRAMS,
    SIZES,
    constants,
    inner,
    normed_row,
    place,
    read,
    read_channels,
    rows_of_a_program,
    strides,
    taps,
    without_border,
)


class Plan(NamedTuple):
    """Positions of a lane, lanes along a line, warps of a program, bytes of a lane's channels, and rows under way."""

    positions: int
    lanes: int = 4
    warps: int = 4
    vector: int = 8
    stages: int = 4


class Norm(NamedTuple):
    """What norms patches: their statistics (B, H, W, 2), as `gspn2_kernels.norm.Normed` has them, and its weights."""

    statistics: Tensor
    weight: Tensor | None
    bias: Tensor | None


def forward(a: Tensor, weight: Tensor, base: Tensor | None) -> Tensor:
    """Compute base + depthwise3x3(a, weight).

    Args:
        a: (B, H, W, C).
        weight: (C, 1, 3, 3).
        base: (B, H, W, C), or None for 0.

    Returns:
        (B, H, W, C), contiguous, in the dtype of a.
    """
    out = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    _launch(a, None, weight, base, None, None, out)
    return out


def backward(dout: Tensor, a: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of a and weight from that of the result, dout (B, H, W, C)."""
    da = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    _launch(dout, None, weight, None, None, None, da, flip=True)
    return da, weight_gradient(dout, a, weight)


def add_up(
    stream: Tensor,
    norm: Norm,
    weight: Tensor | None,
    base: Tensor,
    row: Tensor,
    gamma: Tensor | None,
    out: Tensor,
    *,
    chosen: Plan | None = None,
) -> None:
    """Compute out = stream + gamma * (base + row + depthwise3x3(normed stream, weight)); what is None is left out.

    Args:
        stream: (B, H, W, C).
        norm: What norms the stream.
        weight: (C, 1, 3, 3).
        base: (B, H, W, C).
        row: (B, C).
        gamma: (C,).
        out: Where the result goes (B, H, W, C), in any dtype.
        chosen: Constants of the kernel; by default those that were quickest on an H100.
    """
    _launch(stream, norm, weight, base, row, gamma, out, chosen=chosen)


def _launch(
    a: Tensor,
    norm: Norm | None,
    weight: Tensor | None,
    base: Tensor | None,
    row: Tensor | None,
    gamma: Tensor | None,
    out: Tensor,
    *,
    flip: bool = False,
    chosen: Plan | None = None,
) -> None:
    """Write a result; with `flip` the weight is turned by 180 degrees."""
    batch, height, width, channels = a.shape
    if out.numel() == 0:
        return
    chosen = chosen or _plan(width)
    block = 32 * chosen.warps // chosen.lanes * max(1, chosen.vector // a.element_size())
    columns = cdiv(width, chosen.lanes * chosen.positions) * cdiv(channels, block) * batch
    rows = rows_of_a_program(columns, height, PROGRAMS)
    a, base = by_pixel(a), None if base is None else by_pixel(base)
    statistics, scale, shift = norm or (None, None, None)
    weight, row, gamma, scale, shift = (
        None if t is None else t.contiguous() for t in (weight, row, gamma, scale, shift)
    )
    _convolution_kernel[(columns * cdiv(height, rows),)](
        a, statistics, scale, shift, weight, base, row, gamma, out, height, width, rows,
        0 if statistics is None else statistics.stride(0), **strides("a", a), **strides("b", base),
        **strides("o", out), C=channels, FLIP=flip, LW=chosen.lanes, BC=block, P=chosen.positions,
        NS=chosen.stages, num_warps=chosen.warps,
    )  # fmt: skip


def _plan(width: int) -> Plan:
    """Choose the positions of a lane with which a line is read least, halos and idle lanes counted."""
    return min((Plan(4), Plan(5)), key=lambda plan: cdiv(width, plan.lanes * plan.positions) * (plan.positions + 2))


@triton.jit(do_not_specialize=SIZES)
def _convolution_kernel(
    a, statistics, scale, shift, weight, base, row, gamma, out, H, W, rows, ssb, sab, sbb, sob,
    C: tl.constexpr, SA: tl.constexpr, UA: tl.constexpr, SB: tl.constexpr, UB: tl.constexpr, SO: tl.constexpr,
    UO: tl.constexpr, FLIP: tl.constexpr, LW: tl.constexpr, BC: tl.constexpr, P: tl.constexpr,
    NS: tl.constexpr,
):  # fmt: skip
    """Compute some rows of a tile; a, base and out have batch strides s?b U? and strides S? of a position.

    With a row this is the end of a mixer, where a is the residual too.
    """
    o_q, o_c, first, last, i_b = place(tl.program_id(0), H, W, rows, C, LW, BC, P)
    p_a, p_s, p_b, p_o = a + i_b * sab * UA, statistics, base, out + i_b * sob * UO
    if statistics is not None:
        p_s = statistics + i_b * ssb
    if base is not None:
        p_b = base + i_b * sbb * UB
    b_gamma = read_channels(gamma, 1.0, 0, o_c, C, LW, BC)
    if weight is None:
        b_row = read_channels(row, 0.0, i_b * C, o_c, C, LW, BC)
        for i in range(first, last):
            residual = read(p_a, i, H, W, o_q, o_c, C, SA, 0, P)
            _finish((b_row,) * P, residual, row, b_gamma, p_b, p_o, i, H, W, o_q, o_c, C, SB, SO, P)
    else:
        w = taps(weight, scale, o_c, C, FLIP)
        start = constants(row, i_b * C, weight, shift, o_q, o_c, W, C, LW, BC, P)
        here = read(p_a, first, H, W, o_q, o_c, C, SA, 1, P)
        b_z = normed_row(here, p_s, first, H, W, o_q, P)
        above = normed_row(read(p_a, first - 1, H, W, o_q, o_c, C, SA, 1, P), p_s, first - 1, H, W, o_q, P)
        ending = without_border(start, weight, shift, 0, first == 0, o_q, o_c, W, C, P)
        state = _add(_add(ending, above, w, 0, P), b_z, w, 1, P), _add(start, b_z, w, 0, P), inner(here, P)
        for i in tl.range(first, last - 1, num_stages=NS):
            state = _row(state, start, w, row, b_gamma, p_a, p_s, p_b, p_o, i, H, W, o_q, o_c, C, SA, SB, SO, P)
        ending = without_border(state[0], weight, shift, 6, last == H, o_q, o_c, W, C, P)
        state = ending, state[1], state[2]
        _row(state, start, w, row, b_gamma, p_a, p_s, p_b, p_o, last - 1, H, W, o_q, o_c, C, SA, SB, SO, P)


@triton.jit
def _row(
    state, start, w, row, b_gamma, p_a, p_s, p_b, p_o, i, H, W, o_q, o_c, C: tl.constexpr, SA: tl.constexpr,
    SB: tl.constexpr, SO: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Read the row below row i, which ends the sums of that, and hand on those of the next two and the row itself."""
    ending, starting, residual = state
    below = read(p_a, i + 1, H, W, o_q, o_c, C, SA, 1, P)
    b_z = normed_row(below, p_s, i + 1, H, W, o_q, P)
    _finish(_add(ending, b_z, w, 2, P), residual, row, b_gamma, p_b, p_o, i, H, W, o_q, o_c, C, SB, SO, P)
    return _add(starting, b_z, w, 1, P), _add(start, b_z, w, 0, P), inner(below, P)


@triton.jit
def _finish(
    b_sum, residual, row, b_gamma, p_b, p_o, i, H, W, o_q, o_c, C: tl.constexpr, SB: tl.constexpr, SO: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """Add the rest to the sums of row i, and write it."""
    b_base = read(p_b, i, H, W, o_q, o_c, C, SB, 0, P)
    p_o += i * W.to(tl.int64) * SO + (o_q * SO)[:, None] + o_c[None, :]
    for p in tl.static_range(P):
        b_o = b_sum[p]
        if p_b is not None:
            b_o += b_base[p].to(tl.float32)
        if row is not None:
            b_o = b_o * b_gamma + residual[p].to(tl.float32)
        tl.store(p_o + p * SO, b_o.to(p_o.dtype.element_ty), mask=(o_q + p < W)[:, None] & (o_c < C)[None, :])


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
