"""LayerNorm of tokens and, if wanted, the mean of the patches on a GPU by Triton, in one pass over memory.

A program goes through some tokens of an image, a token for each warp at a time. A warp keeps its token in registers,
in chunks of channels (a tuple), so that the variance is that of differences from the mean and no number is read twice,
while the next tokens are under way. Its sums for the mean stay in registers too. They end in a row for each program,
and torch adds up the rows: always in the same order.

Shapes: B batch, N tokens, C channels; a tile is BM tokens by chunks of BK channels.
"""

# What kernels take are pointers, blocks and constants, of which only the last have types.
# mypy: disable-error-code="no-untyped-def"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gspn2_kernels.memory import VECTOR, batch_unit, by_token

# How many channels, to those there are, chunks may hold before narrower ones cost less.
MOST_PADDING = 1.125
_RUNTIME = ("B", "N", "rows", "prefix", "sxb")


class Plan(NamedTuple):
    """Warps of a program, one token each, tokens under way for each, and programs that run at the same time."""

    warps: int = 4
    stages: int = 4
    programs: int = 264


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, prefix: int, *, chosen: Plan | None = None
) -> tuple[Tensor, Tensor]:
    """Compute a = layer_norm(x) and the mean of a over the patches.

    Args:
        x: (B, N, C).
        weight: (C,), or None for 1.
        bias: (C,), or None for 0.
        eps: What is added to the variance.
        prefix: Tokens before the patches.
        chosen: Constants of the kernel; by default those that were quickest on an H100.

    Returns:
        a (B, N, C) and its mean (B, C), contiguous, in the dtype of x.
    """
    a, shares = _run(x, weight, bias, eps, prefix, chosen or Plan())
    return a, (x.new_zeros(x.shape[0], x.shape[2]) if shares is None else shares.sum(0).to(x.dtype))


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Compute layer_norm(x); arguments as above."""
    return _run(x, weight, bias, eps, None, Plan())[0]


def _run(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, prefix: int | None, chosen: Plan
) -> tuple[Tensor, Tensor | None]:
    """Compute layer_norm(x), and the programs' shares (programs, B, C) of the mean, None without a prefix or tokens."""
    batch, tokens, channels = x.shape
    a = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if a.numel() == 0:
        return a, None
    x = by_token(x)
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    pieces = min(triton.cdiv(chosen.programs, batch), triton.cdiv(tokens, chosen.warps))
    rows = triton.cdiv(tokens, pieces * chosen.warps) * chosen.warps
    programs, shares = triton.cdiv(tokens, rows), None
    if prefix is not None:
        shares = torch.empty(programs, batch, channels, dtype=torch.float32, device=x.device)
    unit = batch_unit(x)
    norm_kernel[(programs * batch,)](
        x, weight, bias, a, shares, eps, batch, tokens, rows, prefix or 0, x.stride(0) // unit, C=channels,
        SX=x.stride(1), UX=unit, BM=chosen.warps, BK=_chunk(channels, x.element_size()), NS=chosen.stages,
        num_warps=chosen.warps,
    )  # fmt: skip
    return a, shares


def _chunk(channels: int, itemsize: int) -> int:
    """Choose how many channels a warp reads at once: fewer where the last chunk would hold much padding."""
    chunk = 32 * VECTOR // itemsize
    if triton.cdiv(channels, chunk) * chunk > MOST_PADDING * channels:
        chunk //= 2
    return min(chunk, max(16, triton.next_power_of_2(channels)))


@triton.jit(do_not_specialize=_RUNTIME)
def norm_kernel(
    x, weight, bias, a, shares, eps, B, N, rows, prefix, sxb, C: tl.constexpr, SX: tl.constexpr, UX: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, NS: tl.constexpr,
):  # fmt: skip
    """Normalise `rows` tokens of an image, and write their share of the mean to a row of shares, if there are any."""
    i = tl.program_id(0)
    # Images may lie further apart than 32 bits can tell, and so may tokens of one.
    i_b, first = (i % B).to(tl.int64), i // B * rows
    o_m = tl.arange(0, BM)
    b_w, b_b, b_s = _channels(weight, C, BM, BK), _channels(bias, C, BM, BK), _zeros(C, BM, BK)
    p_x, p_a = x + i_b * sxb * UX, a + i_b * N * C
    for m in tl.range(first, tl.minimum(first + rows, N), BM, num_stages=NS):
        o_row = m + o_m
        b_x = _read(p_x, o_row.to(tl.int64) * SX, o_row < N, C, BK)
        mean, scale = _statistics(b_x, eps, C, BK)
        b_n: tl.tuple = ()
        for k in tl.static_range(len(b_x)):
            o_c = k * BK + tl.arange(0, BK)
            b_a = (b_x[k].to(tl.float32) - mean[:, None]) * scale[:, None]
            if weight is not None:
                b_a *= b_w[k].to(tl.float32)
            if bias is not None:
                b_a += b_b[k].to(tl.float32)
            b_a = b_a.to(a.dtype.element_ty)
            o_a = (o_row.to(tl.int64) * C)[:, None] + o_c[None, :]
            tl.store(p_a + o_a, b_a, mask=(o_row < N)[:, None] & (o_c < C)[None, :])
            if shares is not None:
                patch = ((o_row >= prefix) & (o_row < N))[:, None]
                b_n = b_n + (b_s[k] + tl.where(patch, b_a.to(tl.float32), 0.0),)
        if shares is not None:
            b_s = b_n
    if shares is not None:
        # Of sums of none the share is 0.
        share = 1.0 / tl.maximum(N - prefix, 1).to(tl.float32)
        for k in tl.static_range(len(b_s)):
            o_c = k * BK + tl.arange(0, BK)
            tl.store(shares + i.to(tl.int64) * C + o_c, tl.sum(b_s[k], 0) * share, mask=o_c < C)


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
