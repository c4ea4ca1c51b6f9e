"""Check on two GPUs that a run is the same run: its losses, and its end after a resume on one of them.

    python recipes/scripts/scale_out.py --output recipes/results/scale_out.json

The demo is converted in float32 three times: on one GPU, on two, and on two with an interruption, resumed on one.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from accuracy import add_row, commit

from gspn2convert.environment import environment

STEPS = 300
RECIPE = f"""name: scale_out
fit: {{images: 128, held_out: 32}}
align: {{steps: 0, batch_size: 32}}
recover: {{steps: {STEPS}, batch_size: 32, ema: 0.97}}
eval_every: 1
held_out: 64
"""
FIRST = 20


def command(gpus: int, recipe: Path, folder: Path, *more: str) -> list[str]:
    """The conversion's command on one or more GPUs."""
    start = [sys.executable, "-m"]
    if gpus > 1:
        start += ["torch.distributed.run", "--nproc-per-node", str(gpus), "-m"]
    asked = ["--teacher", "demo", "--recipe", str(recipe), "--output", str(folder), "--device", "cuda", *more]
    return [*start, "gspn2convert", "distill", *asked]


def losses(folder: Path) -> list[float]:
    """Losses of stage 2, step by step."""
    history = json.loads((folder / "metrics.json").read_text())["history"]
    return [record["loss"] for record in history if record["stage"] == "recover" and "loss" in record]


def interrupted(recipe: Path, folder: Path) -> None:
    """Run on two GPUs until stage 2 has written a checkpoint, then ask it to stop."""
    process = subprocess.Popen(command(2, recipe, folder), start_new_session=True)
    checkpoint = folder / "checkpoint.safetensors"
    first = None
    while process.poll() is None:
        written = checkpoint.stat().st_mtime_ns if checkpoint.exists() else None
        first = first or written
        if first and written != first:  # the first is the fit's
            os.killpg(process.pid, signal.SIGTERM)
            break
        time.sleep(0.05)
    process.wait()
    assert checkpoint.exists(), "the run was not interrupted: it ended before its second checkpoint"


def largest_difference(ours: list[float], theirs: list[float]) -> float:
    """Largest difference of two curves, relative to the first."""
    return max(abs(a - b) / abs(a) for a, b in zip(ours, theirs, strict=True))


def main() -> None:
    """Run, compare, and add to the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--commit", default=commit(), help="commit to note [this checkout's]")
    parser.add_argument("--output", type=Path, required=True, help="results file to add to")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, curves = Path(name), {}
        recipe = folder / "recipe.yaml"
        recipe.write_text(RECIPE)
        for gpus in (1, 2):
            subprocess.run(command(gpus, recipe, folder / f"{gpus}"), check=True)
            curves[gpus] = losses(folder / f"{gpus}")
        interrupted(recipe, folder / "resumed")
        subprocess.run(command(1, recipe, folder / "resumed", "--resume"), check=True)
        curves[0] = losses(folder / "resumed")
    found: dict[str, Any] = {
        "steps": STEPS,
        "first_losses": {str(gpus): curves[gpus][:FIRST] for gpus in (1, 2)},
        "largest_relative_difference": {
            f"first {FIRST} steps, two GPUs against one": largest_difference(curves[1][:FIRST], curves[2][:FIRST]),
            "all steps, two GPUs against one": largest_difference(curves[1], curves[2]),
            "all steps, resumed on one against two": largest_difference(curves[2], curves[0]),
        },
        "commit": arguments.commit,
        "environment": environment(torch.device("cuda")),
    }
    add_row(arguments.output, "demo", found)
    print(found["largest_relative_difference"])


if __name__ == "__main__":
    main()
