"""Time a converted ViT-B/16 against the ViT-B/16 itself, at sizes from 224 to 2048 pixels.

    python kernels/benchmarks/models.py --output kernels/benchmarks/results/models.json

All layers are converted, with the proxy dimension of recipe `default` (C/8 = 96), and with --regions they read as many.
The weights are random: the time does not depend on them. Both models run in CUDA graphs, the teacher with PyTorch's
fused attention; with --compile, both through torch.compile.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from pairs import teacher_and_student

from gspn2convert.bench import bench, crossover

# Pixels and images a call: about the same number of tokens each.
SIZES = ((224, 64), (512, 16), (1024, 4), (2048, 1))


def main() -> None:
    """Parse the command line, time, print a line for each size and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="vit_base_patch16_224", help="name of a timm ViT")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="bf16")
    parser.add_argument("--sizes", type=int, nargs="+", default=[size for size, _ in SIZES], help="pixels")
    parser.add_argument("--regions", type=int, default=0, help="mixer.regions of the student [%(default)s]")
    parser.add_argument("--compile", action="store_true", help="run both models through torch.compile")
    parser.add_argument("--commit", help="of the source, for a copy without its git history; default: ask git")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    how = {"regions": arguments.regions, "compiled": arguments.compile}
    results = run(arguments.model, device, arguments.dtype, arguments.sizes, **how)
    if arguments.commit:
        results["environment"]["commit"] = arguments.commit
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")


def run(
    model: str, device: torch.device, dtype: str, sizes: list[int], *, regions: int, compiled: bool
) -> dict[str, Any]:
    """Time both models at every size."""
    teacher, student = teacher_and_student(model, regions=regions)
    rows, environment = [], {}
    for size in sizes:
        batch = dict(SIZES).get(size, 1)
        setting = {"batch_size": batch, "device": device, "dtype": dtype, "compiled": compiled}
        figures = bench(student, teacher, [(size, size)], **setting)
        environment = figures["environment"]
        row = {"batch_size": batch, **figures["sizes"][0]}
        rows.append(row)
        print(
            f"{size:5d} px, batch {batch:2d}: teacher {row['teacher']['median_ms']:8.3f} ms,"
            f" student {row['student']['median_ms']:8.3f} ms, {row['speedup']:.2f}x",
            flush=True,
        )
    found = crossover(rows)
    print(found["verdict"])
    return {
        "model": model,
        "dtype": dtype,
        "regions": regions,
        "compiled": compiled,
        "sizes": rows,
        "crossover": found,
        "environment": environment,
    }


if __name__ == "__main__":
    main()
