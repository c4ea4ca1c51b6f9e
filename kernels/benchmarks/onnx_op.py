"""Time the ONNX op's library in ONNX Runtime on a CPU: against the function body, and a converted ViT against itself.

    gspn2convert build-ops
    python kernels/benchmarks/onnx_op.py --threads 1 --output kernels/benchmarks/results/onnx_op_cpu.json

All layers of the student are converted, with the proxy dimension of recipe `default`, C/8. The weights are random: the
time does not depend on them. Student and teacher are exported alike, and the teacher's attention runs as the exporter
writes it, in MatMul and Softmax nodes. Rows `op` are of one LineScan node at the student's grid. Nothing is timed
unless library and body agree.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from conditions import conditions, write
from onnx_files import OPERANDS, write_model, write_scan
from pairs import teacher_and_student
from timing import RUNS_AT_LEAST

from gspn2_kernels import onnx_op
from gspn2_kernels.testing import assert_close, random_inputs

SIZES = (224, 512, 1024)
# fp32 through a dozen layers.
TOLERANCE = 1e-5
CPU = torch.device("cpu")
Feeds = dict[str, np.ndarray[Any, Any]]


def main() -> None:
    """Parse the command line, time, print a line for each row and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="name of a timm ViT")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="pixels")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each time")
    parser.add_argument("--commit", help="for the JSON, where git does not know it")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = {
        **conditions(CPU, arguments.commit),
        "onnxruntime": onnxruntime.__version__,
        "model": arguments.model,
        "dtype": "fp32",
        "batch": arguments.batch,
    }
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        student, teacher, proxy, patch = export(arguments.model, Path(folder))
        scan = write_scan(Path(folder) / "scan.onnx")
        for size in arguments.sizes:
            grid = (arguments.batch, size // patch, size // patch, proxy)
            feeds = {n: t.numpy() for n, t in zip(OPERANDS, random_inputs(grid), strict=True)}
            image = np.random.default_rng(0).standard_normal((arguments.batch, 3, size, size), dtype=np.float32)
            rows.append({"what": "op", "size": size, **time_all(scan, None, feeds, arguments)})
            rows.append({"what": "model", "size": size, **time_all(student, teacher, {"image": image}, arguments)})
            for row in rows[-2:]:
                print(describe(row), flush=True)
            write(arguments.output, found, rows)


def export(name: str, folder: Path) -> tuple[Path, Path, int, int]:
    """Write student and teacher; returns their files, the proxy dimension and the size of a patch."""
    teacher, student = teacher_and_student(name)
    proxy, patch = teacher.embed_dim // 8, teacher.patch_embed.patch_size[0]
    files = [write_model(model, folder / f"{kind}.onnx") for kind, model in (("s", student), ("t", teacher))]
    return files[0], files[1], proxy, patch


def time_all(converted: Path, attention: Path | None, feeds: Feeds, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time the body, the library and the attention model, after a comparison of the first two."""
    sessions = {
        "body": make_session(converted, arguments.threads, registered=False),
        "library": make_session(converted, arguments.threads, registered=True),
    }
    results = [torch.from_numpy(session.run(None, feeds)[0]) for session in sessions.values()]
    assert_close("library", *results, TOLERANCE)
    if attention is not None:
        sessions["attention"] = make_session(attention, arguments.threads, registered=False)
    return interleaved(sessions, feeds, arguments.seconds)


def interleaved(
    sessions: dict[str, onnxruntime.InferenceSession], feeds: Feeds, seconds: float
) -> dict[str, dict[str, Any]]:
    """Time the sessions in turns, RUNS_AT_LEAST and for `seconds` each: what else the machine does hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for session in sessions.values():
        session.run(None, feeds)
    end = time.perf_counter() + seconds * len(sessions)
    while time.perf_counter() < end or len(times["body"]) < RUNS_AT_LEAST:
        for name, session in sessions.items():
            start = time.perf_counter()
            session.run(None, feeds)
            times[name].append(1e3 * (time.perf_counter() - start))
    figures = {}
    for name, values in times.items():
        low, *_, high = statistics.quantiles(values, n=5)
        figures[name] = {"ms": statistics.median(values), "ms_20": low, "ms_80": high, "runs": len(values)}
    return {name: {key: round(value, 4) for key, value in figure.items()} for name, figure in figures.items()}


def make_session(path: Path, threads: int, *, registered: bool) -> onnxruntime.InferenceSession:
    """Make a session on the CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if registered and not onnx_op.register(options):
        raise SystemExit("the library does not fit this onnxruntime")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def describe(row: dict[str, Any]) -> str:
    """Put a row into words."""
    library = row["library"]["ms"]
    text = f"{row['what']:5s} {row['size']:4d} px: library {library:8.2f} ms"
    for other in ("body", "attention"):
        if other in row:
            text += f", {other} {row[other]['ms']:8.2f} ms ({row[other]['ms'] / library:.2f}x)"
    return text


if __name__ == "__main__":
    main()
