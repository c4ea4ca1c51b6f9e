"""Time the line scan: every backend of a device, the reference and the released GSPN-1, against the time of a copy.

    python kernels/benchmarks/line_scan.py --device cpu --threads 1 --output kernels/benchmarks/results/cpu.json
    python kernels/benchmarks/line_scan.py --device cuda --output kernels/benchmarks/results/h200.json [--gspn1 PATH]

A provider is timed on a case only after its result and gradients agree with the fp64 reference; a wrong one ends the
run. `share_of_floor` is the time in which a copy would move the bytes that the pass must move, over the time taken.
What was not timed has a row that says why.

Passes: `infer` without gradients; `train`, a forward that saves what its backward needs; `backward` alone.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cases import LAYOUTS, Case, Inputs, draw, draw_dy
from checks import check
from conditions import DEVICES, DTYPES, conditions, numbers, set_up, write
from gspn1 import gspn1
from providers import Provider, attempt, names, provider, refusal
from timing import Call, measure, own_stream, peak_bytes
from torch import Tensor

# CPU: proxies of small ViTs at 224 pixels, training and one image; a wide grid; 518 and 1024 pixels.
# CUDA: 1024 and 2048 pixels, a large and a small grid, one image, long lines, GSPN-2's own shape.
SHAPES = {
    "cpu": [
        Case(shape, "fp32")
        for shape in ((64, 14, 14, 32), (1, 14, 14, 32), (16, 14, 21, 32), (8, 37, 37, 32), (1, 64, 64, 32))
    ],
    "cuda": [
        *(Case(shape, "bf16", "contiguous") for shape in ((32, 74, 74, 64), (32, 147, 147, 64), (8, 256, 256, 64))),
        *(Case(shape, "bf16", "contiguous") for shape in ((256, 14, 14, 64), (1, 64, 64, 32), (1, 512, 512, 8))),
        Case((4, 64, 64, 96), "bf16", "contiguous"),
        Case((16, 1024, 1024, 8), "fp32", "planar"),
    ],
}
PASSES = {"cpu": ["infer", "train", "backward", "forward+backward"], "cuda": ["infer", "train", "backward"]}
SECONDS = {"cpu": 2.0, "cuda": 0.3}
# A reference that takes longer than this is left out.
LIMIT_MS = 1e3
HEAD = f"{'provider':<10} {'case':<31} {'pass':<16} {'ms':>9} {'20 to 80 %':>19} {'python':>9} {'GB/s':>7} {'floor':>6}"


class Setting(NamedTuple):
    """How a run times.

    Attributes:
        device: Where.
        copy_gb_per_s: Bandwidth of a copy there.
        seconds: Time for each row.
        passes: Which ones.
    """

    device: torch.device
    copy_gb_per_s: float
    seconds: float
    passes: list[str]


def main() -> None:
    """Parse the command line, time, write the JSON and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="[%(default)s]")
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's own choice")
    parser.add_argument("--commit", help="of the source, for a copy without its git history; default: ask git")
    parser.add_argument("--output", type=Path, help="JSON file for the results, written as they come")
    shape = numbers("BxHxWxC", "64x14x14x32")
    parser.add_argument("--providers", nargs="+", help="default: all; on a CPU without `compiled`, which takes minutes")
    parser.add_argument("--shapes", nargs="+", type=shape, metavar="BxHxWxC", help="default: a list for the device")
    parser.add_argument("--dtype", choices=DTYPES, help="default: those of the list, else fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--layout", choices=LAYOUTS, help="default: those of the list, else contiguous")
    parser.add_argument("--passes", nargs="+", choices=PASSES["cpu"], help="default: what fits the device")
    parser.add_argument("--gspn1", type=Path, metavar="PATH", help="built GSPN-1 extension, see gspn1.py")
    parser.add_argument("--seconds", type=float, help="time for each row [2 on a CPU, 0.3 on a GPU]")
    parser.add_argument(
        "--compile-lines", type=int, default=40, help="longest grid to compile the reference for [%(default)s]"
    )
    arguments = parser.parse_args()
    device = set_up(parser, arguments)
    arguments.providers = chosen(arguments, device)
    found, rows = conditions(device, arguments.commit), []
    try:
        for row in run(arguments, device, found["copy_gb_per_s"]):
            rows.append(row)
            print(line(row), file=sys.stderr, flush=True)
            write(arguments.output, found, rows)
    finally:
        print(f"{found['device']}, copy {found['copy_gb_per_s']} GB/s, torch {found['torch']}", HEAD, sep="\n")
        print(*map(line, rows), sep="\n")


def cases(arguments: argparse.Namespace, device: torch.device) -> list[Case]:
    """List what is timed, the options applied."""
    default = "bf16" if device.type == "cuda" else "fp32"
    listed = [Case(shape, default) for shape in arguments.shapes or []] or SHAPES[device.type]
    return [
        case._replace(dtype=arguments.dtype or case.dtype, layout=arguments.layout or case.layout) for case in listed
    ]


def chosen(arguments: argparse.Namespace, device: torch.device) -> list[str]:
    """List the providers that will run.

    Raises:
        SystemExit: One of them is not there.
    """
    there = names(device) + ["gspn1"] * (arguments.gspn1 is not None)
    wanted = arguments.providers or [name for name in there if name != "compiled" or device.type == "cuda"]
    missing = ", ".join(sorted(set(wanted) - set(there)))
    if missing:
        raise SystemExit(f"--providers: no {missing} here, only {', '.join(there)} (and gspn1 with --gspn1 PATH)")
    return wanted


def run(arguments: argparse.Namespace, device: torch.device, copy_gb_per_s: float) -> Iterator[dict[str, Any]]:
    """Time every provider on every case: one row for each pass."""
    setting = Setting(
        device=device,
        copy_gb_per_s=copy_gb_per_s,
        seconds=arguments.seconds or SECONDS[device.type],
        passes=arguments.passes or PASSES[device.type],
    )
    released = gspn1(arguments.gspn1) if "gspn1" in arguments.providers else None
    for case in cases(arguments, device):
        inputs, dy = draw(case, device), draw_dy(case, device)
        for name in arguments.providers:
            who = released if name == "gspn1" else provider(name, device, arguments.compile_lines)
            assert who is not None
            yield from timed(who, case, inputs, dy, setting)


def timed(who: Provider, case: Case, inputs: Inputs, dy: Tensor, setting: Setting) -> list[dict[str, Any]]:
    """Check one provider on one case, then time its passes."""
    title = {"provider": who.name, **case._asdict(), "directions": who.directions}
    rows = []
    with own_stream(setting.device, default=not who.capture):
        checked, reason = {}, refusal(who, case)
        if reason is None:
            checked, reason = attempt(lambda: check(who, case, inputs, dy))
        makers = {} if reason else who.passes(who.scan, inputs, dy)
        for name in setting.passes:
            found: dict[str, Any] = {}
            why = reason
            if name in makers:
                found, why = attempt(lambda make=makers[name], name=name: figures(who, case, name, make, setting))
            if found or why:
                rows.append({**title, "pass": name, **({"skipped": why} if why else {**found, **checked})})
    return rows


def figures(who: Provider, case: Case, name: str, make: Callable[[], Call], setting: Setting) -> dict[str, Any]:
    """Time one pass; returns its figures."""
    call = make()
    limit = LIMIT_MS if who.slow else math.inf
    times = measure(call, setting.device, setting.seconds, capture=who.capture, limit_ms=limit)
    work = who.work(case, name)
    rates = {key: count / times["ms"] / 1e6 for key, count in work.items()}
    floors = {key.replace("bytes", "share_of_floor"): rate / setting.copy_gb_per_s for key, rate in rates.items()}
    return {
        **times,
        **work,
        "gb_per_s": round(rates["bytes"], 2),
        **{key: round(share, 4) for key, share in floors.items()},
        "peak_bytes": peak_bytes(call, setting.device),
    }


def line(row: dict[str, Any]) -> str:
    """Put a row into one line of the table."""
    case = Case(row["shape"], row["dtype"], row["layout"])
    start = f"{row['provider']:<10} {case.label():<31} {row['pass']:<16}"
    if "skipped" in row:
        return f"{start} skipped: {row['skipped']}"
    spread = f"{row['ms_20']:.4f} to {row['ms_80']:.4f}"
    python = f"{row['eager_ms']:.4f}" if "eager_ms" in row else ""
    return f"{start} {row['ms']:9.4f} {spread:>19} {python:>9} {row['gb_per_s']:7.1f} {row['share_of_floor']:6.1%}"


if __name__ == "__main__":
    main()
