"""What a conversion would do and cost, without weights or images (`distill --dry-run`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from timm.models import VisionTransformer
from torch import nn

from gspn2convert.cost import Cost, cost, count_parameters, training_bytes
from gspn2convert.curriculum import check_sizes, check_stages, teacher_size, trained
from gspn2convert.given import load_given, recipe_of
from gspn2convert.keep import Auto, read_keep
from gspn2convert.mixer import Gspn2Mixer
from gspn2convert.model import Gspn2Vit, build_student
from gspn2convert.optim import moments
from gspn2convert.recipe import Align, Curriculum, Recipe, Recover
from gspn2convert.teachers import load_teacher
from gspn2convert.vit import attention_sites

FLOAT32, FLOAT64 = 4, 8


def plan(
    teacher: str,
    recipe: Recipe,
    *,
    stages: Sequence[int] = (0, 1, 2, 3),
    img_size: int | None = None,
    keep: str | None = None,
    student: Path | None = None,
    shard: bool = False,
) -> dict[str, Any]:
    """Plan a conversion; downloads and writes nothing.

    Args:
        teacher: "demo", an alias, a timm name or a folder; built without its weights.
        recipe: what to do.
        stages: which of 0, 1, 2, 3 run.
        img_size: pixels to convert at; the teacher's own by default.
        keep: blocks that keep attention, instead of the recipe's.
        student: folder of a converted model to go on from, in place of stage 0; only its shapes are compared with the
            teacher's, whose weights are not there.
        shard: whether training spreads the models over processes, so that no CUDA graphs are recorded.

    Returns:
        Layers, parameters and MACs of teacher and student for one image of the size that stages 0 to 2 see, and steps;
        stage 3 has a row for each of its sizes. "bytes" are memory beyond the two models, of one process, in fp32 on a
        GPU, and with `shard` of all together; "batch_bytes" are what autograd keeps of a batch, among them. Where
        blocks are chosen in the course of the conversion, "automatic" says how many; the figures are then those of
        keeping the last ones, which cost the same, or none for a budget.
    """
    vit = load_teacher(teacher, img_size=teacher_size(recipe, img_size, stages), pretrained=False)
    check_stages(recipe, stages, student is not None)
    if student is not None:
        recipe, stages = recipe_of(load_given(student, vit, keep), recipe), [stage for stage in stages if stage]
    check_sizes(vit, recipe, stages)
    depth, mixer = len(vit.blocks), recipe.mixer.resolve(vit.embed_dim)
    auto, kept = _kept(recipe.keep if keep is None else keep, depth)
    layers = [i for i in range(depth) if i not in kept]
    converted = build_student(vit, layers, mixer)
    size = (recipe.size, recipe.size) if recipe.size else vit.patch_embed.img_size
    before, after = cost(vit, *size), cost(converted, *size)
    aligned = build_student(vit, range(depth), mixer) if auto else converted  # until blocks are chosen, all are
    return {
        "teacher": teacher,
        "recipe": recipe.name,
        "shard": shard,
        "image_size": list(size),
        "converted_layers": layers,
        "kept_layers": list(kept),
        "automatic": asdict(auto) if auto else None,
        "parameters": {"teacher": before.parameters, "student": after.parameters},
        "macs": {"teacher": before.macs, "student": after.macs},
        "fit_images": recipe.fit.images if 0 in stages else 0,
        "fit_bytes": _fit_bytes(vit, recipe, after) if 0 in stages else 0,
        "stages": [
            _training(name, spec, aligned if name == "align" else converted, (side, side) if side else size, shard)
            for name, spec, side in trained(recipe, stages)
        ],
    }


def _kept(text: str, depth: int) -> tuple[Auto | None, Sequence[int]]:
    """How blocks will be chosen, None where they are named, and those that keep attention in the figures."""
    wanted = read_keep(text, depth)
    if isinstance(wanted, Auto):
        return wanted, range(depth - (wanted.count or 0), depth)
    return None, wanted


def _training(
    name: str, spec: Align | Recover, student: Gspn2Vit, size: tuple[int, int], shard: bool
) -> dict[str, Any]:
    """Steps of a stage, and its memory: what autograd keeps of a batch, and copies of the weights."""
    batch = spec.batch_size * training_bytes(student, *size)
    return {
        "stage": name,
        "steps": spec.steps,
        "images": spec.steps * spec.batch_size,
        "bytes": batch + FLOAT32 * _copies(spec, student, shard),
        "batch_bytes": batch,
    }


def _copies(spec: Align | Recover, student: Gspn2Vit, shard: bool) -> int:
    """Numbers that training keeps beyond the models: gradients, moments, averages, adapters, and a guide's weights."""
    mixers = [site for site in attention_sites(student) if isinstance(site, Gspn2Mixer)]
    if isinstance(spec, Align):
        own = [parameter for mixer in mixers for parameter in mixer.own_parameters().values()]
        return sum(parameter.numel() for parameter in own) + moments(spec.optimizer, own)
    target = spec.target if isinstance(spec, Curriculum) else "teacher"
    with_term = spec.losses.mixer > 0 and target == "teacher"
    # Each CUDA graph holds gradients of its own, and there is one with the mixer term and one without it.
    gradients = 2 if with_term and not shard else 1
    copies = gradients + (spec.ema > 0) + (target == "previous")
    adapters = list(nn.Linear(student.embed_dim, student.embed_dim, device="meta").parameters()) if with_term else []
    each = 2 * sum(parameter.numel() for parameter in adapters) + moments(spec.optimizer, adapters)
    return copies * count_parameters(student) + moments(spec.optimizer, student.parameters()) + len(mixers) * each


def _fit_bytes(vit: VisionTransformer, recipe: Recipe, size: Cost) -> int:
    """Hidden tokens of all calibration images, and the moments of one layer with a copy for the solver."""
    dim, tokens = vit.embed_dim, size.grid[0] * size.grid[1] + vit.num_prefix_tokens
    hidden = (recipe.fit.images + recipe.fit.held_out) * tokens * dim * FLOAT32
    return int(hidden + 3 * (6 * dim + 1) ** 2 * FLOAT64)
