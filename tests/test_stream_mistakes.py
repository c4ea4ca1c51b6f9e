"""Streams that are none, told in one line."""

import sys

import pytest

from gspn2convert.data import open_images, split_images
from gspn2convert.errors import UserError
from gspn2convert.stream import Row, Stream
from helpers.pictures import encode
from helpers.streams import CLASSES, FEW, picture, write_parquet

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

pytestmark = pytest.mark.usefixtures("one_thread")


def test_mistakes_are_told_in_one_line(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (tmp_path / "nothing").mkdir()
    texts = {"title": datasets.Value("string"), "kind": datasets.ClassLabel(names=CLASSES)}
    table = pa.Table.from_pydict({"title": ["x"], "kind": [0]}, schema=datasets.Features(texts).arrow_schema)
    (tmp_path / "texts").mkdir()
    parquet.write_table(table, tmp_path / "texts" / "train.parquet")
    write_parquet(tmp_path / "empty" / "train.parquet", [], [])
    write_parquet(tmp_path / "single" / "train.parquet", [encode(picture(0))], [0])
    said = {
        f"hfids/pets:{tmp_path / 'missing'}": "no such folder; expected parquet files or images",
        f"hfids/pets:{tmp_path / 'nothing'}": "cannot be opened: .*",
        f"hfids/pets:{tmp_path / 'texts'}": "no column of images among title, kind; expected one of the type Image$",
        f"hfids/pets:{tmp_path / 'empty'}": r"cannot be read at image 0 \(.*\)$",
        f"hfids/pets:{tmp_path / 'single'}": "the data hold 1 image; at least 2 are needed",
        "hfids/nobody/no_such_pets": "^data hfids/nobody/no_such_pets: cannot be opened: .*",
        "wds/pets:http://127.0.0.1:9/{0..1}.tar": "cannot be opened: .*",
        "hfids": "expected .* hfids/NAME",
    }
    for spec, message in said.items():
        with pytest.raises(UserError, match=message) as error:
            split_images(open_images(spec, "train"), FEW)
        assert "\n" not in str(error.value)


def test_a_stream_without_images_is_an_error() -> None:
    stream = Stream("pets", lambda: datasets.IterableDataset.from_generator(lambda: iter(())), "picture", None, None)
    with pytest.raises(UserError, match="^data pets: the stream holds no images; expected at least two$"):
        stream.keep(3)


def test_missing_package_is_named(monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    for spec in (f"hfids/pets:{tmp_path}", "hfids/somebody/pets", "wds/pets:https://host/{0..9}.tar"):
        with pytest.raises(
            UserError, match=f"^data {spec[:9]}.* needs the package datasets; run: pip install datasets"
        ):
            open_images(spec, "train")


def test_what_a_url_is_read_with_is_named(monkeypatch) -> None:
    def fail(*arguments, **options):
        raise ImportError("HTTPFileSystem requires more")

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    with pytest.raises(UserError, match="cannot be opened: HTTPFileSystem requires more; run: pip install aiohttp$"):
        open_images("wds/x:https://example.org/x.tar", "train")
    with pytest.raises(UserError, match="cannot be opened: HTTPFileSystem requires more$"):
        open_images("hfids/x", "train")


def test_a_row_without_an_image_cannot_be_read() -> None:
    with pytest.raises(OSError, match="no image in this row"):
        Row(3, None, None, -1).open()
