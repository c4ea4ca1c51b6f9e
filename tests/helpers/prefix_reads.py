"""What the reading of prefix tokens takes, and what it gives in fp64.

Shapes: B batch, N tokens, P prefix tokens, C channels, h heads, d head dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.norms import DEVICE, draw_norm, normed


def draw(shape: tuple[int, ...], dtype: torch.dtype, shift: float = 0.5, size: float = 1.0) -> dict:
    """All that the op takes: a stream with the mean `shift`, scores of about `size`, biases that are not 0."""
    batch, tokens, channels, heads, dim, prefix = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(size, generator=generator, dtype=torch.float64)).to(DEVICE, dtype)

    norm = draw_norm(normal(batch, tokens, channels) + shift)
    width = heads * dim
    qkv_weight, qkv_bias = normal(3 * width, channels, scale=channels**-0.5), normal(3 * width)
    projected = F.linear(tokens_of(norm)[:, :prefix], qkv_weight.double(), qkv_bias.double())
    projected[..., : 2 * width] *= size
    return {
        **norm,
        "projected": projected.to(dtype),
        "qkv_weight": qkv_weight,
        "qkv_bias": qkv_bias,
        "proj_weight": normal(channels, width, scale=width**-0.5),
        "log_sum_weight": normal(heads, channels, scale=channels**-0.5),
        "log_sum_bias": normal(heads),
        "heads": heads,
        "scale": dim**-0.5,
    }


def tokens_of(drawn: dict) -> Tensor:
    """The normed tokens in fp64."""
    return normed(drawn["stream"], drawn["norm_weight"], drawn["norm_bias"])


def reference(drawn: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Compute in fp64, rounded nowhere, with a query, key and value of every token."""
    t = {name: value.double() if isinstance(value, Tensor) else value for name, value in drawn.items()}
    heads, prefix, x = t["heads"], t["projected"].shape[1], tokens_of(drawn)

    def of_heads(projected: Tensor) -> tuple[Tensor, ...]:
        return projected.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind()

    q, k, v = of_heads(F.linear(x, t["qkv_weight"], t["qkv_bias"]))
    query, key, value = of_heads(t["projected"])
    read = ((t["scale"] * query @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)
    gate = t["scale"] * q[:, :, prefix:] @ key.mT
    mass = F.linear(x[:, prefix:], t["log_sum_weight"], t["log_sum_bias"])
    share = torch.cat([gate, mass.mT.unsqueeze(-1)], -1).softmax(-1).permute(0, 2, 3, 1).flatten(2)
    values = torch.einsum("bhpd,chd->bphc", value, t["proj_weight"].unflatten(1, (heads, -1))).flatten(1, 2)
    columns = share.shape[2] + -share.shape[2] % 8
    return read, F.pad(share, (0, columns - share.shape[2])), F.pad(values, (0, 0, 0, columns - values.shape[1]))
