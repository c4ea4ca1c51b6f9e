"""What prefix tokens and patches read from each other on a GPU by Triton, in four launches.

Only P queries and keys exist, so all scores are products of tokens with vectors that depend on the prefix tokens alone.
`fold` makes the vectors and the values. `read` goes over the tokens: a program scores its tokens, writes how much each
patch takes, and pools the tokens by the weights that the prefix tokens give them, which are softmaxes of its tokens
alone. `combine` joins the programs' sums as flash-decoding does, and `project` takes the values of what was pooled.
Nothing is added up in an order that may change.

Shapes: B batch, N tokens, P prefix tokens, M = N - P patches, C channels, h heads, d head dimension, S columns of the
share, T tiles of tokens. A column is a head and a prefix token; those of a program are HG heads by PG or PR places for
prefix tokens, the places of a head side by side.
"""

# What kernels take are pointers, blocks and constants, of which only the last have types.
# mypy: disable-error-code="no-untyped-def"

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gspn2_kernels.memory import by_token

# Bytes of a lane, the smallest side of a product, columns of a program, tiles that are joined at once.
VECTOR, SIDE, COLUMNS, TILES = 16, 16, 128, 16
LOG2_E: tl.constexpr = tl.constexpr(math.log2(math.e))
_RUNTIME = ("rows", "N", "T", "sxb")


class Plan(NamedTuple):
    """Tokens and channels of a tile, warps of a program and tiles of channels under way."""

    tokens: int
    channels: int
    warps: int
    stages: int


def forward(
    x: Tensor,
    projected: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    log_sum_weight: Tensor,
    log_sum_bias: Tensor,
    heads: int,
    scale: float,
    columns: int,
    *,
    chosen: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `gspn2::read_prefix`, arguments as there.

    `columns` is S, at most 7 more than (P + 1) h; `chosen` are the constants of the pass over the tokens.
    """
    batch, tokens, channels = x.shape
    prefix, dim = projected.shape[1], projected.shape[2] // 3 // heads
    out = x.new_empty(batch, prefix, heads * dim)
    share, values = x.new_empty(batch, tokens - prefix, columns), x.new_empty(batch, columns, channels)
    if out.numel() == 0:
        return out, share, values
    x, projected, qkv_weight, proj_weight = by_token(x), *(t.contiguous() for t in (projected, qkv_weight, proj_weight))
    log_sum_weight, log_sum_bias = log_sum_weight.contiguous(), log_sum_bias.contiguous()
    qkv_bias = None if qkv_bias is None else qkv_bias.contiguous()
    vectors = x.new_empty(batch, (2 * prefix + 1) * heads, channels)
    level = torch.empty(batch, prefix * heads, dtype=torch.float32, device=x.device)
    rows, sizes = batch * prefix, {"C": channels, "H": heads, "P": prefix}
    tile = {"BM": min(max(triton.next_power_of_2(rows), SIDE), 64)}
    products = triton.cdiv(rows, tile["BM"]) * heads
    fold_kernel[(3 * products * triton.cdiv(channels, 128),)](
        projected, qkv_weight, qkv_bias, proj_weight, log_sum_weight, vectors, level, values, scale, rows,
        **sizes, **tile, D=dim, S=columns, BC=128, BD=_block(dim, 64), num_warps=4,
    )  # fmt: skip
    pooled = _pool(x, vectors, level, log_sum_bias, share, sizes, chosen or _plan(x.dtype, prefix, heads))
    project_kernel[(products * triton.cdiv(dim, SIDE),)](
        pooled, qkv_weight, qkv_bias, out, rows, **sizes, **tile, D=dim, BD=SIDE, BC=_block(channels, 128), NS=4,
        num_warps=4,
    )  # fmt: skip
    return out, share, values


def _pool(
    x: Tensor, vectors: Tensor, level: Tensor, log_sum_bias: Tensor, share: Tensor, sizes: dict[str, int], chosen: Plan
) -> Tensor:
    """Write the share, and pool the tokens for each column (B, P h, C)."""
    batch, tokens, channels = x.shape
    tiles, columns = triton.cdiv(tokens, chosen.tokens), level.shape[1]
    places, group = _group(sizes["P"], sizes["H"])
    parts = torch.empty(batch, tiles, columns, channels, dtype=torch.float32, device=x.device)
    top, total = torch.empty(2, batch, tiles, columns, dtype=torch.float32, device=x.device)
    # The batch stride comes in units that keep vectors aligned.
    unit = math.gcd(x.stride(0), VECTOR // x.element_size())
    read_kernel[(batch * tiles * triton.cdiv(sizes["H"], group),)](
        x, vectors, level, log_sum_bias, share, parts, top, total, tokens, tiles, x.stride(0) // unit, **sizes,
        S=share.shape[2], SX=x.stride(1), UX=unit, BM=chosen.tokens, BC=_block(channels, chosen.channels), HG=group,
        PG=triton.next_power_of_2(sizes["P"] + 1), PR=places, NS=chosen.stages, num_warps=chosen.warps,
    )  # fmt: skip
    pooled = x.new_empty(batch, columns, channels)
    block = _block(channels, 128)
    combine_kernel[(batch * columns * triton.cdiv(channels, block),)](
        parts, top, total, pooled, tiles, C=channels, K=columns, BT=TILES, BC=block, num_warps=4
    )
    return pooled


def _plan(dtype: torch.dtype, prefix: int, heads: int) -> Plan:
    """Choose what registers have room for; products of fp32 keep both of their sides there."""
    many = math.prod(_group(prefix, heads)) > 32
    if dtype == torch.float32:
        return Plan(32, 32, 8 if many else 4, 2)
    return Plan(64 if many else 128, 64, 8 if many else 4, 4)


def _group(prefix: int, heads: int) -> tuple[int, int]:
    """Choose the places for the prefix tokens of a head, and how many heads a program takes."""
    places = triton.next_power_of_2(prefix)
    most = max(COLUMNS // triton.next_power_of_2(prefix + 1), 1)
    return places, max(min(triton.next_power_of_2(heads), most), SIDE // places)


def _block(size: int, most: int) -> int:
    return min(max(triton.next_power_of_2(size), SIDE), most)


@triton.jit(do_not_specialize=_RUNTIME)
def fold_kernel(
    projected, qkv_weight, qkv_bias, proj_weight, log_sum_weight, vectors, level, values, scale, rows, C: tl.constexpr,
    H: tl.constexpr, P: tl.constexpr, D: tl.constexpr, S: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """Fold some prefix tokens' keys, queries or values (0, 1, 2) of one head into a weight.

    vectors are (B, (P + 1) h + P h, C): those of the gate, the mass last, then those of the prefix tokens.
    """
    i = tl.program_id(0)
    o_c, i_h = i % tl.cdiv(C, BC) * BC + tl.arange(0, BC), i // tl.cdiv(C, BC) % H
    which = i // (tl.cdiv(C, BC) * H) % 3
    o_m = i // (tl.cdiv(C, BC) * H * 3) * BM + tl.arange(0, BM)
    there, i_b, i_p = (o_m < rows)[:, None] & (o_c < C)[None, :], (o_m // P).to(tl.int64), o_m % P
    b_f, b_level = _fold(projected, qkv_weight, qkv_bias, proj_weight, which, o_m, rows, i_h, o_c, C, H, D, BM, BC, BD)
    first = there & (i_p == 0)[:, None]
    if which < 2:
        row = (i_b * (2 * P + 1) + which * (P + 1) + i_p) * H + i_h
        tl.store(vectors + (row * C)[:, None] + o_c[None, :], (b_f * scale).to(vectors.dtype.element_ty), mask=there)
        if which == 0:
            # The vectors of the mass are the same for all images.
            b_s = tl.load(log_sum_weight + i_h * C + o_c, mask=o_c < C, other=0.0)
            o_s = ((i_b * (2 * P + 1) + P) * H + i_h) * C
            tl.store(vectors + o_s[:, None] + o_c[None, :], tl.broadcast_to(b_s[None, :], (BM, BC)), mask=first)
            tl.store(level + (i_b * P + i_p) * H + i_h, b_level * scale, mask=(o_m < rows) & (i % tl.cdiv(C, BC) == 0))
    else:
        p_v = values + (i_b * S * C)[:, None] + o_c[None, :]
        tl.store(p_v + ((i_p * H + i_h) * C)[:, None], b_f.to(values.dtype.element_ty), mask=there)
        # The mass brings nothing, and neither do columns that fill up.
        for r in range(P * H + i_h, S, H):
            tl.store(p_v + r * C, tl.zeros((BM, BC), values.dtype.element_ty), mask=first)


@triton.jit
def _fold(
    projected, qkv_weight, qkv_bias, proj_weight, which, o_m, rows, i_h, o_c, C: tl.constexpr, H: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Multiply rows of one head by channels of the weight they fold into, and keys by the bias of queries."""
    # Keys meet the weight of queries, queries that of keys.
    part = tl.where(which < 2, 1 - which, 2)
    b_f, b_level = tl.zeros((BM, BC), tl.float32), tl.zeros((BM,), tl.float32)
    for k in range(0, D, BD):
        o_d = k + tl.arange(0, BD)
        p_r = projected + (o_m.to(tl.int64) * (3 * H * D))[:, None] + ((part * H + i_h) * D + o_d)[None, :]
        b_r = tl.load(p_r, mask=(o_m < rows)[:, None] & (o_d < D)[None, :], other=0.0)
        if which < 2:
            p_w = qkv_weight + (((which * H + i_h) * D + o_d) * C)[:, None] + o_c[None, :]
            b_w = tl.load(p_w, mask=(o_d < D)[:, None] & (o_c < C)[None, :], other=0.0)
        else:
            p_w = proj_weight + (o_c * (H * D))[:, None] + (i_h * D + o_d)[None, :]
            b_w = tl.trans(tl.load(p_w, mask=(o_c < C)[:, None] & (o_d < D)[None, :], other=0.0))
        b_f = tl.dot(b_r, b_w, b_f, input_precision="ieee")
        if qkv_bias is not None:
            b_b = tl.load(qkv_bias + i_h * D + o_d, mask=o_d < D, other=0.0).to(tl.float32)
            b_level += tl.sum(b_r.to(tl.float32) * b_b[None, :], 1)
    return b_f, b_level


@triton.jit(do_not_specialize=_RUNTIME)
def read_kernel(
    x, vectors, level, log_sum_bias, share, parts, top, total, N, T, sxb, C: tl.constexpr, H: tl.constexpr,
    P: tl.constexpr, S: tl.constexpr, SX: tl.constexpr, UX: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
    HG: tl.constexpr, PG: tl.constexpr, PR: tl.constexpr, NS: tl.constexpr,
):  # fmt: skip
    """Score a tile of tokens for some heads: write its share, and pool it for the prefix tokens."""
    i_g, i = tl.program_id(0) % tl.cdiv(H, HG), tl.program_id(0) // tl.cdiv(H, HG)
    # Images may lie further apart than 32 bits can tell, and so may tokens of one.
    i_b, o_m = (i // T).to(tl.int64), i % T * BM + tl.arange(0, BM)
    p_x = x + i_b * sxb * UX + (o_m.to(tl.int64) * SX)[:, None]
    p_v = vectors + i_b * ((2 * P + 1) * H * C)
    row_g, there_g = _columns(i_g, P + 1, H, HG, PG)
    row_r, there_r = _columns(i_g, P, H, HG, PR)
    b_g, b_r = tl.zeros((BM, HG * PG), tl.float32), tl.zeros((BM, HG * PR), tl.float32)
    for k in tl.range(0, C, BC, num_stages=NS):
        o_c = k + tl.arange(0, BC)
        b_x = tl.load(p_x + o_c[None, :], mask=(o_m < N)[:, None] & (o_c < C)[None, :], other=0.0)
        b_g = _score(b_g, b_x, p_v, row_g, there_g, o_c, C)
        b_r = _score(b_r, b_x, p_v, (P + 1) * H + row_r, there_r, o_c, C)
    b_g += tl.load(level + i_b * (P * H) + row_g, mask=there_g & (row_g < P * H), other=0.0)[None, :]
    b_g += tl.load(log_sum_bias + row_g - P * H, mask=there_g & (row_g >= P * H), other=0.0).to(tl.float32)[None, :]
    _store_share(share, b_g, i_g, i_b, o_m, N, H, P, S, BM, HG, PG)
    b_r = tl.where((o_m < N)[:, None], b_r * LOG2_E, float("-inf"))
    b_top = tl.max(b_r, 0)
    # The sum is that of the rounded weights, so that they are a mean of the tokens, whatever those have in common.
    b_w = tl.exp2(b_r - b_top[None, :]).to(x.dtype.element_ty)
    o_r = i.to(tl.int64) * (P * H) + row_r
    tl.store(top + o_r, b_top, mask=there_r)
    tl.store(total + o_r, tl.sum(b_w.to(tl.float32), 0), mask=there_r)
    for k in tl.range(0, C, BC, num_stages=NS):
        o_c = k + tl.arange(0, BC)
        b_x = tl.load(p_x + o_c[None, :], mask=(o_m < N)[:, None] & (o_c < C)[None, :], other=0.0)
        b_p = tl.dot(tl.trans(b_x), b_w, input_precision="ieee")
        tl.store(parts + (o_r * C)[None, :] + o_c[:, None], b_p, mask=there_r[None, :] & (o_c < C)[:, None])


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
def combine_kernel(parts, top, total, pooled, T, C: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """Join what the tiles of an image pooled for one of its K columns."""
    o_c = tl.program_id(0) % tl.cdiv(C, BC) * BC + tl.arange(0, BC)
    i = (tl.program_id(0) // tl.cdiv(C, BC)).to(tl.int64)
    i_k = i // K * T * K + i % K
    b_top = tl.full((BT,), float("-inf"), tl.float32)
    for t in range(0, T, BT):
        o_t = t + tl.arange(0, BT)
        b_top = tl.maximum(b_top, tl.load(top + i_k + o_t * K, mask=o_t < T, other=float("-inf")))
    highest = tl.max(b_top, 0)
    b_total, b_p = tl.zeros((BT,), tl.float32), tl.zeros((BT, BC), tl.float32)
    for t in range(0, T, BT):
        o_t = t + tl.arange(0, BT)
        o_k = i_k + o_t * K
        b_w = tl.exp2(tl.load(top + o_k, mask=o_t < T, other=float("-inf")) - highest)
        b_total += b_w * tl.load(total + o_k, mask=o_t < T, other=0.0)
        there = (o_t < T)[:, None] & (o_c < C)[None, :]
        b_p += b_w[:, None] * tl.load(parts + (o_k * C)[:, None] + o_c[None, :], mask=there, other=0.0)
    b_p = tl.sum(b_p, 0) / tl.sum(b_total, 0)
    tl.store(pooled + i * C + o_c, b_p.to(pooled.dtype.element_ty), mask=o_c < C)


@triton.jit(do_not_specialize=_RUNTIME)
def project_kernel(
    pooled, qkv_weight, qkv_bias, out, rows, C: tl.constexpr, H: tl.constexpr, P: tl.constexpr, D: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, NS: tl.constexpr,
):  # fmt: skip
    """Compute some of the values of one head for some prefix tokens."""
    i = tl.program_id(0)
    o_d, i_h = i % tl.cdiv(D, BD) * BD + tl.arange(0, BD), i // tl.cdiv(D, BD) % H
    o_m = (i // (tl.cdiv(D, BD) * H) * BM + tl.arange(0, BM)).to(tl.int64)
    o_w = (2 * H + i_h) * D + o_d
    b_o = tl.zeros((BM, BD), tl.float32)
    for k in tl.range(0, C, BC, num_stages=NS):
        o_c = k + tl.arange(0, BC)
        p_p = pooled + ((o_m * H + i_h) * C)[:, None] + o_c[None, :]
        b_p = tl.load(p_p, mask=(o_m < rows)[:, None] & (o_c < C)[None, :], other=0.0)
        b_w = tl.load(qkv_weight + (o_w * C)[:, None] + o_c[None, :], mask=(o_d < D)[:, None] & (o_c < C)[None, :], other=0.0)
        b_o = tl.dot(b_p, tl.trans(b_w), b_o, input_precision="ieee")
    if qkv_bias is not None:
        b_o += tl.load(qkv_bias + o_w, mask=o_d < D, other=0.0).to(tl.float32)[None, :]
    p_o = out + (o_m * (H * D))[:, None] + (i_h * D + o_d)[None, :]
    tl.store(p_o, b_o.to(out.dtype.element_ty), mask=(o_m < rows)[:, None] & (o_d < D)[None, :])
