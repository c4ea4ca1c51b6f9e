"""A converted model that a conversion goes on from, in place of stage 0."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, replace
from pathlib import Path

from timm.models import VisionTransformer

from gspn2convert.artifact import load, origin
from gspn2convert.errors import RecipeError, SizeError, UserError
from gspn2convert.model import Gspn2Vit, kept_blocks
from gspn2convert.recipe import Mixer, Recipe

logger = logging.getLogger(__name__)


def load_given(folder: Path, teacher: VisionTransformer, keep: str | None) -> Gspn2Vit:
    """Load a student at its teacher's image size.

    Args:
        folder: what `distill` wrote.
        teacher: with or without its weights; their shapes are compared.
        keep: blocks that the user wants to keep attention, which must be None.

    Raises:
        UserError: it is no student of this teacher, or `keep` is given.
    """
    if keep is not None:
        raise UserError("--keep and --student exclude each other: the student's own blocks keep their attention")
    size = tuple(teacher.patch_embed.img_size)
    given = _load_at(folder, size, teacher)
    own = tuple(vars(given)["pretrained_cfg"]["input_size"][1:])
    if own != size:
        sizes = ("x".join(map(str, each)) for each in (own, size))
        logger.warning("%s is of images of %s px and goes on at %s; --img-size keeps another size", folder, *sizes)
    plain = {name: value.shape for name, value in teacher.state_dict().items() if ".attn." not in name}
    theirs = {name: value.shape for name, value in given.state_dict().items() if ".attn." not in name}
    if plain != theirs:
        differing = next(name for name in sorted({*plain, *theirs}) if plain.get(name) != theirs.get(name))
        raise UserError(f"{folder} is no student of this teacher: {differing} differs; name the teacher it came from")
    return given


def _load_at(folder: Path, size: tuple[int, ...], teacher: VisionTransformer) -> Gspn2Vit:
    """Load a student at a size; of one that does not take it because of other patches, say that."""
    try:
        return load(folder, img_size=size)
    except SizeError:
        patches = [tuple(model.patch_embed.patch_size) for model in (load(folder), teacher)]
        if patches[0] == patches[1]:
            raise
        own, theirs = ("x".join(map(str, each)) for each in patches)
        raise UserError(
            f"{folder} is no student of this teacher: its patches are of {own} px, the teacher's of {theirs}; "
            "name the teacher it came from"
        ) from None


def check_origin(folder: Path, teacher: VisionTransformer, remedy: str = "name that one") -> None:
    """Make sure that a student came from this teacher; of one that does not tell, warn.

    Args:
        folder: what `distill` wrote.
        teacher: with its weights; at any image size.
        remedy: what the user can do.

    Raises:
        UserError: its teacher had other weights.
    """
    written = json.loads((folder / "config.json").read_text()).get("gspn2", {})
    name, weights = (written.get(key) for key in ("teacher", "teacher_weights"))
    if weights is None:
        logger.warning("%s does not tell the weights of its teacher (%s): make sure that they are these", folder, name)
    elif weights != origin(teacher):
        raise UserError(
            f"{folder} is no student of this teacher: it came from {name}, which had other weights; {remedy}"
        )


def recipe_of(given: Gspn2Vit, recipe: Recipe) -> Recipe:
    """The recipe with the mixers and the attention that a given student has; tell where it asks for other mixers."""
    mixer = {name: value for name, value in given._model_args["mixer"].items() if name != "has_prefix"}
    try:
        asked = recipe.mixer.resolve(given.embed_dim)
    except RecipeError:  # of mixers that nobody will make
        asked = asdict(recipe.mixer)
    own = [f"{name} {value}, not {asked[name]}" for name, value in mixer.items() if value != asked[name]]
    if own:
        logger.warning("the student keeps its own mixers, and not those of recipe %s: %s", recipe.name, "; ".join(own))
    return replace(recipe, mixer=Mixer(**mixer), keep=",".join(map(str, kept_blocks(given))) or "none")
