"""WebDataset shards on the local disk, read by index.

timm's own reader streams shards in an order that depends on the processes and workers that read them. Here the
headers of the tar files are read once, so that any image can be had at any time: views, held-out images and resumed
runs are then the same as for every other source, and the `webdataset` package is not needed.
"""

import io
import json
import logging
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from gspn2convert.errors import UserError
from gspn2convert.splits import SPLIT_NAMES, pick_split

_IMAGES = {"jpg", "jpeg", "png", "webp"}
_MOST_CLASSES = 1 << 20  # each gets a name

_log = logging.getLogger(__name__)


class Member(tarfile.TarInfo):
    """A member of a tar file that has to be there to its end mark.

    For `tarfile` a file that breaks off between two members, or in a header, just ends there.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "Member":
        """Read a header.

        Raises:
            tarfile.ReadError: there is none where one, or the end mark, has to be.
        """
        if len(buf) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it breaks off without an end mark")
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if any(buf):  # zeros are the end mark
                raise tarfile.ReadError(str(error)) from error
            raise


class ShardSource:
    """Images and labels (`.cls`) of WebDataset shards, whose classes are named by their numbers."""

    def __init__(self, root: Path, split: str) -> None:
        """Index the shards of the split `train` or `test` that lie in the folder `root`.

        Raises:
            UserError: there are none, one is no complete tar file, or they hold no images.
        """
        self._shards = _shards_of(root, split)
        _log.info("indexing %d shards in %s", len(self._shards), root)
        rows = [row for number, shard in enumerate(self._shards) for row in _scan(shard, number)]
        if not rows:
            raise UserError(f"data {root}: no images in the shards; expected .jpg, .png or .webp next to .cls")
        odd = next((label for *_, label in rows if not -1 <= label < _MOST_CLASSES), None)
        if odd is not None:
            _log.warning("data %s: a .cls file holds %d, which is no number of a class: labels are left out", root, odd)
            rows = [(shard, offset, size, -1) for shard, offset, size, _ in rows]
        self._rows = np.array(rows, dtype=np.int64)  # shard, offset, bytes, label
        self.label_names = list(map(str, range(int(self._rows[:, 3].max()) + 1))) or None

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Return the image as it is stored and its label, -1 where it has none."""
        shard, offset, size, label = self._rows[index].tolist()
        with self._shards[shard].open("rb") as file:
            file.seek(offset)
            return Image.open(io.BytesIO(file.read(size))), label

    def where(self, index: int) -> str:
        """Name the shard and the byte at which the image starts."""
        shard, offset = self._rows[index, :2].tolist()
        return f"{self._shards[shard]} at byte {offset}"


def _shards_of(root: Path, split: str) -> list[Path]:
    """Return the split's tar files: those that `_info.json` lists, or those whose names hold the split's name.

    As a word of its own where it is one, for `latest-train-000.tar` is no test.
    """
    if not root.is_dir():
        raise UserError(f"data {root}: no such folder; wds/NAME:ROOT needs the local folder that holds the shards")
    for info in (root / "_info.json", root / "info.json"):
        if info.is_file():
            return _listed(info, split)
    tars = sorted(root.glob("*.tar"))
    if not tars:
        raise UserError(f"data {root}: no .tar files in it; expected the shards of a WebDataset")
    for words in ([set(re.split("[^a-z]+", tar.name.lower())) for tar in tars], [tar.name for tar in tars]):
        named = {
            key: [tar for tar, held in zip(tars, words, strict=True) if any(name in held for name in names)]
            for key, names in SPLIT_NAMES.items()
        }
        if all(named.values()):
            return named[split]
    return tars


def _listed(info: Path, split: str) -> list[Path]:
    try:
        splits = json.loads(info.read_text())["splits"]
        files = {name: [info.parent / file for file in entry["filenames"]] for name, entry in splits.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"data {info}: no list of splits and file names as timm's readers expect it") from error
    return files[pick_split(files, split, str(info))]


def _scan(shard: Path, number: int) -> Iterable[tuple[int, int, int, int]]:
    """Return (number, offset, bytes, label) of each image; the files of a sample share the name before the dot."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:", tarinfo=Member) as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                key, _, kind = name.partition(".")
                if member.isfile() and kind.lower() in _IMAGES:
                    images.setdefault(f"{folder}/{key}", (member.offset_data, member.size))
                elif member.isfile() and kind == "cls":
                    content = tar.extractfile(member)
                    assert content is not None
                    labels[f"{folder}/{key}"] = int(content.read())
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"data {shard}: no complete tar file ({error}); fetch it again") from error
    except ValueError as error:
        raise UserError(f"data {shard}: a .cls file holds no whole number ({error})") from error
    return [(number, *place, labels.get(key, -1)) for key, place in images.items()]
