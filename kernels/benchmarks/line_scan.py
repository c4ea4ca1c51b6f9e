"""Time the line scan: every backend of a device against the reference, forward and forward + backward.

    python kernels/benchmarks/line_scan.py --device cpu --threads 1 --output kernels/benchmarks/results/cpu.json

A backend is timed on a shape only after its result and gradients on that shape's first image agree with the fp64
reference. Caches are warm, as in a network that has just written the inputs.

Shapes: B batch, H W grid, C channels, G = 1 group.
"""

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gspn2_kernels import backend, line_scan, line_scan_ref, register_backend
from gspn2_kernels.eager import line_scan_bwd, line_scan_fwd
from gspn2_kernels.testing import assert_close, random_inputs

Shape = tuple[int, int, int, int]
Scan = Callable[..., Tensor]

# (B, H, W, C). CPU: proxies of small ViTs at 224 pixels, training and one image; a wide grid; 518 and 1024 pixels.
SHAPES: dict[str, list[Shape]] = {
    "cpu": [(64, 14, 14, 32), (1, 14, 14, 32), (16, 14, 21, 32), (8, 37, 37, 32), (1, 64, 64, 32)],
    "cuda": [(256, 14, 14, 64), (32, 37, 37, 64), (32, 74, 74, 64), (32, 74, 98, 64), (32, 147, 147, 64)]
    + [(1, 64, 64, 32), (1, 128, 128, 64), (8, 256, 256, 64), (16, 1024, 1024, 8)],
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SECONDS, RUNS_AT_LEAST, WARM_UP = 2.0, 10, 3


def main() -> None:
    """Parse the command line, time, print a table and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--shapes", nargs="+", type=_shape, metavar="BxHxWxC", help="default: a list for the device")
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's own choice")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    rows = []
    for row in run(arguments.shapes or SHAPES[device.type], device, arguments.dtype):
        rows.append(row)
        shape = "x".join(map(str, row["shape"]))
        print(
            f"{row['provider']:>10} {shape:>14} {row['pass']:<16} {row['ms']:9.3f} ms"
            f" ({row['ms_20']:.3f} to {row['ms_80']:.3f}) {row['gb_per_s']:8.1f} GB/s",
            flush=True,
        )
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps({**conditions(device, arguments.dtype), "rows": rows}, indent=1) + "\n")


def run(shapes: list[Shape], device: torch.device, dtype: str) -> Iterator[dict[str, Any]]:
    """Check and time every provider on every shape; one row for each pass."""
    for provider, scan in providers(device):
        for shape in shapes:
            inputs = random_inputs(shape, dtype=DTYPES[dtype], device=device, packed=True)
            check(scan, tuple(t[:1] for t in inputs))
            for name, forward_backward in (("forward", False), ("forward+backward", True)):
                times = measure(step(scan, inputs, forward_backward), device)
                low, *_, high = statistics.quantiles(times, n=5)
                median = statistics.median(times)
                yield {
                    "provider": provider,
                    "shape": shape,
                    "pass": name,
                    "ms": round(median, 4),
                    "ms_20": round(low, 4),
                    "ms_80": round(high, 4),
                    "gb_per_s": round(bytes_moved(shape, DTYPES[dtype], forward_backward) / median / 1e6, 2),
                    "runs": len(times),
                }


def providers(device: torch.device) -> Iterator[tuple[str, Scan]]:
    """List what can run on the device. Eager comes last: it takes the place of the device's own backend."""
    yield "reference", line_scan_ref
    if backend(device) != "eager":
        yield backend(device), line_scan
    register_backend(device.type, "eager", line_scan_fwd, line_scan_bwd)
    yield "eager", line_scan


def with_gradients(scan: Scan, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return y and the gradients of x, lam, logits and u for dy = 1."""
    inputs = tuple(t.detach().requires_grad_() for t in inputs)
    y = scan(*inputs)
    return (y, *torch.autograd.grad(y, inputs, torch.ones_like(y)))


def check(scan: Scan, inputs: tuple[Tensor, ...]) -> None:
    """Compare with the reference in fp64; raises AssertionError."""
    # The reference itself, in fp32, misses the logits' tolerance on long scans; 3e-5 covers 1024 lines.
    tolerances = {"dlogits": 3e-5} if inputs[0].dtype == torch.float32 else {}
    expected = with_gradients(line_scan_ref, tuple(t.double() for t in inputs))
    for name, ref, out in zip(
        ("y", "dx", "dlam", "dlogits", "du"), expected, with_gradients(scan, inputs), strict=True
    ):
        assert_close(name, ref, out, tolerances.get(name))


def step(scan: Scan, inputs: tuple[Tensor, ...], forward_backward: bool) -> Callable[[], object]:
    """Make the function that is timed."""
    if forward_backward:
        return lambda: with_gradients(scan, inputs)
    return lambda: scan(*inputs)


def measure(function: Callable[[], object], device: torch.device) -> list[float]:
    """Return the milliseconds of each run, after a warm-up, for about SECONDS."""
    for _ in range(WARM_UP):
        function()
    times: list[float] = []
    while len(times) < RUNS_AT_LEAST or sum(times) < 1e3 * SECONDS:
        _wait(device)
        start = time.perf_counter()
        function()
        _wait(device)
        times.append(1e3 * (time.perf_counter() - start))
    return times


def bytes_moved(shape: Shape, dtype: torch.dtype, forward_backward: bool) -> int:
    """Count every input read once and every output written once, per pass.

    Forward: x C, lam 4C, u 4C, y 4C and logits 12 numbers a pixel. Backward: the same inputs and dy 4C, and the
    gradients of the inputs 9C + 12. Memory for h is a backend's own affair and not counted.
    """
    batch, height, width, channels = shape
    forward, backward = 13 * channels + 12, 22 * channels + 24
    numbers = forward + backward if forward_backward else forward
    return batch * height * width * numbers * dtype.itemsize


def conditions(device: torch.device, dtype: str) -> dict[str, Any]:
    """Describe where, when and with what the numbers were taken."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or None,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "ms": "median, 20 % and 80 % quantiles of single calls, warm caches",
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _shape(text: str) -> Shape:
    try:
        batch, height, width, channels = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape, expected BxHxWxC, such as 64x14x14x32") from None
    return batch, height, width, channels


if __name__ == "__main__":
    main()
