"""The torch op `gspn2::merge`: the end of a mixer, from its scans to the residual stream, for inference.

Shapes: B batch, H W grid, N = P + H W tokens, P prefix tokens, C channels, R scanned channels, S columns of the share.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gspn2_kernels.local import convolve
from gspn2_kernels.operands import autocast, by_triton, check_first, check_other, register_autocast
from gspn2_kernels.registration import define

_SCHEMA = (
    "merge(Tensor y, Tensor weight, SymInt[] lines, Tensor a, Tensor? filters, Tensor? share, Tensor? values,"
    " Tensor row, Tensor residual, Tensor? gamma, Tensor? prefix_out) -> Tensor"
)
# Places of arguments.
_RESIDUAL, _GAMMA = 8, 9


def merge(
    y: Tensor,
    weight: Tensor,
    lines: Sequence[int],
    a: Tensor,
    filters: Tensor | None,
    share: Tensor | None,
    values: Tensor | None,
    row: Tensor,
    residual: Tensor,
    gamma: Tensor | None = None,
    prefix_out: Tensor | None = None,
) -> Tensor:
    """Compute residual + gamma * (y / lines weight^T + depthwise3x3(a, filters) + share values + row) for the patches.

    Prefix tokens become residual + gamma * prefix_out. The tensors share one dtype (fp64, fp32, fp16 or bf16) and one
    device, except that residual and gamma may be fp32 beside others. Under autocast all but these two are cast to the
    autocast dtype. On a GPU this is one pass over memory, sums are in fp32, and there is no gradient.

    Args:
        y: Scans (B, H, W, 4, R).
        weight: Merge of the scans (C, 4 R).
        lines: What the scans of the first two and those of the last two directions are divided by, see `divide`.
        a: Tokens (B, N, C) that the convolution reads, prefix tokens first.
        filters: Weight (C, 1, 3, 3) of a depthwise convolution with zeros around the grid, or None.
        share: What patches take of the values (B, H W, S), or None.
        values: (B, S, C), or None.
        row: What all patches of an image get (B, C).
        residual: Stream (B, N, C).
        gamma: Scale of each channel (C,), as LayerScale has; None for 1.
        prefix_out: (B, P, C), or None where P = 0.

    Returns:
        (B, N, C), contiguous, in the dtype of residual.

    Raises:
        ValueError: A shape, dtype or device does not fit; the message names the argument and what was expected.
    """
    arguments = (y, weight, lines, a, filters, share, values, row, residual, gamma, prefix_out)
    out: Tensor
    if by_triton(y):
        out = torch.ops.gspn2.merge(*arguments)
        return out
    y, weight, a, filters, share, values, row = autocast(y.device.type, y, weight, a, filters, share, values, row)
    (prefix_out,) = autocast(y.device.type, prefix_out)
    _check(y, weight, lines, a, filters, share, values, row, residual, gamma, prefix_out)
    grid, prefix = y.shape[1:3], residual.shape[1] - y.shape[1] * y.shape[2]
    scans, weight = y.flatten(1, 2).flatten(2), divide(weight, lines)
    if torch.compiler.is_exporting():
        out = _one_product(scans, weight, share, values, row)
    else:
        out = F.linear(scans, weight) + row[:, None]
        if share is not None and values is not None:
            out = out + share @ values
    if filters is not None:
        out = out + convolve(a[:, prefix:].unflatten(1, grid), filters).flatten(1, 2)
    if prefix_out is not None:
        out = torch.cat([prefix_out, out], 1)
    return (residual + (out if gamma is None else gamma * out)).to(residual.dtype).contiguous()


def divide(weight: Tensor, lines: Sequence[int]) -> Tensor:
    """Divide each direction's part of a merge's weight (C, 4 R) by its number of lines, and round once.

    A scan adds up its lines; divided by them it is a mean, as attention is, and keeps its size when the image grows.

    Args:
        weight: Of the merge (C, 4 R).
        lines: For the first two directions and for the last two; symbolic while a model is exported for any size.
    """
    # bfloat16 counts to 256 only.
    dtype = torch.float32 if weight.dtype == torch.bfloat16 else weight.dtype
    counts = [weight.new_full((weight.shape[1] // 2,), number, dtype=dtype) for number in lines]
    return (weight / torch.cat(counts)).to(weight.dtype)


def _one_product(scans: Tensor, weight: Tensor, share: Tensor | None, values: Tensor | None, row: Tensor) -> Tensor:
    """Compute scans (B, H W, 4 R) weight^T + share values + row in one product: others take ONNX Runtime a pass each.

    A column of ones brings the row. More of them bring nothing, up to a multiple of eight columns: products with other
    numbers are slow ones on a GPU.
    """
    batch, patches, _ = scans.shape
    columns, rows = [scans], [weight.mT.expand(batch, -1, -1)]
    if share is not None and values is not None:
        columns, rows = [scans, share], [*rows, values]
    more = -(1 + sum(part.shape[2] for part in columns)) % 8
    columns.append(scans.new_ones(batch, patches, 1 + more))
    rows += [row[:, None], row.new_zeros(batch, more, row.shape[1])]
    return torch.cat(columns, 2) @ torch.cat(rows, 1)


def _check(
    y: Tensor,
    weight: Tensor,
    lines: Sequence[int],
    a: Tensor,
    filters: Tensor | None,
    share: Tensor | None,
    values: Tensor | None,
    row: Tensor,
    residual: Tensor,
    gamma: Tensor | None,
    prefix_out: Tensor | None,
) -> None:
    """Raise a ValueError that names the first argument that does not fit y and weight."""
    check_first("y", "(B, H, W, 4, R)", y)
    check_first("weight", "(C, 4 R)", weight)
    check_first("residual", "(B, N, C)", residual)
    batch, height, width, directions, scanned = y.shape
    patches, channels, tokens = height * width, weight.shape[0], residual.shape[1]
    prefix = 0 if prefix_out is None else tokens - patches
    check_other("weight", "(C, 4 R)", weight, (channels, directions * scanned), y)
    check_other("residual", "(B, N, C)", residual, (batch, prefix + patches, channels), y, torch.float32)
    check_other("a", "(B, N, C)", a, (batch, tokens, channels), y)
    check_other("filters", "(C, 1, 3, 3)", filters, (channels, 1, 3, 3), y)
    check_other("row", "(B, C)", row, (batch, channels), y)
    check_other("gamma", "(C,)", gamma, (channels,), y, torch.float32)
    check_other("prefix_out", "(B, P, C)", prefix_out, (batch, prefix, channels), y)
    if len(lines) != 2:
        raise ValueError(f"lines are {tuple(lines)}, expected two numbers")
    if (share is None) != (values is None):
        raise ValueError("share and values belong together: give both or neither")
    if share is not None and values is not None:
        columns = share.shape[-1]
        check_other("share", "(B, H W, S)", share, (batch, patches, columns), y)
        check_other("values", "(B, S, C)", values, (batch, columns, channels), y)


@define(_SCHEMA)
def _merge(*arguments: Any) -> Tensor:  # noqa: ANN401  those of `merge`, in order
    from gspn2_kernels import triton_merge

    _check(*arguments)
    with torch.cuda.device_of(arguments[_RESIDUAL]):
        return triton_merge.merge(*arguments)


@torch.library.register_fake("gspn2::merge")
def _merge_fake(*arguments: Any) -> Tensor:  # noqa: ANN401
    _check(*arguments)
    residual: Tensor = arguments[_RESIDUAL]
    return residual.new_empty(residual.shape)


register_autocast("merge", torch.ops.gspn2.merge, (_RESIDUAL, _GAMMA))


@register_flop_formula(torch.ops.gspn2.merge)
def _flops(
    y: torch.Size,
    weight: torch.Size,
    lines: Sequence[int],
    a: torch.Size,
    filters: torch.Size | None,
    share: torch.Size | None,
    *_: object,
    **__: object,
) -> int:
    """Count 2 FLOPs for a multiply-add, as torch does."""
    columns = weight[1] + (0 if filters is None else 9) + (0 if share is None else share[2])
    return 2 * y[0] * y[1] * y[2] * weight[0] * columns
