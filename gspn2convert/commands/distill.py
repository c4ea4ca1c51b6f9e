"""`gspn2convert distill`: the conversion itself."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gspn2convert.commands import options
from gspn2convert.commands.report import Document, ReportCommand, gibi, millions, percent, show_table, wants_json

if TYPE_CHECKING:
    from rich.console import Console

    from gspn2convert.distill import Options
    from gspn2convert.recipe import Recipe

_DEMO = "demo"
# Recipes of teachers that have one of their own; all others take `default`.
_RECIPES = {_DEMO: "demo", "vit_base": "vit_base_imagenet", "dinov2_small": "dinov2_small_photos"}
_SCORES = {"patch_cosine": "patch cosine", "prefix_cosine": "prefix cosine"}
_SHARES = {"agreement": "agreement", "top1": "top-1"}


def _show(document: Document, console: "Console") -> None:
    if "plan" in document:
        _show_plan(document["plan"], console)
    else:
        _show_result(document, console)


def _show_plan(plan: Document, console: "Console") -> None:
    height, width = plan["image_size"]
    console.print(f"{plan['teacher']} at {height}x{width} px by recipe {plan['recipe']}")
    console.print(_blocks_of(plan))
    rows = [
        ("parameters", *(f"{plan['parameters'][name]:,}" for name in ("teacher", "student"))),
        ("M MACs for one image", *(millions(plan["macs"][name]) for name in ("teacher", "student"))),
    ]
    show_table(console, ("", "teacher", "student"), rows)
    stages = [
        (one["stage"], f"{one['steps']:,}", f"{one['images']:,}", gibi(one["bytes"]), gibi(one["batch_bytes"]))
        for one in plan["stages"]
    ]
    if plan["fit_images"]:
        stages.insert(0, ("fit", "-", f"{plan['fit_images']:,}", gibi(plan["fit_bytes"]), "-"))
    show_table(console, ("stage", "steps", "images", "memory beyond the models", "of it for a batch"), stages)
    console.print(_whose_memory(plan))
    console.print("Nothing was downloaded or written.")


def _whose_memory(plan: Document) -> str:
    """What the figures of memory hold, and what they leave out."""
    if plan["shard"]:
        return (
            "In training (fp32) each of n processes holds an n-th of this and of both models, and the weights of the "
            "block that computes. Not counted: the teacher's pass and the losses."
        )
    gradients = gibi(4 * plan["parameters"]["student"])
    return (
        "On one GPU, in fp32, with the gradients that CUDA graphs hold. Each of n processes needs an n-th of what is "
        f"for a batch, and in training up to {gradients} more, to add gradients up. Not counted: the teacher's pass "
        "and the losses."
    )


def _blocks_of(plan: Document) -> str:
    """Which blocks a plan converts, in words."""
    if plan["automatic"] is None:
        converted, kept = (_join(plan[f"{key}_layers"]) for key in ("converted", "kept"))
        return f"blocks to convert: {converted}; blocks that keep attention: {kept}"
    depth = len(plan["converted_layers"]) + len(plan["kept_layers"])
    if plan["automatic"]["budget"] is None:
        count = plan["automatic"]["count"]
        return f"{count} of {depth} blocks keep attention, chosen automatically; figures are for the last {count}"
    budget = plan["automatic"]["budget"]
    return f"as few of {depth} blocks as retain {budget} keep attention, chosen automatically; figures are for none"


def _join(blocks: Sequence[int]) -> str:
    return ", ".join(map(str, blocks)) or "none"


def _show_result(document: Document, console: "Console") -> None:
    _show_stages(document, console)
    if "selection" in document:
        _show_selection(document["selection"], console)
    out = document["output"]
    top1 = document["teacher_top1"]
    teacher = "" if top1 is None else f"; the teacher's top-1 is {percent(top1)}"
    given, error = document.get("started_from"), document["fit_error"]
    if given:
        console.print(f"went on from {given}{teacher}", soft_wrap=True)
    elif error is not None:
        start = "after the fit" if _begins(document) == "fit" else "of the random start"
        console.print(f"mean error {start} {error:.3f}{teacher}")
    export = f"gspn2convert export {shlex.quote(out)}"
    console.print(f"the student is in {out}; next: {export}, or gspn2convert.load({out!r}) in Python", soft_wrap=True)


def _begins(document: Document) -> str:
    """Name what a conversion began with: the fit of stage 0, a given student, or a random start."""
    if document.get("started_from"):
        return "given"
    return "fit" if 0 in document.get("stages_run", (0,)) else "random"


def _show_stages(document: Document, console: "Console") -> None:
    """Print what each stage came to, with the figures that there are; what it began with has the place of the fit."""
    stages, first = document["stages"], _begins(document)
    known = {key: title for key, title in {**_SCORES, **_SHARES}.items() if stages[0].get(key) is not None}
    rows = [
        (
            first if stage["stage"] == "fit" else stage["stage"],
            f"{stage['seconds']:.1f}",
            *(percent(stage[key]) if key in _SHARES else f"{stage[key]:.4f}" for key in known),
        )
        for stage in stages
    ]
    show_table(console, ("after stage", "seconds", *known.values()), rows)


def _show_selection(selection: Document, console: "Console") -> None:
    """Print the chosen blocks beside what one would keep without looking, so that one sees whether choosing paid."""
    with_kl = selection["passes"][0]["ranked_by"] == "kl"
    console.print(
        f"blocks that keep attention ({selection['keep']}), chosen by {'KL of the logits' if with_kl else 'cosine'}: "
        f"{_join(selection['kept'])}"
    )
    keys = {"kl": "KL", "divergence": "1 - cosine"} if with_kl else {"divergence": "1 - cosine"}
    rows = [
        (
            f"{each['after']}: {one['set']}",
            _join(one["layers"]),
            *(f"{one[key]:.4f}" for key in keys),
            percent(one["retention"]),
        )
        for each in selection["passes"]
        for one in each["sets"]
    ]
    show_table(console, ("after stage: set", "blocks", *keys.values(), "retention"), rows)


@click.command("distill", cls=ReportCommand, show=_show)
@click.option("--teacher", required=True, metavar="NAME", help="demo, an alias (vit_base), a timm name or a folder.")
@options.teacher_weights_option
@click.option("--recipe", metavar="NAME", help="Recipe or YAML file; default: the teacher's own, or `default`.")
@click.option("--data", metavar="SPEC", help="demo, a folder, a .tar, torch/, wds/, hfds/, or hfids/ (streamed).")
@click.option("--output", type=click.Path(path_type=Path), help="Folder to write; default: TEACHER-gspn2.")
@click.option(
    "--stages",
    default="0,1,2,3",
    show_default=True,
    callback=options.read_stages,
    help="Which of fit (0), align (1), recover (2), curriculum (3).",
)
@click.option(
    "--keep",
    metavar="LAYERS",
    help="Blocks that keep attention: 0,5, last:2, every:6, auto:2 or auto:budget=0.98; default: the recipe's.",
)
@click.option("--student", type=options.FOLDER, help="Go on from this converted model, in place of the fit.")
@click.option("--img-size", type=click.IntRange(1, options.LARGEST), help="To convert at; default: the teacher's.")
@options.device_option
@click.option("--precision", type=options.PRECISION, default="fp32", show_default=True, help="Autocast to this type.")
@options.workers_option
@click.option("--cache", "cached", is_flag=True, help="Decode the images once and make views on the device.")
@click.option("--shard", is_flag=True, help="Spread the models in training over the processes (FSDP).")
@click.option("--resume", is_flag=True, help="Go on where an interrupted run stopped.")
@click.option("--dry-run", is_flag=True, help="Print the plan alone: no images, weights or output are looked at.")
def command(
    teacher: str,
    recipe: str | None,
    data: str | None,
    output: Path | None,
    dry_run: bool,
    teacher_weights: Path | None,
    img_size: int | None,
    keep: str | None,
    student: Path | None,
    **how: Any,
) -> dict[str, Any]:
    """Convert a pretrained ViT into a GSPN-2 ViT."""
    from gspn2convert.recipe import load_recipe

    what = load_recipe(recipe or _RECIPES.get(teacher, "default"))
    if dry_run:
        from gspn2convert.plan import plan

        found = plan(
            teacher, what, stages=how["stages"], img_size=img_size, keep=keep, student=student, shard=how["shard"]
        )
        return {"plan": found}
    images = data or (_DEMO if teacher == _DEMO else None)
    if images is None:
        raise click.UsageError("Missing option '--data': images to convert with (only --teacher demo brings its own)")
    from accelerate import PartialState

    from gspn2convert.distill import Options

    folder = output or Path(f"{Path(teacher).name}-gspn2")
    run = Options(output=folder, quiet=wants_json(), **how)
    given = {"teacher_weights": teacher_weights, "img_size": img_size, "keep": keep, "student": student}
    metrics = _convert(teacher, what, images, run, **given)
    if not PartialState().is_main_process:  # of several, one speaks for all
        click.get_current_context().exit()
    return {"output": str(folder), **metrics}


def _convert(teacher: str, recipe: "Recipe", data: str, run: "Options", **given: Any) -> dict[str, Any]:
    """Convert; of Ctrl-C outside of the steps of a stage, which say it themselves, say what is saved."""
    from gspn2convert.distill import distill
    from gspn2convert.unfinished import what_is_kept

    try:
        return distill(teacher, recipe, data, run, **given)
    except KeyboardInterrupt:
        raise click.ClickException(what_is_kept(run.output)) from None
