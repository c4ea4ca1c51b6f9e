"""Images that a user names one by one or by folder, without labels."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from gspn2convert.errors import UserError
from gspn2convert.images import SUFFIXES, ImageSet, open_images


class FileSource:
    """Image files in a fixed order."""

    label_names: list[str] | None = None

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Return the decoded image, and -1 for its label."""
        with Image.open(self._files[index]) as image:
            image.load()
        return image, -1

    def where(self, index: int) -> str:
        """Name the file."""
        return str(self._files[index])


def open_files(paths: Sequence[str], *, in_chans: int) -> ImageSet:
    """Open images, and all that lie in folders and the folders inside, in the order of their names.

    Args:
        paths: files and folders; or instead one of what `open_images` knows, such as "demo" or a .tar file, whose
            test split is taken.
        in_chans: 3 for RGB, 1 for grey images.

    Raises:
        UserError: a path does not exist, a folder holds no image, or the model takes other channels.
    """
    if in_chans not in (1, 3):
        raise UserError(f"the model takes {in_chans} input channels; images can be read with 1 or 3")
    if len(paths) == 1 and (paths[0].endswith(".tar") or not Path(paths[0]).exists()):
        return open_images(paths[0], "test", in_chans=in_chans)
    files = [file for path in paths for file in _files(Path(path))]
    return ImageSet(", ".join(paths), FileSource(files), in_chans=in_chans)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.exists():
        raise UserError(f"images {str(path)!r}: no such file or folder (demo and data sets are taken alone)")
    # Names with a dot in front are hidden, among them what macOS leaves beside every image.
    found = [one for one in path.rglob("[!.]*") if one.suffix.lower() in SUFFIXES and one.is_file()]
    if not found:
        raise UserError(f"images {str(path)!r}: no {', '.join(SUFFIXES)} file in it")
    return sorted(found)
