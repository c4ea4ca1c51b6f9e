r"""Convert a teacher by a recipe, and by everything that the recipe must be compared with; measure what is kept.

Each row is one conversion with one seed; a results file holds many, and a run adds its rows to it. Three settings,
to which come --rows, --work and --output:

    demo:    python recipes/scripts/accuracy.py --setting demo --teacher demo --data demo --precision fp32
    fashion: python recipes/scripts/accuracy.py --setting fashion --teacher FOLDER --data FASHION --cache
    dinov2:  python recipes/scripts/accuracy.py --setting dinov2 --teacher dinov2_small --data PHOTOS --cache \
                 --fashion FASHION

FOLDER is what train_fashion_teacher.py wrote, FASHION a folder with torchvision's Fashion-MNIST, PHOTOS what
make_photos.py wrote. Run from the repository's root; `--rows help` lists the rows.
"""

import argparse
import fcntl
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from controls import with_fresh_attention, without_scan
from timm.models import VisionTransformer

import gspn2convert
from gspn2convert.artifact import write_atomic
from gspn2convert.data import ImageSet, open_images
from gspn2convert.distill import Options, distill_student
from gspn2convert.environment import environment
from gspn2convert.evaluate import evaluate
from gspn2convert.given import recipe_of
from gspn2convert.keep import read_keep
from gspn2convert.model import Gspn2Vit
from gspn2convert.recipe import Recipe, load_recipe
from gspn2convert.teachers import load_teacher


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to convert.

    Attributes:
        what: for people.
        keep: blocks that keep attention.
        stages: which stages run; without 0 the mixers start at random.
        mixer: recipe whose mixer is taken, if it is not the setting's own.
        recipe: taken instead of the setting's.
        after: row whose converted model it goes on from, of the same seed.
        size: image size in pixels, if it is not the recipe's.
        start: makes the student to start from, in place of stage 0.
    """

    what: str
    keep: str = "none"
    stages: tuple[int, ...] = (0, 1, 2)
    mixer: str | None = None
    recipe: str | None = None
    after: str | None = None
    size: int | None = None
    start: Callable[[VisionTransformer, Recipe, ImageSet], Gspn2Vit] | None = None


ROWS = {
    "pure": Row(what="no attention left"),
    "longer": Row(what="`pure` trained on, stage 2 again", stages=(2,), after="pure"),
    "auto": Row(what="3 blocks keep attention, chosen automatically", keep="auto:3"),
    "auto2": Row(what="2 blocks keep attention, chosen automatically", keep="auto:2"),
    "every": Row(what="blocks 3, 7 and 11 keep attention", keep="every:4"),
    "last": Row(what="the last 3 blocks keep attention", keep="last:3"),
    "stage0": Row(what="stage 0 alone", stages=(0,)),
    "stage1": Row(what="stage 1 alone, from a random start", stages=(1,)),
    "stage2": Row(what="stage 2 alone, from a random start", stages=(2,)),
    "random": Row(what="stages 1 and 2 from a random start", stages=(1, 2)),
    "paper": Row(what="the mixer of the paper, all stages", mixer="paper"),
    "no_scan": Row(what="the scan's output switched off, all stages", start=without_scan),
    "hires": Row(what="`pure` taken on to 518 px", recipe="hires", stages=(3,), after="pure", size=518),
    "attention": Row(what="fresh attention in place of mixers, stages 1 and 2", start=with_fresh_attention),
}


# Recipe of each setting.
SETTINGS = {
    "demo": "demo",
    "fashion": "fashion_mnist_vit_tiny",
    "dinov2": "dinov2_small_photos",
}


def convert(row: Row, recipe: Recipe, teacher: VisionTransformer, arguments: argparse.Namespace) -> dict[str, Any]:
    """Convert and measure; see `measure` for the figures."""
    channels = teacher.patch_embed.proj.in_channels
    images, test = (open_images(arguments.data, split, in_chans=channels) for split in ("train", "test"))
    given = None if row.start is None else row.start(teacher, recipe, images)
    if row.after is not None:
        given = gspn2convert.load(folder_of(row.after, recipe, arguments), img_size=teacher.patch_embed.img_size)
        recipe = recipe_of(given, recipe)
    folder = folder_of(arguments.label or arguments.row, recipe, arguments)
    options = Options(
        output=folder,
        stages=row.stages,
        precision=arguments.precision,
        workers=arguments.workers,
        cached=arguments.cache,
    )
    keep = read_keep(row.keep, len(teacher.blocks))
    began = time.monotonic()
    metrics = distill_student(
        *(teacher, recipe, images, test, options),
        teacher_name=arguments.setting,
        keep=keep,
        given=given,
        given_name=row.after or arguments.row,
    )
    minutes = (time.monotonic() - began) / 60
    student = gspn2convert.load(folder) if given is None else given
    shown = ("kept_layers", "parameters", "fit_error", "stages", "selection")
    return {
        "what": row.what,
        "seed": recipe.seed,
        "minutes": round(minutes, 2),
        **{key: metrics[key] for key in shown if key in metrics},
        "images_per_second": speeds(metrics["history"]),
        "evaluation": measure(student, teacher, test, arguments, probe=row.size is None),
        **made_by(arguments.commit, next(student.parameters()).device),
        "recipe": asdict(recipe),
        "device_shared": arguments.shared,
    }


def going_on(row: Row, label: str | None) -> Row:
    """The row, but going on from the converted model of a label in place of its own choice."""
    if label is None:
        return row
    if row.after is None:
        sys.exit(f"--after {label} given, but the row starts from its teacher: {row.what}")
    return replace(row, after=label, what=row.what.replace(f"`{row.after}`", f"`{label}`"))


def folder_of(row: str, recipe: Recipe, arguments: argparse.Namespace) -> Path:
    """Folder of a row's converted model."""
    folder: Path = arguments.work / f"{arguments.setting}-{row}-{recipe.seed}"
    return folder


def speeds(history: list[dict[str, Any]]) -> dict[str, float]:
    """Images per second of each stage, the median of what was noted on the way; evaluations do not count."""
    noted: dict[str, list[float]] = {}
    for record in history:
        if "images_per_second" in record:
            noted.setdefault(record["stage"], []).append(record["images_per_second"])
    return {stage: statistics.median(rates) for stage, rates in noted.items()}


def measure(
    student: VisionTransformer,
    teacher: VisionTransformer,
    test: ImageSet,
    arguments: argparse.Namespace,
    *,
    probe: bool,
) -> dict[str, Any]:
    """What is kept on images that no stage has seen, and by probes on Fashion-MNIST where it is no training data."""
    how = {"device": next(student.parameters()).device, "batch_size": 256, "workers": arguments.workers}
    if torch.cuda.is_available():
        how["device"] = torch.device("cuda")
    result = evaluate(student, teacher, test, cka=True, **how)
    if arguments.fashion is None or not probe:
        return result
    train, unseen = (open_images(arguments.fashion, split) for split in ("train", "test"))
    probed = evaluate(student, teacher, unseen, knn_images=train, linear_images=train, precision="bf16", **how)
    return result | {"fashion": probed}


def add_row(path: Path, name: str, row: dict[str, Any]) -> None:
    """Put a row into the results file, which other processes may write as well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = json.loads(path.read_text()) if path.exists() else {}
        results[name] = row
        write_atomic(path, (json.dumps(dict(sorted(results.items())), indent=1) + "\n").encode())


def made_by(commit: str | None, device: torch.device) -> dict[str, Any]:
    """What made a row; a commit that is given counts where git does not know it."""
    found = environment(device)
    return {"commit": commit or found["commit"], "environment": found}


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=SETTINGS, required=True, help="which teacher and recipe")
    parser.add_argument("--teacher", required=True, help="as for gspn2convert distill")
    parser.add_argument("--teacher-weights", type=Path, help="as for gspn2convert distill")
    parser.add_argument("--data", required=True, help="as for gspn2convert distill")
    parser.add_argument("--fashion", help="data of the probes, such as torch/fashion_mnist:FOLDER")
    parser.add_argument("--rows", default="pure", help=f"some of {', '.join(ROWS)} [%(default)s]")
    parser.add_argument("--seeds", default="0", help="[%(default)s]")
    parser.add_argument("--recipe", help="name or file, in place of the setting's")
    parser.add_argument("--label", help="another name for the one row, in the results file and of its folder")
    parser.add_argument("--after", help="label of the row to go on from, for a row that goes on from one")
    parser.add_argument("--steps", type=int, help="of stage 2, in place of the recipe's")
    parser.add_argument("--workers", type=int, default=8, help="processes that read images [%(default)s]")
    parser.add_argument("--precision", default="bf16", help="as for gspn2convert distill [%(default)s]")
    parser.add_argument("--cache", action="store_true", help="as for gspn2convert distill")
    parser.add_argument("--work", type=Path, required=True, help="folder for the converted models")
    parser.add_argument("--output", type=Path, required=True, help="results file to add to")
    parser.add_argument("--commit", help="of the source, for a copy without its git history; default: ask git")
    parser.add_argument("--shared", action="store_true", help="note that other programs use the device too")
    return parser.parse_args()


def main() -> None:
    """Make each row with each seed."""
    arguments = read_arguments()
    unknown = sorted(set(arguments.rows.split(",")) - set(ROWS))
    if unknown:
        known = "\n".join(f"{name}: {row.what}" for name, row in ROWS.items())
        sys.exit(f"unknown rows {', '.join(unknown)}; known are:\n{known}")
    if arguments.label and "," in arguments.rows:
        sys.exit(f"--label {arguments.label} names one row, and --rows has {arguments.rows}")
    for name in arguments.rows.split(","):
        for seed in map(int, arguments.seeds.split(",")):
            arguments.row, row = name, going_on(ROWS[name], arguments.after)
            recipe = replace(load_recipe(arguments.recipe or row.recipe or SETTINGS[arguments.setting]), seed=seed)
            if row.mixer is not None:
                other = load_recipe(row.mixer)
                align = replace(recipe.align, control_lr=other.align.control_lr)  # which goes with the mixer
                recipe = replace(recipe, mixer=other.mixer, align=align)
            if arguments.steps is not None:
                recipe = replace(recipe, recover=replace(recipe.recover, steps=arguments.steps))
            torch.manual_seed(seed)
            size = row.size or recipe.size or None
            teacher = load_teacher(arguments.teacher, weights=arguments.teacher_weights, img_size=size)
            figures = convert(row, recipe, teacher, arguments)
            add_row(arguments.output, f"{arguments.label or name}-{seed}", figures)


if __name__ == "__main__":
    main()
