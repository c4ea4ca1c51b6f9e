"""Streams: the same views however they are read, held-out images kept apart, runs that go on where they stopped."""

import functools
import http.server
import io
import json
import logging
import pickle
import signal
import sys
import tarfile
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from gspn2convert.data import batches, open_images, split_images, train_batches
from gspn2convert.demo_data import FILE as DEMO_IMAGES
from gspn2convert.distill import Options, distill
from gspn2convert.errors import UserError
from gspn2convert.hub import expand
from gspn2convert.interrupt import Interrupted
from gspn2convert.recipe import Augment, parse_recipe
from gspn2convert.stream import Row, Stream, ahead

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = {
    "input_size": (3, 24, 32),
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.3, 0.4),
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
}
DEMO_RECIPE = """
name: short
mixer: {proxy_dim: C/4}
fit: {images: 48, held_out: 16, batch_size: 16}
align: {steps: 4, batch_size: 24}
recover: {steps: 9, batch_size: 24, mixer_lr: 2.0e-4, lr: 5.0e-5, ema: 0.9}
augment: {scale: [0.7, 1.0], color_jitter: 0.0}
keep: "0,1,2,3,4"
eval_every: 4
held_out: 32
seed: 3
"""
DEMO = parse_recipe(DEMO_RECIPE, "test")
FEW = replace(DEMO, fit=replace(DEMO.fit, images=5), held_out=4)
CLASSES = ["ant", "bee", "cat"]
COLUMNS = {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=CLASSES), "title": datasets.Value("string")}


def picture(number: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    """A smooth coloured picture; no two numbers give the same."""
    rows, columns = np.mgrid[: size[1], : size[0]]
    channels = [rows * 9 + number * 37, columns * 7 + number * 59, (rows + columns) * 4 + number * 83]
    return Image.fromarray((np.stack(channels, -1) % 256).astype(np.uint8))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(file: Path, contents: list[bytes], labels: list[int], columns: dict = COLUMNS) -> None:
    """A file as `datasets` writes it, in small row groups."""
    image, label = list(columns)[:2]
    table = {image: [{"bytes": one, "path": None} for one in contents], label: labels, "title": ["x"] * len(labels)}
    file.parent.mkdir(parents=True, exist_ok=True)
    schema = datasets.Features(columns).arrow_schema
    parquet.write_table(pa.Table.from_pydict(table, schema=schema), file, row_group_size=3)


@pytest.fixture
def make_stream(tmp_path):
    """Opens a stream of pictures 0, 1, ... in three files, shuffled in windows; those in `broken` are cut short."""

    def make(count=31, *, broken=(), window=8, split="train"):
        folder = tmp_path / "pets"
        for file, numbers in enumerate(np.array_split(range(count), 3) if not folder.exists() else ()):
            contents = [png(picture(number)) for number in numbers]
            contents = [one[:40] if number in broken else one for number, one in zip(numbers, contents, strict=True)]
            write_parquet(folder / f"train-{file}.parquet", contents, [int(number) % 3 for number in numbers])
        images = open_images(f"hfids/pets:{folder}", split)
        images.stream.window = window
        return images

    return make


def train(images, **changes) -> list[torch.Tensor]:
    options = dict(batch_size=6, augment=Augment(), seed=3, first_step=0, steps=12, rank=0, world=1)
    indices, _ = split_images(images, FEW)
    return list(train_batches(images, CONFIG, indices=indices, **options | changes))


def test_workers_that_are_not_forked_can_have_a_stream(make_stream):
    """Where workers are spawned the set is pickled; they read none of the stream by themselves."""
    images = make_stream()
    split_images(images, FEW)
    sent = pickle.loads(pickle.dumps(images))
    assert np.array_equal(*(np.asarray(each.image(2)[0]) for each in (images, sent)))


def numbers_of(views: list[torch.Tensor], count: int) -> list[int]:
    """Which pictures some views without augmentation are of."""
    mean, std = (torch.tensor(CONFIG[key]).view(3, 1, 1) for key in ("mean", "std"))
    known = {}
    for number in range(count):
        resized = picture(number).resize((32, 26), Image.Resampling.BICUBIC).crop((0, 1, 32, 25))
        known[number] = (torch.tensor(np.asarray(resized)).permute(2, 0, 1) / 255 - mean) / std
    return [min(known, key=lambda number: float((known[number] - view).abs().mean())) for view in torch.cat(views)]


# What is at hand


def test_the_first_images_are_at_hand(make_stream) -> None:
    images = make_stream()
    assert images.stream.keep(7) == len(images) == 7
    for index in range(7):
        image, label = images.image(index)
        np.testing.assert_array_equal(np.asarray(image), np.asarray(picture(index)))
        assert label == index % 3
    assert images.label_names == CLASSES


def test_a_folder_of_images_streams_as_parquet_does(make_stream, tmp_path, caplog) -> None:
    for number in range(31):
        file = tmp_path / "files" / "train" / CLASSES[number // 12] / f"{number:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(file)
    images = open_images(f"hfids/files:{tmp_path / 'files'}", "train")
    images.stream.window = 8
    assert len(images) == 31
    assert images.label_names == CLASSES
    assert [images.image(index)[1] for index in (0, 11, 12, 30)] == [0, 0, 1, 2]
    assert "classes; give a mixed" not in caplog.text
    assert open_images(f"hfids/files:{tmp_path / 'files'}", "train").stream.keep(12) == 12
    assert "its first 12 images are of 1 of 3 classes; give a mixed stream" in caplog.text
    for workers in (0, 2):
        ours, theirs = (torch.stack(train(one, workers=workers)) for one in (images, make_stream()))
        assert torch.equal(ours, theirs)


def test_evaluation_sees_the_first_images(make_stream, monkeypatch, caplog) -> None:
    monkeypatch.setattr("gspn2convert.stream.AT_HAND", 10)
    images = make_stream(split="test")
    assert "no test split, so train serves for it" in caplog.text
    for workers in (0, 2):
        options = {"indices": range(len(images)), "batch_size": 4, "augment": None, "seed": 0, "workers": workers}
        pixels, labels = zip(*batches(images, CONFIG, **options), strict=True)
        assert numbers_of(list(pixels), 31) == list(range(10))
        assert torch.cat(labels).tolist() == [number % 3 for number in range(10)]
    assert caplog.text.count("only its first 10 images are looked at") == 1


# Training


def test_views_do_not_depend_on_workers_resume_or_processes(make_stream) -> None:
    whole = torch.stack(train(make_stream()))
    assert whole.shape[:2] == (12, 6)  # more than two epochs of 27 images
    for changes in ({}, {"workers": 1}, {"workers": 2}):
        assert torch.equal(whole, torch.stack(train(make_stream(), **changes)))
    for first_step in (1, 4, 5, 9, 11):
        assert torch.equal(whole[first_step:], torch.stack(train(make_stream(), first_step=first_step)))
    for world in (2, 3):
        shares = [train(make_stream(), rank=rank, world=world, workers=rank % 2) for rank in range(world)]
        assert torch.equal(whole, torch.cat([torch.stack(share) for share in shares], dim=1))
    assert not torch.equal(whole[0], train(make_stream(), seed=4)[0])


def test_views_are_those_of_the_same_images_read_by_index(make_stream, tmp_path) -> None:
    """A step of the first window: index and epoch seed its views, as they do for files."""
    for number in range(31):
        picture(number).save(tmp_path / f"{number:02}.png")
    files = open_images(str(tmp_path), "train")
    plain = numbers_of(train(make_stream(), augment=None, steps=1), 31)
    options = {"indices": plain, "batch_size": 6, "augment": Augment(), "seed": 3}
    ((expected, _),) = batches(files, CONFIG, **options)
    assert torch.equal(train(make_stream(), steps=1)[0], expected)


def test_every_epoch_holds_every_image_once_in_a_new_order_and_none_that_is_held_out(make_stream) -> None:
    images = make_stream()
    indices, unseen = split_images(images, FEW)
    assert list(unseen) == [0, 1, 2, 3]
    assert list(indices) == [4, 5, 6, 7, 8]
    order = numbers_of(train(images, augment=None, batch_size=9, steps=12), 31)
    epochs = [order[start : start + 27] for start in range(0, 108, 27)]
    assert all(sorted(epoch) == list(range(4, 31)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    # Windows of eight: mixed inside, in the stream's order among themselves.
    for epoch in epochs:
        for start in range(0, 27, 8):
            assert sorted(epoch[start : start + 8]) == list(range(4 + start, min(12 + start, 31)))


def test_of_a_short_stream_a_fifth_is_held_out(make_stream) -> None:
    images = make_stream(count=8)
    assert [list(part) for part in split_images(images, FEW)] == [[1, 2, 3, 4, 5, 6, 7], [0]]
    assert sorted(numbers_of(train(images, augment=None, batch_size=7, steps=1), 8)) == list(range(1, 8))


def test_a_resumed_run_does_not_read_again_what_lies_behind(make_stream, tmp_path) -> None:
    images = make_stream(count=60)
    whole = train(images, steps=9)
    facts = json.loads(json.dumps(images.stream.facts))
    assert {index for index, _ in facts["bookmarks"]} >= set(range(12, 60, 8))
    resumed = make_stream(count=60)
    split_images(resumed, FEW)
    resumed.stream.facts = facts
    (tmp_path / "pets" / "train-0.parquet").write_bytes(b"gone")  # images 0 to 19
    assert torch.equal(torch.stack(whole[7:]), torch.stack(train(resumed, first_step=7, steps=9)))
    with pytest.raises(UserError, match=r"cannot be read at image 0 \("):
        train(resumed, first_step=0, steps=9)


def test_where_an_epoch_ends_is_found_out_once(make_stream, tmp_path) -> None:
    images = make_stream()
    assert images.stream.facts["count"] is None
    whole = train(images)
    assert images.stream.facts["count"] == 31
    resumed = make_stream()
    resumed.stream.facts |= {"count": 31}
    assert torch.equal(torch.stack(whole[8:]), torch.stack(train(resumed, first_step=8)))


def test_reading_ahead_is_bounded_and_ends_with_its_reader() -> None:
    read = []
    items = ahead((read.append(number) or number for number in range(100)), 5)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    items.close()
    assert len(read) <= 3 + 5
    assert list(ahead(iter(range(7)), 3)) == list(range(7))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("stream")]


# Broken images


@pytest.mark.parametrize("workers", [0, 2])
def test_few_unreadable_images_are_stood_in_for(make_stream, workers, caplog) -> None:
    images = make_stream(count=204, broken=(57,), window=64)
    with caplog.at_level(logging.WARNING):
        order = numbers_of(train(images, augment=None, batch_size=50, steps=4, workers=workers), 204)
    (stand_in,) = {number for number in order if order.count(number) == 2}
    assert sorted(order) == sorted([*(set(range(4, 204)) - {57}), stand_in])
    assert 4 <= stand_in < 9, "one of those at hand that are trained on"
    assert (images.tally.seen, images.tally.unreadable) == (200, 1)
    assert f"image 57 of hfids/pets:{images.name.partition(':')[2]}" in caplog.text


def test_many_unreadable_images_are_an_error(make_stream) -> None:
    images = make_stream(count=204, broken=tuple(range(9, 204, 10)))
    with pytest.raises(UserError, match=r"^\d+ of \d+ images are unreadable.* first is image \d+ of hfids/pets"):
        train(images, batch_size=10, steps=100)


# A whole conversion


@pytest.fixture
def convert(tmp_path, monkeypatch):
    """Converts the bundled teacher on 200 of the bundled images, streamed; SIGTERM as the n-th image is read."""
    with np.load(DEMO_IMAGES, allow_pickle=False) as arrays:
        for split, count in (("train", 200), ("test", 40)):
            pixels, labels = (arrays[f"{split}_{kind}"][:count] for kind in ("images", "labels"))
            names = open_images("demo", split, in_chans=1).label_names
            columns = COLUMNS | {"kind": datasets.ClassLabel(names=names)}
            contents = [png(Image.fromarray(one)) for one in pixels]
            for part in range(2):
                half = slice(part * count // 2, (part + 1) * count // 2)
                file = tmp_path / "demo" / f"{split}-{part}.parquet"
                write_parquet(file, contents[half], labels[half].tolist(), columns)
    monkeypatch.setattr("gspn2convert.stream.WINDOW", 32)
    opened, read = Row.open, []

    def go(name: str, *, terminate_at_read: int | None = None, **options):
        read.clear()

        def open_and_count(row: Row):
            read.append(row.index)
            if len(read) == terminate_at_read:
                signal.raise_signal(signal.SIGTERM)
            return opened(row)

        monkeypatch.setattr(Row, "open", open_and_count)
        how = Options(output=tmp_path / name, device="cpu", quiet=True, **options)
        metrics = distill("demo", DEMO, f"hfids/demo:{tmp_path / 'demo'}", how)
        return metrics, load_file(tmp_path / name / "model.safetensors"), list(read)

    return go


def test_a_run_that_was_stopped_and_resumed_ends_with_the_same_bits(convert) -> None:
    metrics, whole, read = convert("whole")
    assert metrics["teacher_top1"] > 0.8
    assert [stage["stage"] for stage in metrics["stages"]] == ["fit", "align", "recover"]
    # 32 images are held out, 48 and then 16 of those held out are for the fit, the 40 test images for its top-1.
    assert read[:136] == [*range(32), *range(32, 80), *range(0, 32, 2), *range(40)]
    align, recover = read[136 : 136 + 4 * 24], read[136 + 4 * 24 + 40 :][: 9 * 24]
    assert set(align) | set(recover[:168]) == set(range(32, 200)), "all but the images that are held out"
    assert sorted(recover[:168]) == list(range(32, 200))
    eighth = 136 + 4 * 24 + 40 + 7 * 24  # of the steps of `recover`, the first in the second epoch
    with pytest.raises(Interrupted, match="stopped in stage recover after 8 of 9"):
        convert("stopped", terminate_at_read=eighth + 1)
    resumed, weights, again = convert("stopped", resume=True)
    assert weights.keys() == whole.keys()
    assert all(torch.equal(weights[key], whole[key]) for key in whole)
    figures = [[{**stage, "seconds": 0} for stage in one["stages"]] for one in (metrics, resumed)]
    assert figures[0] == figures[1]
    assert again == [*range(32), *read[eighth + 24 :]]


def test_a_stream_is_not_cached(convert, tmp_path) -> None:
    with pytest.raises(UserError, match=r"^data 'hfids/demo:.*' is a stream, which --cache cannot hold"):
        convert("cached", cached=True)
    assert not (tmp_path / "cached").exists()


# Shards by URL


@pytest.fixture
def shards(tmp_path):
    """A folder of three shards with ten pictures and labels each."""
    (tmp_path / "shards").mkdir()
    for shard in range(3):
        with tarfile.open(tmp_path / "shards" / f"pets-{8 + shard:02}.tar", "w") as tar:
            for number in range(10 * shard, 10 * shard + 10):
                for name, content in ((f"{number:03}.png", png(picture(number))), (f"{number:03}.cls", b"1")):
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


# Mistakes


def test_mistakes_are_told_in_one_line(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (tmp_path / "nothing").mkdir()
    texts = {"title": datasets.Value("string"), "kind": datasets.ClassLabel(names=CLASSES)}
    table = pa.Table.from_pydict({"title": ["x"], "kind": [0]}, schema=datasets.Features(texts).arrow_schema)
    (tmp_path / "texts").mkdir()
    parquet.write_table(table, tmp_path / "texts" / "train.parquet")
    write_parquet(tmp_path / "empty" / "train.parquet", [], [])
    write_parquet(tmp_path / "single" / "train.parquet", [png(picture(0))], [0])
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


def test_shares_must_be_even(make_stream) -> None:
    with pytest.raises(UserError, match="make it a multiple of 4"):
        train(make_stream(), world=4)


def test_a_row_without_an_image_cannot_be_read() -> None:
    with pytest.raises(OSError, match="no image in this row"):
        Row(3, None, None, -1).open()
