"""What a conversion changes in parameters and multiply-accumulates (MACs), from small images to large ones.

Nothing is downloaded: the models are counted, not run. From the repository's root:

    python recipes/scripts/costs.py --output recipes/results/costs.json
"""

import argparse
import json
from pathlib import Path
from typing import Any

from timm.models import VisionTransformer

from gspn2convert.cost import cost
from gspn2convert.environment import environment
from gspn2convert.model import build_student
from gspn2convert.recipe import load_recipe
from gspn2convert.teachers import load_teacher

SIZES = (224, 512, 1024, 2048)
REGIONS = (4, 8)


def measure(teacher: str, recipe: str) -> dict[str, Any]:
    """Count a teacher and its students, all layers converted, at each of `SIZES`."""
    vit = load_teacher(teacher, pretrained=False)
    mixer = load_recipe(recipe).mixer.resolve(vit.embed_dim)
    mixers = {"student": mixer, **{f"regions: {count}": {**mixer, "regions": count} for count in REGIONS}}
    students = {name: build_student(vit, range(len(vit.blocks)), each) for name, each in mixers.items()}
    models = {"teacher": vit, **students}
    parameters = {name: cost(model, SIZES[0], SIZES[0]).parameters for name, model in models.items()}
    sizes = [{"pixels": size, **{name: macs(model, size) for name, model in models.items()}} for size in SIZES]
    return {"teacher": teacher, "recipe": recipe, "mixer": mixer, "parameters": parameters, "sizes": sizes}


def macs(model: VisionTransformer, size: int) -> dict[str, int]:
    """MACs for one square image: of the whole model, of all that mixes tokens, and of the line scans in it."""
    counted = cost(model, size, size)
    mixing = sum(site.macs for site in counted.sites)
    return {
        "tokens": counted.grid[0] * counted.grid[1],
        "all": counted.macs,
        "mixing": mixing,
        "scans": counted.scan_macs,
    }


def main() -> None:
    """Count and write one JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--teacher", default="vit_base", help="as for gspn2convert distill [%(default)s]")
    parser.add_argument("--recipe", default="default", help="its mixer is used [%(default)s]")
    arguments = parser.parse_args()
    document = {**measure(arguments.teacher, arguments.recipe), "environment": environment()}
    arguments.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
