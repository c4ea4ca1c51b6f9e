r"""Make the pictures of the DINOv2 rows again, byte for byte, with Pillow 13.

From Debian's packages, each unpacked into a folder of its name, and from clones of public repositories, each in a
folder OWNER+NAME, at the commits of dinov2_small_photos_repositories.json (`--list` prints all of them):

    apt-get download NAME && dpkg -x NAME_*.deb packages/NAME
    git clone --bare URL clones/OWNER+NAME
    python recipes/scripts/gather_pictures.py --packages packages --clones clones --output pictures
    python recipes/scripts/make_photos.py --source pictures/source --more pictures/more --crops 5 --output photos

recipes/results/dinov2_small_photos_sources.json names the pictures. The digests of those in `source` decide the split,
those in `more` are only trained on. Where a name does not tell the file, dinov2_small_photos_files.json does.
Run from the repository's root.
"""

import argparse
import hashlib
import io
import json
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

from make_photos import TEST_EVERY, on_white
from PIL import Image, ImageOps

RESULTS = Path(__file__).parents[1] / "results"
BLOB_DIGITS = 12  # of a file's name in git, by which later photographs are named; the first ones end in 6


@cache
def listed(what: str) -> dict[str, Any]:
    """Return one of the committed lists."""
    found: dict[str, Any] = json.loads((RESULTS / f"dinov2_small_photos_{what}.json").read_text())
    return found


def is_source(name: str) -> bool:
    """Tell whether a picture is one of those that are split, and none of the photographs from OWNER+NAME."""
    return "+" not in name.partition("/")[0]


def origin(name: str) -> str:
    """Return where a picture's file is: a path in the packages, or git:OWNER+NAME/DIGITS, of its name in that clone."""
    repository, _, path = name.partition("/")
    where: str = listed("files").get(name, f"git:{repository}/{Path(path).stem.rpartition('_')[2]}")
    return where


def reduced(image: Image.Image, shortest: int) -> tuple[int, int]:
    """Return the size of an image whose short side has at most so many pixels."""
    share = min(1.0, shortest / min(image.size))
    return round(image.width * share), round(image.height * share)


def wallpaper(image: Image.Image, draft: int | None) -> Image.Image:
    """Return a picture of the source: on white, without metadata."""
    if draft is not None:
        image.draft("RGB", (draft, draft))
    image = on_white(image)
    image.info = {}
    return image.resize(reduced(image, 1000), Image.Resampling.LANCZOS)


def first_photograph(image: Image.Image) -> Image.Image:
    """Return one of the 966 photographs that came first, upright."""
    image.draft("RGB", (1280, 1280))
    image = ImageOps.exif_transpose(image).convert("RGB")
    image.thumbnail(reduced(image, 640), Image.Resampling.LANCZOS)
    return image


def later_photograph(image: Image.Image) -> Image.Image:
    """Return one of the photographs that came later."""
    image.draft("RGB", (900, 900))
    image = image.convert("RGB")
    return image.resize(reduced(image, 448), Image.Resampling.LANCZOS)


def encoded(name: str, raw: bytes) -> bytes:
    """Return a picture's JPEG, made of the bytes of its file."""
    out = io.BytesIO()
    with Image.open(io.BytesIO(raw)) as image:
        if name.startswith("more/"):
            wallpaper(image, None).save(out, "JPEG", quality=88)
        elif is_source(name):
            wallpaper(image, 1400).save(out, "JPEG", quality=87)
        else:
            how = later_photograph if len(Path(name).stem) == BLOB_DIGITS else first_photograph
            how(image).save(out, "JPEG", quality=85)
    return out.getvalue()


@cache
def blobs(clone: Path) -> dict[str, list[str]]:
    """Return the names that git has for all files of a repository, by their first six digits."""
    command = ["git", f"--git-dir={clone}", "cat-file", "--batch-all-objects", "--batch-check"]
    found = defaultdict(list)
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        if " blob " in line:
            found[line[:6]].append(line.split()[0])
    return found


def read(name: str, packages: Path, clones: Path) -> bytes:
    """Return the bytes of the file that a picture is made of.

    Raises:
        LookupError: It is not there.
    """
    where = origin(name)
    if not where.startswith("git:"):
        try:
            return (packages / where).read_bytes()
        except OSError as error:
            raise LookupError(f"{name}: no {packages / where}") from error
    repository, digits = where.removeprefix("git:").split("/")
    clone = clones / repository
    if (clone / ".git").is_dir():  # a clone that is not bare
        clone = clone / ".git"
    if not (clone / "HEAD").is_file():
        raise LookupError(f"{name}: no clone {clone}")
    found = [blob for blob in blobs(clone)[digits[:6]] if blob.startswith(digits)]
    if len(found) != 1:
        raise LookupError(f"{name}: {len(found)} files in {clone} begin with {digits}")
    command = ["git", f"--git-dir={clone}", "cat-file", "blob", found[0]]
    return subprocess.run(command, capture_output=True, check=True).stdout


def make(name: str, arguments: argparse.Namespace) -> str | None:
    """Make a picture; returns what is missing."""
    path: Path = arguments.output / ("source" if is_source(name) else "more") / name
    try:
        raw = read(name, arguments.packages, arguments.clones)
    except LookupError as error:
        return str(error)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(name, raw))
    return None


def split_is_as_listed(folder: Path) -> bool:
    """Tell whether the digests of the source's pictures give the test pictures that are listed."""
    by_digest = sorted(folder.rglob("*.jpg"), key=lambda path: hashlib.sha256(path.read_bytes()).hexdigest())
    return {str(path.relative_to(folder)) for path in by_digest[::TEST_EVERY]} == set(listed("sources")["test"])


def print_origins(names: list[str]) -> None:
    """Print the packages, and the repositories with their commits."""
    folders = sorted({origin(name).split("/")[0] for name in names})
    print(*(folder for folder in folders if not folder.startswith("git:")), sep="\n")
    commits = {name: each["commit"] for name, each in listed("repositories").items()}
    for name in (folder.removeprefix("git:") for folder in folders if folder.startswith("git:")):
        print(name.replace("+", "/"), commits.get(name, "(see recipes/results/README.md)"))


def main() -> None:
    """Make all pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, default=Path("packages"), help="Debian's, unpacked [%(default)s]")
    parser.add_argument("--clones", type=Path, default=Path("clones"), help="git directories [%(default)s]")
    parser.add_argument("--output", type=Path, default=Path("pictures"), help="folder to make [%(default)s]")
    parser.add_argument("--workers", type=int, default=None, help="processes [all cores]")
    parser.add_argument("--list", action="store_true", help="print the packages and repositories, and make nothing")
    arguments = parser.parse_args()
    names = [name for part in listed("sources").values() for name in part]
    if arguments.list:
        print_origins(names)
        return
    if arguments.output.exists() and any(arguments.output.iterdir()):
        parser.error(f"{arguments.output} is not empty; name a new folder")
    with ProcessPoolExecutor(arguments.workers) as pool:
        missing = [each for each in pool.map(partial(make, arguments=arguments), names, chunksize=64) if each]
    print(*missing, f"{len(names) - len(missing)} of {len(names)} pictures made", sep="\n")
    if missing:
        sys.exit("some pictures are missing; --list prints where they come from")
    if not split_is_as_listed(arguments.output / "source"):
        sys.exit("the digests give another split than the results had: is this Pillow 13?")


if __name__ == "__main__":
    main()
