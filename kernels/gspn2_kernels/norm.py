"""The torch ops `gspn2::layer_norm` and `gspn2::norm_statistics`: LayerNorm of tokens for inference.

The ops run Triton kernels. Where those cannot run, and in an export, the same functions are plain torch.

Shapes: B batch, N tokens, P prefix tokens, C channels.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gspn2_kernels.operands import at_least, by_triton, check_first, check_kernel, check_other, exporting, no_autocast
from gspn2_kernels.registration import define

# Where ops that norm tokens as they read them take the stream and what norms it, which autocast leaves as they are.
STREAM = (0, 1, 2, 3)
# An export sums tokens over this number, for fp16 ends at 65504.
_PART = 256


class Normed(NamedTuple):
    """Tokens after a LayerNorm, which on a GPU are never written: those who read them norm them as they do.

    Attributes:
        stream: Tokens (B, N, C) before the norm.
        tokens: Tokens (B, N, C) after it, or None where they are not written.
        statistics: What norms each token (B, N, 2) in fp32: the inverse of its deviation, and its mean times that.
            None where the tokens are written.
        weight: Scale of each channel (C,), or None for 1.
        bias: What is added to each channel (C,), or None for 0.
        eps: What is added to the variance.
        first: The prefix tokens (B, P, C) after the norm.
        mean: The mean patch (B, C) after the norm.
    """

    stream: Tensor
    tokens: Tensor | None
    statistics: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    first: Tensor
    mean: Tensor

    def unwritten(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """What ops take first that norm the tokens as they read them, at the places `STREAM`."""
        return self.stream, self.statistics, self.weight, self.bias

    def written(self) -> Tensor:
        """The tokens (B, N, C) after the norm."""
        return layer_norm(self.stream, self.weight, self.bias, self.eps) if self.tokens is None else self.tokens


def check_normed(stream: Tensor, statistics: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    """Raise a ValueError that names the first argument that does not fit the stream (B, N, C)."""
    check_first("stream", "(B, N, C)", stream)
    batch, tokens, channels = stream.shape
    check_kernel("stream", stream)
    if statistics.dtype != torch.float32:
        raise ValueError(f"statistics has dtype {statistics.dtype}, expected torch.float32")
    check_other("statistics", "(B, N, 2)", statistics, (batch, tokens, 2), stream, torch.float32)
    check_other("norm_weight", "(C,)", weight, (channels,), stream)
    check_other("norm_bias", "(C,)", bias, (channels,), stream)


def check_prefix(prefix: int, tokens: int) -> None:
    """Raise a ValueError where there are not so many prefix tokens."""
    if not 0 <= prefix <= tokens:
        raise ValueError(f"prefix is {prefix}, expected 0 to {tokens}, the number of tokens")


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Compute a LayerNorm over the channels for inference; arguments and errors are those of `norm_tokens`.

    PyTorch's own takes about twice as long on an H100.

    Returns:
        (B, N, C), contiguous and in the dtype of x.
    """
    if by_triton(x):
        out: Tensor = torch.ops.gspn2.layer_norm(x, weight, bias, eps)
        return out
    _check(x, weight, bias, 0)
    return _plain(x, weight, bias, eps)


def norm_and_sum(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, addend: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute `layer_norm`, and x + addend with an addend (C,), or None for 0, in one pass.

    Returns:
        Two tensors (B, N, C), contiguous and in the dtype of x.
    """
    if by_triton(x):
        normed, total = torch.ops.gspn2.norm_and_sum(x, weight, bias, eps, addend)
        return normed, total
    _check(x, weight, bias, 0, addend)
    return _plain(x, weight, bias, eps), torch.add(x, 0 if addend is None else addend).contiguous()


def _plain(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    with no_autocast(x.device.type):
        return F.layer_norm(x, x.shape[2:], weight, bias, eps).contiguous()


def norm_tokens(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, prefix: int) -> Normed:
    """Compute what norms each token, the normed prefix tokens and the mean normed patch, in one pass, for inference.

    Without Triton, and in an export, it writes the normed tokens as well.

    The tensors share one dtype (fp64, fp32, fp16 or bf16) and one device; autocast leaves them alone. On a GPU sums are
    in fp32, and there is no gradient.

    Args:
        x: Tokens (B, N, C), the prefix tokens first. A slice of tokens is as good as a contiguous tensor.
        weight: Scale of each channel (C,); None for 1.
        bias: What to add to each channel (C,); None for 0.
        eps: What to add to the variance.
        prefix: Number of tokens P before the patches.

    Returns:
        The normed tokens, with the prefix tokens and the mean patch, 0 if there are no patches, in the dtype of x.

    Raises:
        ValueError: A shape, dtype, device or number does not fit; the message names the argument.
    """
    if by_triton(x):
        statistics, first, mean = torch.ops.gspn2.norm_statistics(x, weight, bias, eps, prefix)
        return Normed(x, None, statistics, weight, bias, eps, first, mean)
    _check(x, weight, bias, prefix)
    a = _plain(x, weight, bias, eps)
    return Normed(x, a, None, weight, bias, eps, a[:, :prefix], _mean(a[:, prefix:]))


def _mean(patches: Tensor) -> Tensor:
    """Compute the mean (B, C) of patches (B, M, C), rounded once."""
    with no_autocast(patches.device.type):
        wide = torch.promote_types(patches.dtype, torch.float32)
        count = at_least(patches.shape[1], 1)
        if exporting():
            # A reduction takes ONNX Runtime ten times as long as this product.
            total = patches.new_full((1, patches.shape[1]), 1 / _PART) @ patches
            return (total.squeeze(1).to(wide) * (_PART / count)).to(patches.dtype)
        return (patches.sum(1, dtype=wide) / count).to(patches.dtype)


def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None, prefix: int, addend: Tensor | None = None) -> None:
    """Raise a ValueError that names the first argument that does not fit x."""
    check_first("x", "(B, N, C)", x)
    _, tokens, channels = x.shape
    check_other("weight", "(C,)", weight, (channels,), x)
    check_other("bias", "(C,)", bias, (channels,), x)
    check_other("addend", "(C,)", addend, (channels,), x)
    check_prefix(prefix, tokens)


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


@define(
    "norm_and_sum(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor? addend) -> (Tensor normed, Tensor total)"
)
def _norm_and_sum(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, addend: Tensor | None
) -> tuple[Tensor, Tensor]:
    from gspn2_kernels import triton_norm

    _check(x, weight, bias, 0, addend)
    with torch.cuda.device_of(x):
        return triton_norm.norm_and_sum(x, weight, bias, eps, addend)


@torch.library.register_fake("gspn2::norm_and_sum")
def _norm_and_sum_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, addend: Tensor | None
) -> tuple[Tensor, Tensor]:
    _check(x, weight, bias, 0, addend)
    return x.new_empty(x.shape), x.new_empty(x.shape)


@define(
    "norm_statistics(Tensor x, Tensor? weight, Tensor? bias, float eps, int prefix)"
    " -> (Tensor statistics, Tensor first, Tensor mean)"
)
def _norm_statistics(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, prefix: int
) -> tuple[Tensor, Tensor, Tensor]:
    from gspn2_kernels import triton_norm

    _check(x, weight, bias, prefix)
    with torch.cuda.device_of(x):
        return triton_norm.statistics(x, weight, bias, eps, prefix)


@torch.library.register_fake("gspn2::norm_statistics")
def _norm_statistics_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, prefix: int
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, weight, bias, prefix)
    batch, tokens, channels = x.shape
    statistics = x.new_empty(batch, tokens, 2, dtype=torch.float32)
    return statistics, x.new_empty(batch, prefix, channels), x.new_empty(batch, channels)
