"""`gspn2convert build-ops`: the library that runs LineScan in ONNX Runtime."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gspn2convert.commands.report import Document, ReportCommand
from gspn2convert.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

_USE = """In Python, which finds it from now on:
  session = gspn2convert.onnx_session("model.onnx")
With ONNX Runtime alone:
  options = onnxruntime.SessionOptions()
  options.register_custom_ops_library({path})
  session = onnxruntime.InferenceSession("model.onnx", options, providers=[{providers}])"""


def _show(document: Document, console: "Console") -> None:
    devices = "CPU and CUDA" if document["cuda"] else "CPU alone"
    # A path must stay whole for whoever copies it.
    console.print(f"library {document['path']} ({devices})", soft_wrap=True)
    names = ("CUDAExecutionProvider", "CPUExecutionProvider") if document["cuda"] else ("CPUExecutionProvider",)
    providers = ", ".join(f'"{name}"' for name in names)
    console.print(_USE.format(path=json.dumps(document["path"]), providers=providers), soft_wrap=True)


@click.command("build-ops", cls=ReportCommand, show=_show)
@click.option(
    "--include",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Folder of ONNX Runtime's headers (onnxruntime_cxx_api.h); default: looked for.",
)
@click.option("--cuda", is_flag=True, help="With CUDA kernels for sessions on a GPU; needs nvcc, takes minutes.")
def command(include: Path | None, cuda: bool) -> dict[str, Any]:
    """Compile the library that runs LineScan fast in ONNX Runtime."""
    from gspn2_kernels.build import BuildError, build, has_cuda

    try:
        path = build(include=include, cuda=cuda, report=lambda line: click.echo(line, err=True))
    except BuildError as error:
        # The message of a command is one line; below it stands what the compiler said.
        message, _, output = str(error).partition("\n")
        if output:
            click.echo(output, err=True)
        raise UserError(message) from error
    if named := os.environ.get("GSPN2_ORT_LIBRARY"):
        click.echo(f"warning: Python takes {named} instead, which GSPN2_ORT_LIBRARY names; unset it", err=True)
    return {"path": str(path), "cuda": has_cuda(path)}
