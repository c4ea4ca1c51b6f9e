"""Data sets that are read as a stream, because they are too large to download.

Any image can be had at any time from a folder or a shard on the disk; a stream only has a next one. So its first
images stay in memory, undecoded: they are what can be had by index, for calibration, evaluation and as held-out
images. Training passes over all that follow, see `data.train_batches`. Only this process reads the stream; workers
are handed undecoded images.
"""

import io
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from PIL import Image

from gspn2convert.errors import UserError

WINDOW = 4096
AT_HAND = 2000
# A bookmark lies at the start of a window; reading is a few windows ahead of training, more with many workers.
BOOKMARKS = 64
T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """An image of a stream, not decoded."""

    index: int  # its place in the stream
    content: bytes | None  # None where the image is a file of its own
    path: str | None
    label: int

    def open(self) -> tuple[Image.Image, int]:
        """Return the image as it is stored and its label, -1 where it has none."""
        content = self.content
        if content is None:
            if self.path is None:
                raise OSError("there is no image in this row")
            import fsspec  # comes with `datasets`

            with fsspec.open(self.path, "rb") as file:
                content = file.read()
        return Image.open(io.BytesIO(content)), self.label


class Stream:
    """A streamed data set; by index there are its first images.

    Attributes:
        label_names: names of the classes, None where the labels have none.
        window: training shuffles so many images at a time; two such windows are in memory.
        facts: what passes have found out, fit for JSON: `count`, the number of images once the end was seen, and
            `bookmarks`, an index and how `datasets` finds it again. They spare a resumed run what it has read, and
            decide nothing else.
    """

    def __init__(
        self, name: str, begin: Callable[[], Any], image: str, label: str | None, label_names: list[str] | None
    ) -> None:
        """Wrap a data set.

        Args:
            name: what the user called it.
            begin: gives a new `datasets.IterableDataset` of these columns whose images are not decoded.
            image: column of images.
            label: column of labels, None without one.
            label_names: names of the classes.
        """
        self.name, self.label_names, self.window = name, label_names, WINDOW
        self.facts: dict[str, Any] = {"count": None, "bookmarks": []}
        self._begin, self._image, self._label = begin, image, label
        self._first: list[Row] = []

    def __getstate__(self) -> dict[str, Any]:
        """Leave out how to begin: workers get the images at hand and those handed to them, and read nothing."""
        return self.__dict__ | {"_begin": None}

    def __len__(self) -> int:
        if not self._first:
            if self.keep(AT_HAND) == AT_HAND:
                _log.warning("data %s is a stream: only its first %d images are looked at", self.name, AT_HAND)
        return len(self._first)

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Return one of the first images as it is stored and its label, -1 where it has none."""
        return self._first[index].open()

    def where(self, index: int) -> str:
        """Name the image."""
        return f"image {index} of {self.name}"

    def keep(self, count: int) -> int:
        """Hold the first images in memory.

        Returns:
            How many there are: `count`, or fewer where that is all of the stream.

        Raises:
            UserError: there are none.
        """
        if len(self._first) < count:
            self._first = list(itertools.islice(self.rows(), count))
        if not self._first:
            raise UserError(f"data {self.name}: the stream holds no images; expected at least two")
        classes, known = len({row.label for row in self._first}), len(self.label_names or ())
        if 2 * classes < min(known, len(self._first)):
            _log.warning(
                "data %s: its first %d images are of %d of %d classes; give a mixed stream",
                *(self.name, len(self._first), classes, known),
            )
        return min(count, len(self._first))  # more are held if more were asked for before

    def rows(self, start: int = 0) -> Iterator[Row]:
        """Go through the stream from an index on to its end; what lies before is passed over, undecoded."""
        passed = 0
        try:
            dataset = self._begin()
            for index, state in self.facts["bookmarks"]:
                if passed < index <= start:
                    dataset.load_state_dict(state)
                    passed = index
            for row in dataset:
                passed += 1
                if passed > start:
                    if (passed - start) % self.window == 0:
                        self._bookmark(passed, dataset.state_dict())
                    yield self._row(passed - 1, row)
        except Exception as error:  # a network and its clients fail in many ways
            advice = "; go on from the last checkpoint with --resume" if passed else ""
            said = " ".join(str(error).split())
            raise UserError(f"data {self.name}: cannot be read at image {passed} ({said}){advice}") from error
        self.facts["count"] = passed

    def _bookmark(self, index: int, state: dict[str, Any]) -> None:
        # A new list, for a checkpoint may be written in this moment.
        others = [bookmark for bookmark in self.facts["bookmarks"] if bookmark[0] != index]
        self.facts["bookmarks"] = [*others, [index, state]][-BOOKMARKS:]

    def _row(self, index: int, row: dict[str, Any]) -> Row:
        image = row[self._image] or {}
        label = None if self._label is None else row[self._label]
        return Row(index, image.get("bytes"), image.get("path"), -1 if label is None else int(label))


def ahead(items: Iterator[T], count: int) -> Iterator[T]:
    """Give items that a thread reads, up to `count` of them before they are asked for."""
    pool = ThreadPoolExecutor(1, "stream")
    coming: deque[Future[T | None]] = deque(pool.submit(next, items, None) for _ in range(count))
    try:
        while (item := coming.popleft().result()) is not None:
            coming.append(pool.submit(next, items, None))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
