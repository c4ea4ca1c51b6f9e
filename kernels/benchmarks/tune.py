"""Time the Triton kernels of the line scan with other constants than those of the table in `tuning.py`.

    python kernels/benchmarks/tune.py --device cuda --shapes 32x74x74x64 --output build/tune.json

For every case forward, backward and the scans of a latent (`gated`, with the products before them): candidates around
the table's choice, one constant changed at a time, and the splits of a line. A candidate whose result differs from that
of the table's choice by more than rounding is wrong and ends the run. Every candidate compiles for some seconds: give a
few shapes at a time.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from cases import LAYOUTS, Case, draw, draw_dy
from checks import NAMES
from conditions import DEVICES, DTYPES, conditions, numbers, set_up, write
from line_scan import SHAPES
from providers import EXACT
from timing import measure, own_stream
from torch import Tensor
from triton.errors import TritonError

from gspn2_kernels import triton_gated
from gspn2_kernels import triton_line_scan as kernels
from gspn2_kernels.memory import shared_memory
from gspn2_kernels.testing import assert_close
from gspn2_kernels.tuning import LANES, Plan, plan

Run = Callable[[Plan], tuple[Tensor, ...]]

PASSES = ("infer", "train", "backward", "gated")
# Which part of the table a pass goes by.
KERNELS = {"infer": "forward", "train": "train", "backward": "backward", "gated": "planes"}
# A lane holds so many numbers of the state at most: beyond, it spills.
REGISTERS = 96


def main() -> None:
    """Parse the command line, time, write the JSON and print the best beside the table's choice."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=DEVICES, default="cuda", help="[%(default)s]")
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's own choice")
    parser.add_argument("--commit", help="of the source, for a copy without its git history; default: ask git")
    parser.add_argument("--output", type=Path, help="JSON file for the results, written as they come")
    shape = numbers("BxHxWxC", "64x14x14x32")
    parser.add_argument("--shapes", nargs="+", type=shape, metavar="BxHxWxC", help="default: those of line_scan.py")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of --shapes [%(default)s]")
    parser.add_argument("--layout", choices=LAYOUTS, default=LAYOUTS[0], help="of --shapes [%(default)s]")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES, help="[all]")
    parser.add_argument("--seconds", type=float, default=0.1, help="time for each candidate [%(default)s]")
    arguments = parser.parse_args()
    device = set_up(parser, arguments)
    found, rows = conditions(device, arguments.commit), []
    listed = [Case(one, arguments.dtype, arguments.layout) for one in arguments.shapes or []] or SHAPES["cuda"]
    for case, name in itertools.product(listed, arguments.passes):
        with own_stream(device):
            rows.append(tune(case, name, device, arguments.seconds))
        print(line(rows[-1]), file=sys.stderr, flush=True)
        write(arguments.output, found, rows)
    print(*map(line, rows), sep="\n")


def tune(case: Case, name: str, device: torch.device, seconds: float) -> dict[str, Any]:
    """Time all candidates for one pass over one case, the table's choice first."""
    batch, height, width, channels = case.shape
    itemsize = DTYPES[case.dtype].itemsize
    shared = shared_memory(device)
    table = plan(batch, height, width, channels, 1, itemsize, KERNELS[name], shared=shared)
    run = runner(case, name, device)
    expected, tried = run(table), []  # of the table's choice, which line_scan.py compares with the reference
    for candidate in candidates(table, case):
        row: dict[str, Any] = {"plan": candidate._asdict()}
        try:
            for one, ref, out in zip(NAMES, expected, run(candidate), strict=False):
                assert_close(f"{case.label()}, {candidate}: {one}", ref, out, EXACT[case.dtype][2])
            times = measure(lambda plan=candidate: run(plan), device, seconds)
        except TritonError as error:
            tried.append({**row, "failed": f"{type(error).__name__}: {error}".partition("\n")[0]})
        else:
            tried.append({**row, **times})
    return {**case._asdict(), "pass": name, "tried": tried}


def runner(case: Case, name: str, device: torch.device) -> Run:
    """Make the function that runs a pass with a plan."""
    if name == "gated":
        return gated_runner(case, device)
    inputs, dy = draw(case, device), draw_dy(case, device)
    if name == "infer":
        return lambda chosen: (kernels.line_scan_fwd(*inputs, 0, chosen=chosen),)
    if name == "train":
        return lambda chosen: kernels.line_scan_train(*inputs, 0, chosen=chosen)[:1]
    _, states = kernels.line_scan_train(*inputs, 0)
    return lambda chosen: kernels.line_scan_bwd(dy, *inputs, 0, states, chosen=chosen)


def gated_runner(case: Case, device: torch.device) -> Run:
    """The same for the scans of a latent, whose lam is about 1/2, as that of the other passes."""
    batch, height, width, channels = case.shape
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(batch, height * width, channels, generator=generator) + 0.5
    weight = torch.randn(8 * channels + 12, channels, generator=generator) / (4 * channels**0.5)
    bias = torch.full(weight.shape[:1], 0.5)
    drawn = [t.to(device, DTYPES[case.dtype]) for t in (latent, weight, bias)]
    return lambda chosen: (triton_gated.gated_scan(*drawn, (height, width), 1, 0, chosen=chosen),)


def candidates(table: Plan, case: Case) -> list[Plan]:
    """List the valid plans around a plan, itself first."""
    changes = [
        {},
        *({"NS": table.NS + more} for more in (-1, 1, 2)),
        {"AHEAD": not table.AHEAD},
        {"APART": not table.APART},
        *({"BC": vector} for vector in (table.BC // 2, table.BC * 2)),
        *splits(table, case.lines),
    ]
    plans = dict.fromkeys(table._replace(**change) for change in changes)
    return [one for one in plans if one == table or valid(one, case)]


def splits(table: Plan, lines: int) -> Iterator[dict[str, int]]:
    """List other ways to share a line out to programs, warps and lanes."""
    grids = {1, max(1, table.GRID // 2), table.GRID, 2 * table.GRID}
    for grid, warps, lanes in itertools.product(grids, (1, 2, 4, 8), (1, 2, 4, 8)):
        for halo in (8, 16, 32) if grid > 1 else (0,):
            held = -(-lines // grid) + min(2, grid - 1) * halo
            yield {"GRID": grid, "WC": warps, "CL": lanes, "P": -(-held * lanes // (LANES * warps))}


def valid(one: Plan, case: Case) -> bool:
    """Tell whether a plan covers a case, loads 16 bytes at most, and leaves a lane registers enough."""
    _, height, width, channels = case.shape
    covers = one.held >= case.lines if one.GRID == 1 else one.lines_per_launch(height, width) >= 1
    wide = 1 <= one.BC <= 16 // DTYPES[case.dtype].itemsize and one.tile <= channels
    return covers and wide and one.NS >= 1 and one.P * one.BC <= REGISTERS


def line(row: dict[str, Any]) -> str:
    """Put the table's choice and the best of a case into one line."""
    table = row["tried"][0]
    best = min((one for one in row["tried"] if "ms" in one), key=lambda one: one["ms"])
    case = Case(row["shape"], row["dtype"], row["layout"])
    head = f"{case.label():<31} {row['pass']:<9} {len(row['tried']):3} tried"
    change = {key: value for key, value in best["plan"].items() if value != table["plan"][key]}
    gain = f"best {best['ms']:.4f} ms with {change}" if change else "the best"
    return f"{head}, table {table['ms']:.4f} ms {tuple(table['plan'].values())}, {gain}"


if __name__ == "__main__":
    main()
