"""LayerNorm of tokens on a GPU by Triton, in one pass over memory: the normed tokens, or what norms each.

A program goes through some tokens of an image, a token for each warp at a time. A warp keeps its token in registers, in
chunks of channels (a tuple), so that the variance is that of differences from the mean and no number is read twice,
while the next tokens are under way. Its sums for the mean patch stay in registers too. They end in a row for each
program, and one more kernel adds up the rows: always in the same order.

Others read the stream and norm it as they do, with `load_statistics` and `affine`: a token is 8 bytes more to read, and
the normed ones are neither written nor read.

Shapes: B batch, N tokens, P prefix tokens, C channels; a tile is BM tokens by chunks of BK channels.
"""

# What kernels take are pointers, blocks and constants, of which only the last have types.
# mypy: disable-error-code="no-untyped-def"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gspn2_kernels.memory import MULTIPROCESSORS, VECTOR, batch_unit, by_token, cdiv, power_of_2

# How many channels, to those there are, chunks may hold before narrower ones cost less.
MOST_PADDING = 1.125
# Rows that are added up at once, and channels of them: many images, and few.
SUMMED, SUMMED_OF_FEW = (32, 64), (128, 16)
_RUNTIME = ("B", "N", "P", "rows", "sxb")


class Plan(NamedTuple):
    """Warps of a program, one token each, tokens under way for each, and programs that run at the same time."""

    warps: int = 1
    stages: int = 4
    programs: int = 1056


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, chosen: Plan | None = None) -> Tensor:
    """Compute layer_norm(x).

    Args:
        x: (B, N, C).
        weight: (C,), or None for 1.
        bias: (C,), or None for 0.
        eps: What is added to the variance.
        chosen: Constants of the kernel; by default those that were quickest on an H100.

    Returns:
        (B, N, C), contiguous, in the dtype of x.
    """
    a = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if a.numel():
        _run(x, weight, bias, eps, 0, chosen or Plan(), a=a)
    return a


def norm_and_sum(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    addend: Tensor | None,
    *,
    chosen: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute layer_norm(x) and x + addend (C,), arguments and results as above."""
    a, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    if a.numel():
        _run(x, weight, bias, eps, 0, chosen or Plan(), a=a, addend=addend, total=total)
    return a, total


def statistics(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, prefix: int, *, chosen: Plan | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what norms each token; arguments as above, and the number of tokens before the patches.

    Returns:
        The inverse of each token's deviation and its mean times that (B, N, 2) in fp32; of the normed tokens, in the
        dtype of x, the prefix tokens (B, P, C) and the mean patch (B, C), 0 if there are no patches.
    """
    batch, tokens, channels = x.shape
    found = torch.empty(batch, tokens, 2, dtype=torch.float32, device=x.device)
    first = x.new_empty(batch, prefix, channels)
    if x.numel() == 0:
        return found, first, x.new_zeros(batch, channels)
    mean = x.new_empty(batch, channels)
    shares = _run(x, weight, bias, eps, prefix, chosen or Plan(), found=found, first=first)
    rows, block = SUMMED if batch * cdiv(channels, SUMMED[1]) >= MULTIPROCESSORS else SUMMED_OF_FEW
    sum_kernel[(batch * cdiv(channels, block),)](
        shares, mean, batch, len(shares), C=channels, BT=rows, BC=block, num_warps=4
    )
    return found, first, mean


def _run(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    prefix: int,
    chosen: Plan,
    *,
    a: Tensor | None = None,
    addend: Tensor | None = None,
    total: Tensor | None = None,
    found: Tensor | None = None,
    first: Tensor | None = None,
) -> Tensor:
    """Write a, and the total; or what else is there, and return the programs' shares (programs, B, C) of the mean."""
    batch, tokens, channels = x.shape
    x = by_token(x)
    weight, bias, addend = (None if t is None else t.contiguous() for t in (weight, bias, addend))
    pieces = min(cdiv(chosen.programs, batch), cdiv(tokens, chosen.warps))
    rows = cdiv(tokens, pieces * chosen.warps) * chosen.warps
    programs, unit = cdiv(tokens, rows), batch_unit(x)
    shares = torch.empty(programs if a is None else 0, batch, channels, dtype=torch.float32, device=x.device)
    norm_kernel[(programs * batch,)](
        x, weight, bias, a, addend, total, found, first, shares, eps, batch, tokens, prefix, rows,
        x.stride(0) // unit, C=channels, SX=x.stride(1), UX=unit, BM=chosen.warps,
        BK=_chunk(channels, x.element_size()), NS=chosen.stages, num_warps=chosen.warps,
    )  # fmt: skip
    return shares


def _chunk(channels: int, itemsize: int) -> int:
    """Choose how many channels a warp reads at once: fewer where the last chunk would hold much padding."""
    chunk = 32 * VECTOR // itemsize
    if cdiv(channels, chunk) * chunk > MOST_PADDING * channels:
        chunk //= 2
    return min(chunk, max(16, power_of_2(channels)))


@triton.jit(do_not_specialize=_RUNTIME)
def norm_kernel(
    x, weight, bias, a, addend, total, found, first, shares, eps, B, N, P, rows, sxb, C: tl.constexpr,
    SX: tl.constexpr, UX: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, NS: tl.constexpr,
):  # fmt: skip
    """Normalise `rows` tokens of an image and write them to a, and to the total what they are with the addend.

    Without an a, write what norms them and their sums.
    """
    i = tl.program_id(0)
    # Images may lie further apart than 32 bits can tell, and so may tokens of one.
    i_b, start = (i % B).to(tl.int64), i // B * rows
    end, o_m = tl.minimum(start + rows, N), tl.arange(0, BM)
    b_w, b_b, b_s = _channels(weight, C, BM, BK), _channels(bias, C, BM, BK), _zeros(C, BM, BK)
    b_c, b_1 = _channels(addend, C, BM, BK), _channels(None, C, BM, BK)
    for m in tl.range(start, end, BM, num_stages=NS):
        o_row = m + o_m
        b_x = _read(x + i_b * sxb * UX, o_row.to(tl.int64) * SX, o_row < N, C, BK)
        mean, scale = _statistics(b_x, eps, C, BK)
        if a is not None:
            _store(a, b_x, mean, scale, b_w, b_b, i_b * N + o_row, o_row < N, C, BK)
            if total is not None:
                none = tl.zeros_like(mean)
                _store(total, b_x, none, none + 1, b_1, b_c, i_b * N + o_row, o_row < N, C, BK)
        else:
            tl.store(found + 2 * (i_b * N + o_row), scale, mask=o_row < N)
            tl.store(found + 2 * (i_b * N + o_row) + 1, mean * scale, mask=o_row < N)
            if m < P:
                b_fw, b_fb = _channels(weight, C, BM, BK), _channels(bias, C, BM, BK)
                _store(first, b_x, mean, scale, b_fw, b_fb, i_b * P + o_row, o_row < P, C, BK)
            b_s = _add(b_s, b_x, mean, scale, (o_row >= P) & (o_row < N))
    if a is None:
        patches = tl.maximum(end - tl.maximum(start, P), 0).to(tl.float32)
        # Of sums of none the share is 0.
        part = 1.0 / tl.maximum(N - P, 1).to(tl.float32)
        for k in tl.static_range(len(b_s)):
            o_c = k * BK + tl.arange(0, BK)
            b_a = affine((tl.sum(b_s[k], 0) * part)[None, :], weight, bias, o_c, C, patches * part)
            tl.store(shares + i.to(tl.int64) * C + o_c[None, :], b_a, mask=o_c[None, :] < C)


@triton.jit
def affine(b_a, weight, bias, o_c, C: tl.constexpr, part=1.0):
    """Scale each channel of rows, and add a part of its bias."""
    if weight is not None:
        b_a *= tl.load(weight + o_c, mask=o_c < C, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        b_a += part * tl.load(bias + o_c, mask=o_c < C, other=0.0).to(tl.float32)[None, :]
    return b_a


@triton.jit
def load_statistics(found, o, there):
    """Load what norms tokens: factors, and what to take away then; 0 for tokens that are not there."""
    return tl.load(found + 2 * o, mask=there, other=0.0), tl.load(found + 2 * o + 1, mask=there, other=0.0)


@triton.jit(do_not_specialize=("B", "T"))
def sum_kernel(shares, mean, B, T, C: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """Add up T rows (T, B, C) for some channels of an image."""
    i_b = (tl.program_id(0) // tl.cdiv(C, BC)).to(tl.int64)
    o_c = tl.program_id(0) % tl.cdiv(C, BC) * BC + tl.arange(0, BC)
    b_s = tl.zeros((BT, BC), tl.float32)
    for t in tl.range(0, T, BT, num_stages=4):
        o_t = t + tl.arange(0, BT)
        there = (o_t < T)[:, None] & (o_c < C)[None, :]
        b_s += tl.load(shares + ((o_t * B + i_b) * C)[:, None] + o_c[None, :], mask=there, other=0.0)
    tl.store(mean + i_b * C + o_c, tl.sum(b_s, 0).to(mean.dtype.element_ty), mask=o_c < C)


@triton.jit
def _store(t, b_x, mean, scale, b_w, b_b, o_row, there, C: tl.constexpr, BK: tl.constexpr):
    """Write normed rows, times a weight and with a bias where there are any."""
    for k in tl.static_range(len(b_x)):
        o_c = k * BK + tl.arange(0, BK)
        b_a = (b_x[k].to(tl.float32) - mean[:, None]) * scale[:, None]
        if len(b_w):
            b_a *= b_w[k].to(tl.float32)
        if len(b_b):
            b_a += b_b[k].to(tl.float32)
        p_t = t + (o_row * C)[:, None] + o_c[None, :]
        tl.store(p_t, b_a.to(t.dtype.element_ty), mask=there[:, None] & (o_c < C)[None, :])


@triton.jit
def _add(b_s, b_x, mean, scale, there):
    """Add to sums what is left of rows without the norm's weight and bias."""
    b: tl.tuple = ()
    for k in tl.static_range(len(b_x)):
        b_a = (b_x[k].to(tl.float32) - mean[:, None]) * scale[:, None]
        b = b + (b_s[k] + tl.where(there[:, None], b_a, 0.0),)
    return b


@triton.jit
def _channels(t, C: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """Read one number a channel, for every row alike."""
    b: tl.tuple = ()
    if t is not None:
        for k in tl.static_range((C + BK - 1) // BK):
            o_c = tl.zeros((BM, BK), tl.int32) + k * BK + tl.arange(0, BK)[None, :]
            b = b + (tl.load(t + o_c, mask=o_c < C, other=0.0),)
    return b


@triton.jit
def _zeros(C: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """Make the sums of no tokens."""
    b: tl.tuple = ()
    for _ in tl.static_range((C + BK - 1) // BK):
        b = b + (tl.zeros((BM, BK), tl.float32),)
    return b


@triton.jit
def _read(x, o_row, there, C: tl.constexpr, BK: tl.constexpr):
    """Read rows of C channels, in chunks of BK; 0 where there is no row or channel."""
    b: tl.tuple = ()
    for k in tl.static_range((C + BK - 1) // BK):
        o_c = k * BK + tl.arange(0, BK)
        b = b + (tl.load(x + o_row[:, None] + o_c[None, :], mask=there[:, None] & (o_c < C)[None, :], other=0.0),)
    return b


@triton.jit
def _statistics(b_x, eps, C: tl.constexpr, BK: tl.constexpr):
    """Compute the mean of each row and the inverse of its standard deviation."""
    b_sum = b_x[0].to(tl.float32)
    for k in tl.static_range(1, len(b_x)):
        b_sum += b_x[k].to(tl.float32)
    mean = tl.sum(b_sum, 1) / C
    b_sum = tl.zeros_like(b_sum)
    for k in tl.static_range(len(b_x)):
        difference = b_x[k].to(tl.float32) - mean[:, None]
        if (k + 1) * BK > C:
            difference = tl.where((k * BK + tl.arange(0, BK) < C)[None, :], difference, 0.0)
        b_sum += difference * difference
    return mean, tl.rsqrt(tl.sum(b_sum, 1) / C + eps)
