"""`gspn2convert run`: an exported file on images."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gspn2convert.commands import options
from gspn2convert.commands.report import Document, ReportCommand, percent, show_table, wants_json
from gspn2convert.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from gspn2convert.images import ImageSet
    from gspn2convert.session import OnnxSession


def _show(document: Document, console: Console) -> None:
    console.print(_line(document["session"]), soft_wrap=True)
    rows = [
        ("" if place else result["image"], guess["label"], f"{percent(guess['probability']):>8}")
        for result in document["results"]
        for place, guess in enumerate(result["guesses"])
    ]
    if rows:
        show_table(console, ("image", "label", "probability"), rows, numbers=False)
    if document["output"]:
        shape = "x".join(map(str, document["shape"]))
        console.print(
            f"wrote {document['output']}: {document['array']} ({shape}) and images, the names", soft_wrap=True
        )


def _line(session: dict[str, Any]) -> str:
    """Say in one line what runs where."""
    parts = [f"ONNX Runtime {session['onnxruntime']}", ", ".join(session["providers"]), session["dtype"]]
    if session["line_scan"]:
        library = f" {session['library']}" if session["library"] else ""
        parts.append(f"LineScan: {session['line_scan']}{library}")
    return "; ".join(parts)


@click.command("run", cls=ReportCommand, show=_show)
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.argument("more", nargs=-1, metavar="[PATH]...")
@click.option(
    "--images",
    multiple=True,
    metavar="PATH...",
    help="Images or folders; or demo, a .tar, torch/, wds/, hfds/, hfids/.",
)
@click.option("--top", type=click.IntRange(1), default=5, show_default=True, help="Labels of each image.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the model's output as .npz.")
@click.option("--limit", type=click.IntRange(1), help="Stop after so many images.")
@click.option("--batch-size", type=click.IntRange(1), help="Images per call; default: 16, or the only one allowed.")
@click.option("--providers", metavar="NAME,...", help="cpu, cuda, ...; default: CUDA where it is there, then the CPU.")
@click.option("--library/--no-library", default=None, help="Insist on the LineScan library, or leave it out.")
@click.option("--size", metavar="HxW", callback=options.read_size, help="Image size; default: the model's.")
@click.option("--mean", metavar="X,...", callback=options.read_numbers, help="Of the channels, if the file lacks it.")
@click.option("--std", metavar="X,...", callback=options.read_numbers, help="Of the channels, if the file lacks it.")
def command(
    model: Path,
    more: tuple[str, ...],
    images: tuple[str, ...],
    top: int,
    output: Path | None,
    limit: int | None,
    batch_size: int | None,
    providers: str | None,
    library: bool | None,
    **preprocessing: Any,
) -> dict[str, Any]:
    """Run an exported ONNX file on images (MODEL --images PATH...).

    A classifier gives its most likely labels; any other model's features go to --output.
    """
    if not (images or more):
        raise click.UsageError("Missing option '--images'")
    if model.is_dir():
        raise UserError(f"{model} is a folder; name the exported file, such as {model / 'model.onnx'}")
    from gspn2convert.image_files import open_files
    from gspn2convert.infer import data_config, pick_batch_size
    from gspn2convert.session import onnx_session

    asked = [name.strip() for name in providers.split(",")] if providers is not None else None
    session = onnx_session(model, asked, library=library)
    config = data_config(session, **preprocessing)
    _check_output(session, output)
    found = open_files([*images, *more], in_chans=session.input_size[0])
    values = _infer(session, found, config, pick_batch_size(session, batch_size), limit)
    names = [found.where(index) for index in range(len(values))]
    if output is not None:
        _write(output, session.output_names[0], values, names)
    return {
        "model": str(model),
        "session": session.describe(),
        "preprocessing": config,
        "results": _guesses(session, values, names, top),
        "array": session.output_names[0],
        "shape": list(values.shape),
        "output": output,
    }


def _is_classifier(session: OnnxSession) -> bool:
    from gspn2convert.infer import LOGITS

    return session.output_names[0] == LOGITS


def _check_output(session: OnnxSession, output: Path | None) -> None:
    """Find out before the long part whether its result can be kept."""
    if output is None:
        if not _is_classifier(session):
            raise UserError(
                f"{session.path} is no classifier; name a file for its {session.output_names[0]}: --output FILE.npz"
            )
        return
    if output.suffix != ".npz":
        raise UserError(f"output {str(output)!r}: expected a name that ends in .npz")
    if output.exists():
        raise UserError(f"{output} exists; remove it or name another output")
    if not output.parent.is_dir():
        raise UserError(f"folder {output.parent} does not exist; create it or name another output")


def _infer(
    session: OnnxSession, images: ImageSet, config: dict[str, Any], batch_size: int, limit: int | None
) -> np.ndarray:
    from gspn2convert.infer import infer
    from gspn2convert.progress import Progress

    count = min(len(images), limit or len(images))
    with Progress(quiet=wants_json() or count <= batch_size) as progress:
        progress.start("run", count)
        before = 0

        def done(now: int) -> None:
            nonlocal before
            progress.advance(now, {}, now - before)
            before = now

        return infer(session, images, config, batch_size=batch_size, limit=limit, done=done)


def _write(path: Path, name: str, values: np.ndarray, images: Sequence[str]) -> None:
    import numpy as np

    from gspn2convert.artifact import write_atomic

    content = io.BytesIO()
    np.savez(content, **{name: values, "images": np.array(images)})  # type: ignore[arg-type]
    write_atomic(path, content.getvalue())


def _guesses(session: OnnxSession, values: np.ndarray, images: Sequence[str], top: int) -> list[dict[str, Any]]:
    if not _is_classifier(session):
        return []
    from gspn2convert.infer import label_names, top_classes

    names = label_names(session, values.shape[1])
    return [
        {
            "image": image,
            "guesses": [{"class": one, "label": names[one], "probability": share} for one, share in classes],
        }
        for image, classes in zip(images, top_classes(values, top), strict=True)
    ]
