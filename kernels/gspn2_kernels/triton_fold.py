"""Products of prefix tokens with the weights of an attention layer on a GPU by Triton, a launch for each side.

A program multiplies some prefix tokens, of whichever images, by the weight of one head: so a weight is read once, and
not once an image.

Shapes: B batch, P prefix tokens, C channels, h heads, d head dimension, S columns of the share.
"""

# What kernels take are pointers, blocks and constants, of which only the last have types.
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from gspn2_kernels.memory import cdiv, power_of_2

# The smallest side of a product, and the widest of one with weights; those of fp32 keep all they multiply in registers.
SIDE, WIDEST, WIDEST_FP32 = 16, 64, 16
_RUNTIME = ("rows",)


def fold(
    projected: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    log_sum_weight: Tensor,
    log_sum_bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    heads: int,
    scale: float,
    columns: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fold keys, queries and values of prefix tokens into the weights that they meet.

    Scores are products of vectors with normed tokens. The norm's weight joins the vectors, so that they are products
    with tokens whose mean is taken away and whose deviation is 1; its bias is a constant of each score.

    Args:
        projected: (B, P, 3 h d).
        qkv_weight: (3 h d, C).
        qkv_bias: (3 h d,), or None.
        proj_weight: (C, h d).
        log_sum_weight: (h, C).
        log_sum_bias: (h,).
        norm_weight: (C,), or None.
        norm_bias: (C,), or None.
        heads: h.
        scale: Factor of the scores.
        columns: S, at least (P + 1) h.

    Returns:
        Vectors (B, (2 P + 1) h, C): P h for the patches, h for the mass and P h for the prefix tokens. For each, in
        blocks of WIDEST channels, what they add up to and the parts of its score's constant (B, (2 P + 1) h, blocks, 2)
        in fp32. And the values (B, S, C) of the prefix tokens, then 0.
    """
    batch, prefix, width = projected.shape
    channels, dim = qkv_weight.shape[1], width // 3 // heads
    vectors = projected.new_empty(batch, (2 * prefix + 1) * heads, channels)
    blocks = cdiv(channels, WIDEST)
    sums = torch.empty(*vectors.shape[:2], blocks, 2, dtype=torch.float32, device=projected.device)
    values = projected.new_empty(batch, columns, channels)
    qkv_bias, norm_weight, norm_bias = (
        None if t is None else t.contiguous() for t in (qkv_bias, norm_weight, norm_bias)
    )
    rows, most = batch * prefix, _widest(projected)
    tile = {"BM": block(rows, most), "BD": block(dim, most), "BC": WIDEST}
    fold_kernel[(3 * heads * cdiv(rows, tile["BM"]) * blocks,)](
        projected.contiguous(), qkv_weight.contiguous(), qkv_bias, proj_weight.contiguous(),
        log_sum_weight.contiguous(), log_sum_bias.contiguous(), norm_weight, norm_bias, vectors, sums, values, scale,
        rows, C=channels, H=heads, P=prefix, D=dim, S=columns, **tile, num_warps=4,
    )  # fmt: skip
    return vectors, sums, values


def project(pooled: Tensor, qkv_weight: Tensor, qkv_bias: Tensor | None, heads: int) -> Tensor:
    """Compute the values (B, P, h d) of what was pooled for each prefix token and head, (B, P h, C).

    The weight (3 h d, C) and the bias (3 h d,), or None, are those of queries, keys and values.
    """
    batch, columns, channels = pooled.shape
    prefix, dim = columns // heads, qkv_weight.shape[0] // 3 // heads
    out = pooled.new_empty(batch, prefix, heads * dim)
    rows = batch * prefix
    qkv_bias = None if qkv_bias is None else qkv_bias.contiguous()
    tile = {"BM": block(rows, _widest(pooled)), "BD": SIDE, "BC": block(channels, 128)}
    project_kernel[(heads * cdiv(rows, tile["BM"]) * cdiv(dim, SIDE),)](
        pooled, qkv_weight.contiguous(), qkv_bias, out, rows, C=channels, H=heads, D=dim, **tile, NS=4, num_warps=4
    )
    return out


def block(size: int, most: int) -> int:
    """Choose how much of a size a tile takes."""
    return min(max(power_of_2(size), SIDE), most)


def _widest(t: Tensor) -> int:
    return WIDEST_FP32 if t.dtype == torch.float32 else WIDEST


@triton.jit(do_not_specialize=_RUNTIME)
def fold_kernel(
    projected, qkv_weight, qkv_bias, proj_weight, log_sum_weight, log_sum_bias, norm_weight, norm_bias, vectors, sums,
    values, scale, rows, C: tl.constexpr, H: tl.constexpr, P: tl.constexpr, D: tl.constexpr, S: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Fold some prefix tokens' keys, queries or values (0, 1, 2) of one head into a weight.

    vectors are (B, (P + 1) h + P h, C): those of the gate, the mass last, then those of the prefix tokens.
    """
    i = tl.program_id(0)
    i_c, i_h = i % tl.cdiv(C, BC), i // tl.cdiv(C, BC) % H
    o_c, which = i_c * BC + tl.arange(0, BC), i // (tl.cdiv(C, BC) * H) % 3
    o_m = i // (tl.cdiv(C, BC) * H * 3) * BM + tl.arange(0, BM)
    i_b, i_p = (o_m // P).to(tl.int64), o_m % P
    b_f, b_level = _fold(projected, qkv_weight, qkv_bias, proj_weight, which, o_m, rows, i_h, o_c, C, H, D, BM, BC, BD)
    if which < 2:
        row = (i_b * (2 * P + 1) + which * (P + 1) + i_p) * H + i_h
        # The bias of queries counts for keys alone: that of keys shifts all scores of a query alike.
        b_level = tl.where((which == 0) & (i_c == 0), b_level * scale, 0.0)
        _store_vectors(vectors, sums, b_f * scale, b_level, row, o_m < rows, norm_weight, norm_bias, i_c, o_c, C, BC)
        if which == 0:
            # The vectors of the mass are the same for all images.
            b_s = tl.load(log_sum_weight + i_h * C + o_c, mask=o_c < C, other=0.0).to(tl.float32)
            b_level = tl.zeros((BM,), tl.float32) + tl.load(log_sum_bias + i_h).to(tl.float32)
            _store_vectors(
                vectors, sums, tl.broadcast_to(b_s[None, :], (BM, BC)), tl.where(i_c == 0, b_level, 0.0),
                (i_b * (2 * P + 1) + P) * H + i_h, (o_m < rows) & (i_p == 0), norm_weight, norm_bias, i_c, o_c, C, BC,
            )  # fmt: skip
    else:
        there, p_v = (o_m < rows)[:, None] & (o_c < C)[None, :], values + (i_b * S * C)[:, None] + o_c[None, :]
        tl.store(p_v + ((i_p * H + i_h) * C)[:, None], b_f.to(values.dtype.element_ty), mask=there)
        # The mass brings nothing, and neither do columns that fill up.
        for r in range(P * H + i_h, S, H):
            nothing = tl.zeros((BM, BC), values.dtype.element_ty)
            tl.store(p_v + r * C, nothing, mask=there & (i_p == 0)[:, None])


@triton.jit
def _store_vectors(
    vectors, sums, b_f, b_level, row, there, norm_weight, norm_bias, i_c, o_c, C: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """Write some channels of vectors times the norm's weight, what they add up to, and their part in the constant."""
    b_v = b_f
    if norm_weight is not None:
        b_v *= tl.load(norm_weight + o_c, mask=o_c < C, other=0.0).to(tl.float32)[None, :]
    b_v = b_v.to(vectors.dtype.element_ty)
    tl.store(vectors + (row * C)[:, None] + o_c[None, :], b_v, mask=there[:, None] & (o_c < C)[None, :])
    if norm_bias is not None:
        b_b = tl.load(norm_bias + o_c, mask=o_c < C, other=0.0).to(tl.float32)
        b_level += tl.sum(b_f * b_b[None, :], 1)
    p_s = sums + (row * tl.cdiv(C, BC) + i_c) * 2
    tl.store(p_s, tl.sum(b_v.to(tl.float32), 1), mask=there)
    tl.store(p_s + 1, b_level, mask=there)


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
            p_q = qkv_weight + (((which * H + i_h) * D + o_d) * C)[:, None] + o_c[None, :]
            b_w = tl.load(p_q, mask=(o_d < D)[:, None] & (o_c < C)[None, :], other=0.0)
        else:
            p_o = proj_weight + (o_c * (H * D))[:, None] + (i_h * D + o_d)[None, :]
            b_w = tl.trans(tl.load(p_o, mask=(o_c < C)[:, None] & (o_d < D)[None, :], other=0.0))
        b_f = tl.dot(b_r, b_w, b_f, input_precision="ieee")
        if qkv_bias is not None:
            b_b = tl.load(qkv_bias + i_h * D + o_d, mask=o_d < D, other=0.0).to(tl.float32)
            b_level += tl.sum(b_r.to(tl.float32) * b_b[None, :], 1)
    return b_f, b_level


@triton.jit(do_not_specialize=_RUNTIME)
def project_kernel(
    pooled, qkv_weight, qkv_bias, out, rows, C: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BM: tl.constexpr,
    BC: tl.constexpr, BD: tl.constexpr, NS: tl.constexpr,
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
        p_w = qkv_weight + (o_w * C)[:, None] + o_c[None, :]
        b_w = tl.load(p_w, mask=(o_d < D)[:, None] & (o_c < C)[None, :], other=0.0)
        b_o = tl.dot(b_p, tl.trans(b_w), b_o, input_precision="ieee")
    if qkv_bias is not None:
        b_o += tl.load(qkv_bias + o_w, mask=o_d < D, other=0.0).to(tl.float32)[None, :]
    p_o = out + (o_m * (H * D))[:, None] + (i_h * D + o_d)[None, :]
    tl.store(p_o, b_o.to(out.dtype.element_ty), mask=(o_m < rows)[:, None] & (o_d < D)[None, :])
