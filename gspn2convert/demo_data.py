"""The bundled demo data: a class-balanced part of Fashion-MNIST (see demo/LICENSE-fashion-mnist)."""

from pathlib import Path

import numpy as np
from PIL import Image

FILE = Path(__file__).parent / "demo" / "fashion_mnist.npz"
LABEL_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


class DemoSource:
    """Grey images of 28 x 28 pixels in ten classes, all in memory."""

    label_names: list[str] | None = list(LABEL_NAMES)

    def __init__(self, split: str) -> None:
        """Read the split `train` or `test`."""
        with np.load(FILE, allow_pickle=False) as arrays:
            self._images: np.ndarray = arrays[f"{split}_images"]
            self._labels: np.ndarray = arrays[f"{split}_labels"]

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Return the grey image and its label."""
        return Image.fromarray(self._images[index]), int(self._labels[index])

    def where(self, index: int) -> str:
        """Name the image in messages."""
        return f"demo image {index}"
