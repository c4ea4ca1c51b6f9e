"""Pictures by number, their files, and batches of them."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gspn2convert.data import ImageSet, train_batches
from gspn2convert.recipe import Augment

CONFIG = {
    "input_size": (3, 24, 32),
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.3, 0.4),
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "crop_mode": "center",
}
MakeFolder = Callable[..., Path]


def picture(number: int, size: tuple[int, int] = (20, 16)) -> Image.Image:
    """A smooth coloured picture; no two numbers give the same."""
    rows, columns = np.mgrid[: size[1], : size[0]]
    channels = [rows * 9 + number * 37, columns * 7 + number * 59, (rows + columns) * 4 + number * 83]
    return Image.fromarray((np.stack(channels, -1) % 256).astype(np.uint8))


def encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def png(number: int) -> bytes:
    return encode(picture(number))


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def train(images: ImageSet, **changes: object) -> list[torch.Tensor]:
    options = dict(
        indices=range(len(images)), batch_size=4, augment=Augment(), seed=3, first_step=0, steps=6, rank=0, world=1
    )
    return list(train_batches(images, CONFIG, **options | changes))  # type: ignore[arg-type]
