"""How the ridge of the closed-form fit decides where training ends: the demo, once for each ridge and seed.

An unridged fit starts nearest to the attention and then trains worse than one with a ridge of 1 to 5 %.
Run from the repository's root: python recipes/scripts/ridge_curves.py --output recipes/results/ridge_curves.json
"""

import argparse
import json
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from gspn2convert.distill import Options, distill
from gspn2convert.environment import environment, pick_device
from gspn2convert.recipe import load_recipe

METHODS: dict[str, Literal["random", "svd"]] = {"random": "random", "weight SVD": "svd"}
STARTS = {**dict.fromkeys(METHODS), "ridge 0": 0.0, "ridge 0.01": 0.01, "ridge 0.05": 0.05}


def run(name: str, ridge: float | None, seed: int, device: str) -> dict[str, Any]:
    """Convert the demo's teacher from one start; returns what was measured on the way."""
    recipe = load_recipe("demo")
    fit = replace(recipe.fit, ridge=ridge) if ridge is not None else replace(recipe.fit, method=METHODS[name])
    recipe = replace(recipe, fit=fit, seed=seed, eval_every=10)
    with tempfile.TemporaryDirectory() as folder:
        options = Options(output=Path(folder) / "student", device=device, quiet=True)
        metrics = distill("demo", recipe, "demo", options)
    curve = [
        {"stage": each["stage"], "step": each["step"], **each["evaluation"]}
        for each in metrics["history"]
        if "evaluation" in each
    ]
    return {"start": name, "seed": seed, "fit_error": metrics["fit_error"], "stages": metrics["stages"], "curve": curve}


def main() -> None:
    """Run all starts and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--seeds", type=int, default=3, help="[%(default)s]")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda [%(default)s]")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time [%(default)s]")
    arguments = parser.parse_args()
    tasks = [(name, ridge, seed, arguments.device) for seed in range(arguments.seeds) for name, ridge in STARTS.items()]
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        runs = list(pool.map(run, *zip(*tasks, strict=True)))
    document = {"runs": runs, "environment": environment(pick_device(arguments.device))}
    arguments.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
