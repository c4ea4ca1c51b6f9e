"""The GSPN-2 Vision Transformer: a timm VisionTransformer with mixers where attention was.

For the time of a forward pass the model notes the grid in a cell that its blocks share. No method of timm is copied.

Shapes: B batch, N = P + H W tokens, P prefix tokens, C channels, H W grid of patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.models import model_entrypoint, register_model, resolve_pretrained_cfg
from timm.models._features import FeatureGetterNet
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from gspn2convert.block import Grid, GspnBlock, KeptBlock, StudentBlock
from gspn2convert.embedding import by_products, embed_and_norm_by_kernels
from gspn2convert.errors import UserError
from gspn2convert.vit import GSPN2_VIT, base_arguments, check_vit, current_arguments, num_prefix, probe, public_cfg


class Gspn2Vit(VisionTransformer):
    """A VisionTransformer with GSPN-2 blocks. Built by `gspn2_vit`, never by its constructor."""

    grid: Grid
    _model_args: dict[str, Any]
    _pos_embed = by_products(VisionTransformer._pos_embed)

    def share_grid(self) -> None:
        """Give all blocks one grid cell."""
        self.grid = Grid()
        for block in self.blocks:
            if isinstance(block, GspnBlock):
                block.grid = self.grid

    def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Normalised tokens (B, N, C) of images (B, channels, height, width), as in timm."""
        self.grid.hw = self.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))
        try:
            return super().forward_features(x, *args, **kwargs)
        finally:
            self.grid.hw = None

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  timm's own union
        """Tokens after chosen blocks, as in timm."""
        self.grid.hw = self.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))
        try:
            return super().forward_intermediates(x, *args, **kwargs)
        finally:
            self.grid.hw = None

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Let each block recompute itself in backward, to save memory.

        timm's own flag stays off: its checkpoint would read the grid again in backward, when it is gone.
        """
        for block in self.blocks:
            assert isinstance(block, StudentBlock)
            block.grad_checkpointing = enable
        if hasattr(self.patch_embed, "set_grad_checkpointing"):
            self.patch_embed.set_grad_checkpointing(enable)


class Gspn2VitDistilled(Gspn2Vit, VisionTransformerDistilled):
    """The same for DeiT's distilled models, with a second prefix token and a second head."""

    _pos_embed = by_products(VisionTransformerDistilled._pos_embed)


_CONVERTED: dict[type[nn.Module], type[Gspn2Vit]] = {
    VisionTransformer: Gspn2Vit,
    VisionTransformerDistilled: Gspn2VitDistilled,
}


@register_model
def gspn2_vit(
    pretrained: bool = False,
    *,
    base: str = "vit_tiny_patch16_224",
    gspn_layers: Sequence[int] | None = None,
    mixer: dict[str, Any] | None = None,
    pretrained_cfg: Any = None,  # noqa: ANN401  timm's union of str, dict and PretrainedCfg
    **kwargs: Any,
) -> nn.Module:
    """Build any plain timm VisionTransformer with GSPN-2 mixers; called by `timm.create_model("gspn2_vit", ...)`.

    Args:
        pretrained: load the weights that `pretrained_cfg` points to, as `local-dir:` names do.
        base: timm entry point whose architecture is taken.
        gspn_layers: blocks that get a mixer; None for all.
        mixer: keyword arguments of `Gspn2Mixer`; the proxy dimension is C/8 if not given.
        pretrained_cfg: filled in by timm.
        kwargs: for the entry point, such as `img_size`, `num_classes` or `features_only`.

    Raises:
        UserError: the base or an argument does not fit, or `pretrained` finds nothing to load.
    """
    overlay = kwargs.get("pretrained_cfg_overlay") or {}
    if pretrained and not isinstance(pretrained_cfg, dict) and not overlay.get("file"):
        raise UserError('gspn2_vit has no weights of its own; load "local-dir:FOLDER", a folder that distill wrote')
    _check_request(base, kwargs)
    cfg = resolve_pretrained_cfg(base, pretrained_cfg).to_dict() | {"architecture": GSPN2_VIT, "custom_load": False}
    plain = probe(base, {**kwargs, "pretrained_cfg": cfg | {"architecture": base}})
    layers = _check_layers(gspn_layers, len(plain.blocks))
    settled = {"proxy_dim": max(1, plain.embed_dim // 8), **(mixer or {}), "has_prefix": num_prefix(plain) > 0}

    def pick(*, depth: int, **arguments: Any) -> Block:
        if depth in layers:
            return GspnBlock(mixer=settled, depth=depth, **arguments)
        return KeptBlock(depth=depth, **arguments)

    model = model_entrypoint(base)(pretrained=pretrained, pretrained_cfg=cfg, block_fn=pick, **kwargs)
    _convert_class(model, {**kwargs, "base": base, "gspn_layers": layers, "mixer": settled})
    return model


def _check_request(base: str, arguments: dict[str, Any]) -> None:
    if base == GSPN2_VIT or not timm.is_model(base):
        raise UserError(f"base={base!r} is no timm ViT; give the name of one, such as vit_tiny_patch16_224")
    if "block_fn" in arguments or arguments.get("fix_init"):
        raise UserError("gspn2_vit takes neither block_fn nor fix_init, for its blocks are its own; leave them out")
    if arguments.get("feature_cls", "getter") not in ("getter", FeatureGetterNet):
        raise UserError(f"feature_cls={arguments['feature_cls']!r} would hide the grid from the blocks; use 'getter'")


def _convert_class(model: nn.Module, arguments: dict[str, Any]) -> None:
    """Make the model that timm built, bare or in its feature getter, a Gspn2Vit in place."""
    vit = model.model if isinstance(model, FeatureGetterNet) else model
    # The entry points name their class themselves; the converted one differs in methods alone.
    vit.__class__ = _CONVERTED[type(vit)]
    assert isinstance(vit, Gspn2Vit)
    vit.share_grid()
    embed_and_norm_by_kernels(vit)
    # timm records the arguments itself since 1.0.31.
    vit._model_args = arguments
    vit._model_args = current_arguments(vit)


def _check_layers(layers: Sequence[int] | None, depth: int) -> list[int]:
    chosen = list(range(depth)) if layers is None else sorted(set(layers))
    wrong = [layer for layer in chosen if not 0 <= layer < depth]
    if wrong:
        raise UserError(f"gspn_layers has block {wrong[0]}, but the model has blocks 0 to {depth - 1}; leave it out")
    return chosen


def build_student(teacher: nn.Module, gspn_layers: Sequence[int], mixer: dict[str, Any]) -> Gspn2Vit:
    """Build the student of a teacher: its architecture and weights, with fresh mixers at some blocks.

    Args:
        teacher: plain timm VisionTransformer made by `timm.create_model` or `load_teacher`; it is not changed.
        gspn_layers: blocks that get a mixer.
        mixer: keyword arguments of `Gspn2Mixer` but `has_prefix`, which follows from the teacher.

    Returns:
        The student in eval mode, on the teacher's device and in its dtype. Where attention went, its weights are
        in the mixer's prefix read.

    Raises:
        UserError: the teacher cannot be converted.
    """
    vit = check_vit(teacher)
    base, arguments = base_arguments(vit)
    arguments |= {"gspn_layers": list(gspn_layers), "mixer": {**mixer, "has_prefix": num_prefix(vit) > 0}}
    student = timm.create_model(GSPN2_VIT, pretrained_cfg=public_cfg(vit), base=base, **arguments)
    assert isinstance(student, Gspn2Vit)
    first = next(vit.parameters())
    student.to(first.device, first.dtype)
    _inherit(student, vit)
    return student.eval()


def kept_blocks(student: Gspn2Vit) -> list[int]:
    """Blocks that have attention."""
    return [i for i, block in enumerate(student.blocks) if not isinstance(block, GspnBlock)]


def _inherit(student: Gspn2Vit, teacher: VisionTransformer) -> None:
    """Copy every weight of the teacher to its place in the student, and make sure that none is lost."""
    state, weights, homeless = student.state_dict(), {}, []
    converted = {f"blocks.{i}.attn." for i, block in enumerate(student.blocks) if isinstance(block, GspnBlock)}
    for name, value in teacher.state_dict().items():
        site = next((prefix for prefix in converted if name.startswith(prefix)), None)
        home = name if site is None else name.replace(site, f"{site}prefix.", 1)
        if home in state:
            weights[home] = value
        else:
            homeless.append((site, home))
    # Without a prefix read, nothing in the mixer can use the attention's weights.
    assert not [home for site, home in homeless if site is None or f"{site}prefix.qkv.weight" in state], homeless
    own = [name for name in state if name not in weights and not name.startswith(tuple(converted))]
    assert not own, f"left without the teacher's weights: {own}"
    student.load_state_dict(state | weights)
