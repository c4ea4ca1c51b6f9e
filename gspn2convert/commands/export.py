"""`gspn2convert export`: a student as one ONNX or safetensors file."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gspn2convert.commands import options
from gspn2convert.commands.models import metrics_of, teacher_name
from gspn2convert.commands.report import Document, ReportCommand, show_table

if TYPE_CHECKING:
    from rich.console import Console

_MEBI = 2**20


def _show(document: Document, console: "Console") -> None:
    console.print(f"wrote {document['path']} ({document['bytes'] / _MEBI:.2f} MiB, {document['dtype']})")
    if "parity" not in document:
        return
    rows = [
        (
            "x".join(map(str, one["shape"])),
            f"{one['max_abs']:.1e}",
            f"{one['relative_rms']:.1e}",
            f"{100 * one['top1_agreement']:.0f} %" if "top1_agreement" in one else "-",
        )
        for one in document["parity"]
    ]
    show_table(console, ("ONNX Runtime and PyTorch at", "largest error", "relative error", "same guess"), rows)
    dynamic = ", ".join(document["dynamic"]) or "nothing"
    console.print(f"opset {document['opset']}, {document['line_scans']} LineScan nodes, free to change: {dynamic}")


@click.command("export", cls=ReportCommand, show=_show)
@options.folder_argument
@click.option("--format", "kind", type=click.Choice(["onnx", "safetensors"]), default="onnx", show_default=True)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="File; default: inside FOLDER.")
@click.option("--dtype", type=click.Choice(["fp32", "fp16"]), default="fp32", show_default=True, help="Of the weights.")
@click.option("--size", metavar="HxW", callback=options.read_size, help="Size to check ONNX at; default: the model's.")
@click.option(
    "--static",
    metavar="N,C,H,W",
    callback=options.read_shape,
    help="ONNX for this one shape, as CUDA graphs need it; default: any batch, height and width.",
)
def command(
    folder: Path,
    kind: str,
    output: Path | None,
    dtype: str,
    size: options.Size | None,
    static: options.Shape | None,
) -> dict[str, Any]:
    """Write a converted model as ONNX or safetensors."""
    for name, value in (("--size", size), ("--static", static)):
        if value is not None and kind != "onnx":
            raise click.UsageError(f"{name} is for --format onnx, not {kind}")
    other = {"onnx": ".safetensors", "safetensors": ".onnx"}[kind]
    if output is not None and output.suffix.lower() == other:
        raise click.UsageError(f"--output {output} is named {other}, and --format is {kind}; change one of them")
    if size is not None and static is not None:
        raise click.UsageError("--static names the size already; leave --size out")
    from gspn2convert.artifact import load
    from gspn2convert.export import export_onnx, export_safetensors

    student = load(folder)
    path = output or folder / default_name(kind, dtype, static)
    if kind == "safetensors":
        return export_safetensors(student, path, dtype=dtype)
    source = {"teacher": teacher_name(folder), "recipe": str(metrics_of(folder).get("recipe", ""))}
    return export_onnx(student, path, dtype=dtype, size=size, static=static, metadata=source)


def default_name(kind: str, dtype: str, static: options.Shape | None = None) -> str:
    """Name the file inside the student's folder, whose own weights are `model.safetensors`."""
    parts = ["model"]
    if (kind, dtype) != ("onnx", "fp32"):
        parts.append(dtype)
    if static is not None:
        parts.append("x".join(map(str, static)))
    return f"{'-'.join(parts)}.{kind}"
