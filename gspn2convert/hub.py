"""Streams that the package `datasets` opens: the Hugging Face hub, folders in its layouts, WebDataset shards by URL."""

import importlib
import importlib.util
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from gspn2convert.errors import UserError
from gspn2convert.shards import Member
from gspn2convert.splits import pick_split
from gspn2convert.stream import Stream

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def import_datasets(data: str) -> Any:  # noqa: ANN401 - a module
    """Import the package, which is needed for nothing else.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec("datasets") is None:
        raise UserError(f"data {data} needs the package datasets; run: pip install datasets")
    return importlib.import_module("datasets")


def stream_hub(data: str, name: str, root: str | None, split: str) -> Stream:
    """Stream a data set of the hub, or a local folder of parquet files, images or shards.

    Args:
        data: what the user called it.
        name: on the hub; only a name where there is a folder.
        root: the folder, None for the hub.
        split: "train" or "test".

    Raises:
        UserError: it cannot be opened, or has no images.
    """
    if root is not None and not Path(root).is_dir():
        raise UserError(f"data {data}: no such folder; expected parquet files or images in it, or leave :ROOT out")
    return _stream(data, split, root or name)


def stream_shards(data: str, pattern: str, split: str) -> Stream:
    """Stream WebDataset shards.

    Args:
        data: what the user called them.
        pattern: URL of a shard, or of several as in `https://host/train-{0000..0099}.tar`.
        split: "train" or "test"; the shards serve as either.

    Raises:
        UserError: they cannot be opened, or have no images.
    """
    return _stream(data, split, "webdataset", data_files={split: expand(pattern)})


def expand(pattern: str) -> list[str]:
    """Write out ranges of numbers: `{08..10}` stands for 08, 09 and 10.

    Raises:
        UserError: braces hold something else, or a range counts down.
    """
    found = _RANGE.search(pattern)
    if found is None:
        if "{" in pattern or "}" in pattern:
            raise UserError(f"data {pattern}: expected a range of shards as {{000..099}}, or no braces")
        return [pattern]
    first, last = found.groups()
    if int(last) < int(first):
        raise UserError(f"data {pattern}: the range {found[0]} counts down; write {{{last}..{first}}}")
    before, after = pattern[: found.start()], pattern[found.end() :]
    numbers = range(int(first), int(last) + 1)
    return [one for number in numbers for one in expand(f"{before}{number:0{len(first)}}{after}")]


def image_and_label(
    datasets: Any,  # noqa: ANN401 - a module
    features: dict[str, Any] | None,
    data: str,
) -> tuple[str, str | None]:
    """Find the columns of images and of labels with names, None without the latter.

    Raises:
        UserError: there is no column of images.
    """
    features = features or {}
    image = next((key for key, kind in features.items() if isinstance(kind, datasets.Image)), None)
    label = next((key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)), None)
    if image is None:
        found = ", ".join(features) or "its columns"
        raise UserError(f"data {data}: no column of images among {found}; expected one of the type Image")
    return image, label


def _stream(data: str, split: str, path: str, **how: Any) -> Stream:
    datasets = import_datasets(data)
    try:
        builder = datasets.load_dataset_builder(path, **how)
        if isinstance(builder, importlib.import_module("datasets.packaged_modules.webdataset.webdataset").WebDataset):
            _read_to_the_end(datasets, builder)
        splits = builder.as_streaming_dataset()
        found = pick_split(list(splits), split, data)
        features = splits[found].features
        image, label = image_and_label(datasets, features, data)
    except UserError:
        raise
    except Exception as error:  # its errors are of many kinds; all mean that the data cannot be had
        way_out = "; run: pip install aiohttp" if isinstance(error, ImportError) and "://" in data else ""
        raise UserError(f"data {data}: cannot be opened: {' '.join(str(error).split())}{way_out}") from error

    def begin() -> Any:  # noqa: ANN401 - of a package that need not be there
        """Start anew: passes over one object would disturb each other."""
        dataset = builder.as_streaming_dataset(split=found).select_columns([image, label] if label else [image])
        return dataset.cast_column(image, datasets.Image(decode=False))

    return Stream(data, begin, image, label, list(features[label].names) if label else None)


def _read_to_the_end(datasets: Any, builder: Any) -> None:  # noqa: ANN401 - a module, and an object of its
    """Make a builder of WebDataset shards name one that fails, and one that breaks off: it would just end there."""
    samples = builder._get_pipeline_from_tar

    def samples_of(url: str, files: Iterable[tuple[str, IO[bytes]]]) -> Iterator[dict[str, Any]]:
        try:
            yield from samples(url, files if ".zip" in url else _files(datasets, url))
        except tarfile.TarError as error:
            raise OSError(f"shard {url} is no complete tar file and has to be replaced: {error}") from error
        except Exception as error:  # a network and its clients fail in many ways
            raise OSError(f"shard {url}: {error}") from error

    builder._get_pipeline_from_tar = samples_of


def _files(datasets: Any, url: str) -> Iterator[tuple[str, IO[bytes] | None]]:  # noqa: ANN401 - a module
    """Names and contents of a tar's files, all but hidden ones, as `datasets` itself goes through them."""
    opened = datasets.utils.file_utils.xopen(url, "rb", block_size=0)  # tries again where the connection breaks
    with opened as file, tarfile.open(fileobj=file, mode="r|*", tarinfo=Member) as tar:
        for member in tar:
            if member.isreg() and not PurePosixPath(member.name).name.startswith((".", "__")):
                yield member.name, tar.extractfile(member)
            tar.members = []  # type: ignore[attr-defined]  # a shard may have a million
