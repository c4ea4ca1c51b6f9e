"""Shards that are streamed by URL, and those that break off."""

import functools
import http.server
import io
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest

from gspn2convert.data import open_images
from gspn2convert.errors import UserError
from gspn2convert.hub import expand
from helpers.pictures import encode
from helpers.streams import numbers_of, picture, train

datasets = pytest.importorskip("datasets")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def shards(tmp_path):
    """A folder of three shards with ten pictures and labels each."""
    (tmp_path / "shards").mkdir()
    for shard in range(3):
        with tarfile.open(tmp_path / "shards" / f"pets-{8 + shard:02}.tar", "w") as tar:
            for number in range(10 * shard, 10 * shard + 10):
                for name, content in ((f"{number:03}.png", encode(picture(number))), (f"{number:03}.cls", b"1")):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return tmp_path / "shards"


@pytest.fixture
def url(shards):
    """Where a server has these shards; of those in `url.broken` it sends so many bytes and hangs up."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def copyfile(self, source, target):
            sent = source.read()
            target.write(sent[: place.broken.get(Path(self.path).name, len(sent))])

    class Place(str):
        broken = {}

    handler = functools.partial(Handler, directory=shards)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = Place(f"http://127.0.0.1:{server.server_port}/pets-")
        yield place
        server.shutdown()


def test_shards_are_streamed_from_a_url(url) -> None:
    images = open_images(f"wds/pets:{url}{{08..10}}.tar", "train")
    images.stream.window = 8
    order = numbers_of(train(images, augment=None, batch_size=13, steps=4), 30)
    assert sorted(order) == sorted(2 * list(range(4, 30)))
    assert images.label_names is None


def cut(shard: Path, place: str) -> None:
    """Let a shard break off in its sixth sample, or after its last."""
    with tarfile.open(shard) as tar:
        image, label = tar.getmembers()[10:12]
        end = tar.getmembers()[-1].offset_data + tarfile.BLOCKSIZE
    content = shard.read_bytes()
    places = {"header": image.offset + 100, "image": image.offset_data + 99, "padding": label.offset - 1}
    places |= {"sample": label.offset, "member": image.offset, "mark": end, "empty": 0}
    shard.write_bytes(content[: places[place]])


@pytest.mark.parametrize("place", ["header", "image", "padding", "sample", "member", "mark", "empty"])
def test_a_shard_that_breaks_off_is_named(url, shards, place) -> None:
    cut(shards / "pets-09.tar", place)
    for spec in (f"wds/pets:{url}{{08..10}}.tar", f"hfids/pets:{shards}"):
        rows, read = open_images(spec, "train").stream.rows(), []
        sentence = r"shard \S+/pets-09.tar is no complete tar file and has to be replaced: \w+.*; go on from the last"
        with pytest.raises(UserError, match=rf"^data \S+: cannot be read at image \d+ \({sentence} checkpoint with"):
            read.extend(rows)
    with pytest.raises(UserError, match=r"pets-09.tar: no complete tar file \(.*\); fetch it again"):
        open_images(f"wds/pets:{shards}", "train")
    with pytest.raises(UserError, match=r"pets-09.tar': no complete tar file \(.*\); fetch it again"):
        open_images(str(shards / "pets-09.tar"), "train")


def test_one_block_of_zeros_ends_a_shard(url, shards) -> None:
    """Two are the rule, but `tarfile` reads no further."""
    shard = shards / "pets-09.tar"
    with tarfile.open(shard) as tar:
        end = tar.getmembers()[-1].offset_data + 2 * tarfile.BLOCKSIZE
    shard.write_bytes(shard.read_bytes()[:end])
    rows = open_images(f"wds/pets:{url}{{08..10}}.tar", "train").stream.rows()
    assert [np.asarray(row.open()[0])[0, 0].tolist() for row in rows] == [
        np.asarray(picture(number))[0, 0].tolist() for number in range(30)
    ]


def test_a_shard_whose_server_hangs_up_is_named(url, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "STREAMING_READ_RETRY_INTERVAL", 0.01)
    url.broken["pets-09.tar"] = 21_000
    rows = open_images(f"wds/pets:{url}{{08..10}}.tar", "train").stream.rows()
    with pytest.raises(UserError, match=r"\(shard http\S+/pets-09.tar: .*\); go on from the last checkpoint"):
        list(rows)


def test_ranges_in_urls_are_written_out() -> None:
    assert expand("https://h/x.tar") == ["https://h/x.tar"]
    assert expand("h/{09..11}.tar") == ["h/09.tar", "h/10.tar", "h/11.tar"]
    assert expand("{0..1}/{5..6}") == ["0/5", "0/6", "1/5", "1/6"]
    for wrong in ("h/{a,b}.tar", "h/{0..x}.tar", "h/{0..2", "h/{0..1}-{}.tar"):
        with pytest.raises(UserError, match=r"expected a range of shards as \{000..099\}, or no braces"):
            expand(wrong)
    with pytest.raises(UserError, match=r"the range \{2..0\} counts down; write \{0..2\}"):
        expand("h/x-{2..0}.tar")
