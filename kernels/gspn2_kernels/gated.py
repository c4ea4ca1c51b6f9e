"""The torch op `gspn2::gated_scan`: four scans of a latent, whose lam, u and logits are linear in it.

The op runs Triton's kernels, for inference. Elsewhere the same function is plain torch around `gspn2::line_scan`.

Shapes: B batch, N = P + H W tokens, P prefix tokens, H W grid, R latent channels, G groups, C channels of a source.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gspn2_kernels.line_scan import FLOPS_PER_ELEMENT, check_segment, line_scan
from gspn2_kernels.norm import Normed
from gspn2_kernels.operands import by_triton, check_first, check_kernel, check_other, register_autocast
from gspn2_kernels.project import project
from gspn2_kernels.registration import define

DIRECTIONS, NEIGHBOURS = 4, 3
# Most channels of a latent that a program keeps beside what it multiplies them by, by bytes of a number.
WIDEST = {2: 256, 4: 128}


def gated_scan(
    latent: Tensor,
    source: Tensor | Normed,
    weight: Tensor,
    bias: Tensor,
    grid: tuple[int, int],
    groups: int = 1,
    segment: int = 0,
) -> Tensor:
    """Compute `line_scan` of the patches of a latent, with lam, u and logits a linear layer of the source.

    The tensors share one dtype (fp64, fp32, fp16 or bf16) and one device; autocast casts them as those of a linear
    layer. Where no gradients are wanted, kernels make lam, u and weights of the latent itself; lam times the latent is
    rounded to the dtype then, and of fp16 must stay below 65504. Else it is differentiable, but for unwritten tokens.

    Args:
        latent: Tokens (B, N, R), the prefix tokens first, of which nothing is read.
        source: The latent, or other tokens (B, N, C). Those that are normed may come without prefix tokens beside a
            latent that does too, N = H W.
        weight: Of lam (4 R, C), u (4 R, C) and the logits (12 G, C), one after the other; R for C with the latent.
        bias: (8 R + 12 G,).
        grid: H, W.
        groups: G, a divisor of R.
        segment: As in `line_scan`.

    Returns:
        (B, H, W, 4, R), contiguous.

    Raises:
        ValueError: A shape, dtype or device does not fit; the message names the argument and what was expected.
    """
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (latent, weight, bias))
    if (
        source is latent
        and by_triton(latent)
        and not wanted
        and latent.shape[2] <= WIDEST.get(latent.element_size(), 0)
    ):
        patches = latent[:, latent.shape[1] - grid[0] * grid[1] :]
        out: Tensor = torch.ops.gspn2.gated_scan(patches, weight, bias, *grid, groups, segment)
        return out
    linear: Callable[..., Tensor] = project if isinstance(source, Normed) else F.linear
    scan = DIRECTIONS * latent.shape[-1]
    # A product for each part: results are contiguous, and no gradient has to be copied into that of a whole.
    lam, u = (linear(source, weight[i : i + scan], bias[i : i + scan]) for i in (0, scan))
    # A fourth logit, whatever it is, after every three: kernels read four at once, and a product has even columns.
    rows, level = (t[2 * scan :].unflatten(0, (-1, NEIGHBOURS)) for t in (weight, bias))
    rows, level = (torch.cat([t, t[:, :1]], 1).flatten(0, 1) for t in (rows, level))
    logits = linear(source, rows, level)
    # Projections have taken the prefix tokens along: to leave them out first would copy all the others.
    tensors = (latent, lam, u, logits)
    latent, lam, u, logits = (t[:, t.shape[1] - grid[0] * grid[1] :].unflatten(1, grid) for t in tensors)
    lam, u = (t.unflatten(-1, (DIRECTIONS, -1)) for t in (lam, u))
    return line_scan(latent, lam, logits.unflatten(-1, (DIRECTIONS, groups, -1))[..., :NEIGHBOURS], u, segment)


def _check(latent: Tensor, weight: Tensor, bias: Tensor, height: int, width: int, groups: int, segment: int) -> None:
    """Raise a ValueError that names the first argument that does not fit the latent."""
    check_first("latent", "(B, H W, R)", latent)
    check_kernel("latent", latent)
    batch, _, channels = latent.shape
    check_other("latent", "(B, H W, R)", latent, (batch, height * width, channels), latent)
    if channels > WIDEST[latent.element_size()]:
        raise ValueError(f"latent has {channels} channels, for which there is no kernel in {latent.dtype}")
    if groups < 1 or channels % groups:
        raise ValueError(f"groups is {groups}, expected a divisor of {channels}, the channels of the latent")
    check_segment(segment)
    rows = DIRECTIONS * (2 * channels + NEIGHBOURS * groups)
    check_other("weight", "(8 R + 12 G, R)", weight, (rows, channels), latent)
    check_other("bias", "(8 R + 12 G,)", bias, (rows,), latent)


@define(
    "gated_scan(Tensor latent, Tensor weight, Tensor bias, SymInt height, SymInt width, int groups, int segment)"
    " -> Tensor"
)
def _gated_scan(
    latent: Tensor, weight: Tensor, bias: Tensor, height: int, width: int, groups: int, segment: int
) -> Tensor:
    from gspn2_kernels import triton_gated

    _check(latent, weight, bias, height, width, groups, segment)
    with torch.cuda.device_of(latent):
        return triton_gated.gated_scan(latent, weight, bias, (height, width), groups, segment)


@torch.library.register_fake("gspn2::gated_scan")
def _gated_scan_fake(
    latent: Tensor, weight: Tensor, bias: Tensor, height: int, width: int, groups: int, segment: int
) -> Tensor:
    _check(latent, weight, bias, height, width, groups, segment)
    return latent.new_empty(latent.shape[0], height, width, DIRECTIONS, latent.shape[2])


register_autocast("gated_scan", torch.ops.gspn2.gated_scan)


@register_flop_formula(torch.ops.gspn2.gated_scan)
def _flops(latent: torch.Size, weight: torch.Size, *_: Any, **__: object) -> int:
    """Count 2 FLOPs for a multiply-add of the product, and what a scan takes."""
    batch, patches, channels = latent
    return int(batch * patches * channels * (2 * weight[0] + FLOPS_PER_ELEMENT * DIRECTIONS))
