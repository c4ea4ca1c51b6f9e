"""Streams of tokens, what norms them, and the normed tokens in fp64."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gspn2_kernels import Normed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6
NORM = ("stream", "statistics", "norm_weight", "norm_bias")
"""Names of what ops take that norm tokens as they read them, in order."""


def draw(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str = DEVICE, shift: float = 0.5
) -> tuple[Tensor, Tensor, Tensor, float]:
    """All that the function takes but the prefix: x with the mean `shift`, a weight around 1, a bias that is not 0."""
    batch, tokens, channels = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int, mean: float = 0.0) -> Tensor:
        return (torch.randn(size, generator=generator, dtype=torch.float64) + mean).to(device, dtype)

    x, weight, bias = normal(batch, tokens, channels, mean=shift), normal(channels, mean=1), normal(channels, mean=0.5)
    return x, weight, bias, EPS


def draw_norm(stream: Tensor, seed: int = 1) -> dict[str, Tensor]:
    """What norms a stream (B, N, C), beside it: its statistics, a weight around 1, a bias that is not 0."""
    generator = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(2, stream.shape[2], generator=generator, dtype=torch.float64).to(stream) + 0.5
    mean = stream.double().mean(2)
    factor = ((stream - mean[..., None]).square().mean(2) + EPS).rsqrt()
    statistics = torch.stack([factor, mean * factor], 2).float()
    return dict(zip(NORM, (stream, statistics, weight + 0.5, bias), strict=True))


def normed(stream: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float = EPS) -> Tensor:
    """The normed tokens in fp64."""
    weight, bias = (None if t is None else t.double() for t in (norm_weight, norm_bias))
    return F.layer_norm(stream.double(), stream.shape[2:], weight, bias, eps)


def unwritten(
    stream: Tensor, statistics: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, prefix: int = 0
) -> Normed:
    """Normed tokens as kernels take them; with nothing in place of their mean."""
    first = normed(stream[:, :prefix], norm_weight, norm_bias).to(stream) if prefix else stream[:, :0]
    return Normed(stream, None, statistics, norm_weight, norm_bias, EPS, first, stream.new_empty(0))
