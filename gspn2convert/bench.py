"""Latency and memory of a student against its teacher, size by size."""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import Tensor

from gspn2convert.environment import environment
from gspn2convert.errors import UserError
from gspn2convert.vit import grid_size

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_WARM_UP_SECONDS = 0.3
_MEASURE_SECONDS = 1.5
_MIN_RUNS, _MAX_RUNS = 7, 300


def bench(
    student: VisionTransformer,
    teacher: VisionTransformer,
    sizes: Sequence[tuple[int, int]],
    *,
    batch_size: int = 1,
    device: torch.device,
    dtype: str = "fp32",
    compiled: bool = False,
) -> dict[str, Any]:
    """Time both models at every size and say from which size on the student is the faster one.

    Args:
        student: converted ViT.
        teacher: what it is compared with.
        sizes: heights and widths in pixels.
        batch_size: images per call.
        device: where to run.
        dtype: `fp32`, `bf16` or `fp16`, of weights and images.
        compiled: whether both models go through `torch.compile` first.

    Returns:
        Times in milliseconds, memory in bytes (None on the CPU, where PyTorch keeps no count). On CUDA the times are
        those of a CUDA graph, and `launched_ms` the median of calls that Python launches kernel by kernel.

    Raises:
        UserError: if a size is no multiple of the patch, or an output is not finite.
    """
    for size in sizes:
        grid_size(teacher, *size)  # refuses what the teacher does not take
    grids = [grid_size(student, *size) for size in sizes]
    setting = _Setting(batch_size=batch_size, device=device, dtype=dtype, compiled=compiled)
    rows = []
    for (height, width), (lines, columns) in zip(sizes, grids, strict=True):
        row: dict[str, Any] = {"height": height, "width": width, "tokens": lines * columns}
        for name, model in (("teacher", teacher), ("student", student)):
            row[name] = setting.measure(name, model, (height, width))
        row["speedup"] = row["teacher"]["median_ms"] / row["student"]["median_ms"]
        rows.append(row)
    return {
        "batch_size": batch_size,
        "dtype": dtype,
        "compiled": compiled,
        "sizes": rows,
        "crossover": crossover(rows),
        "environment": environment(device),
    }


def crossover(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Say in one sentence, and in numbers, where the student starts to be faster.

    Between two measured sizes the number of tokens at which the speed-up is 1 is interpolated
    linearly; outside of the measured sizes nothing is claimed.

    Args:
        rows: sizes with `tokens`, `height`, `width` and `speedup` (teacher's time over the student's), and the
            `launched_ms` of `teacher` and `student` where `bench` has them.
    """
    ordered = sorted(rows, key=lambda row: row["tokens"])
    found = _crossover(ordered)
    launched = (
        (row["teacher"]["launched_ms"] / row["student"]["launched_ms"], _size(row))
        for row in ordered
        if "launched_ms" in row.get("student", {})
    )
    slow = ", ".join(f"{speed:.2f}x at {size}" for speed, size in launched if speed < 1.0)
    if slow:
        found["verdict"] += f"; launched one by one, not as a CUDA graph, it is SLOWER: {slow}"
    return found


def _crossover(ordered: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The same of the times that `speedup` is of; sizes in ascending order."""
    faster = [row["speedup"] > 1.0 for row in ordered]
    span = ", ".join(f"{row['speedup']:.2f}x at {_size(row)}" for row in ordered)
    if all(faster):
        return {"tokens": None, "verdict": f"the student is faster at every size measured ({span})"}
    if not any(faster):
        return {"tokens": None, "verdict": f"the student is SLOWER at every size measured ({span})"}
    first = faster.index(True)
    if not all(faster[first:]):
        return {"tokens": None, "verdict": f"no clear crossover: the student is faster at some sizes only ({span})"}
    below, above = ordered[first - 1], ordered[first]
    share = (1.0 - below["speedup"]) / (above["speedup"] - below["speedup"])
    tokens = round(below["tokens"] + share * (above["tokens"] - below["tokens"]))
    place = f"about {tokens} tokens on, between {_size(below)} and {_size(above)}"
    return {"tokens": tokens, "verdict": f"the student is slower at small sizes and faster from {place} ({span})"}


def _size(row: dict[str, Any]) -> str:
    return f"{row['height']}x{row['width']}"


@dataclass(frozen=True, kw_only=True)
class _Setting:
    """How every model of a run is timed."""

    batch_size: int
    device: torch.device
    dtype: str
    compiled: bool

    @torch.inference_mode()
    def measure(self, name: str, model: VisionTransformer, size: tuple[int, int]) -> dict[str, float | None]:
        """Check the output, then time calls on the same random images."""
        generator = torch.Generator().manual_seed(0)
        channels = model.patch_embed.proj.in_channels
        images = torch.randn(self.batch_size, channels, *size, generator=generator).to(self.device)
        # A copy, for a rounded weight is lost; on the device one at a time, so that each peak memory is its own.
        model = copy.deepcopy(model).to(self.device, DTYPES[self.dtype]).eval()
        images = images.to(DTYPES[self.dtype])
        if self.compiled:
            torch._dynamo.reset()
            model.compile(dynamic=False)
        self._check(name, model(images), size)
        if self.device.type != "cuda":
            return self._figures(_times_ms(lambda: model(images), self.device))
        torch.cuda.reset_peak_memory_stats(self.device)
        figures = self._figures(_times_ms(_recorded(model, images), self.device))
        figures["launched_ms"] = statistics.median(_times_ms(lambda: model(images), self.device))
        return figures

    def _check(self, name: str, output: Tensor, size: tuple[int, int]) -> None:
        if not torch.isfinite(output).all():
            where = f"{size[0]}x{size[1]}, {self.dtype}"
            raise UserError(f"{name}: output at {where} holds NaN or infinity; try --dtype fp32, or check the weights")

    def _figures(self, times: list[float]) -> dict[str, float | None]:
        times, fifth = sorted(times), len(times) // 5
        median = statistics.median(times)
        on_cuda = self.device.type == "cuda"
        return {
            "median_ms": median,
            "p20_ms": times[fifth],
            "p80_ms": times[-1 - fifth],
            "images_per_second": self.batch_size * 1000.0 / median,
            "peak_bytes": torch.cuda.max_memory_allocated(self.device) if on_cuda else None,
            "runs": len(times),
        }


def _recorded(model: VisionTransformer, images: Tensor) -> Callable[[], object]:
    """Record the launches of a call into a CUDA graph: its replay takes the time of the device, not that of Python."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            model(images)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(images)
    return graph.replay


def _times_ms(call: Callable[[], object], device: torch.device) -> list[float]:
    """Repeat a call until the time is used up; CUDA is timed by events on the device."""
    end = time.perf_counter() + _WARM_UP_SECONDS
    while True:
        _time_ms(call, device)
        if time.perf_counter() > end:
            break
    times: list[float] = []
    end = time.perf_counter() + _MEASURE_SECONDS
    while len(times) < _MIN_RUNS or (time.perf_counter() < end and len(times) < _MAX_RUNS):
        times.append(_time_ms(call, device))
    return times


def _time_ms(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1000.0
    begin, finish = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    finish.record()
    finish.synchronize()
    return float(begin.elapsed_time(finish))
