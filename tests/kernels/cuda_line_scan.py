"""Compares the CUDA line scan with the reference, and times it: a program for a machine with a GPU and nvcc.

    python tests/kernels/cuda_line_scan.py --output kernels/benchmarks/results/cuda_line_scan_h100.json

Shapes: B batch, H W grid, C channels, G groups. A plan is (kind, positions, stages, line_warps, channel_warps,
helped), see `Plan` in line_scan.cu.
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT / "kernels" / "benchmarks")]

# Only now, for the folders of these modules are on the path since the line above.
from conditions import conditions  # noqa: E402

from gspn2_kernels.reference import line_scan_ref  # noqa: E402
from gspn2_kernels.testing import random_inputs, relative_rms  # noqa: E402

CSRC = ROOT / "kernels" / "gspn2_kernels" / "csrc"
WRAPPER = Path(__file__).with_name("cuda_line_scan_wrapper.cu")
FP32, FP16, BF16 = DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # in the order of gspn2::Dtype
TOLERANCES = {FP32: 2e-6, FP16: 4e-3, BF16: 4e-3}
# (B, H, W, C), G, segment, dtypes, kind of logits.
CASES: list[tuple[tuple[int, int, int, int], int, int, tuple[torch.dtype, ...], str]] = [
    ((0, 5, 7, 16), 1, 0, (BF16,), ""),
    ((2, 0, 7, 16), 1, 0, (FP32,), ""),
    ((2, 7, 0, 16), 1, 0, (FP16,), ""),
    ((1, 1, 1, 8), 1, 0, DTYPES, ""),
    ((2, 1, 9, 16), 1, 0, DTYPES, ""),
    ((2, 9, 1, 64), 1, 2, DTYPES, ""),
    ((8, 14, 14, 64), 1, 0, DTYPES, ""),
    ((40, 14, 14, 64), 1, 0, (BF16,), ""),
    ((16, 74, 74, 64), 1, 0, (FP32, BF16), ""),
    ((32, 74, 75, 64), 1, 0, (BF16,), "extreme"),
    ((32, 37, 41, 64), 8, 5, DTYPES, ""),
    ((3, 33, 47, 48), 2, 0, DTYPES, "extreme"),  # channels that no block of four warps can share out
    ((24, 60, 31, 40), 1, 7, DTYPES, ""),  # a warp half beyond the channels
    ((5, 30, 29, 64), 16, 3, (FP16, BF16), ""),  # four channels a group
    ((2, 12, 13, 24), 12, 0, DTYPES, ""),  # two channels a group
    ((2, 12, 13, 24), 24, 1, DTYPES, ""),  # one channel a group, every line restarts
    ((3, 11, 10, 7), 1, 0, DTYPES, ""),
    ((3, 11, 10, 9), 3, 4, DTYPES, "extreme"),
    ((2, 10, 21, 12), 3, 0, DTYPES, ""),
    ((1, 64, 64, 32), 1, 0, DTYPES, ""),
    ((1, 128, 100, 64), 1, 50, (FP32, BF16), ""),
    ((1, 33, 65, 8), 1, 0, DTYPES, "low"),
    ((16, 147, 147, 64), 1, 0, (BF16,), ""),
    ((2, 20, 300, 64), 1, 0, DTYPES, ""),
    ((40, 300, 9, 16), 1, 100, (FP32, BF16), ""),
    ((1, 512, 40, 8), 1, 0, (FP32, BF16), ""),
    ((1, 1024, 6, 8), 1, 0, DTYPES, ""),
    ((1, 5, 1100, 16), 1, 0, (FP32, BF16), ""),
    ((1, 3, 4096, 8), 2, 0, (FP16,), ""),
    ((1, 4100, 2, 3), 1, 0, (FP32,), ""),
]
TIMED = [(32, 74, 74, 64), (32, 147, 147, 64), (8, 256, 256, 64), (256, 14, 14, 64), (1, 64, 64, 32), (1, 512, 512, 8)]
GUARD = 64  # numbers before and behind each tensor, which nobody may read or write
LAUNCHES, REPLAYS = 20, 15


class Library:
    """The kernels, compiled for the device at hand."""

    def __init__(self, folder: Path) -> None:
        library = folder / "line_scan.so"
        major, minor = torch.cuda.get_device_capability()
        command = ["nvcc", "-std=c++17", "-O3", f"-arch=sm_{major}{minor}", "-DGSPN2_CUDA", f"-I{CSRC}", "-shared"]
        subprocess.run([*command, "-Xcompiler", "-fPIC", "-o", str(library), str(WRAPPER)], check=True)
        self._library = ctypes.CDLL(str(library))
        for name in ("scan", "choose", "scan_by_plan"):
            getattr(self._library, name).restype = ctypes.c_char_p

    def call(self, name: str, inputs: list[Tensor], y: Tensor, segment: int, *rest: Any) -> str | None:
        """Call a function of the wrapper; returns what went wrong."""
        x, _, logits, _ = inputs
        shape = (ctypes.c_int64 * 6)(*x.shape, logits.shape[4], segment)
        pointers = (ctypes.c_void_p * 5)(*(t.data_ptr() for t in (*inputs, y)))
        text = getattr(self._library, name)(shape, DTYPES.index(x.dtype), pointers, *rest)
        return None if text is None else text.decode()

    def launch(self, inputs: list[Tensor], y: Tensor, segment: int, plan: tuple[int, ...] | None = None) -> str | None:
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        if plan is None:
            return self.call("scan", inputs, y, segment, stream)
        return self.call("scan_by_plan", inputs, y, segment, stream, (ctypes.c_int * 6)(*plan))

    def plan(self, inputs: list[Tensor], y: Tensor, segment: int) -> list[int]:
        numbers = (ctypes.c_int * 6)()
        text = self.call("choose", inputs, y, segment, numbers)
        if text is not None:
            raise RuntimeError(text)
        return list(numbers)


def guarded(t: Tensor, shift: int = 0) -> Tensor:
    """Copy a tensor into the middle of NaNs, `shift` numbers away from an aligned address."""
    memory = torch.full((t.numel() + 2 * GUARD + shift,), float("nan"), dtype=t.dtype, device="cuda")
    inside = memory[GUARD + shift : GUARD + shift + t.numel()].view(t.shape)
    inside.copy_(t)
    return inside


def guards(t: Tensor) -> Tensor:
    """The NaNs around a guarded tensor."""
    memory = torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage())
    return torch.cat((memory[: t.storage_offset()], memory[t.storage_offset() + t.numel() :]))


def with_logits(logits: Tensor, kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if kind == "extreme":
        return torch.where(torch.rand(logits.shape, generator=generator) < 0.5, -200.0, 200.0).to(logits)
    if kind == "low":
        levels = torch.tensor([0.0, 25.0, 90.0, 200.0]).to(logits)
        return logits - levels[torch.arange(logits.shape[2]) % 4].view(-1, 1, 1, 1)
    return logits


def draw(shape: tuple[int, ...], groups: int, dtype: torch.dtype, kind: str = "", shift: int = 0) -> list[Tensor]:
    """Draw inputs of three images at most, which take turns."""
    x, lam, logits, u = random_inputs((min(shape[0], 3), *shape[1:]), groups, dtype)
    images = torch.arange(shape[0]) % 3
    return [guarded(t[images], shift) for t in (x, lam, with_logits(logits, kind), u)]


def check(
    library: Library, inputs: list[Tensor], segment: int, plan: tuple[int, ...] | None = None, ref: Tensor | None = None
) -> dict[str, Any] | None:
    """Compare with the reference; bits of two runs and of a replayed graph. None where the plan does not fit."""
    if ref is None:
        ref = line_scan_ref(*(t.double() for t in inputs), segment)
    empty = torch.full(inputs[1].shape, float("nan"), dtype=inputs[0].dtype)
    runs = [guarded(empty) for _ in range(3)]
    for y in runs[:2]:
        text = library.launch(inputs, y, segment, plan)
        if text == "does not fit":
            return None
        if text is not None:
            return {"passed": False, "error": text}
    if runs[2].numel():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            library.launch(inputs, runs[2], segment, plan)
        graph.replay()
    torch.cuda.synchronize()
    integers = torch.int32 if empty.dtype == FP32 else torch.int16
    same = all(torch.equal(y.view(integers), runs[0].view(integers)) for y in runs[1:])
    clean = all(bool(guards(y).isnan().all()) for y in runs)
    error = relative_rms(ref, runs[0])
    passed = error <= TOLERANCES[empty.dtype] and same and clean
    return {"passed": passed, "error": error, "same_bits": same, "guards_clean": clean}


def compared(library: Library) -> Iterator[dict[str, Any]]:
    """Check all cases, misaligned tensors, and every compiled kernel."""
    for shape, groups, segment, dtypes, kind in CASES:
        for dtype in dtypes:
            inputs = draw(shape, groups, dtype, kind)
            plan = library.plan(inputs, inputs[1], segment) if inputs[1].numel() else []
            named = {"shape": shape, "groups": groups, "segment": segment, "dtype": str(dtype), "logits": kind}
            yield {**named, "plan": plan, **(check(library, inputs, segment) or {})}
    for dtype in DTYPES:
        inputs = draw((2, 9, 10, 16), 1, dtype, shift=1)
        yield {"dtype": str(dtype), "case": "misaligned", **(check(library, inputs, 4) or {})}
        for height, width in ((53, 37), (19, 31)):
            inputs = draw((1, height, width, 64), 2, dtype)
            ref = line_scan_ref(*(t.double() for t in inputs), 20)
            for plan in plans(max(height, width), 64 * inputs[0].element_size()):
                found = check(library, inputs, 20, plan, ref)
                if found is not None:
                    yield {"dtype": str(dtype), "case": "plan", "plan": plan, "length": max(height, width), **found}


def plans(length: int, row: int) -> Iterator[tuple[int, ...]]:
    """All plans worth a thought for lines of `length` positions and `row` bytes of channels."""
    for positions in (1, 2, 3, 4, 5):
        for channel_warps in (1, 2, 4):
            if row % (32 * channel_warps) == 0:
                yield 1, positions, 0, -(-length // (16 * positions)), channel_warps, 0
    for positions, stages in ((1, 3), (2, 3), (4, 3), (4, 2)):
        for helped in (0, 1):
            yield 0, positions, stages, -(-length // (8 * positions)), 1, helped
    for positions in (1, 2):
        yield 2, positions, 0, 1, 1, 0
    yield 2, 1, 0, 2, 1, 0


def milliseconds(function: Callable[[], object], launches: int, replays: int) -> float:
    """Time a call: the median over replays of a CUDA graph of many."""
    function()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(launches):
            function()
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / launches)
    return statistics.median(times)


def timed(library: Library, tune: bool, copy_gb_per_s: float) -> Iterator[dict[str, Any]]:
    for shape in TIMED:
        batch, height, width, channels = shape
        inputs = [t.to("cuda", BF16) for t in random_inputs((1, height, width, channels))]
        inputs = [t.expand(batch, *t.shape[1:]).contiguous() for t in inputs]
        y = torch.empty_like(inputs[1])
        floor = (13 * channels + 12) * 2 * batch * height * width / copy_gb_per_s / 1e6
        chosen = tuple(library.plan(inputs, y, 0))
        tried = {chosen, *plans(max(height, width), 2 * channels)} if tune else {chosen}
        for plan in sorted(tried, key=lambda plan: plan != chosen):
            if library.launch(inputs, y, 0, plan) is None:
                launch = partial(library.launch, inputs, y, 0, plan)
                ms = round(milliseconds(launch, LAUNCHES, REPLAYS), 5)
                figures = {"ms": ms, "share_of_floor": round(floor / ms, 3)}
                yield {"shape": shape, "plan": plan, "chosen": plan == chosen, **figures}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the JSON here, too")
    parser.add_argument("--tune", action="store_true", help="time all plans of a shape, not only the chosen one")
    parser.add_argument("--commit", help="of the source, for a copy without its git history; default: ask git")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, torch.cuda.stream(torch.cuda.Stream()):
        found = conditions(torch.device("cuda"), options.commit)
        began = time.perf_counter()
        library = Library(Path(folder))
        compiled = time.perf_counter()
        checks = list(compared(library))
        failed = [check for check in checks if not check["passed"]]
        times = [] if failed else list(timed(library, options.tune, found["copy_gb_per_s"]))
    report = {
        **found,
        "ms": "median of replays of a CUDA graph of many calls",
        "seconds_compiling": round(compiled - began, 1),
        "seconds": round(time.perf_counter() - began, 1),
        "checks": len(checks),
        "failed": failed,
        "times": times,
        "compared": checks,
    }
    text = "\n".join(f"{json.dumps(key)}: {dumped(value)}," for key, value in report.items())
    text = "{\n" + text.removesuffix(",") + "\n}\n"
    if options.output:
        options.output.write_text(text)
    sys.stdout.write(text)
    return 1 if failed else 0


def dumped(value: Any) -> str:
    """JSON with a line for each item of a list."""
    if isinstance(value, list) and value:
        return "[\n " + ",\n ".join(map(json.dumps, value)) + "\n]"
    return json.dumps(value)


if __name__ == "__main__":
    raise SystemExit(main())
