"""A teacher, data and a recipe on disk, and what `distill` made of them."""

import json

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image
from timm.models import save_for_hf

from gspn2convert.cli import main
from helpers.command_line import RECIPE


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A teacher's folder, labelled images and a recipe."""
    root = tmp_path_factory.mktemp("place")
    shape = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 3}
    torch.manual_seed(0)
    teacher = timm.create_model("vit_tiny_patch16_224", **shape)
    save_for_hf(teacher, root / "teacher", safe_serialization=True, model_args=shape)
    noise = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 4)):
        for name in ("ant", "bee", "cat"):
            (root / "data" / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = noise.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / "data" / split / name / f"{index}.png")
    (root / "tiny.yaml").write_text(RECIPE)
    return root


@pytest.fixture(scope="module")
def run(place):
    """Runs a command line in which {} stands for the place."""

    def go(line):
        return CliRunner().invoke(main, line.replace("{}", str(place)).split())

    return go


@pytest.fixture(scope="module")
def converted(place, run):
    """What distill printed as JSON; the student lies in {}/student."""
    line = "distill --teacher {}/teacher --data {}/data --recipe {}/tiny.yaml --output {}/student --json"
    result = run(line)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)
