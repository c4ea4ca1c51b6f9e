"""What prefix tokens and patches read from each other on a GPU by Triton, in four launches.

Only P queries and keys exist, so all scores are products of tokens with vectors that depend on the prefix tokens alone.
`fold` makes these and the values. A program of `read` scores a tile of tokens, writes how much each patch takes, and
pools the tokens by the weights that prefix tokens give them: softmaxes within the tile, which `combine` joins, as
flash-decoding does. `project` takes the values of what was pooled. Sums always have the same order.

Shapes: B batch, N tokens, P prefix tokens, C channels, h heads, S columns of the share, T tiles of tokens. A column of
scores is a head and a prefix token; a program has those of HG heads by PG (gate) or PR (read) places for prefix tokens,
the places of a head side by side.
"""

# What kernels take are pointers, blocks and constants, of which only the last have types.
# mypy: disable-error-code="no-untyped-def"

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gspn2_kernels.memory import batch_unit, by_token, cdiv, power_of_2
from gspn2_kernels.prefix import share_columns
from gspn2_kernels.triton_fold import SIDE, block, fold, project
from gspn2_kernels.triton_norm import load_statistics

# Most columns of the gate in a program unless one head has more.
COLUMNS = 128
# Tiles that are compared at once, those that are joined at once, and how often those are under way.
COMPARED, JOINED, AHEAD = 256, 16, 4
LOG2_E: tl.constexpr = tl.constexpr(math.log2(math.e))
_RUNTIME = ("N", "T", "sxb")


class Plan(NamedTuple):
    """Tokens and channels of a tile, warps of a program and tiles of channels under way."""

    tokens: int
    channels: int
    warps: int
    stages: int


def forward(
    stream: Tensor,
    statistics: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    projected: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    log_sum_weight: Tensor,
    log_sum_bias: Tensor,
    heads: int,
    scale: float,
    *,
    chosen: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `gspn2::read_prefix`, arguments as there; `chosen` are the constants of the pass over the tokens."""
    batch, tokens, channels = stream.shape
    prefix, width = projected.shape[1:]
    columns = share_columns(prefix, heads)
    share = projected.new_empty(batch, tokens - prefix, columns)
    if stream.numel() == 0:
        return projected.new_empty(batch, prefix, width // 3), share, projected.new_empty(batch, columns, channels)
    norm = norm_weight, norm_bias
    weights = qkv_weight, qkv_bias, proj_weight, log_sum_weight, log_sum_bias
    vectors, sums, values = fold(projected, *weights, *norm, heads, scale, columns)
    pooled = _pool(by_token(stream), statistics.contiguous(), norm, vectors, sums, share, heads, chosen)
    return project(pooled, qkv_weight, qkv_bias, heads), share, values


def _pool(
    stream: Tensor,
    statistics: Tensor,
    norm: tuple[Tensor | None, ...],
    vectors: Tensor,
    sums: Tensor,
    share: Tensor,
    heads: int,
    chosen: Plan | None,
) -> Tensor:
    """Write the share, and pool the tokens for each prefix token and head (B, P h, C)."""
    batch, tokens, channels = stream.shape
    columns = (vectors.shape[1] - heads) // 2
    prefix = columns // heads
    chosen = chosen or _plan(vectors.dtype, prefix, heads)
    tiles, unit = cdiv(tokens, chosen.tokens), batch_unit(stream)
    places, group = _group(prefix, heads)
    parts = torch.empty(batch, tiles, columns, channels, dtype=torch.float32, device=stream.device)
    top, total = torch.empty(2, batch, tiles, columns, dtype=torch.float32, device=stream.device)
    norm_weight, norm_bias = (None if t is None else t.contiguous() for t in norm)
    read_kernel[(batch * tiles * cdiv(heads, group),)](
        stream, statistics, norm_weight, norm_bias, vectors, sums, share, parts, top, total, tokens, tiles,
        stream.stride(0) // unit, C=channels, H=heads, P=prefix, S=share.shape[2], SX=stream.stride(1), UX=unit,
        BM=chosen.tokens, BC=block(channels, chosen.channels), HG=group, PG=power_of_2(prefix + 1),
        PR=places, NB=sums.shape[2], NS=chosen.stages, num_warps=chosen.warps,
    )  # fmt: skip
    pooled = vectors.new_empty(batch, columns, channels)
    # Of few tiles a program joins more channels: a block is as large, or small images would wait for launches.
    joined = min(JOINED, power_of_2(tiles))
    piece = block(channels, 128 * JOINED // joined)
    combine_kernel[(batch * columns * cdiv(channels, piece),)](
        parts, top, total, pooled, tiles, C=channels, K=columns, BA=COMPARED if tiles > JOINED else JOINED, BT=joined,
        BC=piece, NS=AHEAD, num_warps=4,
    )  # fmt: skip
    return pooled


def _plan(dtype: torch.dtype, prefix: int, heads: int) -> Plan:
    """Choose what registers have room for, where products of fp32 keep all they multiply."""
    if prefix >= COLUMNS:
        return Plan(16, 16, 8, 1)
    if dtype == torch.float32:
        return Plan(32, 32, 8, 2)
    places, group = _group(prefix, heads)
    if power_of_2(prefix + 1) * group > COLUMNS // 2:
        return Plan(32, 64, 8, 3)
    return Plan(64, 64, 8, 4) if places * group > 32 else Plan(128, 64, 4, 4)


def _group(prefix: int, heads: int) -> tuple[int, int]:
    """Choose the places for the prefix tokens of a head, and how many heads a program takes."""
    places = power_of_2(prefix)
    most = max(COLUMNS // power_of_2(prefix + 1), 1)
    return places, max(min(power_of_2(heads), most), SIDE // places)


@triton.jit(do_not_specialize=_RUNTIME)
def read_kernel(
    x, statistics, norm_weight, norm_bias, vectors, sums, share, parts, top, total, N, T, sxb, C: tl.constexpr,
    H: tl.constexpr, P: tl.constexpr, S: tl.constexpr, SX: tl.constexpr, UX: tl.constexpr, BM: tl.constexpr,
    BC: tl.constexpr, HG: tl.constexpr, PG: tl.constexpr, PR: tl.constexpr, NB: tl.constexpr, NS: tl.constexpr,
):  # fmt: skip
    """Score a tile of tokens for some heads: write its share, and pool it for the prefix tokens.

    Tokens are multiplied as they are; scores and sums are normed instead of them. Not so where the stream has more
    digits than the products: there its mean is taken away before they are lost.
    """
    i_g, i = tl.program_id(0) % tl.cdiv(H, HG), tl.program_id(0) // tl.cdiv(H, HG)
    # Images may lie further apart than 32 bits can tell, and so may tokens of one.
    i_b, o_m = (i // T).to(tl.int64), i % T * BM + tl.arange(0, BM)
    p_x = x + i_b * sxb * UX + (o_m.to(tl.int64) * SX)[:, None]
    p_v, p_s = vectors + i_b * ((2 * P + 1) * H * C), sums + i_b * ((2 * P + 1) * H * NB * 2)
    row_g, there_g = _columns(i_g, P + 1, H, HG, PG)
    row_r, there_r = _columns(i_g, P, H, HG, PR)
    b_s, b_d = load_statistics(statistics, i_b * N + o_m, o_m < N)
    b_g, b_r = tl.zeros((BM, HG * PG), tl.float32), tl.zeros((BM, HG * PR), tl.float32)
    for k in tl.range(0, C, BC, num_stages=NS):
        o_c = k + tl.arange(0, BC)
        b_x = _read(p_x, o_m < N, b_s, b_d, o_c, C, vectors.dtype.element_ty)
        b_g = _score(b_g, b_x, p_v, row_g, there_g, o_c, C)
        b_r = _score(b_r, b_x, p_v, (P + 1) * H + row_r, there_r, o_c, C)
    normed: tl.constexpr = x.dtype.element_ty != vectors.dtype.element_ty
    b_f, b_m = (tl.full((BM,), 1.0, tl.float32), tl.zeros((BM,), tl.float32)) if normed else (b_s, b_d)
    b_g = _normed(b_g, b_f, b_m, p_s, row_g, there_g, NB)
    _store_share(share, b_g, i_g, i_b, o_m, N, H, P, S, BM, HG, PG)
    b_r = _normed(b_r, b_f, b_m, p_s, (P + 1) * H + row_r, there_r, NB)
    b_r = tl.where((o_m < N)[:, None], b_r * LOG2_E, float("-inf"))
    b_top = tl.max(b_r, 0)
    b_w = (tl.exp2(b_r - b_top[None, :]) * b_f[:, None]).to(vectors.dtype.element_ty)
    # The sum is that of the rounded weights, so that they are a mean of the tokens, whatever those have in common.
    b_p = tl.where((o_m < N)[:, None], b_w.to(tl.float32) / b_f[:, None], 0.0)
    b_total, b_mean = tl.sum(b_p, 0), tl.sum(b_p * b_m[:, None], 0)
    o_r = i.to(tl.int64) * (P * H) + row_r
    tl.store(top + o_r, b_top, mask=there_r)
    tl.store(total + o_r, b_total, mask=there_r)
    for k in tl.range(0, C, BC, num_stages=NS):
        o_c = k + tl.arange(0, BC)
        b_x = _read(p_x, o_m < N, b_s, b_d, o_c, C, vectors.dtype.element_ty)
        b_a = tl.dot(tl.trans(b_x), b_w, input_precision="ieee") - b_mean[None, :]
        b_a = _affine(b_a, norm_weight, norm_bias, b_total, o_c, C)
        tl.store(parts + (o_r * C)[None, :] + o_c[:, None], b_a, mask=there_r[None, :] & (o_c < C)[:, None])


@triton.jit
def _read(p_x, there, b_f, b_m, o_c, C: tl.constexpr, DTYPE: tl.constexpr):
    """Read some channels of tokens, normed where they have another type than they are wanted in."""
    b_x = tl.load(p_x + o_c[None, :], mask=there[:, None] & (o_c < C)[None, :], other=0.0)
    if b_x.dtype != DTYPE:
        b_x = (b_x.to(tl.float32) * b_f[:, None] - b_m[:, None]).to(DTYPE)
    return b_x


@triton.jit
def _normed(b_s, b_f, b_m, p_s, row, there, NB: tl.constexpr):
    """Norm the scores of tokens: factor, mean, and the constant of each column, which come in NB parts."""
    b_v, b_c = tl.zeros(there.shape, tl.float32), tl.zeros(there.shape, tl.float32)
    for k in tl.static_range(NB):
        b_v += tl.load(p_s + (row * NB + k) * 2, mask=there, other=0.0)
        b_c += tl.load(p_s + (row * NB + k) * 2 + 1, mask=there, other=0.0)
    return b_s * b_f[:, None] - b_m[:, None] * b_v[None, :] + b_c[None, :]


@triton.jit
def _affine(b_a, weight, bias, b_total, o_c, C: tl.constexpr):
    """Scale each channel of sums, and add its bias as often as tokens were added up."""
    if weight is not None:
        b_a *= tl.load(weight + o_c, mask=o_c < C, other=0.0).to(tl.float32)[:, None]
    if bias is not None:
        b_a += tl.load(bias + o_c, mask=o_c < C, other=0.0).to(tl.float32)[:, None] * b_total[None, :]
    return b_a


@triton.jit
def _columns(i_g, P: tl.constexpr, H: tl.constexpr, HG: tl.constexpr, PG: tl.constexpr):
    """Tell the row p h + head of each column of a program, and whether there is one."""
    o_k = tl.arange(0, HG * PG)
    i_p, i_h = o_k % PG, i_g * HG + o_k // PG
    return i_p * H + i_h, (i_p < P) & (i_h < H)


@triton.jit
def _score(b_s, b_x, p_v, row, there, o_c, C: tl.constexpr):
    """Add to scores what some channels bring."""
    b_v = tl.load(p_v + (row * C)[:, None] + o_c[None, :], mask=there[:, None] & (o_c < C)[None, :], other=0.0)
    return tl.dot(b_x, tl.trans(b_v), b_s, input_precision="ieee")


@triton.jit
def _store_share(
    share, b_g, i_g, i_b, o_m, N, H: tl.constexpr, P: tl.constexpr, S: tl.constexpr, BM: tl.constexpr,
    HG: tl.constexpr, PG: tl.constexpr,
):  # fmt: skip
    """Write the softmax of each head's scores over the prefix tokens and the mass."""
    o_p, o_h = tl.arange(0, PG)[None, None, :], i_g * HG + tl.arange(0, HG)[None, :, None]
    b_g = tl.where(o_p <= P, tl.reshape(b_g, (BM, HG, PG)) * LOG2_E, float("-inf"))
    b_g = tl.exp2(b_g - tl.max(b_g, 2)[:, :, None])
    b_g = (b_g / tl.sum(b_g, 2)[:, :, None]).to(share.dtype.element_ty)
    patch = (o_m >= P) & (o_m < N)
    o_s = (i_b * (N - P) + o_m - P) * S
    tl.store(share + o_s[:, None, None] + o_p * H + o_h, b_g, mask=patch[:, None, None] & (o_p <= P) & (o_h < H))
    if S > (P + 1) * H:
        # Columns that fill up, fewer than eight.
        o_k = (P + 1) * H + tl.arange(0, 8)
        nothing = tl.zeros((BM, 8), share.dtype.element_ty)
        tl.store(share + o_s[:, None] + o_k[None, :], nothing, mask=patch[:, None] & (o_k < S)[None, :] & (i_g == 0))


@triton.jit(do_not_specialize=_RUNTIME)
def combine_kernel(
    parts, top, total, pooled, T, C: tl.constexpr, K: tl.constexpr, BA: tl.constexpr, BT: tl.constexpr,
    BC: tl.constexpr, NS: tl.constexpr,
):  # fmt: skip
    """Join what the tiles of an image pooled for one of its K columns."""
    o_c = tl.program_id(0) % tl.cdiv(C, BC) * BC + tl.arange(0, BC)
    i = (tl.program_id(0) // tl.cdiv(C, BC)).to(tl.int64)
    i_k = i // K * T * K + i % K
    b_top = tl.full((BA,), float("-inf"), tl.float32)
    for t in range(0, T, BA):
        o_t = t + tl.arange(0, BA)
        b_top = tl.maximum(b_top, tl.load(top + i_k + o_t * K, mask=o_t < T, other=float("-inf")))
    highest = tl.max(b_top, 0)
    b_total, b_p = tl.zeros((BT,), tl.float32), tl.zeros((BT, BC), tl.float32)
    for t in tl.range(0, T, BT, num_stages=NS):
        o_t = t + tl.arange(0, BT)
        o_k = i_k + o_t * K
        b_w = tl.exp2(tl.load(top + o_k, mask=o_t < T, other=float("-inf")) - highest)
        b_total += b_w * tl.load(total + o_k, mask=o_t < T, other=0.0)
        there = (o_t < T)[:, None] & (o_c < C)[None, :]
        b_p += b_w[:, None] * tl.load(parts + (o_k * C)[:, None] + o_c[None, :], mask=there, other=0.0)
    b_p = tl.sum(b_p, 0) / tl.sum(b_total, 0)
    tl.store(pooled + i * C + o_c, b_p.to(pooled.dtype.element_ty), mask=o_c < C)
