"""Teachers by name or folder; what can be wrong with one is found before timm loads a weight."""

from __future__ import annotations

import difflib
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from timm.models import (
    filter_pretrained_cfg,
    get_deprecated_models,
    is_model_in_modules,
    split_model_name_tag,
)
from timm.models.vision_transformer import VisionTransformer

from gspn2convert.config import read_config
from gspn2convert.errors import UserError, is_out_of_memory
from gspn2convert.vit import GSPN2_VIT, check_vit, native_shapes, probe
from gspn2convert.weights import WEIGHTS_FILE, check_finite, check_match, folder_weights, hub_file, read_shapes

logger = logging.getLogger(__name__)

ALIASES: dict[str, str] = {
    "vit_tiny": "vit_tiny_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "vit_large": "vit_large_patch16_224",
    "deit_small": "deit_small_patch16_224",
    "deit_base": "deit_base_patch16_224",
    "dinov2_small": "vit_small_patch14_dinov2",
    "dinov2_base": "vit_base_patch14_dinov2",
    "siglip2_base": "vit_base_patch16_siglip_224.v2_webli",
}
DEMO = Path(__file__).parent / "demo" / "teacher"
_VIT_MODULES = ("vision_transformer", "deit")


@dataclass(frozen=True, kw_only=True)
class _Source:
    """Where a teacher comes from.

    Attributes:
        name: what timm.create_model takes.
        architecture: timm entry point.
        cfg: timm's pretrained_cfg.
        arguments: for the entry point.
        folder: of a saved model.
        hub: repository that has the weights.
    """

    name: str
    architecture: str
    cfg: dict[str, Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    hub: str | None = None


def load_teacher(
    name: str | Path,
    *,
    weights: str | Path | None = None,
    img_size: int | tuple[int, int] | None = None,
    pretrained: bool = True,
) -> VisionTransformer:
    """Load a pretrained ViT.

    Args:
        name: timm model name with or without a tag, alias (`vit_base`), "demo", folder that timm or the Hugging
            Face hub saved, `local-dir:FOLDER` or `hf-hub:OWNER/NAME`.
        weights: safetensors file to load in place of the published weights.
        img_size: image size in pixels, height and width; timm resamples the position embedding. None: as published.
        pretrained: False builds the architecture with random weights and needs neither network nor file.

    Returns:
        The teacher in eval mode, in float32 on the CPU. It takes images of any size that is a multiple of the patch.

    Raises:
        UserError: the name is unknown or no plain ViT, or the weights are missing, damaged, pickled or another's.
    """
    source = _find(str(name))
    if not is_model_in_modules(source.architecture, _VIT_MODULES):
        probe(source.architecture, {})
    arguments: dict[str, Any] = {**source.arguments, "dynamic_img_size": True}
    if img_size is not None:
        arguments["img_size"] = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    plain = probe(source.architecture, {**arguments, "pretrained_cfg": source.cfg})
    overlay: dict[str, Any] = {}
    if pretrained:
        path = _published_weights(source) if weights is None else Path(weights)
        arguments["num_classes"] = _check_weights(path, source, plain, arguments)
        overlay = {"file": str(path), "source": None, "custom_load": False, "num_classes": arguments["num_classes"]}
    return _create(source, pretrained, overlay, arguments)


def _find(name: str) -> _Source:
    """Tell names, folders and hub repositories apart."""
    if not name:
        raise UserError("the teacher's name is empty; give demo, an alias such as vit_base, a timm ViT or a folder")
    if name == "demo":
        return _from_folder(DEMO)
    prefix, _, rest = name.partition(":")
    if prefix == "local-dir":
        return _from_folder(Path(rest))
    if prefix == "hf-hub":
        return _from_folder(hub_file(rest, "config.json").parent, hub=rest)
    architecture, tag = split_model_name_tag(name)
    architecture, own_tag = split_model_name_tag(ALIASES.get(architecture, architecture))
    tag = tag or own_tag
    if architecture == GSPN2_VIT:
        raise UserError("gspn2_vit is what teachers are converted to; name a ViT such as vit_small")
    if timm.is_model(architecture):
        return _registered(architecture, tag)
    path = Path(name)
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        raise UserError(f"{name} is a file; name its architecture as the teacher and give it with --teacher-weights")
    raise UserError(
        f"unknown teacher {name!r}; {_nearest(name, [*ALIASES, 'demo', *timm.list_models(module=_VIT_MODULES)])}"
    )


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return "expected a timm ViT, an alias such as vit_small, or an existing folder"


def _registered(architecture: str, tag: str) -> _Source:
    current = get_deprecated_models().get(architecture)
    if current:
        architecture, tag = split_model_name_tag(current)
    name = f"{architecture}.{tag}" if tag else architecture
    try:
        cfg = timm.get_pretrained_cfg(name)
    except RuntimeError:
        tags = timm.list_models(architecture, include_tags=True)
        raise UserError(f"{architecture} has no weights tagged {tag!r}; {_nearest(name, tags)}") from None
    known = {} if cfg is None else cfg.to_dict()
    return _Source(name=name, architecture=architecture, cfg=known, hub=known.get("hf_hub_id"))


def _from_folder(folder: Path, hub: str | None = None) -> _Source:
    """Read the config.json of a saved model."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json; give a folder that timm saved, or the name of a ViT")
    cfg, architecture, arguments = read_config(folder)
    if architecture == GSPN2_VIT:
        raise UserError(f"{folder} holds a converted GSPN-2 ViT; give the ViT that it came from")
    if not timm.is_model(architecture):
        raise UserError(f"{folder} holds a {architecture}, which this timm does not know; update timm")
    return _Source(
        name=f"local-dir:{folder}", architecture=architecture, cfg=cfg, arguments=arguments, folder=folder, hub=hub
    )


def _published_weights(source: _Source) -> Path:
    if source.hub:
        return hub_file(source.hub, WEIGHTS_FILE)
    if source.folder is not None:
        return folder_weights(source.folder)
    if source.cfg.get("url"):
        raise UserError(
            f"the weights of {source.name} are published as a pickle alone, which is never loaded; "
            "convert them to safetensors where you trust them, and give --teacher-weights FILE"
        )
    raise UserError(f"timm publishes no weights for {source.name}; give --teacher-weights FILE, or another teacher")


def _check_weights(path: Path, source: _Source, plain: VisionTransformer, arguments: dict[str, Any]) -> int:
    """Check a weights file against the architecture, and return how many classes its head has."""
    stored = read_shapes(path)
    found = native_shapes(stored, plain)
    classes = (found.get("head.weight") or (0,))[0]
    if classes == plain.num_classes:
        model = plain
    else:
        model = probe(source.architecture, {**arguments, "pretrained_cfg": source.cfg, "num_classes": classes})
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    # What does not fit is shown as it stands in the file.
    shown = {name: shape if shape == expected.get(name) else stored.get(name, shape) for name, shape in found.items()}
    check_match(path, shown, expected)
    if classes != plain.num_classes:
        logger.warning(
            "%s has a head for %d classes, %s one for %d: the teacher has %d",
            *(path, classes, source.name, plain.num_classes, classes),
        )
    return classes


def _create(source: _Source, pretrained: bool, overlay: dict[str, Any], arguments: dict[str, Any]) -> VisionTransformer:
    """Build the teacher, load its weights, and note how it was built."""
    try:
        model = timm.create_model(source.name, pretrained=pretrained, pretrained_cfg_overlay=overlay, **arguments)
    except (OSError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{source.name} does not take the weights {overlay.get('file')}: {error}") from error
    vit = check_vit(model).eval()
    check_finite(overlay.get("file", source.name), vit)
    cfg = filter_pretrained_cfg(vit.pretrained_cfg, remove_source=True)
    cfg["input_size"] = (vit.patch_embed.proj.in_channels, *vit.patch_embed.img_size)
    # timm records the arguments itself since 1.0.31.
    recorded = {**arguments, **getattr(vit, "_model_args", {})}
    vars(vit).update(_model_args=recorded, pretrained_cfg=cfg, default_cfg=cfg)
    return vit
