"""Check and time the ONNX op's library in ONNX Runtime on a GPU: nodes, and a converted ViT-B against ViT-B.

    CUDAARCHS=native gspn2convert build-ops --cuda
    cd kernels/benchmarks
    python onnx_op_cuda.py --parts parity node body memcpy --output results/onnx_op_h100.json
    python onnx_op_cuda.py --parts model --compile --output results/onnx_model_h100.json

Parts, each in a process of its own, so that one which fails leaves the others:

    parity  LineScan against the reference in fp64, and the bits of two runs
    node    time of a LineScan in a session, by itself and in a CUDA graph, against the time of a copy
    body    a node by the library against the same by its function body
    memcpy  copies between host and device that ONNX Runtime adds to a converted ViT-Ti of any size
    model   all layers converted, in fp16, images of one shape: bits of a CUDA graph's replay; both models' times
    profile the same student: the kernels that take most of the time

Inputs and outputs stay on the device. Weights are random. Nothing is timed unless it is right. --export writes the
files of the models and ends, which needs no GPU; --files finds them again.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import onnxruntime
import torch
from conditions import conditions, write
from ort_bound import Row, Setting
from ort_models import SMALL_DTYPES, export, export_small, memcpy, model
from ort_nodes import body, node, parity
from ort_profile import profile
from timing import own_stream

PARTS: dict[str, Callable[[Setting], Iterator[Row]]] = {
    "parity": parity,
    "node": node,
    "body": body,
    "memcpy": memcpy,
    "model": model,
    "profile": profile,
}
SECONDS_AT_MOST = {"parity": 60, "node": 60, "body": 60, "memcpy": 60, "model": 120, "profile": 60}


def main() -> None:
    """Run the parts in processes and write the JSON, or be one of these processes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--commit", help="of the source, for a copy without its git history; default: ask git")
    parser.add_argument("--output", type=Path, help="JSON file for the results, written as they come")
    parser.add_argument("--files", type=Path, help="folder for the models' files; default: a temporary one")
    parser.add_argument("--export", action="store_true", help="write the models' files and end")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each time [%(default)s]")
    parser.add_argument("--compile", action="store_true", help="time the student through torch.compile, too")
    parser.add_argument("--dry", action="store_true", help="small shapes on the CPU, to try the program")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--copy", type=float, default=1.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = arguments.files or Path(folder)
        files.mkdir(parents=True, exist_ok=True)
        device = torch.device("cpu" if arguments.dry else "cuda")
        setting = Setting(device, files, arguments.seconds, arguments.copy, arguments.compile, arguments.dry)
        if arguments.export:
            print(*(export_small(setting, dtype) for dtype in SMALL_DTYPES), *export(setting))
        elif arguments.part:
            with own_stream(device):
                for row in PARTS[arguments.part](setting):
                    print(json.dumps({"part": arguments.part, **row}), flush=True)
        else:
            run_parts(arguments, device, files)


def run_parts(arguments: argparse.Namespace, device: torch.device, files: Path) -> None:
    """Run each part in a process, and write its rows as they come."""
    found = {**conditions(device, arguments.commit), "onnxruntime": onnxruntime.__version__}
    rows: list[Row] = []
    for part in arguments.parts:
        command = [sys.executable, __file__, *sys.argv[1:], "--part", part, "--files", str(files)]
        command += ["--copy", str(found["copy_gb_per_s"])]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        timer = threading.Timer(SECONDS_AT_MOST[part], process.kill)
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith("{"):
                rows.append(json.loads(line))
                write(arguments.output, found, rows)
        if process.wait():
            rows.append({"part": part, "failed": f"the process ended with {process.returncode}"})
            print(json.dumps(rows[-1]))
        timer.cancel()
        write(arguments.output, found, rows)


if __name__ == "__main__":
    main()
