"""The torch op `gspn2::project`: a linear layer of the patches among normed tokens, for inference.

Shapes: B batch, N = P + M tokens, P prefix tokens, M patches, C channels, R numbers of a patch.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gspn2_kernels.norm import STREAM, Normed, check_normed, check_prefix
from gspn2_kernels.operands import check_first, check_other, register_autocast
from gspn2_kernels.registration import define

_SCHEMA = (
    "project(Tensor stream, Tensor statistics, Tensor? norm_weight, Tensor? norm_bias, Tensor weight, Tensor? bias,"
    " int prefix) -> Tensor"
)


def project(normed: Normed, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute patches weight^T + bias.

    Where the normed tokens are not written, a kernel norms them as it reads them. Autocast casts weight and bias, and
    the normed tokens where they are written; sums are in fp32 on a GPU.

    Args:
        normed: Tokens (B, N, C), normed.
        weight: (R, C).
        bias: (R,), or None.

    Returns:
        (B, M, R), in the dtype of weight.

    Raises:
        ValueError: A shape, dtype or device does not fit; the message names the argument and what was expected.
    """
    prefix = normed.first.shape[1]
    if normed.tokens is not None:
        return F.linear(normed.tokens[:, prefix:], weight, bias)
    out: Tensor = torch.ops.gspn2.project(*normed.unwritten(), weight, bias, prefix)
    return out


def _check(
    stream: Tensor,
    statistics: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    prefix: int,
) -> None:
    """Raise a ValueError that names the first argument that does not fit the stream."""
    check_normed(stream, statistics, norm_weight, norm_bias)
    check_first("weight", "(R, C)", weight)
    check_other("weight", "(R, C)", weight, (weight.shape[0], stream.shape[2]), stream, weight.dtype)
    check_other("bias", "(R,)", bias, (weight.shape[0],), weight)
    check_prefix(prefix, stream.shape[1])


@define(_SCHEMA)
def _project(*arguments: Any) -> Tensor:  # noqa: ANN401  those of the schema, in order
    from gspn2_kernels import triton_project

    _check(*arguments)
    with torch.cuda.device_of(arguments[0]):
        return triton_project.project(*arguments)


@torch.library.register_fake("gspn2::project")
def _project_fake(*arguments: Any) -> Tensor:  # noqa: ANN401  the same
    _check(*arguments)
    stream, *_, weight, _, prefix = arguments
    out: Tensor = weight.new_empty(stream.shape[0], stream.shape[1] - prefix, weight.shape[0])
    return out


register_autocast("project", torch.ops.gspn2.project, STREAM)


@register_flop_formula(torch.ops.gspn2.project)
def _flops(stream: torch.Size, *others: Any, **__: object) -> int:
    """Count 2 FLOPs for a multiply-add, as torch does."""
    *_, weight, _, prefix = others
    return int(2 * stream[0] * (stream[1] - prefix) * stream[2] * weight[0])
