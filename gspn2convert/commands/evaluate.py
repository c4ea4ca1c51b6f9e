"""`gspn2convert evaluate`: accuracy of a student, and how near it is to its teacher."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gspn2convert.commands import options
from gspn2convert.commands.models import NO_TEACHER, load_rival, teacher_name
from gspn2convert.commands.report import Document, ReportCommand, percent, show_table
from gspn2convert.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from gspn2convert.images import ImageSet


_SHARES = {"top1": "top-1", "knn": "k-NN top-1", "linear": "linear probe top-1"}


def _show(document: Document, console: "Console") -> None:
    count = document["images"]
    console.print(f"{count} image{'s' * (count != 1)} of {document['data']} ({document['split']} split)")
    rows = [
        *(_scores(document, title, key) for key, title in _SHARES.items()),
        ("agreement of the first guess", _percent(document, "agreement"), "", ""),
        ("neighbours in common (10)", _percent(document, "neighbour_agreement"), "", ""),
        *((f"cosine of {name} tokens", _cosine(document, f"{name}_cosine"), "", "") for name in ("prefix", "patch")),
        ("CKA of the blocks", _cka(document), "", ""),
    ]
    titles = ("", "student", "teacher", "kept") if document["teacher"] else ("", "student")
    show_table(console, titles, [row[: len(titles)] for row in rows if any(row[1:])])


def _scores(document: Document, title: str, key: str) -> tuple[str, ...]:
    return (title, *(_percent(document, one) for one in (key, f"teacher_{key}", f"{key}_kept")))


def _percent(document: Document, key: str) -> str:
    return percent(document[key]) if key in document else ""


def _cosine(document: Document, key: str) -> str:
    return f"{document[key]['mean']:.4f} (5 %: {document[key]['p5']:.4f})" if key in document else ""


def _cka(document: Document) -> str:
    figures = document.get("cka")
    return f"{sum(figures) / len(figures):.4f} (least: {min(figures):.4f})" if figures else ""


@click.command("evaluate", cls=ReportCommand, show=_show)
@options.folder_argument
@click.option(
    "--data", required=True, metavar="SPEC", help="Images: demo, a folder, a .tar, torch/, wds/, hfds/, hfids/."
)
@click.option(
    "--split", type=click.Choice(["train", "test"]), default="test", show_default=True, help="Part of the data."
)
@click.option("--teacher", metavar="NAME", help=f"Compare with another teacher than its own; {NO_TEACHER}.")
@options.teacher_weights_option
@click.option("--knn", is_flag=True, help="Also classify by the 20 nearest images of the train split.")
@click.option("--linear", is_flag=True, help="Also fit a linear classifier to features of the train split.")
@click.option("--cka", is_flag=True, help="Also compare the patch tokens after each block.")
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True, help="Images per pass.")
@options.device_option
@click.option("--precision", type=options.PRECISION, default="fp32", show_default=True, help="Autocast to this type.")
@options.workers_option
def command(
    folder: Path,
    data: str,
    split: str,
    teacher: str | None,
    teacher_weights: Path | None,
    knn: bool,
    linear: bool,
    device: str,
    **how: Any,
) -> dict[str, Any]:
    """Compare a converted model with its teacher on images."""
    from gspn2convert.artifact import load
    from gspn2convert.data import open_images
    from gspn2convert.environment import environment, pick_device
    from gspn2convert.evaluate import evaluate

    student = load(folder)
    where = pick_device(device)
    channels = student.patch_embed.proj.in_channels
    images = open_images(data, split, in_chans=channels)
    training = open_images(data, "train", in_chans=channels) if knn or linear else None
    _check_labels(images, teacher)
    rival = None if teacher == NO_TEACHER else load_rival(student, folder, teacher, weights=teacher_weights)
    figures = evaluate(
        *(student, rival, images),
        device=where,
        knn_images=training if knn else None,
        linear_images=training if linear else None,
        **how,
    )
    return {
        "student": str(folder),
        "teacher": None if rival is None else teacher or teacher_name(folder),
        "data": data,
        "split": split,
        "precision": how["precision"],
        **figures,
        "environment": environment(where),
    }


def _check_labels(images: "ImageSet", teacher: str | None) -> None:
    if teacher == NO_TEACHER and images.label_names is None:
        raise UserError(f"data {images.name!r} has no labels, and without a teacher nothing can be measured; name one")
