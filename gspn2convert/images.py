"""Where images come from: the bundled demo data, folders, tar files, torchvision, shards, Hugging Face, streams.

timm's readers list and open the files; unlike timm's dataset this set never replaces an image on its own.
"""

import hashlib
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

import numpy as np
from PIL import Image
from timm.data import create_dataset
from timm.data.readers import create_reader

from gspn2convert.demo_data import DemoSource
from gspn2convert.errors import UserError
from gspn2convert.hub import image_and_label, import_datasets, stream_hub, stream_shards
from gspn2convert.shards import Member, ShardSource
from gspn2convert.splits import SPLIT_NAMES, pick_split
from gspn2convert.stream import Row, Stream
from gspn2convert.tally import Tally

_WITH_ROOT = ("torch", "wds", "hfds", "hfids")
_KINDS = "a folder of images, a .tar file, demo, torch/NAME:ROOT, wds/NAME:ROOT, hfds/NAME or hfids/NAME"
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")  # of image files in folders
T = TypeVar("T")

_MODES = {1: "L", 3: "RGB"}


class UnreadableImage(OSError):
    """An image cannot be decoded; the message names it."""


class Source(Protocol):
    """Images by index."""

    label_names: list[str] | None

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Return an image in any mode, decoded or not, and its label, -1 where it has none."""

    def where(self, index: int) -> str:
        """Name the image in messages."""


class ImageSet:
    """Images of one colour mode with labels; the index of an image never changes.

    Attributes:
        stream: set where the images come as a stream; by index there are then only its first ones.
    """

    def __init__(self, name: str, source: Source, *, in_chans: int = 3) -> None:
        """Wrap a source.

        Args:
            name: what the user called it.
            source: the images.
            in_chans: 3 for RGB, 1 for grey images.
        """
        self.name = name
        self.label_names = source.label_names
        self.in_chans = in_chans
        self.stream = source if isinstance(source, Stream) else None
        self.tally = Tally(len(source) if self.stream is None else None)
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def where(self, index: int) -> str:
        """Return the image's file name, or what stands for it."""
        return self._source.where(index)

    def image(self, index: int, row: Row | None = None) -> tuple[Image.Image, int]:
        """Decode an image.

        Args:
            index: of the image.
            row: the image, where a stream has come to it.

        Returns:
            The image in mode RGB or L, and its label, -1 where it has none.

        Raises:
            UnreadableImage: the file is missing, truncated or no image.
        """
        try:
            image, label = self._source.read(index) if row is None else row.open()
            return _in_mode(image, _MODES[self.in_chans]), label
        except Exception as error:  # Pillow's decoders raise whatever a broken file drives them into
            raise UnreadableImage(f"{self.where(index)}: {error}") from error

    def digest(self) -> str:
        """SHA-256, in hexadecimal, of their number and of names from all over them; of a stream, of what it is called.

        Not of all names, for which some data sets decode the image.
        """
        facts = [self.name]
        if self.stream is None:
            facts = [str(len(self)), *(self.where(index) for index in spread(range(len(self)), 256))]
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()

    def same_as(self, other: "ImageSet") -> bool:
        """Whether two sets are one: as many images, and alike pixel by pixel in eight places all over them."""
        places = spread(range(len(self)), 8)
        return len(self) == len(other) and all(self._look(index) == other._look(index) for index in places)

    def _look(self, index: int) -> tuple[tuple[int, int], bytes] | str:
        """Size and pixels of an image, or what keeps it from being read."""
        try:
            image, _ = self.image(index)
        except UnreadableImage as error:
            return str(error)
        return image.size, image.tobytes()


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of some items, from all over them, for a folder sorts its images by class."""
    count = min(count, len(items))
    return [items[place * len(items) // count] for place in range(count)]


def open_images(spec: str, split: str, *, in_chans: int = 3) -> ImageSet:
    """Open the images that a user named.

    Args:
        spec: "demo", a folder (labelled by its subfolders, or not labelled), a .tar file, "torch/NAME[:ROOT]"
            (already downloaded to ROOT, by default `data`), "wds/NAME:ROOT" or "hfds/NAME[:ROOT]" (downloads to ROOT
            or the Hugging Face cache). Streamed and never stored are "hfids/NAME", "hfids/NAME:ROOT" (a local folder)
            and "wds/NAME:URL".
        split: "train" or "test". A folder without subfolders for both serves as either.
        in_chans: the teacher's input channels: 3 gives RGB, 1 grey images.

    Raises:
        UserError: there is no such data, a package is missing, or nothing in it is an image.
    """
    assert split in SPLIT_NAMES, split
    if in_chans not in _MODES:
        raise UserError(f"the teacher takes {in_chans} input channels; images can be read with 1 or 3")
    return ImageSet(spec, _source(spec, split), in_chans=in_chans)


def _source(spec: str, split: str) -> Source:
    kind, _, rest = spec.partition("/")
    name, colon, root = rest.partition(":")
    if not spec or (colon and not root and kind in _WITH_ROOT):
        raise UserError(f"data {spec!r}: nothing is named{' after the colon' if spec else ''}; expected {_KINDS}")
    if spec == "demo":
        return DemoSource(split)
    if kind == "torch" and name:
        return _torchvision(name, root or "data", split)
    if kind == "wds" and root:
        return stream_shards(spec, root, split) if "://" in root else ShardSource(Path(root), split)
    if kind == "hfids" and name:
        return stream_hub(spec, name, root or None, split)
    if kind == "hfds" and name:
        return _hugging_face(name, root or None, split)
    if Path(spec).exists():
        return _files(Path(spec), split)
    raise UserError(f"data {spec!r}: no such file or folder; expected {_KINDS}")


class _Reader(Protocol):
    """What is used of timm's readers."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]: ...

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str | None: ...


class _ReaderSource:
    """Images of one of timm's readers; without class names their labels are not used."""

    def __init__(self, reader: _Reader, label_names: list[str] | None) -> None:
        self._reader = reader
        self.label_names = label_names

    def __len__(self) -> int:
        return len(self._reader)

    def read(self, index: int) -> tuple[Image.Image, int]:
        file, label = self._reader[index]
        with file:
            image = Image.open(file)
            image.load()
        return image, -1 if self.label_names is None else int(label)

    def where(self, index: int) -> str:
        return self._reader.filename(index, absolute=True) or f"image {index}"


class _TorchvisionSource:
    """Images of a torchvision dataset."""

    def __init__(self, dataset: Sequence[tuple[Image.Image, int]], name: str) -> None:
        self._dataset, self._name = dataset, name
        self.label_names: list[str] | None = getattr(dataset, "classes", None)

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, index: int) -> tuple[Image.Image, int]:
        image, label = self._dataset[index]
        return image, int(label)

    def where(self, index: int) -> str:
        return f"image {index} of torch/{self._name}"


def _files(path: Path, split: str) -> Source:
    """Open a folder or tar file with timm's readers."""
    packed = path.suffix == ".tar" and not path.is_dir()
    if packed:
        # Open tar files cannot be shared by worker processes, and timm would pickle its index next to a large one.
        options: dict[str, Any] = {"cache_tarfiles": False, "cache_tarinfo": False}
    elif path.is_dir():
        path, options = _split_folder(path, split), {"input_key": ";".join(SUFFIXES)}
    else:
        raise UserError(f"data {str(path)!r} is a file of another kind; expected {_KINDS}")
    try:
        if packed:
            with tarfile.open(path, "r:", tarinfo=Member) as tar:
                tar.getmembers()  # timm's reader would take what there is of a tar file that breaks off
        reader = create_reader("", root=str(path), **options)
    except tarfile.TarError as error:
        raise UserError(f"data {str(path)!r}: no complete tar file ({error}); fetch it again") from error
    except (RuntimeError, ValueError) as error:
        # What timm raises where it finds no image, in a folder and in a tar file.
        hint = "; name one of its .tar files" if path.is_dir() and any(path.glob("*.tar")) else ""
        kinds = ".jpg, .jpeg or .png" if packed else ", ".join(SUFFIXES)
        raise UserError(f"data {str(path)!r}: no {kinds} images in it{hint}") from error
    classes = reader.class_name_to_idx if packed else reader.class_to_idx
    return _ReaderSource(reader, list(classes) if len(classes) > 1 else None)


def _split_folder(root: Path, split: str) -> Path:
    """Return the split's subfolder where there is one for training and one for tests, else the folder itself."""
    found = {key: [root / name for name in names if (root / name).is_dir()] for key, names in SPLIT_NAMES.items()}
    return found[split][0] if all(found.values()) else root


def _torchvision(name: str, root: str, split: str) -> Source:
    try:
        # timm's word for the split, as some of torchvision's datasets have no other than `val`.
        dataset = create_dataset(f"torch/{name}", root=root, split="train" if split == "train" else "validation")
    except AssertionError as error:
        raise UserError(
            f"data torch/{name}: timm knows no torchvision dataset of this name; it writes them like fashion_mnist"
        ) from error
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"data torch/{name}: not found in {root!r}, and nothing is downloaded unasked; give its folder as "
            f"torch/{name}:ROOT, or fetch it with torchvision.datasets and download=True"
        ) from error
    return _TorchvisionSource(dataset, name)


def _hugging_face(name: str, root: str | None, split: str) -> Source:
    datasets = import_datasets(f"hfds/{name}")
    try:
        found = pick_split(datasets.get_dataset_split_names(name), split, f"hfds/{name}")
        features = datasets.load_dataset(name, split=found, cache_dir=root).features
        image, label = image_and_label(datasets, features, f"hfds/{name}")
        keys: dict[str, Any] = {"input_key": image, "target_key": label or image}
        reader = create_dataset(f"hfds/{name}", root=root, split=found, **keys).reader
    except UserError:
        raise
    except Exception as error:  # the hub's client has errors of many kinds; all mean that the data cannot be had
        raise UserError(f"data hfds/{name}: cannot be opened: {' '.join(str(error).split())}") from error
    return _ReaderSource(reader, list(features[label].names) if label else None)


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image to RGB or L as timm does, but scale 16-bit images, which Pillow would clip to white."""
    if image.mode == "F":
        raise ValueError("its pixels are floating point numbers, of which nobody says what is white; save 8 or 16 bits")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 0xFFFF) >> 8).astype(np.uint8))
    return image.convert(mode)
