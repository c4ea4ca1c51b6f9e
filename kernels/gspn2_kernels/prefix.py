"""The torch op `gspn2::read_prefix`: what prefix tokens and patches read from each other, for inference.

Prefix tokens keep softmax attention over all tokens; patches read the prefix tokens beside a mass that a linear map of
each patch stands for. The op runs Triton kernels, and nothing else: it serves tensors for which `by_triton` holds.

Shapes: B batch, N tokens, P prefix tokens, M = N - P patches, C channels, h heads, d head dimension, S columns of the
share.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gspn2_kernels.norm import STREAM, Normed, check_normed
from gspn2_kernels.operands import check_first, check_kernel, check_other, register_autocast
from gspn2_kernels.registration import define

_SCHEMA = (
    "read_prefix(Tensor stream, Tensor statistics, Tensor? norm_weight, Tensor? norm_bias, Tensor projected,"
    " Tensor qkv_weight, Tensor? qkv_bias, Tensor proj_weight, Tensor log_sum_weight, Tensor log_sum_bias, int heads,"
    " float scale) -> (Tensor read, Tensor share, Tensor values)"
)


def read_prefix(
    normed: Normed,
    projected: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    log_sum_weight: Tensor,
    log_sum_bias: Tensor,
    heads: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Read in both directions without a key or a value of a patch, for inference.

    The tensors share one dtype (fp32, fp16 or bf16) and one GPU; the stream and what norms it may have another, and
    autocast casts all but these. Sums and softmaxes are in fp32, and there is no gradient.

    Args:
        normed: Tokens (B, N, C), the prefix tokens first, which are not written.
        projected: Queries, keys and values of the prefix tokens (B, P, 3 h d), biases included.
        qkv_weight: Weight (3 h d, C) that made them.
        qkv_bias: Its bias (3 h d,), or None.
        proj_weight: Weight (C, h d) of the projection after the attention.
        log_sum_weight: What predicts from a patch the log-sum-exp of its scores over all patches (h, C).
        log_sum_bias: Its bias (h,).
        heads: h.
        scale: Factor of all scores but the predicted ones.

    Returns:
        What prefix tokens read (B, P, h d), before the projection after the attention; how much each patch takes
        (B, M, S) of S values (B, S, C), which are the projected ones. Column p h + head is that of prefix token p; the
        last h of (P + 1) h are those of the mass, whose values are 0; S is the next multiple of eight, filled up by 0.

    Raises:
        ValueError: A shape, dtype, device or number does not fit; the message names the argument.
    """
    out: tuple[Tensor, Tensor, Tensor] = torch.ops.gspn2.read_prefix(
        *normed.unwritten(),
        *(projected, qkv_weight, qkv_bias, proj_weight, log_sum_weight, log_sum_bias, heads, scale),
    )
    return out


def _check(
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
) -> None:
    """Raise a ValueError that names the first argument that does not fit the stream, projected and heads."""
    check_normed(stream, statistics, norm_weight, norm_bias)
    check_first("projected", "(B, P, 3 h d)", projected)
    check_kernel("projected", projected)
    batch, tokens, channels = stream.shape
    prefix, width = projected.shape[1:]
    if heads < 1 or width % (3 * heads):
        raise ValueError(f"heads is {heads}, expected a divisor of a third of {width}, the last size of projected")
    check_other("projected", "(B, P, 3 h d)", projected, (batch, prefix, width), stream, projected.dtype)
    if not 1 <= prefix <= tokens:
        raise ValueError(f"projected has {prefix} prefix tokens, expected 1 to {tokens}, the number of tokens")
    check_other("qkv_weight", "(3 h d, C)", qkv_weight, (width, channels), projected)
    check_other("qkv_bias", "(3 h d,)", qkv_bias, (width,), projected)
    check_other("proj_weight", "(C, h d)", proj_weight, (channels, width // 3), projected)
    check_other("log_sum_weight", "(h, C)", log_sum_weight, (heads, channels), projected)
    check_other("log_sum_bias", "(h,)", log_sum_bias, (heads,), projected)


def share_columns(prefix: int, heads: int) -> int:
    """Count the columns of the share: products with other numbers than multiples of eight are slow ones on a GPU."""
    return ((prefix + 1) * heads + 7) // 8 * 8


@define(_SCHEMA)
def _read_prefix(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN401  those of `read_prefix`, in order
    from gspn2_kernels import triton_prefix

    _check(*arguments[:-1])
    with torch.cuda.device_of(arguments[0]):
        return triton_prefix.forward(*arguments)


@torch.library.register_fake("gspn2::read_prefix")
def _read_prefix_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN401
    _check(*arguments[:-1])
    stream, projected, heads = arguments[0], arguments[4], arguments[-2]
    batch, tokens, channels = stream.shape
    prefix, width = projected.shape[1:]
    columns = share_columns(prefix, heads)
    return (
        projected.new_empty(batch, prefix, width // 3),
        projected.new_empty(batch, tokens - prefix, columns),
        projected.new_empty(batch, columns, channels),
    )


register_autocast("read_prefix", torch.ops.gspn2.read_prefix, STREAM)


@register_flop_formula(torch.ops.gspn2.read_prefix)
def _flops(stream: torch.Size, *others: Any, **__: object) -> int:
    """Count 2 FLOPs for a multiply-add, as torch does."""
    (batch, tokens, channels), (_, prefix, width), heads = stream, others[3], others[-2]
    # Of a token the scores, those of the gate and its mass too, and its part in what is pooled; of a prefix token four
    # products with weights.
    return 2 * batch * channels * (tokens * (3 * prefix + 1) * heads + 4 * prefix * width // 3)
