"""What the toolkit needs to know about timm's VisionTransformer; no other module looks inside one.

Shapes: B batch, N = P + H W tokens, P prefix tokens, C channels, H W grid of patches.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from timm.layers import Attention, LayerNorm, PatchEmbed
from timm.models import PretrainedCfg, model_entrypoint
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from gspn2_kernels import layer_norm
from gspn2convert.errors import SizeError, UserError

logger = logging.getLogger(__name__)

GSPN2_VIT = "gspn2_vit"
"""Name under which converted models are registered with timm."""

PASSES = ("forward_features", "forward_head")
"""Methods that a pass through a model calls here, in place of its `forward`."""

PLAIN = (VisionTransformer, VisionTransformerDistilled)

# Arguments that shape the fresh weights, the wrapper or the training, but not the architecture.
_NOT_ARCHITECTURE = {
    "cache_dir",
    "device",
    "dtype",
    "feature_cls",
    "features_only",
    "fix_init",
    "out_indices",
    "pretrained_cfg_overlay",
    "pretrained_model_args",
    "weight_init",
}
_SOURCES = {"architecture", "url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "label_offset"}


class FinalNorm(LayerNorm):
    """timm's LayerNorm, by a kernel where it is on a GPU and nobody wants gradients: in a third of the time."""

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, C) to tokens (B, N, C)."""
        if not x.is_cuda or x.ndim != 3 or torch.is_grad_enabled() or torch.is_autocast_enabled("cuda"):
            return super().forward(x)
        return layer_norm(x, self.weight, self.bias, self.eps)


def check_vit(model: nn.Module) -> VisionTransformer:
    """Check that a model can be converted.

    Raises:
        UserError: it is no plain timm VisionTransformer with plain blocks and attention, or is converted already.
    """
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture") or type(model).__name__
    if name == GSPN2_VIT:
        raise UserError("the teacher is a converted GSPN-2 ViT already; give the ViT that it came from")
    if not isinstance(model, PLAIN) or type(model) not in PLAIN:
        raise UserError(
            f"{name} is a {type(model).__name__}, not a plain timm VisionTransformer; "
            "give a ViT such as vit_small, deit_base or dinov2_small"
        )
    fault = _fault(model)
    if fault:
        raise UserError(f"{name} cannot be converted: {fault}; give a ViT of plain blocks such as vit_small")
    return model


def _fault(vit: VisionTransformer) -> str | None:
    """What makes the conversion of a VisionTransformer wrong, or None."""
    kinds = {type(block) for block in vit.blocks} - {Block}
    if kinds:
        return f"its blocks are {kinds.pop().__name__}s, not Blocks"
    sites = attention_sites(vit)
    if any(type(site) is not Attention for site in sites):
        return f"its attention layers are {type(sites[0]).__name__}s, not Attentions"
    if any(getattr(site, "gate", None) is not None or not isinstance(site.norm, nn.Identity) for site in sites):
        return "its attention layers have a gate or a norm before the output projection"
    if type(vit.patch_embed) is not PatchEmbed:
        return f"its patches come from a {type(vit.patch_embed).__name__}, not a PatchEmbed"
    if not isinstance(vit.patch_drop, nn.Identity):
        return "patch_drop_rate is above 0, and a line scan needs every patch of the grid"
    return None


def attention_sites(vit: VisionTransformer) -> list[nn.Module]:
    """What stands at the place of attention in each block, in order: timm's Attention or a mixer."""
    return [block.get_submodule("attn") for block in vit.blocks]


def blocks(vit: VisionTransformer) -> list[nn.Module]:
    """The blocks in order; each maps tokens (B, N, C) to tokens (B, N, C)."""
    return list(vit.blocks)


def layer_scale(block: nn.Module) -> Tensor | None:
    """Factor (C,) on the output of a block's attention, or None."""
    gamma = getattr(block.ls1, "gamma", None)
    return gamma if isinstance(gamma, Tensor) else None


def num_prefix(vit: VisionTransformer) -> int:
    """P, the number of class, distillation and register tokens before the patches."""
    return int(vit.num_prefix_tokens)


def has_head(vit: VisionTransformer) -> bool:
    """Whether the model ends in a classifier."""
    return int(vit.num_classes) > 0


def describe_tokens(vit: VisionTransformer) -> str:
    """Say in words what must be the same for the tokens of two models to be compared."""
    return (
        f"{len(vit.blocks)} blocks of width {vit.embed_dim}, patches of {vit.patch_embed.patch_size} "
        f"and {num_prefix(vit)} prefix tokens"
    )


def embed(vit: VisionTransformer, images: Tensor) -> Tensor:
    """Tokens (B, N, C) that the first block sees, of images (B, channels, height, width)."""
    tokens: Tensor = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
    return tokens


def final_tokens(vit: VisionTransformer, images: Tensor) -> Tensor:
    """Normalised tokens (B, N, C) after the last block, of images (B, channels, height, width)."""
    return vit.forward_features(images)


def data_config(vit: VisionTransformer) -> dict[str, Any]:
    """How timm makes images ready for a model, at the size that the model has now.

    Its pretrained_cfg may still name the size of the published weights.
    """
    config: dict[str, Any] = resolve_model_data_config(vit)
    return config | {"input_size": (vit.patch_embed.proj.in_channels, *vit.patch_embed.img_size)}


def grid_size(vit: VisionTransformer, height: int, width: int) -> tuple[int, int]:
    """Patches H, W of an image of height x width pixels.

    Raises:
        SizeError: the size is no multiple of the patch, or not the one size that the model takes.
    """
    patch, fixed = vit.patch_embed.patch_size, vit.patch_embed.img_size
    if vit.patch_embed.strict_img_size and (height, width) != tuple(fixed):
        raise SizeError(
            f"image size {height}x{width} given, but the model takes {fixed[0]}x{fixed[1]} alone; "
            "build it with dynamic_img_size=True, or call set_input_size"
        )
    sizes = list(zip((height, width), patch, strict=True))
    if min(height, width) < 1 or any(size % p for size, p in sizes) and not vit.patch_embed.dynamic_img_pad:
        near = [sorted({max(size // p, 1) * p, (size // p + 1) * p}) for size, p in sizes]
        use = " or ".join(map(str, near[0])) + ("" if near[0] == near[1] else " by " + " or ".join(map(str, near[1])))
        raise SizeError(f"image size {height}x{width} is no multiple of the patch {patch[0]}x{patch[1]}; use {use}")
    rows, columns = vit.patch_embed.dynamic_feat_size((height, width))
    return int(rows), int(columns)


def probe(name: str, arguments: Mapping[str, Any]) -> VisionTransformer:
    """Build a ViT without memory for its weights, on the meta device, to see what it is.

    Args:
        name: entry point of timm.
        arguments: for the entry point; those that wrap or place the model are left out.

    Raises:
        UserError: the model cannot be built with these arguments, or cannot be converted.
    """
    known = {key: value for key, value in arguments.items() if key not in _NOT_ARCHITECTURE}
    try:
        model = model_entrypoint(name)(pretrained=False, **known, device="meta")
    except (AssertionError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        reason, *_ = (str(error) or type(error).__name__).split("\n")
        raise UserError(f"{name} cannot be built as a ViT: {reason}; check the arguments, or name another") from error
    vit = check_vit(model)
    grid_size(vit, *vit.patch_embed.img_size)
    return vit


def base_arguments(vit: VisionTransformer) -> tuple[str, dict[str, Any]]:
    """Entry point of timm and the arguments, fit for JSON, that rebuild a teacher's architecture.

    Raises:
        UserError: the model does not know how it was built, or was built with what JSON cannot hold.
    """
    base = (getattr(vit, "pretrained_cfg", None) or {}).get("architecture")
    # timm records the arguments since 1.0.31, load_teacher does for older ones.
    if not base or not timm.is_model(base) or not isinstance(getattr(vit, "_model_args", None), dict):
        raise UserError(
            f"this {type(vit).__name__} does not say how it was built, so no student can be built like it; "
            "build the teacher with timm.create_model or gspn2convert.load_teacher"
        )
    check_vit(vit)
    return base, current_arguments(vit)


def current_arguments(vit: VisionTransformer) -> dict[str, Any]:
    """Arguments that rebuild a model as it is now, after reset_classifier or set_input_size.

    Raises:
        UserError: one of them is no JSON value.
    """
    recorded = {
        key: value
        for key, value in getattr(vit, "_model_args", {}).items()
        if key not in _NOT_ARCHITECTURE and not ("drop" in key and key.endswith("_rate"))
    }
    patch = vit.patch_embed.patch_size
    recorded |= {
        "img_size": list(vit.patch_embed.img_size),
        "patch_size": patch[0] if patch[0] == patch[1] else list(patch),
        "in_chans": vit.patch_embed.proj.in_channels,
        "num_classes": vit.num_classes,
        "global_pool": vit.global_pool,
        # The pooling at construction decides where the last norm stands; reset_classifier leaves it there.
        "fc_norm": not isinstance(vit.fc_norm, nn.Identity),
    }
    for key, value in recorded.items():
        try:
            recorded[key] = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            raise UserError(f"the model was built with {key}={value!r}, which JSON cannot hold; pass a name") from None
    return recorded


def public_cfg(vit: VisionTransformer) -> dict[str, Any]:
    """The pretrained_cfg of timm as it fits the model now, fit for JSON, without where the weights came from."""
    source: dict[str, Any] = vars(vit)["pretrained_cfg"]
    known = PretrainedCfg.__dataclass_fields__.keys() - _SOURCES
    cfg = {key: value for key, value in source.items() if key in known and value is not None}
    if cfg.get("num_classes") != vit.num_classes:
        cfg = {key: value for key, value in cfg.items() if not key.startswith("label_")}
    cfg |= {
        "input_size": [vit.patch_embed.proj.in_channels, *vit.patch_embed.img_size],
        "fixed_input_size": bool(vit.patch_embed.strict_img_size),
        "num_classes": vit.num_classes,
        "pool_size": None,
        "first_conv": source.get("first_conv"),
        "classifier": source.get("classifier"),
        "custom_load": False,
    }
    # Recommendations for other sizes held for the weights as they were published.
    cfg = {key: value for key, value in cfg.items() if not key.startswith(("test_", "min_"))}
    plain: dict[str, Any] = json.loads(json.dumps(cfg))
    return plain


def native_shapes(shapes: Mapping[str, tuple[int, ...]], vit: VisionTransformer) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint once timm has renamed and resampled it for a model.

    Args:
        shapes: names and shapes as stored, in timm's layout or one that timm translates (DINOv2, CLIP, ...).
        vit: the model, which may be on the meta device.

    Returns:
        The same as stored where timm can make nothing of them.
    """
    stored = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    try:
        native = checkpoint_filter_fn(stored, vit, adapt_layer_scale=True)
    except Exception:  # timm's translators index and reshape as if every checkpoint were theirs
        logger.debug("timm cannot translate these weights", exc_info=True)
        return dict(shapes)
    return {name: tuple(tensor.shape) for name, tensor in native.items()}
