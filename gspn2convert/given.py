"""A converted model that a conversion goes on from, in place of stage 0."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from timm.models import VisionTransformer

from gspn2convert.artifact import load
from gspn2convert.errors import UserError
from gspn2convert.model import Gspn2Vit, kept_blocks
from gspn2convert.recipe import Mixer, Recipe


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
    given = load(folder, img_size=tuple(teacher.patch_embed.img_size))
    plain = {name: value.shape for name, value in teacher.state_dict().items() if ".attn." not in name}
    theirs = {name: value.shape for name, value in given.state_dict().items() if ".attn." not in name}
    if plain != theirs:
        differing = next(name for name in sorted({*plain, *theirs}) if plain.get(name) != theirs.get(name))
        raise UserError(f"{folder} is no student of this teacher: {differing} differs; name the teacher it came from")
    return given


def recipe_of(given: Gspn2Vit, recipe: Recipe) -> Recipe:
    """The recipe with the mixers and the attention that a given student has, whatever the recipe asks for."""
    mixer = {name: value for name, value in given._model_args["mixer"].items() if name != "has_prefix"}
    return replace(recipe, mixer=Mixer(**mixer), keep=",".join(map(str, kept_blocks(given))) or "none")
