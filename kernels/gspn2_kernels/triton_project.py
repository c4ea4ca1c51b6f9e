"""A linear layer of normed patches on a GPU by Triton: the tokens are normed on their way to the product.

Shapes: B batch, N = P + M tokens, P prefix tokens, M patches, C channels, R numbers of a patch; a tile is BM patches by
BN numbers, in steps of BK channels.
"""

# What kernels take are pointers, blocks and constants, of which only the last have types.
# mypy: disable-error-code="no-untyped-def"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gspn2_kernels.memory import batch_unit, by_token, cdiv, power_of_2
from gspn2_kernels.triton_norm import affine, load_statistics

# The smallest and the largest number of columns of a product.
FEWEST, MOST = 16, 128


class Plan(NamedTuple):
    """Patches of a tile, channels of a step, warps of a program, and steps under way."""

    patches: int = 64
    step: int = 64
    warps: int = 4
    stages: int = 4


# Products of fp32 keep all they multiply in registers.
FP32 = Plan(32, 32, 4, 2)


def project(
    stream: Tensor,
    statistics: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    prefix: int,
    *,
    chosen: Plan | None = None,
) -> Tensor:
    """Compute `gspn2::project`, arguments as there; `chosen` are the kernel's constants."""
    batch, tokens, channels = stream.shape
    patches, numbers = tokens - prefix, weight.shape[0]
    out = torch.empty(batch, patches, numbers, dtype=weight.dtype, device=stream.device)
    if out.numel() == 0:
        return out
    chosen = chosen or (FP32 if weight.dtype == torch.float32 else Plan())
    stream, statistics = by_token(stream), statistics.contiguous()
    norm_weight, norm_bias, bias = (None if t is None else t.contiguous() for t in (norm_weight, norm_bias, bias))
    columns = min(max(power_of_2(numbers), FEWEST), MOST)
    unit, tiles = batch_unit(stream), cdiv(patches, chosen.patches) * cdiv(numbers, columns)
    project_kernel[(batch * tiles,)](
        stream, statistics, norm_weight, norm_bias, weight.contiguous(), bias, out, tokens, prefix,
        stream.stride(0) // unit, C=channels, R=numbers, SX=stream.stride(1), UX=unit, BM=chosen.patches, BN=columns,
        BK=chosen.step, NS=chosen.stages, num_warps=chosen.warps,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=("N", "P", "sxb"))
def project_kernel(
    stream, statistics, norm_weight, norm_bias, weight, bias, out, N, P, sxb, C: tl.constexpr, R: tl.constexpr,
    SX: tl.constexpr, UX: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, NS: tl.constexpr,
):  # fmt: skip
    """Compute a tile; programs that lie side by side share the patches."""
    i_n, i = tl.program_id(0) % tl.cdiv(R, BN), tl.program_id(0) // tl.cdiv(R, BN)
    # Images may lie further apart than 32 bits can tell, and so may tokens of one.
    i_b, o_m = (i // tl.cdiv(N - P, BM)).to(tl.int64), i % tl.cdiv(N - P, BM) * BM + tl.arange(0, BM)
    o_n, o_k, there = i_n * BN + tl.arange(0, BN), tl.arange(0, BK), o_m < N - P
    p_x = stream + i_b * sxb * UX + ((P + o_m).to(tl.int64) * SX)[:, None] + o_k[None, :]
    p_w = weight + (o_n * C)[:, None] + o_k[None, :]
    b_r, b_m = load_statistics(statistics, i_b * N + P + o_m, there)
    b_o = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, C, BK, num_stages=NS):
        inside = (o_k < C - k)[None, :]
        b_x = tl.load(p_x + k, mask=there[:, None] & inside, other=0.0)
        b_w = tl.load(p_w + k, mask=(o_n < R)[:, None] & inside, other=0.0)
        b_a = affine(b_x.to(tl.float32) * b_r[:, None] - b_m[:, None], norm_weight, norm_bias, k + o_k, C)
        if C % BK:
            # Without a weight of the norm what is beyond the channels is not 0, and may be more than fp16 holds.
            b_a = tl.where(inside, b_a, 0.0)
        b_o = tl.dot(b_a.to(weight.dtype.element_ty), tl.trans(b_w), b_o, input_precision="ieee")
    if bias is not None:
        b_o += tl.load(bias + o_n, mask=o_n < R, other=0.0).to(tl.float32)[None, :]
    p_o = out + ((i_b * (N - P) + o_m) * R)[:, None] + o_n[None, :]
    tl.store(p_o, b_o.to(out.dtype.element_ty), mask=there[:, None] & (o_n < R)[None, :])
