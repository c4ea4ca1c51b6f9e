"""`gspn2convert bench`: latency and memory of a student against its teacher."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gspn2convert.commands import options
from gspn2convert.commands.models import load_rival, teacher_name
from gspn2convert.commands.report import Document, ReportCommand, show_table

if TYPE_CHECKING:
    from rich.console import Console

_MEBI = 2**20


def _show(document: Document, console: "Console") -> None:
    device, batch, dtype = document["environment"]["device"], document["batch_size"], document["dtype"]
    recorded = "launched_ms" in document["sizes"][0]["student"]
    how = (", compiled" if document["compiled"] else "") + (", as CUDA graphs" if recorded else "")
    console.print(f"{device}; batch {batch}, {dtype}{how}")
    rows = []
    for row in document["sizes"]:
        for name, shown in (("teacher", document["rival"]), ("student", "student")):
            figures, peak = row[name], row[name]["peak_bytes"]
            rows.append(
                (
                    f"{row['height']}x{row['width']}",
                    shown,
                    f"{figures['median_ms']:.4g}",
                    f"{figures['p20_ms']:.4g}..{figures['p80_ms']:.4g}",
                    f"{figures['images_per_second']:.4g}",
                    "-" if peak is None else f"{peak / _MEBI:.0f}",
                    f"{row['speedup']:.2f}x" if name == "student" else "",
                    *([f"{figures['launched_ms']:.4g}"] if recorded else []),
                )
            )
    titles = ("size", "model", "median ms", "20..80 % of runs", "images/s", "peak MiB", "speed")
    show_table(console, (*titles, *(["ms, launched one by one"] if recorded else [])), rows)
    console.print(f"Verdict: {document['crossover']['verdict']}.")


@click.command("bench", cls=ReportCommand, show=_show)
@options.folder_argument
@click.option("--against", default="teacher", show_default=True, metavar="NAME", help="Its teacher, or any other ViT.")
@click.option(
    "--sizes",
    metavar="HxW,...",
    callback=options.read_sizes,
    help="In pixels; default: its own and twice that.",
)
@click.option("--batch-size", type=click.IntRange(1), default=1, show_default=True, help="Images per call.")
@options.device_option
@click.option("--dtype", type=options.PRECISION, default="fp32", show_default=True, help="Of weights and images.")
@click.option("--compile", "compiled", is_flag=True, help="Run both models through torch.compile first.")
def command(
    folder: Path,
    against: str,
    sizes: tuple[options.Size, ...] | None,
    batch_size: int,
    device: str,
    dtype: str,
    compiled: bool,
) -> dict[str, Any]:
    """Time a converted model against its teacher."""
    from gspn2convert.artifact import load
    from gspn2convert.bench import bench
    from gspn2convert.environment import pick_device

    student = load(folder)
    name = None if against == "teacher" else against
    height, width = student.patch_embed.img_size
    sizes = sizes or ((height, width), (2 * height, 2 * width))
    # The time does not depend on the weights, so none are fetched.
    other = load_rival(student, folder, name, pretrained=False)
    setting: dict[str, Any] = {"device": pick_device(device), "dtype": dtype, "compiled": compiled}
    figures = bench(student, other, sizes, batch_size=batch_size, **setting)
    return {
        "student": str(folder),
        "against": name or teacher_name(folder),
        "rival": Path(against).resolve().name,
        **figures,
    }
