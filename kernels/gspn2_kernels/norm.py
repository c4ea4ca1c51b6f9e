"""The torch ops `gspn2::layer_norm` and `gspn2::norm_mean`: LayerNorm of tokens, and the mean patch, for inference.

The ops run a Triton kernel. Where that cannot run, and in an export, the same functions are plain torch.

Shapes: B batch, N tokens, P prefix tokens, C channels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gspn2_kernels.operands import by_triton, check_first, check_other, no_autocast
from gspn2_kernels.registration import define

# An export sums tokens over this number, for fp16 ends at 65504.
_PART = 256


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Compute a LayerNorm over the channels for inference; arguments and errors are those of `norm_mean`.

    PyTorch's own takes about twice as long on an H100.

    Returns:
        (B, N, C), contiguous and in the dtype of x.
    """
    if by_triton(x):
        out: Tensor = torch.ops.gspn2.layer_norm(x, weight, bias, eps)
        return out
    _check(x, weight, bias, 0)
    return _plain(x, weight, bias, eps)


def _plain(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    with no_autocast(x.device.type):
        return F.layer_norm(x, x.shape[2:], weight, bias, eps).contiguous()


def norm_mean(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, prefix: int) -> tuple[Tensor, Tensor]:
    """Compute a = layer_norm(x) and the mean of a over the patches in one pass over memory, for inference.

    The tensors share one dtype (fp64, fp32, fp16 or bf16) and one device; autocast leaves them alone. The mean is that
    of the rounded a. On a GPU sums are in fp32, and there is no gradient.

    Args:
        x: Tokens (B, N, C), the prefix tokens first. A slice of tokens is as good as a contiguous tensor.
        weight: Scale of each channel (C,); None for 1.
        bias: What to add to each channel (C,); None for 0.
        eps: What to add to the variance.
        prefix: Number of tokens P before the patches.

    Returns:
        a (B, N, C), and its mean (B, C) over the patches, 0 if there are none; contiguous and in the dtype of x.

    Raises:
        ValueError: A shape, dtype, device or number does not fit; the message names the argument.
    """
    if by_triton(x):
        out: tuple[Tensor, Tensor] = torch.ops.gspn2.norm_mean(x, weight, bias, eps, prefix)
        return out
    _check(x, weight, bias, prefix)
    a = _plain(x, weight, bias, eps)
    with no_autocast(x.device.type):
        wide = torch.promote_types(a.dtype, torch.float32)
        count: Any = torch.sym_max(x.shape[1] - prefix, 1)
        if torch.compiler.is_exporting():
            # A reduction takes ONNX Runtime ten times as long as this product.
            total = x.new_full((1, x.shape[1] - prefix), 1 / _PART) @ a[:, prefix:]
            return a, (total.squeeze(1).to(wide) * (_PART / count)).to(a.dtype)
        return a, (a[:, prefix:].sum(1, dtype=wide) / count).to(a.dtype)


def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None, prefix: int) -> None:
    """Raise a ValueError that names the first argument that does not fit x."""
    check_first("x", "(B, N, C)", x)
    _, tokens, channels = x.shape
    check_other("weight", "(C,)", weight, (channels,), x)
    check_other("bias", "(C,)", bias, (channels,), x)
    if not 0 <= prefix <= tokens:
        raise ValueError(f"prefix is {prefix}, expected 0 to {tokens}, the number of tokens")


@define("layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor")
def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    from gspn2_kernels import triton_norm

    _check(x, weight, bias, 0)
    with torch.cuda.device_of(x):
        return triton_norm.norm(x, weight, bias, eps)


@torch.library.register_fake("gspn2::layer_norm")
def _layer_norm_fake(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    _check(x, weight, bias, 0)
    return x.new_empty(x.shape)


@define("norm_mean(Tensor x, Tensor? weight, Tensor? bias, float eps, int prefix) -> (Tensor a, Tensor mean)")
def _norm_mean(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, prefix: int) -> tuple[Tensor, Tensor]:
    from gspn2_kernels import triton_norm

    _check(x, weight, bias, prefix)
    with torch.cuda.device_of(x):
        return triton_norm.forward(x, weight, bias, eps, prefix)


@torch.library.register_fake("gspn2::norm_mean")
def _norm_mean_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, prefix: int
) -> tuple[Tensor, Tensor]:
    _check(x, weight, bias, prefix)
    return x.new_empty(x.shape), x.new_empty(x.shape[0], x.shape[2])
