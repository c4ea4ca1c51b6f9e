"""Time the first call of the line scan in a process: with an empty cache, when Triton compiles, and with a filled one.

    python kernels/benchmarks/cold_start.py --output kernels/benchmarks/results/cold_start_h200.json

Each call is made in a process of its own, after PyTorch has started the GPU. `infer` is a first call without, `train`
one with gradients, forward and backward, of a loss. The import of PyTorch is not counted; that of Triton is, for a
first call on a GPU makes it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from cases import Case, draw, draw_dy
from conditions import conditions, write

from gspn2_kernels import line_scan

CASE = Case((8, 74, 74, 64), "bf16")


def main() -> None:
    """Parse the command line, start the processes, write the JSON and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--commit", help="of the source, for a copy without its git history; default: ask git")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--first-call", choices=("infer", "train"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.first_call:
        print(json.dumps(first_call(arguments.first_call)))
        return
    rows = []
    for name in ("infer", "train"):
        with tempfile.TemporaryDirectory() as cache:
            for state in ("empty", "filled"):
                rows.append({"pass": name, "cache": state, "seconds": in_a_process(name, cache)})
                print(f"{name:<6} {state:<7} cache: {rows[-1]['seconds']:.2f} s", flush=True)
    found = conditions(torch.device("cuda"), arguments.commit)
    write(arguments.output, {**found, "case": CASE.label()}, rows)


def in_a_process(name: str, cache: str) -> float:
    """Make the first call in a process of its own; returns its seconds."""
    environment = {**os.environ, "TRITON_CACHE_DIR": cache}
    command = [sys.executable, __file__, "--first-call", name]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(json.loads(run.stdout))


def first_call(name: str) -> float:
    """Make a first call; returns its seconds."""
    device = torch.device("cuda")
    inputs, dy = draw(CASE, device), draw_dy(CASE, device)
    for t in inputs:
        t.requires_grad_(name == "train")
    torch.cuda.synchronize()
    start = time.perf_counter()
    y = line_scan(*inputs)
    if name == "train":
        (y * dy).sum().backward()  # as in training: a gradient that is given makes PyTorch import sympy first
    torch.cuda.synchronize()
    return round(time.perf_counter() - start, 3)


if __name__ == "__main__":
    main()
