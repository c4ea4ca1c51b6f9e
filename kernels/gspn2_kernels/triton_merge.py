"""The end of a mixer on a GPU by Triton: a product that adds up what is not local, then the convolution's pass.

What patches take of the prefix tokens is a second, short product, whose weights are those of an image. As two of cuBLAS
the second would read and write all tokens once more; so a program here does both for a tile, which ends where its image
does. Scans go by direction, of which the first two add up the image's rows and the last two its columns: the sum of
each half is divided by its number of lines. Without prefix tokens cuBLAS's product is the faster one.

Shapes: B batch, M = H W patches, C channels, K = 2 R numbers of two directions, S columns of the share; a tile is BM
patches by BN channels, in steps of BK numbers.
"""

# What kernels take are pointers, blocks and constants, of which only the last have types.
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from gspn2_kernels.memory import by_token, cdiv, power_of_2
from gspn2_kernels.merge import divide
from gspn2_kernels.triton_local import Norm, add_up

# Of a share that a program holds at once; more of them are a product of their own.
MOST_COLUMNS = 128


class Plan(NamedTuple):
    """Patches and channels of a tile, numbers of a step, warps of a program, and steps under way."""

    patches: int = 128
    channels: int = 128
    step: int = 64
    warps: int = 8
    stages: int = 3


# Products of fp32 keep all they multiply in registers.
FP32 = Plan(32, 64, 32, 4, 2)


def merge(
    stream: Tensor,
    statistics: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    y: Tensor,
    weight: Tensor,
    lines: Sequence[int],
    filters: Tensor | None,
    share: Tensor | None,
    values: Tensor | None,
    row: Tensor,
    gamma: Tensor | None,
    prefix_out: Tensor | None,
) -> Tensor:
    """Compute `gspn2::merge`, arguments as there."""
    grid = y.shape[1:3]
    prefix = stream.shape[1] - grid[0] * grid[1]
    out = torch.empty(stream.shape, dtype=stream.dtype, device=stream.device)
    if prefix_out is not None:
        _add_prefix(stream, prefix_out, gamma, out)
    if share is None or values is None:
        base = F.linear(y.flatten(-2), divide(weight, lines))
    elif share.shape[2] > MOST_COLUMNS:
        base = F.linear(y.flatten(1, 2).flatten(2), divide(weight, lines)).baddbmm_(share, values).unflatten(1, grid)
    else:
        base = product(y, weight, lines, share, values)
    # Both numbers of a token are read at once.
    found = statistics.contiguous() if statistics.data_ptr() % 8 == 0 else statistics.clone()
    patches, found, sums = (t[:, prefix:].unflatten(1, grid) for t in (stream, found, out))
    add_up(patches, Norm(found, norm_weight, norm_bias), filters, base, row, gamma, sums)
    return out


def _add_prefix(stream: Tensor, prefix_out: Tensor, gamma: Tensor | None, out: Tensor) -> None:
    """Write stream + gamma * prefix_out for the prefix tokens; torch's sum of slices takes three times as long."""
    batch, prefix, channels = prefix_out.shape
    if prefix_out.numel() == 0:
        return
    stream, prefix_out, gamma = by_token(stream), prefix_out.contiguous(), None if gamma is None else gamma.contiguous()
    prefix_kernel[(batch * prefix,)](
        stream, prefix_out, gamma, out, prefix, *stream.stride()[:2], *out.stride()[:2], C=channels,
        BC=power_of_2(channels), num_warps=4,
    )  # fmt: skip


def product(
    y: Tensor, weight: Tensor, lines: Sequence[int], share: Tensor, values: Tensor, chosen: Plan | None = None
) -> Tensor:
    """Compute y / lines weight^T + share values, (B, H, W, C).

    Args:
        y: (B, H, W, 4, R).
        weight: (C, 4 R).
        lines: What the first two and the last two directions are divided by.
        share: (B, H W, S).
        values: (B, S, C).
        chosen: Constants of the kernel; by default those that were quickest on an H100, of fp32 those that fit.
    """
    chosen = chosen or (FP32 if y.dtype == torch.float32 else Plan())
    batch, height, width = y.shape[:3]
    channels, patches, columns = weight.shape[0], height * width, share.shape[2]
    out = torch.empty(batch, height, width, channels, dtype=y.dtype, device=y.device)
    if out.numel() == 0:
        return out
    y, weight, share, values = (t.contiguous() for t in (y, weight, share, values))
    tiles = batch * cdiv(patches, chosen.patches) * cdiv(channels, chosen.channels)
    product_kernel[(tiles,)](
        y, weight, share, values, out, lines[1] / lines[0], 1 / lines[1], patches, C=channels, K=weight.shape[1] // 2,
        S=columns, BM=chosen.patches, BN=chosen.channels, BK=chosen.step, BS=max(16, power_of_2(columns)),
        NS=chosen.stages, num_warps=chosen.warps,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=("ratio", "inverse", "M"))
def product_kernel(
    y, weight, share, values, out, ratio, inverse, M, C: tl.constexpr, K: tl.constexpr, S: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BS: tl.constexpr, NS: tl.constexpr,
):  # fmt: skip
    """Compute a tile; programs that lie side by side share the scans."""
    i_c, i_m = tl.program_id(0) % tl.cdiv(C, BN), tl.program_id(0) // tl.cdiv(C, BN)
    i_b, i_m = (i_m // tl.cdiv(M, BM)).to(tl.int64), i_m % tl.cdiv(M, BM)
    o_m, o_c, o_k = i_m * BM + tl.arange(0, BM), i_c * BN + tl.arange(0, BN), tl.arange(0, BK)
    o_n = (i_b * M + o_m)[:, None]
    p_y, p_w = y + o_n * (2 * K) + o_k[None, :], weight + o_c[None, :] * (2 * K) + o_k[:, None]
    acc = tl.zeros((BM, BN), tl.float32)
    for half in tl.static_range(2):
        for k in tl.range(0, K, BK, num_stages=NS):
            inside = o_k < K - k
            b_y = tl.load(p_y + half * K + k, mask=(o_m < M)[:, None] & inside[None, :], other=0.0)
            b_w = tl.load(p_w + half * K + k, mask=(o_c < C)[None, :] & inside[:, None], other=0.0)
            acc = tl.dot(b_y, b_w, acc, input_precision="ieee")
        acc *= ratio if half == 0 else inverse
    o_s = tl.arange(0, BS)
    b_s = tl.load(share + o_n * S + o_s[None, :], mask=(o_m < M)[:, None] & (o_s < S)[None, :], other=0.0)
    p_v = values + i_b * S * C + o_s[:, None] * C + o_c[None, :]
    b_v = tl.load(p_v, mask=(o_s < S)[:, None] & (o_c < C)[None, :], other=0.0)
    acc = tl.dot(b_s, b_v, acc, input_precision="ieee")
    at = (o_m < M)[:, None] & (o_c < C)[None, :]
    tl.store(out + o_n * C + o_c[None, :], acc.to(out.dtype.element_ty), mask=at)


@triton.jit(do_not_specialize=("P", "sxb", "sxn", "sob", "son"))
def prefix_kernel(stream, prefix_out, gamma, out, P, sxb, sxn, sob, son, C: tl.constexpr, BC: tl.constexpr):
    """Add a prefix token to its place in the stream."""
    i, o_c = tl.program_id(0), tl.arange(0, BC)
    i_b, i_p = (i // P).to(tl.int64), i % P
    b_o = tl.load(prefix_out + i.to(tl.int64) * C + o_c, mask=o_c < C, other=0.0).to(tl.float32)
    if gamma is not None:
        b_o *= tl.load(gamma + o_c, mask=o_c < C, other=0.0).to(tl.float32)
    b_o += tl.load(stream + i_b * sxb + i_p * sxn + o_c, mask=o_c < C, other=0.0).to(tl.float32)
    tl.store(out + i_b * sob + i_p * son + o_c, b_o.to(out.dtype.element_ty), mask=o_c < C)
