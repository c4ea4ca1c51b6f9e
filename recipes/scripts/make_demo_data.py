"""Make the bundled demo data: a class-balanced part of Fashion-MNIST.

The source is the four .gz files that Debian's package `dataset-fashion-mnist` installs.
Run from the repository's root: python recipes/scripts/make_demo_data.py
"""

import argparse
import gzip
from pathlib import Path

import numpy as np

CLASSES = 10


def read_idx(path: Path) -> np.ndarray:
    """Read one gzipped IDX file of bytes.

    Args:
        path: A `*-idx3-ubyte.gz` (images) or `*-idx1-ubyte.gz` (labels) file.

    Returns:
        uint8 array of the shape that the file's header gives.
    """
    raw = gzip.decompress(path.read_bytes())
    assert raw[:3] == b"\x00\x00\x08", f"{path} is no IDX file of bytes"
    rank = raw[3]
    shape = np.frombuffer(raw, ">i4", count=rank, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


def read_split(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Read the images (count, 28, 28) and labels (count,) of the split `train` or `t10k`."""
    return read_idx(folder / f"{split}-images-idx3-ubyte.gz"), read_idx(folder / f"{split}-labels-idx1-ubyte.gz")


def balanced(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `count` indices with equally many of each class, in random order."""
    each = count // CLASSES
    chosen = [rng.choice(np.flatnonzero(labels == label), each, replace=False) for label in range(CLASSES)]
    return rng.permutation(np.concatenate(chosen))


def main() -> None:
    """Write the .npz file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="[%(default)s]")
    parser.add_argument(
        "--output", type=Path, default=Path("gspn2convert/demo/fashion_mnist.npz"), help="[%(default)s]"
    )
    parser.add_argument("--train", type=int, default=6000, help="training images [%(default)s]")
    parser.add_argument("--test", type=int, default=2000, help="test images [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="[%(default)s]")
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    arrays = {}
    for split, source, count in (("train", "train", arguments.train), ("test", "t10k", arguments.test)):
        images, labels = read_split(arguments.data, source)
        chosen = balanced(labels, count, rng)
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = images[chosen], labels[chosen]
    np.savez_compressed(arguments.output, allow_pickle=False, **arrays)


if __name__ == "__main__":
    main()
