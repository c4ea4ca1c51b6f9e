"""What a ViT costs: parameters and multiply-accumulates (MACs) by part, counted and not estimated.

Nothing is computed and no weight is copied: the model runs once on the meta device, under PyTorch's own
counter. MACs are those of matrix products, convolutions, attention and line scans; biases, norms,
activations and other elementwise work are left out, as usual.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gspn2convert.mixer import Gspn2Mixer
from gspn2convert.vit import attention_sites, grid_size

_FLOPS_PER_MAC = 2


@dataclass(frozen=True, kw_only=True)
class SiteCost:
    """One attention site: what mixes the tokens there, its parameters, and its MACs for one image.

    `regions` are the rows and columns of parts of the image whose means patches read, 0 for none.
    """

    layer: int
    kind: str
    regions: int
    parameters: int
    macs: int


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of one image of `height` x `width` pixels; `scan_macs` are the line scans' share of `macs`."""

    height: int
    width: int
    grid: tuple[int, int]
    parameters: int
    macs: int
    scan_macs: int
    sites: tuple[SiteCost, ...]


def cost(model: VisionTransformer, height: int, width: int) -> Cost:
    """Count parameters and MACs of a ViT for one image.

    Raises:
        UserError: if the size is no multiple of the patch.
    """
    grid = grid_size(model, height, width)
    counter = FlopCounterMode(display=False)
    # Without gradients a block adds its mixer to the stream in one go, and the counter does not see the module.
    with torch.enable_grad(), counter:
        _run_on_meta(model, height, width)
    flops = counter.get_flop_counts()
    names = {module: name for name, module in model.named_modules()}
    root = type(model).__name__
    sites = tuple(
        SiteCost(
            layer=index,
            kind=site_kind(site),
            regions=site.regions if isinstance(site, Gspn2Mixer) else 0,
            parameters=count_parameters(site),
            macs=sum(flops[f"{root}.{names[site]}"].values()) // _FLOPS_PER_MAC,
        )
        for index, site in enumerate(attention_sites(model))
    )
    total = flops["Global"]
    scans = sum(count for operator, count in total.items() if "line_scan" in str(operator))
    return Cost(
        height=height,
        width=width,
        grid=grid,
        parameters=count_parameters(model),
        macs=sum(total.values()) // _FLOPS_PER_MAC,
        scan_macs=scans // _FLOPS_PER_MAC,
        sites=sites,
    )


def training_bytes(model: VisionTransformer, height: int, width: int) -> int:
    """Return the bytes that autograd keeps for the backward pass of one fp32 image, weights not counted."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with torch.enable_grad(), hooks, warnings.catch_warnings():
        # They do not see the scans, which a checkpoint keeps; but the product that merges these keeps them as well.
        warnings.filterwarnings("ignore", "A saved_tensors_hooks context")
        weights, _ = _run_on_meta(model, height, width)
    own = {tensor.untyped_storage()._cdata for tensor in weights.values()}
    return sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own)


def site_kind(site: nn.Module) -> str:
    """Return `gspn2` for a mixer and `attention` for what it replaces."""
    return "gspn2" if isinstance(site, Gspn2Mixer) else "attention"


def count_parameters(module: nn.Module) -> int:
    """Return how many parameters a module has, each tensor once."""
    return sum(parameter.numel() for parameter in module.parameters())


def _run_on_meta(model: VisionTransformer, height: int, width: int) -> tuple[dict[str, Tensor], Any]:
    weights = {
        name: torch.empty_like(tensor, device="meta", requires_grad=tensor.requires_grad)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }
    channels = model.patch_embed.proj.in_channels
    image = torch.empty(1, channels, height, width, device="meta")
    return weights, torch.func.functional_call(model, weights, (image,))
