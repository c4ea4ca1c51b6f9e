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
from gspn2_kernels.norm import STREAM, Normed, check_normed
from gspn2_kernels.operands import autocast, check_first, check_other, exporting, register_autocast
from gspn2_kernels.registration import define

_SCHEMA = (
    "merge(Tensor stream, Tensor statistics, Tensor? norm_weight, Tensor? norm_bias, Tensor y, Tensor weight,"
    " SymInt[] lines, Tensor? filters, Tensor? share, Tensor? values, Tensor row, Tensor? gamma, Tensor? prefix_out)"
    " -> Tensor"
)
_GAMMA = 11  # its place among the arguments


def merge(
    normed: Normed,
    y: Tensor,
    weight: Tensor,
    lines: Sequence[int],
    filters: Tensor | None,
    share: Tensor | None,
    values: Tensor | None,
    row: Tensor,
    gamma: Tensor | None = None,
    prefix_out: Tensor | None = None,
) -> Tensor:
    """Compute stream + gamma * (y / lines weight^T + depthwise3x3(a, filters) + share values + row) for the patches.

    The stream is that of the normed tokens a. Prefix tokens become stream + gamma * prefix_out. The tensors share one
    dtype (fp64, fp32, fp16 or bf16) and one device, except that normed tokens and gamma may be fp32 beside others.
    Under autocast all but these are cast to the autocast dtype. On a GPU sums are in fp32, and there is no gradient.

    Args:
        normed: Stream and tokens (B, N, C) that the convolution reads, prefix tokens first.
        y: Scans (B, H, W, 4, R).
        weight: Merge of the scans (C, 4 R).
        lines: What the scans of the first two and those of the last two directions are divided by, see `divide`.
        filters: Weight (C, 1, 3, 3) of a depthwise convolution with zeros around the grid, or None.
        share: What patches take of the values (B, H W, S), or None.
        values: (B, S, C), or None.
        row: What all patches of an image get (B, C).
        gamma: Scale of each channel (C,), as LayerScale has; None for 1.
        prefix_out: (B, P, C), or None where P = 0.

    Returns:
        (B, N, C), contiguous, in the dtype of the stream.

    Raises:
        ValueError: A shape, dtype or device does not fit; the message names the argument and what was expected.
    """
    stream, a = normed.stream, normed.tokens
    if a is None:
        norm = normed.unwritten()
        out: Tensor = torch.ops.gspn2.merge(*norm, y, weight, lines, filters, share, values, row, gamma, prefix_out)
        return out
    y, weight, a, filters, share, values, row = autocast(y.device.type, y, weight, a, filters, share, values, row)
    (prefix_out,) = autocast(y.device.type, prefix_out)
    _check(stream, y, weight, lines, filters, share, values, row, gamma, prefix_out)
    check_other("tokens", "(B, N, C)", a, tuple(stream.shape), y)
    grid, prefix = y.shape[1:3], stream.shape[1] - y.shape[1] * y.shape[2]
    scans, weight = y.flatten(1, 2).flatten(2), divide(weight, lines)
    if exporting():
        out = _one_product(scans, weight, share, values, row)
    else:
        out = F.linear(scans, weight) + row[:, None]
        if share is not None and values is not None:
            out = out + share @ values
    if filters is not None:
        out = out + convolve(a[:, prefix:].unflatten(1, grid), filters).flatten(1, 2)
    if prefix_out is not None:
        out = torch.cat([prefix_out, out], 1)
    return (stream + (out if gamma is None else gamma * out)).to(stream.dtype).contiguous()


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
    stream: Tensor,
    y: Tensor,
    weight: Tensor,
    lines: Sequence[int],
    filters: Tensor | None,
    share: Tensor | None,
    values: Tensor | None,
    row: Tensor,
    gamma: Tensor | None,
    prefix_out: Tensor | None,
) -> None:
    """Raise a ValueError that names the first argument that does not fit y and weight."""
    check_first("y", "(B, H, W, 4, R)", y)
    check_first("weight", "(C, 4 R)", weight)
    check_first("stream", "(B, N, C)", stream)
    batch, height, width, directions, scanned = y.shape
    patches, channels = height * width, weight.shape[0]
    prefix = 0 if prefix_out is None else stream.shape[1] - patches
    check_other("weight", "(C, 4 R)", weight, (channels, directions * scanned), y)
    check_other("stream", "(B, N, C)", stream, (batch, prefix + patches, channels), y, torch.float32)
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
def _merge(stream: Tensor, *arguments: Any) -> Tensor:  # noqa: ANN401  those of the schema, in order
    from gspn2_kernels import triton_merge

    check_normed(stream, *arguments[:3])
    _check(stream, *arguments[3:])
    with torch.cuda.device_of(stream):
        return triton_merge.merge(stream, *arguments)


@torch.library.register_fake("gspn2::merge")
def _merge_fake(stream: Tensor, *arguments: Any) -> Tensor:  # noqa: ANN401
    check_normed(stream, *arguments[:3])
    _check(stream, *arguments[3:])
    return stream.new_empty(stream.shape)


register_autocast("merge", torch.ops.gspn2.merge, (*STREAM, _GAMMA))


@register_flop_formula(torch.ops.gspn2.merge)
def _flops(stream: torch.Size, *others: Any, **__: object) -> int:
    """Count 2 FLOPs for a multiply-add, as torch does."""
    y, weight, _, filters, share = others[3:8]
    columns = weight[1] + (0 if filters is None else 9) + (0 if share is None else share[2])
    return int(2 * y[0] * y[1] * y[2] * weight[0] * columns)
