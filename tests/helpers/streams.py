"""Pictures by number, written as `datasets` writes them, and batches of them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gspn2convert.data import split_images, train_batches
from gspn2convert.recipe import Augment, parse_recipe
from helpers import pictures

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

CONFIG = pictures.CONFIG | {"crop_pct": 1.0}
DEMO_RECIPE = """
name: short
mixer: {proxy_dim: C/4}
fit: {images: 48, held_out: 16, batch_size: 16}
align: {steps: 4, batch_size: 24}
recover: {steps: 9, batch_size: 24, mixer_lr: 2.0e-4, lr: 5.0e-5, ema: 0.9}
augment: {scale: [0.7, 1.0], color_jitter: 0.0}
keep: "0,1,2,3,4"
eval_every: 4
held_out: 32
seed: 3
"""
DEMO = parse_recipe(DEMO_RECIPE, "test")
FEW = replace(DEMO, fit=replace(DEMO.fit, images=5), held_out=4)
CLASSES = ["ant", "bee", "cat"]
COLUMNS = {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=CLASSES), "title": datasets.Value("string")}


def picture(number: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    return pictures.picture(number, size)


def write_parquet(file: Path, contents: list[bytes], labels: list[int], columns: dict = COLUMNS) -> None:
    """A file as `datasets` writes it, in small row groups."""
    image, label = list(columns)[:2]
    table = {image: [{"bytes": one, "path": None} for one in contents], label: labels, "title": ["x"] * len(labels)}
    file.parent.mkdir(parents=True, exist_ok=True)
    schema = datasets.Features(columns).arrow_schema
    parquet.write_table(pa.Table.from_pydict(table, schema=schema), file, row_group_size=3)


def train(images, **changes) -> list[torch.Tensor]:
    options = dict(batch_size=6, augment=Augment(), seed=3, first_step=0, steps=12, rank=0, world=1)
    indices, _ = split_images(images, FEW)
    return list(train_batches(images, CONFIG, indices=indices, **options | changes))


def numbers_of(views: list[torch.Tensor], count: int) -> list[int]:
    """Which pictures some views without augmentation are of."""
    mean, std = (torch.tensor(CONFIG[key]).view(3, 1, 1) for key in ("mean", "std"))
    known = {}
    for number in range(count):
        resized = picture(number).resize((32, 26), Image.Resampling.BICUBIC).crop((0, 1, 32, 25))
        known[number] = (torch.tensor(np.asarray(resized)).permute(2, 0, 1) / 255 - mean) / std
    return [min(known, key=lambda number: float((known[number] - view).abs().mean())) for view in torch.cat(views)]
