"""Check that a run on two GPUs is the run on one: its losses, and its end after a resume on one of them.

    python recipes/scripts/scale_out.py --output recipes/results/scale_out.json
    python recipes/scripts/scale_out.py --shard --output recipes/results/scale_out.json

The demo is converted in float32 three times: by one process, by two, and by two with an interruption, resumed by one.
With --shard each of two processes holds half of the models. Results are added under the device.
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
from accuracy import add_row, made_by

RECIPE = """name: scale_out
fit: {{images: 128, held_out: 32}}
align: {{steps: 0, batch_size: 32}}
recover: {{steps: {steps}, batch_size: 32, ema: 0.97}}
eval_every: 1
held_out: 64
"""
FIRST = 20


def command(processes: int, recipe: Path, folder: Path, device: str, shard: bool, *more: str) -> list[str]:
    """The conversion's command for one or more processes."""
    start = [sys.executable, "-m"]
    if processes > 1:
        # A port of its own: the usual one may be another program's.
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
        more = (*more, "--shard") if shard else more
    asked = ["--teacher", "demo", "--recipe", str(recipe), "--output", str(folder), "--device", device, *more]
    return [*start, "gspn2convert", "distill", *asked]


def losses(folder: Path) -> list[float]:
    """Losses of stage 2, step by step."""
    history = json.loads((folder / "metrics.json").read_text())["history"]
    return [record["loss"] for record in history if record["stage"] == "recover" and "loss" in record]


def interrupted(recipe: Path, folder: Path, device: str, shard: bool) -> None:
    """Run two processes until stage 2 has written a checkpoint, then ask it to stop."""
    process = subprocess.Popen(command(2, recipe, folder, device, shard), start_new_session=True)
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


def compare(steps: int, device: str, shard: bool) -> dict[str, Any]:
    """Run three times and compare the losses of stage 2."""
    with tempfile.TemporaryDirectory() as name:
        folder, curves = Path(name), {}
        recipe = folder / "recipe.yaml"
        recipe.write_text(RECIPE.format(steps=steps))
        for processes in (1, 2):
            subprocess.run(command(processes, recipe, folder / f"{processes}", device, shard), check=True)
            curves[processes] = losses(folder / f"{processes}")
        interrupted(recipe, folder / "resumed", device, shard)
        subprocess.run(command(1, recipe, folder / "resumed", device, shard, "--resume"), check=True)
        resumed = losses(folder / "resumed")
    return {
        "steps": steps,
        "first_losses": {str(processes): curve[:FIRST] for processes, curve in curves.items()},
        "largest_relative_difference": {
            f"first {FIRST} steps, two processes against one": largest_difference(curves[1][:FIRST], curves[2][:FIRST]),
            "all steps, two processes against one": largest_difference(curves[1], curves[2]),
            "all steps, resumed by one against two": largest_difference(curves[2], resumed),
        },
    }


def main() -> None:
    """Run, compare, and add to the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="[%(default)s]")
    parser.add_argument("--steps", type=int, default=300, help="of stage 2 [%(default)s]")
    parser.add_argument("--shard", action="store_true", help="spread the models over the two processes")
    parser.add_argument("--commit", help="of the source, for a copy without its git history; default: ask git")
    parser.add_argument("--output", type=Path, required=True, help="results file to add to")
    arguments = parser.parse_args()
    found = compare(arguments.steps, arguments.device, arguments.shard)
    found |= made_by(arguments.commit, torch.device(arguments.device))
    add_row(arguments.output, arguments.device + ", sharded" * arguments.shard, found)
    print(found["largest_relative_difference"])


if __name__ == "__main__":
    main()
