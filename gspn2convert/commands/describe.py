"""`gspn2convert describe`: the layers of a model and what they cost."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gspn2convert.commands import options
from gspn2convert.commands.models import is_student, metrics_of
from gspn2convert.commands.report import Document, ReportCommand, millions, plain, show_table

if TYPE_CHECKING:
    from rich.console import Console


def _show(document: Document, console: "Console") -> None:
    cost = document["cost"]
    rows, columns = cost["grid"]
    size = f"{cost['height']}x{cost['width']} px, {rows}x{columns} patches"
    console.print(f"{document['model']}: {document['kind']}, {size}")
    has_errors = any(layer["error"] is not None for layer in document["layers"])
    titles = ("layer", "mixes tokens by", "parameters", "M MACs", *(["error after stage 0"] if has_errors else []))
    table = [
        (str(layer["layer"]), _mixes(layer), f"{layer['parameters']:,}", millions(layer["macs"]), _error(layer))
        for layer in document["layers"]
    ]
    show_table(console, titles, [row[: len(titles)] for row in table])
    share = 100 * cost["scan_macs"] / cost["macs"]
    total = f"{cost['parameters']:,} parameters, {millions(cost['macs'])} M MACs for one image"
    console.print(f"whole model: {total}, {share:.1f} % of them in line scans")


def _mixes(layer: dict[str, Any]) -> str:
    regions = layer["regions"]
    return f"{layer['kind']}, {regions} x {regions} regions" if regions else str(layer["kind"])


def _error(layer: dict[str, Any]) -> str:
    return "" if layer["error"] is None else f"{layer['error']:.3f}"


@click.command("describe", cls=ReportCommand, show=_show)
@click.argument("model")
@click.option("--size", metavar="HxW", callback=options.read_size, help="Size to count at; default: the model's own.")
def command(model: str, size: options.Size | None) -> dict[str, Any]:
    """Show the layers of a model and what they cost.

    MODEL is a converted folder, or a teacher as for distill (nothing is downloaded).
    """
    from gspn2convert.artifact import load
    from gspn2convert.cost import cost
    from gspn2convert.teachers import load_teacher
    from gspn2convert.unfinished import is_unfinished

    folder = Path(model)
    converted = is_student(folder) or is_unfinished(folder)  # of the latter, loading tells how to go on
    vit = load(folder) if converted else load_teacher(model, pretrained=False)
    counted = cost(vit, *(size or vit.patch_embed.img_size))
    figures = plain(counted)
    errors = _fit_errors(folder) if converted else {}
    # A block that was fitted and then got its attention back has no error any longer.
    layers = [
        site | {"error": errors.get(site["layer"]) if site["kind"] == "gspn2" else None}
        for site in figures.pop("sites")
    ]
    return {"model": model, "kind": "converted" if converted else "teacher", "cost": figures, "layers": layers}


def _fit_errors(folder: Path) -> dict[int, float]:
    """Errors of stage 0 by block; none where metrics.json, which a model does without, does not tell them."""
    try:
        return {layer["layer"]: layer["errors"][layer["method"]] for layer in metrics_of(folder)["layers"]}
    except (KeyError, TypeError):
        return {}
