"""The torch op `gspn2::local_perception`: a depthwise 3x3 convolution of tokens.

The op runs Triton's kernels. Where those cannot run, and in an export, which shall show a standard convolution, the
same function is plain torch.

Shapes: B batch, H W grid, C channels.
"""

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gspn2_kernels.operands import autocast, by_triton, check_first, check_other, register_autocast
from gspn2_kernels.registration import define

# Multiply-adds of a 3x3 convolution per element of the result, as torch counts those of its own: 2 FLOPs each.
_FLOPS_PER_ELEMENT = 2 * 9


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
    if by_triton(a):
        out = torch.ops.gspn2.local_perception(a, weight, base)
        return out
    a, weight, base = autocast(a.device.type, a, weight, base)
    _check(a, weight, base)
    out = convolve(a, weight)
    return out if base is None else (base + out).contiguous()


def convolve(a: Tensor, weight: Tensor) -> Tensor:
    """Compute depthwise3x3(a, weight) in plain torch; arguments as for `local_perception`."""
    out = F.conv2d(a.permute(0, 3, 1, 2), weight, padding=1, groups=weight.shape[0])
    return out.permute(0, 2, 3, 1).contiguous()


def _check(a: Tensor, weight: Tensor, base: Tensor | None) -> None:
    """Raise a ValueError that names the first argument that does not fit a."""
    check_first("a", "(B, H, W, C)", a)
    check_other("weight", "(C, 1, 3, 3)", weight, (a.shape[3], 1, 3, 3), a)
    check_other("base", "(B, H, W, C)", base, tuple(a.shape), a)


@define("local_perception(Tensor a, Tensor weight, Tensor? base) -> Tensor")
def _local_perception(a: Tensor, weight: Tensor, base: Tensor | None) -> Tensor:
    from gspn2_kernels import triton_local

    _check(a, weight, base)
    with torch.cuda.device_of(a):
        return triton_local.forward(a, weight, base)


@torch.library.register_fake("gspn2::local_perception")
def _local_perception_fake(a: Tensor, weight: Tensor, base: Tensor | None) -> Tensor:
    _check(a, weight, base)
    return a.new_empty(a.shape)


@define("local_perception_backward(Tensor dout, Tensor a, Tensor weight) -> (Tensor da, Tensor dweight)")
def _local_perception_backward(dout: Tensor, a: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    from gspn2_kernels import triton_local

    with torch.cuda.device_of(a):
        return triton_local.backward(dout, a, weight)


@torch.library.register_fake("gspn2::local_perception_backward")
def _local_perception_backward_fake(dout: Tensor, a: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape), weight.new_empty(weight.shape)


def _save_inputs(ctx: _Context, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    a, weight, base = inputs
    ctx.has_base = base is not None
    ctx.save_for_backward(a, weight)


def _gradients(ctx: _Context, dout: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.gspn2.local_perception_backward(dout, *ctx.saved_tensors), dout if ctx.has_base else None


torch.library.register_autograd("gspn2::local_perception", _gradients, setup_context=_save_inputs)

register_autocast("local_perception", torch.ops.gspn2.local_perception)


@register_flop_formula(torch.ops.gspn2.local_perception)
def _forward_flops(a: torch.Size, *_: object, **__: object) -> int:
    return _FLOPS_PER_ELEMENT * math.prod(a)


@register_flop_formula(torch.ops.gspn2.local_perception_backward)
def _backward_flops(dout: torch.Size, *_: object, **__: object) -> int:
    return 2 * _FLOPS_PER_ELEMENT * math.prod(dout)
