r"""Make a training set of photographs out of Debian's wallpapers.

    for name in gnome-backgrounds mate-backgrounds ukui-wallpapers plasma-workspace-wallpapers lomiri-wallpapers-16.04 \
        lomiri-wallpapers-20.04 opencv-doc tuxpaint-stamps-default dataset-fashion-mnist; do
        apt-get download $name; dpkg -x ${name}_*.deb unpacked/$name; done
    python recipes/scripts/make_photos.py --source unpacked --output photos \
        --skip '*/ela_modified.*' '*/graf3.*' '*/aloeR.*' '*/aloeGT.*' '*/leuvenB.*' '*/aero3.*' \
        --fashion unpacked/dataset-fashion-mnist/usr/share/datasets/fashion-mnist

The pictures that are skipped show what others show, a little moved. More photographs, among much else, are in these
folders of other packages: usr/share/lxqt/wallpapers of lxqt-themes, usr/share/plasma/avatars/photos of
plasma-workspace-data, usr/share/palapeli/collection of palapeli-data, usr/share/tuxpaint/templates of tuxpaint-data.

Any folder with pictures will do as the source. Pictures that are small, nearly flat or a copy of another are left out.
Every sixth picture is a test picture: crops of one picture are all in one split. Those of --more are trained on only,
so that other pictures there do not change what is tested. Fashion-MNIST's training images, if asked for, are more views
to train on; none is a test image. The same arguments give the same files.
"""

import argparse
import hashlib
import json
import math
import random
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import numpy as np
from make_demo_data import read_split
from PIL import Image

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
SHORTEST, SHORTEST_MORE = 480, 400  # pixels of the short side; of pictures that are only trained on
# A step in brightness below this is none, and a picture that has so few others is a gradient or a plain surface.
FLAT_STEP, FLAT_SHARE = 1.5, 0.75
COPY_BITS = 28  # of 256 that differ at most in the fingerprints of two copies
# Copies are often cut to the shape (width by height) of another screen: they agree in what both still show, which is
# in the middle of one of them or at either end.
SHAPES, PLACES = (16 / 9, 16 / 10, 3 / 2, 4 / 3, 1.0, 9 / 16), (0.0, 0.5, 1.0)
TEST_EVERY = 6


@dataclass(frozen=True)
class Picture:
    """A picture worth cropping: its file, a digest of its bytes, its pixels, and its fingerprints, whole and cut."""

    path: Path
    digest: str
    pixels: int
    looks: list[set[int]]


def fingerprint(grey: Image.Image, box: tuple[float, float, float, float] | None = None) -> int:
    """Return 256 bits of what a part of a picture looks like: where it gets brighter from left to right."""
    tiny = np.asarray(grey.resize((17, 16), Image.Resampling.LANCZOS, box=box), int)
    return int.from_bytes(np.packbits(np.diff(tiny, axis=1) > 0).tobytes(), "big")


def cut_fingerprints(grey: Image.Image, shape: float) -> set[int]:
    """Return the fingerprints of a picture cut to a shape; a part with little to tell it by, as a sky, has none."""
    width, height = min(grey.width, grey.height * shape), min(grey.height, grey.width / shape)
    corners = [((grey.width - width) * place, (grey.height - height) * place) for place in PLACES]
    looks = {fingerprint(grey, (left, top, left + width, top + height)) for left, top in corners}
    return {each for each in looks if 64 < each.bit_count() < 192}


def examine(path: Path, shortest: int) -> Picture | None:
    """Look at a file; None for what is small, nearly flat, or no picture."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            if min(width, height) < shortest:
                return None
            image.draft("RGB", (512, 512))
            grey = image.convert("L")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    small = np.asarray(grey.resize((128, 128), Image.Resampling.LANCZOS), float)
    if (np.abs(np.diff(small, axis=1)) < FLAT_STEP).mean() > FLAT_SHARE:
        return None
    looks = [{fingerprint(grey)}, *(cut_fingerprints(grey, shape) for shape in SHAPES)]
    return Picture(path, hashlib.sha256(path.read_bytes()).hexdigest(), width * height, looks)


class Fingerprints:
    """A growing set of fingerprints, in words of 64 bits."""

    def __init__(self) -> None:
        self.count, self.words = 0, np.empty((1024, 4), np.uint64)

    def add(self, looks: set[int]) -> None:
        """Add some."""
        for look in looks:
            if self.count == len(self.words):
                self.words = np.concatenate([self.words, np.empty_like(self.words)])
            self.words[self.count] = as_words(look)
            self.count += 1

    def has_near(self, looks: set[int]) -> bool:
        """Tell whether one is within `COPY_BITS` of one of these."""
        words = self.words[: self.count]
        return any((np.bitwise_count(words ^ as_words(look)).sum(1) <= COPY_BITS).any() for look in looks)


def as_words(look: int) -> np.ndarray:
    """Return a fingerprint as four words."""
    return np.frombuffer(look.to_bytes(32, "big"), np.uint64)


class Album:
    """Pictures that differ from one another by more than size, compression, and edges that were cut off."""

    def __init__(self) -> None:
        self.looks = [Fingerprints() for _ in (None, *SHAPES)]  # of whole pictures, and of those cut to each shape

    def add(self, picture: Picture) -> None:
        """Take a picture in, whatever it shows."""
        for kept, looks in zip(self.looks, picture.looks, strict=True):
            kept.add(looks)

    def shows(self, picture: Picture) -> bool:
        """Tell whether the album has a copy of a picture."""
        return any(kept.has_near(looks) for kept, looks in zip(self.looks, picture.looks, strict=True))


def distinct(pictures: list[Picture], known: list[Picture]) -> list[Picture]:
    """Leave out copies, in other sizes or crops, of what is known and of one another; of several the largest stays."""
    album, kept = Album(), []
    for picture in known:
        album.add(picture)
    for picture in sorted(pictures, key=lambda each: (-each.pixels, each.digest)):
        if not album.shows(picture):
            album.add(picture)
            kept.append(picture)
    return sorted(kept, key=lambda each: each.digest)


def on_white(image: Image.Image) -> Image.Image:
    """Return an image in RGB, on white where it is transparent."""
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def write_crops(job: tuple[Picture, Path, int], *, size: int, seed: int) -> None:
    """Write square crops of a picture whose areas are log-uniform from 8 % of the largest square to all of it."""
    picture, folder, crops = job
    rng = random.Random(f"{seed} {picture.digest}")
    with Image.open(picture.path) as file:
        image = on_white(file)
    for number in range(crops):
        side = round(min(image.size) * math.sqrt(math.exp(rng.uniform(math.log(0.08), 0))))
        left, top = (rng.randint(0, length - side) for length in image.size)
        box = (left, top, left + side, top + side)
        crop = image.resize((size, size), Image.Resampling.LANCZOS, box=box)
        crop.save(folder / f"{picture.digest[:12]}_{number:03}.jpg", quality=90)


def write_fashion(source: Path, folder: Path, count: int, seed: int) -> None:
    """Write some of Fashion-MNIST's training images."""
    images, _ = read_split(source, "train")
    for index in sorted(random.Random(seed).sample(range(len(images)), count)):
        Image.fromarray(images[index]).save(folder / f"fashion_{index:05}.png")


def find(folder: Path, skipped: list[str]) -> list[Path]:
    """Return the picture files of a folder but for those that match a pattern."""
    paths = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES and path.is_file()]
    return [path for path in paths if not any(fnmatch(str(path), pattern) for pattern in skipped)]


def name_of(picture: Picture, arguments: argparse.Namespace) -> str:
    """Return a picture's path in the folder that it was found in."""
    inside = arguments.source if picture.path.is_relative_to(arguments.source) else arguments.more
    return str(picture.path.relative_to(inside))


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder that is searched for pictures")
    parser.add_argument("--more", type=Path, help="folder of pictures that are only trained on")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--skip", nargs="*", default=[], metavar="GLOB", help="pictures to leave out, as '*/graf3.*'")
    parser.add_argument("--size", type=int, default=640, help="side of the crops [%(default)s]")
    parser.add_argument("--crops", type=int, default=64, help="crops of a picture to train on [%(default)s]")
    parser.add_argument("--test-crops", type=int, default=24, help="crops of a test picture [%(default)s]")
    parser.add_argument("--fashion", type=Path, help="folder of Fashion-MNIST's four .gz files")
    parser.add_argument("--fashion-images", type=int, default=6000, help="how many of them [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="[%(default)s]")
    parser.add_argument("--workers", type=int, default=None, help="processes [all cores]")
    arguments = parser.parse_args()
    if arguments.output.exists() and any(arguments.output.iterdir()):
        parser.error(f"{arguments.output} is not empty; name a new folder")
    return arguments


def main() -> None:
    """Make the set."""
    arguments = read_arguments()
    if not hasattr(np, "bitwise_count"):
        sys.exit(f"NumPy {np.__version__} is too old to count bits: pip install 'numpy>=2'")
    Image.MAX_IMAGE_PIXELS = None  # the packages are trusted
    warnings.simplefilter("ignore")
    paths = find(arguments.source, arguments.skip)
    more_paths = find(arguments.more, arguments.skip) if arguments.more else []
    with ProcessPoolExecutor(arguments.workers) as pool:
        found = pool.map(partial(examine, shortest=SHORTEST), paths)
        pictures = distinct([picture for picture in found if picture is not None], [])
        if len(pictures) < TEST_EVERY:
            sys.exit(
                f"{arguments.source} holds {len(pictures)} usable pictures among {len(paths)}; name another folder"
            )
        found = pool.map(partial(examine, shortest=SHORTEST_MORE), more_paths)
        more = distinct([picture for picture in found if picture is not None], pictures)
        folders = {name: arguments.output / name for name in ("train", "test")}
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        splits = {"test": pictures[::TEST_EVERY], "train": [p for i, p in enumerate(pictures) if i % TEST_EVERY]}
        splits["train"] += more
        counts = {"train": arguments.crops, "test": arguments.test_crops}
        jobs = [(picture, folders[name], counts[name]) for name, part in splits.items() for picture in part]
        list(pool.map(partial(write_crops, size=arguments.size, seed=arguments.seed), jobs))
    if arguments.fashion is not None:
        write_fashion(arguments.fashion, folders["train"], arguments.fashion_images, arguments.seed)
    names = {name: [name_of(picture, arguments) for picture in part] for name, part in splits.items()}
    (arguments.output / "sources.json").write_text(json.dumps(names, indent=1) + "\n")
    made = {name: sum(1 for _ in folder.iterdir()) for name, folder in folders.items()}
    found = f"{len(pictures) + len(more)} pictures of {len(paths) + len(more_paths)}"
    print(f"{found}: {made['train']} images to train on, {made['test']} to test")


if __name__ == "__main__":
    main()
