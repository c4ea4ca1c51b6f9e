"""What a conversion would do and cost, without weights or images (`distill --dry-run`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from timm.models import VisionTransformer

from gspn2convert.cost import Cost, cost, count_parameters, training_bytes
from gspn2convert.curriculum import check_sizes, teacher_size, trained
from gspn2convert.given import load_given, recipe_of
from gspn2convert.keep import Auto, read_keep
from gspn2convert.model import Gspn2Vit, build_student
from gspn2convert.recipe import Align, Recipe, Recover
from gspn2convert.teachers import load_teacher

FLOAT32, FLOAT64 = 4, 8
# AdamW keeps two moments beside weight and gradient; stage 2 averages the weights too.
COPIES_IN_TRAINING = 5


def plan(
    teacher: str,
    recipe: Recipe,
    *,
    stages: Sequence[int] = (0, 1, 2, 3),
    img_size: int | None = None,
    keep: str | None = None,
    student: Path | None = None,
) -> dict[str, Any]:
    """Plan a conversion; downloads and writes nothing.

    Args:
        teacher: "demo", an alias, a timm name or a folder; built without its weights.
        recipe: what to do.
        stages: which of 0, 1, 2, 3 run.
        img_size: pixels to convert at; the teacher's own by default.
        keep: blocks that keep attention, instead of the recipe's.
        student: folder of a converted model to go on from, in place of stage 0.

    Returns:
        Layers, parameters and MACs of teacher and student for one image of the size that stages 0 to 2 see, memory in
        bytes beyond the two models (fp32, one process), and steps; stage 3 has a row for each of its sizes. Where
        blocks are chosen in the course of the conversion, "automatic" says how many; the figures are then those of
        keeping the last ones, which cost the same, or none for a budget.
    """
    vit = load_teacher(teacher, img_size=teacher_size(recipe, img_size, stages), pretrained=False)
    check_sizes(vit, recipe, stages)
    if student is not None:
        recipe, stages = recipe_of(load_given(student, vit, keep), recipe), [stage for stage in stages if stage]
    depth, mixer = len(vit.blocks), recipe.mixer.resolve(vit.embed_dim)
    wanted = read_keep(recipe.keep if keep is None else keep, depth)
    auto = wanted if isinstance(wanted, Auto) else None
    kept = range(depth - (wanted.count or 0), depth) if isinstance(wanted, Auto) else wanted
    layers = [i for i in range(depth) if i not in kept]
    converted = build_student(vit, layers, mixer)
    height, width = (recipe.size, recipe.size) if recipe.size else vit.patch_embed.img_size
    before, after = cost(vit, height, width), cost(converted, height, width)
    # Until blocks are chosen, all are converted.
    aligned = build_student(vit, range(depth), mixer) if auto else converted
    return {
        "teacher": teacher,
        "recipe": recipe.name,
        "image_size": [height, width],
        "converted_layers": layers,
        "kept_layers": list(kept),
        "automatic": asdict(auto) if auto else None,
        "parameters": {"teacher": before.parameters, "student": after.parameters},
        "macs": {"teacher": before.macs, "student": after.macs},
        "fit_images": recipe.fit.images if 0 in stages else 0,
        "fit_bytes": _fit_bytes(vit, recipe, after) if 0 in stages else 0,
        "stages": [
            _training(name, spec, aligned if name == "align" else converted, (side, side) if side else (height, width))
            for name, spec, side in trained(recipe, stages)
        ],
    }


def _training(name: str, spec: Align | Recover, student: Gspn2Vit, size: tuple[int, int]) -> dict[str, Any]:
    """Steps of a stage, and its memory: what autograd keeps of a batch, and all copies of the weights."""
    per_image = training_bytes(student, *size)
    return {
        "stage": name,
        "steps": spec.steps,
        "images": spec.steps * spec.batch_size,
        "bytes": spec.batch_size * per_image + COPIES_IN_TRAINING * FLOAT32 * count_parameters(student),
    }


def _fit_bytes(vit: VisionTransformer, recipe: Recipe, size: Cost) -> int:
    """Hidden tokens of all calibration images, and the moments of one layer with a copy for the solver."""
    dim, tokens = vit.embed_dim, size.grid[0] * size.grid[1] + vit.num_prefix_tokens
    hidden = (recipe.fit.images + recipe.fit.held_out) * tokens * dim * FLOAT32
    return int(hidden + 3 * (6 * dim + 1) ** 2 * FLOAT64)
