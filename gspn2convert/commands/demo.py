"""`gspn2convert demo`: the whole way, from the bundled teacher to ONNX Runtime, in one table."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gspn2convert.commands import options
from gspn2convert.commands.report import Document, ReportCommand, percent, plain, show_table, wants_json
from gspn2convert.errors import UserError
from gspn2convert.interrupt import Interrupted

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from timm.models import VisionTransformer

    from gspn2convert.data import ImageSet

_DEMO = "demo"
_STAGES = {"fit": "stage 0, closed-form fit", "align": "stage 1, align", "recover": "stage 2, recover"}
_BATCH = 64


def _show(document: Document, console: Console) -> None:
    teacher, student, onnx = document["teacher"], document["student"], document["onnx"]
    seconds = document["seconds"]
    rows = [
        *((f"top-1 after {_STAGES[one['stage']]}", "", percent(one["top1"])) for one in document["stages"]),
        ("top-1, reloaded from the folder", percent(teacher["top1"]), percent(student["top1"])),
        ("top-1 in ONNX Runtime", "", percent(onnx["top1"])),
        ("largest difference of ONNX Runtime from PyTorch", "", f"{onnx['max_abs']:.1e}"),
        ("same first guess as the teacher", "", percent(student["agreement"])),
        ("mean error of the layers after stage 0", "", f"{document['fit_error']:.3f}"),
        ("parameters", f"{teacher['parameters']:,}", f"{student['parameters']:,}"),
        ("M MACs for one image", f"{teacher['macs'] / 1e6:.2f}", f"{student['macs'] / 1e6:.2f}"),
        ("seconds in all", "", f"{sum(seconds.values()):.1f}"),
        *((f"  {name}", "", f"{value:.1f}") for name, value in seconds.items()),
    ]
    show_table(console, ("", "teacher", "student"), rows)
    console.print(f"wrote {document['output']}: the converted model, model.onnx and demo.json")


@click.command("demo", cls=ReportCommand, show=_show)
@click.option(
    "--output", type=click.Path(path_type=Path), default="gspn2-demo", show_default=True, help="New folder to write."
)
@options.device_option
def command(output: Path, device: str) -> dict[str, Any]:
    """Run the whole way on the bundled data."""
    _check_onnx()
    from gspn2convert.artifact import holds_files, write_atomic
    from gspn2convert.distill import Options, distill
    from gspn2convert.environment import environment, pick_device
    from gspn2convert.recipe import load_recipe

    if holds_files(output):
        raise UserError(f"the output folder {output} is not empty; name another by --output, or remove it")
    where, seconds, start = pick_device(device), {}, time.perf_counter()
    try:
        metrics = distill(_DEMO, load_recipe(_DEMO), _DEMO, Options(output=output, device=device, quiet=wants_json()))
    except (Interrupted, KeyboardInterrupt) as stop:
        where_stopped = f" in stage {stop.stage}" if isinstance(stop, Interrupted) else ""
        again = f"remove {output} to start again" if output.exists() else "nothing was written, so start it again"
        raise click.ClickException(f"the demo was stopped{where_stopped}; {again}") from stop
    seconds["distill"] = time.perf_counter() - start
    document = {
        "output": str(output),
        "stages": metrics["stages"],
        "fit_error": metrics["fit_error"],
        **_use(output, where, seconds),
        "seconds": seconds,
        "environment": environment(where),
    }
    write_atomic(output / "demo.json", json.dumps(plain(document), indent=2).encode() + b"\n")
    return document


def _check_onnx() -> None:
    """Find out before the long part whether the last one can run."""
    from gspn2convert.doctor import report

    for check in report():
        if check.name in ("onnx export", "onnxruntime") and not check.ok:
            raise UserError(f"{check.name}: {check.value}; {check.remedy}")


def _use(folder: Path, device: torch.device, seconds: dict[str, float]) -> dict[str, Any]:
    """Load what was written, evaluate it, export it, and run that; `seconds` takes the time of each."""
    from gspn2convert.artifact import load
    from gspn2convert.cost import cost
    from gspn2convert.data import open_images
    from gspn2convert.evaluate import evaluate
    from gspn2convert.export import export_onnx
    from gspn2convert.teachers import load_teacher

    start = time.perf_counter()
    student, teacher = load(folder), load_teacher(_DEMO)
    images = open_images(_DEMO, "test", in_chans=student.patch_embed.proj.in_channels)
    figures = evaluate(student, teacher, images, batch_size=_BATCH, device=device)
    seconds["evaluate"] = time.perf_counter() - start
    start = time.perf_counter()
    exported = export_onnx(student.cpu(), folder / "model.onnx", metadata={"teacher": _DEMO, "recipe": _DEMO})
    seconds["export"] = time.perf_counter() - start
    start = time.perf_counter()
    ran = _run_onnx(folder / "model.onnx", student, images)
    seconds["ONNX Runtime"] = time.perf_counter() - start
    costs = [cost(model.cpu(), *student.patch_embed.img_size) for model in (teacher, student)]
    of_teacher, of_student = ({"parameters": one.parameters, "macs": one.macs} for one in costs)
    return {
        "teacher": {"top1": figures.pop("teacher_top1"), **of_teacher},
        "student": {**figures, **of_student},
        "onnx": {**ran, "export": exported},
    }


def _run_onnx(path: Path, student: VisionTransformer, images: ImageSet) -> dict[str, float]:
    """Run a file over all images in plain ONNX Runtime, beside PyTorch."""
    import onnxruntime
    import torch
    from timm.data import resolve_model_data_config

    from gspn2convert.data import batches

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    right, largest = 0, 0.0
    for pixels, labels in batches(
        images,
        resolve_model_data_config(student),
        indices=range(len(images)),
        batch_size=_BATCH,
        augment=None,
        seed=0,
    ):
        logits = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: pixels.numpy()})[0])
        with torch.inference_mode():
            largest = max(largest, (logits - student(pixels)).abs().max().item())
        right += int((logits.argmax(1) == labels).sum())
    return {"top1": right / len(images), "max_abs": largest}
