"""Time a scan and a whole student of ViT-B/16 for one image, from 14 x 14 to 256 x 256 patches: is it linear?

    python kernels/benchmarks/scaling.py --output kernels/benchmarks/results/scaling_h200.json

`off_line` is how far the time of a size above 64 x 64 lies from a straight line through 64 x 64 and 256 x 256, as a
share of the line. The student has no attention left and random weights. Times are those of CUDA graphs, in bf16.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from cases import Case, draw
from conditions import conditions, write
from pairs import teacher_and_student
from timing import measure, own_stream

from gspn2_kernels import line_scan

SIDES = (14, 32, 64, 96, 128, 192, 256)
PATCH, PROXY = 16, 96


def main() -> None:
    """Parse the command line, time, write the JSON and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES, help="patches a side, ascending")
    parser.add_argument("--seconds", type=float, default=0.3, help="time for each row")
    parser.add_argument("--commit", help="of the source, for a copy without its git history; default: ask git")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    device, rows = torch.device("cuda"), []
    for name, calls in (("line scan", scans), ("student", students)):
        timed = []
        for side, call in calls(arguments.sides, device):
            with own_stream(device), torch.inference_mode():
                timed.append(
                    {"what": name, "side": side, "tokens": side**2, **measure(call, device, arguments.seconds)}
                )
        rows += with_line(timed)
        for row in timed:
            print(f"{name:<10} {row['side']:4d} {row['ms']:9.4f} ms {row.get('off_line', ''):>8}", flush=True)
    write(arguments.output, conditions(device, arguments.commit), rows)


def scans(sides: tuple[int, ...], device: torch.device) -> Iterator[tuple[int, Callable[[], object]]]:
    """Make calls of the scan alone."""
    for side in sides:
        inputs = draw(Case((1, side, side, PROXY), "bf16"), device)
        yield side, lambda inputs=inputs: line_scan(*inputs)


def students(sides: tuple[int, ...], device: torch.device) -> Iterator[tuple[int, Callable[[], object]]]:
    """Make calls of a whole model."""
    _, student = teacher_and_student("vit_base_patch16_224")
    student.to(device, torch.bfloat16)
    for side in sides:
        images = torch.randn(1, 3, PATCH * side, PATCH * side, dtype=torch.bfloat16, device=device)
        yield side, lambda images=images: student(images)


def with_line(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add how far the times of large sizes are from a straight line."""
    large = [row for row in rows if row["side"] >= 64]
    first, last = large[0], large[-1]
    if last is not first:
        slope = (last["ms"] - first["ms"]) / (last["tokens"] - first["tokens"])
        for row in large:
            line = first["ms"] + slope * (row["tokens"] - first["tokens"])
            row["off_line"] = round(row["ms"] / line - 1, 4)
    return rows


if __name__ == "__main__":
    main()
