"""Stage 3, curriculum: targets from a guide that sees a reduced image.

Shapes: B batch, N = P + H W tokens, P prefix tokens, C channels, H W grid of patches.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from timm.models import VisionTransformer
from torch import Tensor

from gspn2convert.errors import UserError
from gspn2convert.model import Gspn2Vit
from gspn2convert.recipe import Align, Recipe, Recover, RecoverLosses
from gspn2convert.recover import RecoverStage
from gspn2convert.stage import frozen_tokens
from gspn2convert.vit import grid_size

logger = logging.getLogger(__name__)

Vit = TypeVar("Vit", bound=VisionTransformer)

CURRICULUM = "curriculum-"  # a size's name begins so


class ReducedStage(RecoverStage):
    """Recovery at a size at which no teacher is asked: the targets come from a guide that sees a reduced image.

    The guide's patch tokens are resized to the student's grid. There is no mixer term, for no other model has
    outputs on that grid.

    Args:
        student: see `Objective`.
        teacher: gives the head for the logits.
        losses: weights of the terms; the mixer's is not used.
        deviations: `token_deviations` of the teacher.
        guide: ViT that gives the targets, the teacher or the student of an earlier size. It is frozen.
        size: height and width of the images that the guide sees.
    """

    def __init__(
        self,
        student: Gspn2Vit,
        teacher: VisionTransformer,
        losses: RecoverLosses,
        deviations: Tensor,
        guide: VisionTransformer,
        size: tuple[int, int],
    ) -> None:
        super().__init__(student, teacher, replace(losses, mixer=0.0), deviations)
        self.size, self._guide = size, (guide.eval().requires_grad_(False),)
        if guide is not teacher:
            self.previous = guide  # as a submodule, unlike the teacher, so that the checkpoint has it

    def models(self) -> list[VisionTransformer]:
        """Those of every stage, and the guide where it is another."""
        return [*super().models(), *(guide for guide in self._guide if guide is not self.teacher)]

    def target(self, images: Tensor) -> Tensor:
        """Final tokens (B, N, C) of the guide, on the grid of the images (B, channels, height, width)."""
        reduced = F.interpolate(images, self.size, mode="bicubic", antialias=True, align_corners=False)
        tokens = frozen_tokens(self._guide[0], reduced)
        return resize_patches(tokens, grid_size(self.student, *self.size), grid_size(self.student, *images.shape[-2:]))


def resized(model: Vit, size: tuple[int, int]) -> Vit:
    """A copy of a model at another image size (height, width)."""
    copied = copy.deepcopy(model)
    copied.set_input_size(size)
    return copied


def teacher_size(recipe: Recipe, img_size: int | None, stages: Sequence[int]) -> int | None:
    """Size at which to load the teacher, in pixels; None for its own.

    Without stage 3 it is the recipe's `size`, which the student keeps. With it the teacher stays at its own size, from
    which timm resamples its position embedding to every other.

    Args:
        recipe: what to do.
        img_size: what the user asked for, or None.
        stages: which stages run.

    Raises:
        UserError: the user asked for another size than the recipe.
    """
    if not recipe.size:
        return img_size
    other = img_size not in (None, recipe.size)
    if 3 in stages and recipe.curriculum.sizes:
        if other and set(stages) != {3}:
            text = "--img-size %d is only where the teacher starts from; stages 0 to 2 are at the recipe's %d px"
            logger.warning(text, img_size, recipe.size)
        return img_size
    if other:
        raise UserError(f"the recipe has size {recipe.size}, and --img-size is {img_size}; leave one of them out")
    return recipe.size


def check_sizes(teacher: VisionTransformer, recipe: Recipe, stages: Sequence[int], given: bool = False) -> None:
    """Make sure that a teacher takes all sizes of a recipe, before hours go into the first of them.

    Warns where mixers read more regions of an image than any size has rows and columns of patches.

    Args:
        teacher: with or without its weights.
        recipe: what to do.
        stages: which of 0, 1, 2, 3 run.
        given: whether there is a student to go on from, in place of stage 0.

    Raises:
        UserError: one is no multiple of the patch, or stage 3 begins below the size of the stages before it.
    """
    first = (recipe.size, recipe.size) if recipe.size else teacher.patch_embed.img_size
    later = [(side, side) for _, _, side in trained(recipe, stages) if side]
    rows, columns = max((grid_size(teacher, *size) for size in (first, *later)), key=max)
    earlier = (0 in stages and not given) or trains_before_stage_3(recipe, stages)
    if earlier and later and recipe.curriculum.steps and math.prod(later[0]) < math.prod(first):
        height, width = first
        raise UserError(
            f"curriculum.sizes begins at {later[0][0]}, and the stages before it are at {height}x{width} px; "
            "leave smaller sizes out, or set a smaller `size`"
        )
    regions, most = recipe.mixer.regions, max(rows, columns)
    if regions > most:
        logger.warning(
            "mixer.regions is %d, and images have %d x %d patches: more regions than rows of patches gain nothing and "
            "cost time; convert the teacher with mixer.regions of %d or less, or at larger images",
            *(regions, rows, columns, most),
        )


def check_stages(recipe: Recipe, stages: Sequence[int], given: bool) -> None:
    """Make sure that the stages which are asked for do something, and tell where mixers start from nothing.

    Args:
        recipe: what to do.
        stages: which of 0, 1, 2, 3 run.
        given: whether there is a student to go on from.

    Raises:
        UserError: there is nothing to do.
    """
    if stages and (0 not in stages or given) and not any(spec.steps for _, spec, _ in trained(recipe, stages)):
        asked = ", ".join(map(str, stages))
        raise UserError(
            f"stages {asked} of recipe {recipe.name} have nothing to do: stage 0 needs no student to go on from, "
            "1 and 2 need steps, 3 needs sizes (curriculum.sizes); name other stages, or another recipe"
        )
    if stages and 0 not in stages and not given:
        logger.warning("without stage 0 and without a student to go on from, the mixers start at random")


def stages_run(recipe: Recipe, stages: Sequence[int]) -> list[int]:
    """Which of the stages run: the third only where the recipe names sizes."""
    return [stage for stage in stages if stage < 3 or recipe.curriculum.sizes]


def trained(recipe: Recipe, stages: Sequence[int]) -> Iterator[tuple[str, Align | Recover, int]]:
    """Stages that train: name, what is done, and the size of stage 3, 0 before it."""
    if 1 in stages:
        yield "align", recipe.align, 0
    if 2 in stages:
        yield "recover", recipe.recover, 0
    for number, side in enumerate(recipe.curriculum.sizes if 3 in stages else ()):
        yield f"{CURRICULUM}{side}", recipe.curriculum.at(number), side


def trains_before_stage_3(recipe: Recipe, stages: Sequence[int]) -> bool:
    """Whether stage 1 or 2 has steps to take."""
    return any(spec.steps for _, spec, side in trained(recipe, stages) if not side)


def resize_patches(tokens: Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """Resize the patches of tokens (B, P + H W, C) bilinearly from one grid (H, W) to another; P prefix tokens stay."""
    prefix = tokens.shape[1] - grid[0] * grid[1]
    patches = tokens[:, prefix:].mT.unflatten(-1, grid).float()
    resized = F.interpolate(patches, wanted, mode="bilinear", align_corners=False).flatten(2).mT
    return torch.cat([tokens[:, :prefix], resized.to(tokens.dtype)], 1)
