"""The conversion as a whole: teacher -> closed-form fit -> align -> recover -> output folder."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.models import VisionTransformer

from gspn2convert.artifact import check_output_folder, fingerprint, holds_files, origin, public_name, save_student
from gspn2convert.checkpoint import CheckpointStore
from gspn2convert.conversion import Conversion
from gspn2convert.curriculum import check_sizes, check_stages, stages_run, teacher_size, trained
from gspn2convert.data import ImageSet, open_images, own_share
from gspn2convert.differences import tell_differences
from gspn2convert.errors import UserError
from gspn2convert.given import check_origin, load_given, recipe_of
from gspn2convert.keep import Auto, read_keep
from gspn2convert.lock import sole_writer
from gspn2convert.mixing import check_pairs
from gspn2convert.model import Gspn2Vit, kept_blocks
from gspn2convert.options import Options
from gspn2convert.progress import Progress
from gspn2convert.recipe import Recipe, dump_recipe
from gspn2convert.teachers import load_teacher
from gspn2convert.train import make_accelerator
from gspn2convert.unfinished import CACHE

__all__ = ["Options", "distill", "distill_student"]

logger = logging.getLogger(__name__)

# Of a cosine: less is noise.
_DECLINE = 1e-3
_PLACES = {"fit": "before training", "align": "after stage 1", "select": "after the choice of blocks"}
_TRAINED = {
    "align": ("stage 1", "align.lr and align.control_lr"),
    "recover": ("stage 2", "recover.lr and recover.mixer_lr"),
}


def distill(
    teacher: str,
    recipe: Recipe,
    data: str,
    options: Options,
    *,
    teacher_weights: Path | None = None,
    img_size: int | None = None,
    keep: str | None = None,
    student: Path | None = None,
) -> dict[str, Any]:
    """Convert a teacher by name; see `distill_student`, which takes models and images.

    Args:
        teacher: "demo", an alias, a timm name or a folder.
        recipe: what to do.
        data: images, see `data.open_images`.
        options: where and how.
        teacher_weights: safetensors file with the teacher's weights, instead of a download.
        img_size: pixels to convert at; the teacher's own by default.
        keep: blocks that keep attention, instead of the recipe's.
        student: folder of a converted model to go on from, in place of stage 0.

    Returns:
        The metrics, which the output folder holds as metrics.json.
    """
    check_output_folder(options.output, options.resume)
    size = teacher_size(recipe, img_size, options.stages)
    vit = load_teacher(teacher, weights=teacher_weights, img_size=size)
    given = None if student is None else load_given(student, vit, keep)
    if student is not None:
        check_origin(student, vit)
    kept = () if given is not None else read_keep(recipe.keep if keep is None else keep, len(vit.blocks))
    channels = vit.patch_embed.proj.in_channels
    images, test = (open_images(data, split, in_chans=channels) for split in ("train", "test"))
    names = {"teacher_name": teacher} | ({} if student is None else {"given_name": str(student)})
    return distill_student(vit, recipe, images, test, options, **names, keep=kept, given=given)


def distill_student(
    teacher: VisionTransformer,
    recipe: Recipe,
    images: ImageSet,
    test: ImageSet,
    options: Options,
    *,
    teacher_name: str,
    keep: Sequence[int] | Auto = (),
    given: Gspn2Vit | None = None,
    given_name: str = "unnamed",
) -> dict[str, Any]:
    """Convert a teacher: fit, train, save.

    Args:
        teacher: timm VisionTransformer in eval mode.
        recipe: what to do.
        images: training images; calibration and held-out images are taken from them.
        test: images whose top-1 is reported after each stage, where their labels are the teacher's classes.
        options: where and how.
        teacher_name: what the output folder calls the teacher.
        keep: blocks that keep attention, or how to choose them; those of `given` where there is one.
        given: student of this teacher to go on from, in place of stage 0; it is changed.
        given_name: what the output folder calls that student.

    Returns:
        The metrics, which the output folder holds as metrics.json.

    Raises:
        UserError: something given cannot be used.
        Interrupted: Ctrl-C or SIGTERM in the steps of a stage; `resume` goes on from there.
    """
    if given is not None:
        keep, recipe = kept_blocks(given), recipe_of(given, recipe)
    _check_keep(keep, len(teacher.blocks))
    check_output_folder(options.output, options.resume)
    check_sizes(teacher, recipe, options.stages, given is not None)
    check_stages(recipe, options.stages, given is not None)
    if options.cached and images.stream is not None:
        raise UserError(f"data {images.name!r} is a stream, which --cache cannot hold; leave --cache out")
    accelerator = make_accelerator(options.device, options.precision)
    _check_processes(recipe, options, accelerator.num_processes)
    what = {"teacher": teacher_name, "data": images.name, "keep": _named(keep)}
    identity = what | _identity(teacher, recipe, options, given) | {"list of images": images.digest()}
    started_from = "" if given is None else public_name(given_name)
    with sole_writer(options.output, options.resume, accelerator):
        store = CheckpointStore(options.output, identity, main=accelerator.is_main_process)
        if options.resume and not store.load():
            done = _finished(options, what | {"student": started_from}, recipe)
            if done is not None:
                return done
        with Progress(quiet=options.quiet or not accelerator.is_main_process) as progress:
            given = None if given is None else given.to(accelerator.device)
            there = teacher.to(accelerator.device)
            run = Conversion(there, recipe, images, test, options, accelerator, store, progress, given)
            student = run.stages(keep)
        return _save(run, student, teacher_name, started_from)


def _save(run: Conversion, student: Gspn2Vit, teacher_name: str, started_from: str) -> dict[str, Any]:
    """Measure and write what came out; the metrics."""
    metrics = run.metrics(student, teacher_name, started_from)
    if run.accelerator.is_main_process:
        whose = {"teacher": teacher_name, "teacher_weights": origin(run.teacher)}
        save_student(student, run.options.output, recipe_text=dump_recipe(run.recipe), metrics=metrics, **whose)
        run.store.path.unlink(missing_ok=True)
        _tell_decline(metrics["stages"])
    run.accelerator.end_training()
    return metrics


def _named(keep: Sequence[int] | Auto) -> str:
    return str(keep) if isinstance(keep, Auto) else ",".join(map(str, keep))


def _check_keep(keep: Sequence[int] | Auto, depth: int) -> None:
    if isinstance(keep, Auto):
        keep.check(depth)
    elif len(keep) == depth:
        raise UserError("every block keeps attention, so there is nothing to convert; keep fewer with --keep")


def _check_processes(recipe: Recipe, options: Options, processes: int) -> None:
    """Make sure that models and every stage's batches can be shared out, before the first of them runs."""
    if options.shard and processes == 1:
        raise UserError(
            "--shard spreads the models over several processes, and this is the only one; start more, by "
            "`accelerate launch -m gspn2convert distill ...` or torchrun, or leave --shard out"
        )
    for spec in (spec for _, spec, _ in trained(recipe, options.stages) if spec.steps):
        own_share(spec.batch_size, 0, processes)
        if recipe.augment.mix:
            check_pairs(spec.place, spec.batch_size, processes)


def _tell_decline(stages: Sequence[dict[str, Any]]) -> None:
    """Warn where training undid what there was before, by images of the same size: stage 1 or else stage 2."""
    cosines = {one["stage"]: one["cosine"] for one in stages if one["stage"] in (*_PLACES, "recover")}
    ended = cosines.get("recover", cosines.get("align"))
    if ended is None or ended >= max(cosines.values()) - _DECLINE:
        return
    undone = cosines.get("align", 1.0) < cosines.get("fit", 0.0) - _DECLINE
    stage = "align" if undone and ended >= cosines["align"] - _DECLINE else "recover"
    if stage in cosines:
        best = max((name for name in _PLACES if name in cosines and name != stage), key=cosines.__getitem__)
        logger.warning(
            "%s ended at a mean cosine of %.4f, below the %.4f %s: lower %s, "
            "take more steps, or leave it out (--stages)",
            *(_TRAINED[stage][0], cosines[stage], cosines[best], _PLACES[best], _TRAINED[stage][1]),
        )


def _identity(teacher: VisionTransformer, recipe: Recipe, options: Options, given: Gspn2Vit | None) -> dict[str, str]:
    """What must be the same for a run to be resumed, under names that messages show."""
    return {
        "recipe": dump_recipe(recipe),
        "teacher weights": fingerprint(teacher),
        "student": "" if given is None else fingerprint(given),
        "stages": ",".join(map(str, options.stages)),
        "image size": "x".join(map(str, teacher.patch_embed.img_size)),
        "precision": options.precision,
        CACHE: "device" if options.cached else "workers",
    }


def _finished(options: Options, asked: dict[str, str], recipe: Recipe) -> dict[str, Any] | None:
    """The metrics of a run that has ended, None in an empty folder; one of something else must not be written to."""
    folder = options.output
    if not holds_files(folder):
        logger.warning("nothing to resume in %s, starting from the beginning", folder)
        return None
    if not all((folder / name).is_file() for name in ("config.json", "metrics.json", "recipe.yaml")):
        raise UserError(f"{folder} holds files, but no run to resume; name the folder of the run, or a new one")
    try:
        metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
        had = {name: metrics[name] for name in ("teacher", "data")}
        had["keep"] = metrics.get("selection", {}).get("keep", ",".join(map(str, metrics["kept_layers"])))
        had["student"] = metrics.get("started_from") or ""
        had["stages"] = ",".join(map(str, metrics["stages_run"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / 'metrics.json'} is damaged ({error!r}); name another folder") from error
    wanted = {name: public_name(asked[name]) for name in ("teacher", "data")} | {"keep": asked["keep"]}
    wanted["student"] = asked["student"]
    wanted["stages"] = ",".join(map(str, stages_run(recipe, options.stages)))
    recipes = [{"recipe": text} for text in ((folder / "recipe.yaml").read_text(), dump_recipe(recipe))]
    differing = ((had[name] or "none", want or "none", name) for name, want in wanted.items() if had[name] != want)
    other = [f"{name} {ours} and not {theirs}" for ours, theirs, name in differing]
    quoted = shlex.quote(str(folder))
    if other or recipes[0] != recipes[1]:
        raise UserError(
            f"{folder} is finished, with {other[0] if other else 'another recipe'}; name another folder, and to go on "
            f"from this one --student {quoted}{tell_differences(*recipes)}"
        )
    logger.warning("%s is finished already, nothing to resume; to go on from it: --student %s", folder, quoted)
    return metrics
