"""The torch ops `gspn2::local_perception` and `gspn2::local_residual`: a depthwise 3x3 convolution of tokens.

The ops run Triton's kernels. Where those cannot run, and in an export, which shall show a standard convolution, the
same functions are plain torch.

Shapes: B batch, H W grid, C channels.
"""

import importlib.util
import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gspn2_kernels.line_scan import autocast_wanted

_TRITON = importlib.util.find_spec("triton") is not None
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Multiply-adds of a 3x3 convolution per element of the result, as torch counts those of its own: 2 FLOPs each.
_FLOPS_PER_ELEMENT = 2 * 9
_RESIDUAL_ARGUMENTS = "Tensor a, Tensor? weight, Tensor? base, Tensor? row, Tensor residual, Tensor? gamma"


class _Context(Protocol):
    """What autograd hands from the forward to the backward."""

    has_base: bool
    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


def local_perception(a: Tensor, weight: Tensor, base: Tensor | None = None) -> Tensor:
    """Compute base + depthwise3x3(a, weight), with zeros around the grid; all three arguments get gradients.

    The tensors share one dtype (fp64, fp32, fp16 or bf16) and one device. Under autocast they are cast to the
    autocast dtype, except fp64 tensors. On a GPU sums are in fp32 and rounded once.

    Args:
        a: Activations (B, H, W, C). A slice of tokens is as good as a contiguous tensor.
        weight: Weight (C, 1, 3, 3) of an `nn.Conv2d` with one group per channel and a padding of 1.
        base: What to add (B, H, W, C); None for nothing.

    Returns:
        (B, H, W, C), contiguous, in the dtype of a.

    Raises:
        ValueError: A shape, dtype or device does not fit; the message names the argument and what was expected.
    """
    out: Tensor
    if _by_triton(a):
        out = torch.ops.gspn2.local_perception(a, weight, base)
        return out
    a, weight, base = _autocast(a.device.type, a, weight, base)
    _check(a, weight, base)
    out = _convolve(a, weight)
    return out if base is None else (base + out).contiguous()


def local_residual(
    a: Tensor,
    weight: Tensor | None,
    base: Tensor | None,
    row: Tensor | None,
    residual: Tensor,
    gamma: Tensor | None = None,
) -> Tensor:
    """Compute residual + gamma * (base + depthwise3x3(a, weight) + row) in one pass over memory, for inference.

    Dtypes and devices as in `local_perception`, except that residual and gamma may be fp32 beside another a, and
    autocast leaves these two alone. On a GPU there is no gradient.

    Args:
        a: Activations (B, H, W, C). A slice of tokens is as good as a contiguous tensor; so for residual.
        weight: Weight (C, 1, 3, 3) of the convolution, as in `local_perception`; None for no convolution.
        base: What to add (B, H, W, C); None for nothing, if there is a weight.
        row: What to add to every position (B, C); None for nothing.
        residual: The stream (B, H, W, C) that the scaled sum is added to.
        gamma: Scale of each channel (C,), as LayerScale has; None for 1.

    Returns:
        (B, H, W, C), contiguous, in the dtype of residual.

    Raises:
        ValueError: A shape, dtype or device does not fit; the message names the argument and what was expected.
    """
    out: Tensor
    if _by_triton(a):
        out = torch.ops.gspn2.local_residual(a, weight, base, row, residual, gamma)
        return out
    a, weight, base, row = _autocast(a.device.type, a, weight, base, row)
    _check_residual(a, weight, base, row, residual, gamma)
    terms = [base] if base is not None else []
    terms += [_convolve(a, weight)] if weight is not None else []
    terms += [row[:, None, None]] if row is not None else []
    out = sum(terms[1:], terms[0])
    return (residual + (out if gamma is None else gamma * out)).to(residual.dtype).contiguous()


def _by_triton(a: Tensor) -> bool:
    """Tell whether the kernels run on this tensor: not in an export, whose result shall run anywhere."""
    exporting = torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()
    return a.is_cuda and a.dtype != torch.float64 and _TRITON and not exporting


def _convolve(a: Tensor, weight: Tensor) -> Tensor:
    out = F.conv2d(a.permute(0, 3, 1, 2), weight, padding=1, groups=weight.shape[0])
    return out.permute(0, 2, 3, 1).contiguous()


def _check(a: Tensor, weight: Tensor | None, base: Tensor | None, row: Tensor | None = None) -> None:
    """Raise a ValueError that names the first argument that does not fit a."""
    if a.ndim != 4:
        raise ValueError(f"a has shape {tuple(a.shape)}, expected (B, H, W, C)")
    if a.dtype not in _DTYPES:
        raise ValueError(f"a has dtype {a.dtype}, expected one of {', '.join(map(str, _DTYPES))}")
    batch, *_, channels = a.shape
    _check_argument("weight", "(C, 1, 3, 3)", weight, (channels, 1, 3, 3), a)
    _check_argument("base", "(B, H, W, C)", base, tuple(a.shape), a)
    _check_argument("row", "(B, C)", row, (batch, channels), a)


def _check_residual(
    a: Tensor, weight: Tensor | None, base: Tensor | None, row: Tensor | None, residual: Tensor, gamma: Tensor | None
) -> None:
    _check(a, weight, base, row)
    if weight is None and base is None:
        raise ValueError(f"base is None, expected (B, H, W, C) = {tuple(a.shape)} where weight is None too")
    _check_argument("residual", "(B, H, W, C)", residual, tuple(a.shape), a, torch.float32)
    _check_argument("gamma", "(C,)", gamma, (a.shape[3],), a, torch.float32)


def _check_argument(
    name: str, form: str, t: Tensor | None, shape: tuple[int, ...], a: Tensor, *other_dtypes: torch.dtype
) -> None:
    if t is None:
        return
    if t.shape != shape:
        raise ValueError(f"{name} has shape {tuple(t.shape)}, expected {form} = {shape}")
    if t.dtype not in (a.dtype, *other_dtypes):
        choices = " or ".join(map(str, (a.dtype, *other_dtypes)))
        raise ValueError(f"{name} of shape {shape} has dtype {t.dtype}, expected {choices}, as a is {a.dtype}")
    if t.device != a.device:
        raise ValueError(f"{name} of shape {shape} is on {t.device}, expected {a.device}, the device of a")


@torch.library.custom_op(
    "gspn2::local_perception", mutates_args=(), schema="(Tensor a, Tensor weight, Tensor? base) -> Tensor"
)
def _local_perception(a: Tensor, weight: Tensor, base: Tensor | None) -> Tensor:
    from gspn2_kernels import triton_local

    _check(a, weight, base)
    with torch.cuda.device_of(a):
        return triton_local.forward(a, weight, base)


@_local_perception.register_fake
def _local_perception_fake(a: Tensor, weight: Tensor, base: Tensor | None) -> Tensor:
    _check(a, weight, base)
    return a.new_empty(a.shape)


@torch.library.custom_op(
    "gspn2::local_perception_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor a, Tensor weight) -> (Tensor da, Tensor dweight)",
)
def _local_perception_backward(dout: Tensor, a: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    from gspn2_kernels import triton_local

    with torch.cuda.device_of(a):
        return triton_local.backward(dout, a, weight)


@_local_perception_backward.register_fake
def _local_perception_backward_fake(dout: Tensor, a: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape), weight.new_empty(weight.shape)


@torch.library.custom_op("gspn2::local_residual", mutates_args=(), schema=f"({_RESIDUAL_ARGUMENTS}) -> Tensor")
def _local_residual(
    a: Tensor, weight: Tensor | None, base: Tensor | None, row: Tensor | None, residual: Tensor, gamma: Tensor | None
) -> Tensor:
    from gspn2_kernels import triton_local

    _check_residual(a, weight, base, row, residual, gamma)
    with torch.cuda.device_of(a):
        return triton_local.residual_forward(a, weight, base, row, residual, gamma)


@_local_residual.register_fake
def _local_residual_fake(
    a: Tensor, weight: Tensor | None, base: Tensor | None, row: Tensor | None, residual: Tensor, gamma: Tensor | None
) -> Tensor:
    _check_residual(a, weight, base, row, residual, gamma)
    return residual.new_empty(a.shape)


def _save_inputs(ctx: _Context, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    a, weight, base = inputs
    ctx.has_base = base is not None
    ctx.save_for_backward(a, weight)


def _gradients(ctx: _Context, dout: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.gspn2.local_perception_backward(dout, *ctx.saved_tensors), dout if ctx.has_base else None


_local_perception.register_autograd(_gradients, setup_context=_save_inputs)


def _autocast(device_type: str, *tensors: Tensor | None) -> tuple[Any, ...]:
    """Cast tensors as autocast, where it is on, casts those of a linear layer."""
    if not autocast_wanted(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _autocast_rule(op: Callable[..., Tensor], first: int, device_type: str) -> Callable[..., Tensor]:
    """Make the rule of one type of device: cast the first arguments, leave the others alone.

    `torch.library.register_autocast` knows one fixed dtype only, not the dtype that the user chose.
    """

    def rule(*arguments: Tensor | None) -> Tensor:
        cast = _autocast(device_type, *arguments[:first])
        with torch.autocast(device_type, enabled=False):
            return op(*cast, *arguments[first:])

    return rule


_LIBRARY = torch.library.Library("gspn2", "FRAGMENT")
for _device in ("cpu", "cuda"):
    _key = f"Autocast{_device.upper()}"
    _LIBRARY.impl("local_perception", _autocast_rule(torch.ops.gspn2.local_perception, 3, _device), _key)
    _LIBRARY.impl("local_residual", _autocast_rule(torch.ops.gspn2.local_residual, 4, _device), _key)


@register_flop_formula(torch.ops.gspn2.local_perception)
def _forward_flops(a: torch.Size, *_: object, **__: object) -> int:
    return _FLOPS_PER_ELEMENT * math.prod(a)


@register_flop_formula(torch.ops.gspn2.local_perception_backward)
def _backward_flops(dout: torch.Size, *_: object, **__: object) -> int:
    return 2 * _FLOPS_PER_ELEMENT * math.prod(dout)


@register_flop_formula(torch.ops.gspn2.local_residual)
def _residual_flops(a: torch.Size, weight: torch.Size | None, *_: object, **__: object) -> int:
    return 0 if weight is None else _FLOPS_PER_ELEMENT * math.prod(a)
