"""How a call is timed: replays of a CUDA graph between events on a GPU, the clock on a CPU; and how fast a copy is.

The caches are warm, as in a network that has just written the inputs: below about 50 MB a GPU reads them from L2.
On a GPU, whoever times makes a stream of their own the current one first (`own_stream`): a graph is captured from
it, and autograd runs a backward on the stream of its forward.
"""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch

Call = Callable[[], object]

RUNS_AT_LEAST, RUNS_AT_MOST, WARM_UP = 10, 1000, 3
# A replay lasts this long at least, and a short call is one of so many in it, to drown the cost of the launch.
REPLAY_MS, CALLS_AT_LEAST, CALLS_AT_MOST, LONG_CALL_MS = 0.4, 4, 100, 20.0
COPY_RUNS = 30
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}


class TooSlow(Exception):
    """A call took longer than the caller is willing to wait for many of."""


def measure(
    function: Call, device: torch.device, seconds: float, *, capture: bool = True, limit_ms: float = math.inf
) -> dict[str, Any]:
    """Time a call for about `seconds`, after a warm-up.

    Args:
        function: The call. What it returns is dropped.
        device: Where it runs.
        seconds: Time to spend; RUNS_AT_LEAST runs are made in any case.
        capture: Whether the call may be captured in a CUDA graph.
        limit_ms: The longest call worth timing.

    Returns:
        `ms`, `ms_20` and `ms_80`, median and quantiles of a call; `runs`, how many were timed, each of `calls` calls;
        `timed` by "graph", "events" or "clock". On a GPU also `eager_ms`, of the call launched from Python, and
        `no_graph`, why it could not be captured, if so.

    Raises:
        TooSlow: A call takes more than `limit_ms`.
    """
    once = _first_calls(function, device)
    if once > limit_ms:
        raise TooSlow(f"one call took {once / 1e3:.2f} s, more than {limit_ms / 1e3:.2f} s")
    if device.type != "cuda":
        return _figures(_clocked(function, _runs(once, seconds)), "clock")
    eager = _events(function, min(_runs(once, seconds), 50))
    if not capture:
        return {**_figures(_events(function, _runs(once, seconds)), "events"), "eager_ms": _median(eager)}
    try:
        found = _replayed(function, seconds)
    except RuntimeError as error:  # also out of memory: a graph keeps its own
        torch.cuda.synchronize(device)
        reason = str(error).partition("\n")[0]
        found = {**_figures(_events(function, _runs(once, seconds)), "events"), "no_graph": reason}
    return {**found, "eager_ms": _median(eager)}


def copy_bandwidth(device: torch.device) -> float:
    """Measure bytes read and written in a second by a copy on the device: what the shares of a floor refer to."""
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    _first_calls(lambda: target.copy_(source), device)
    times = (_events if device.type == "cuda" else _clocked)(lambda: target.copy_(source), COPY_RUNS)
    return 2 * source.numel() / (1e-3 * statistics.median(times))


def peak_bytes(function: Call, device: torch.device) -> int | None:
    """Measure the memory that a call takes at most, beyond what was allocated before; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


@contextlib.contextmanager
def own_stream(device: torch.device, *, default: bool = False) -> Iterator[None]:
    """Run what is inside on a stream that can be captured; with `default`, on the default stream, which cannot."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    with torch.cuda.stream(torch.cuda.default_stream(device) if default else _side_stream(device)):
        yield
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all, since memory that was freed on a stream serves that stream alone."""
    return torch.cuda.Stream(device)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _first_calls(function: Call, device: torch.device) -> float:
    """Warm up; returns the milliseconds of the quickest warm call. A first call may compile, and does not count."""
    function()
    quickest = math.inf
    for _ in range(WARM_UP):
        quickest = min(quickest, _clocked(function, 1, device)[0])
        if quickest > 1e3:
            break
    return quickest


def _clocked(function: Call, runs: int, device: torch.device | None = None) -> list[float]:
    times = []
    for _ in range(runs):
        synchronize(device or torch.device("cpu"))
        start = time.perf_counter()
        function()
        synchronize(device or torch.device("cpu"))
        times.append(1e3 * (time.perf_counter() - start))
    return times


def _events(function: Call, runs: int) -> list[float]:
    """Time calls in a row, without a gap for the CPU to catch up in."""
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
    for start, end in pairs:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


def _replayed(function: Call, seconds: float) -> dict[str, Any]:
    graph, calls = _capture(function, 1), 1
    once = _median(_events(graph.replay, 5))
    if once < LONG_CALL_MS:
        calls = min(CALLS_AT_MOST, max(CALLS_AT_LEAST, math.ceil(REPLAY_MS / once)))
        graph = _capture(function, calls)
    times = _events(graph.replay, _runs(once * calls, seconds))
    return _figures([total / calls for total in times], "graph", calls)


def _capture(function: Call, calls: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(calls):
            function()
    for _ in range(WARM_UP):
        graph.replay()
    torch.cuda.synchronize()
    return graph


def _runs(ms: float, seconds: float) -> int:
    return min(RUNS_AT_MOST, max(RUNS_AT_LEAST, round(1e3 * seconds / max(ms, 1e-3))))


def _figures(times: list[float], timed: str, calls: int = 1) -> dict[str, Any]:
    low, *_, high = statistics.quantiles(times, n=5)
    spread = {"ms": _median(times), "ms_20": round(low, 5), "ms_80": round(high, 5)}
    return {**spread, "runs": len(times), "calls": calls, "timed": timed}


def _median(times: list[float]) -> float:
    return round(statistics.median(times), 5)
