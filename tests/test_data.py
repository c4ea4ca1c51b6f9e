"""Images from everywhere, views that depend on nothing but their seed, and what happens to broken files."""

import gzip
import hashlib
import io
import json
import logging
import random
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from gspn2convert.data import ImageSet, batches, open_images, split_held_out, train_batches
from gspn2convert.demo_data import FILE
from gspn2convert.errors import UserError
from gspn2convert.recipe import Augment

CONFIG = {
    "input_size": (3, 24, 32),
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.3, 0.4),
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "crop_mode": "center",
}
MakeFolder = Callable[..., Path]


def picture(number: int, size: tuple[int, int] = (20, 16)) -> Image.Image:
    """A smooth coloured picture; no two numbers give the same."""
    rows, columns = np.mgrid[: size[1], : size[0]]
    channels = [rows * 9 + number * 37, columns * 7 + number * 59, (rows + columns) * 4 + number * 83]
    return Image.fromarray((np.stack(channels, -1) % 256).astype(np.uint8))


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, "PNG")
    return buffer.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Makes a folder of pictures: 0.png, 1.png, ... or any given names; those in `broken` are cut short."""

    def make(count: int = 10, *, names: list[str] | None = None, broken: tuple[int, ...] = ()) -> Path:
        folder = tmp_path / "pictures"
        for number, name in enumerate(names or [f"{number}.png" for number in range(count)]):
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            content = png(number)
            file.write_bytes(content[: len(content) // 2] if number in broken else content)
        return folder

    return make


def pixels_of(images: ImageSet) -> list[np.ndarray]:
    return [np.asarray(images.image(index)[0]) for index in range(len(images))]


def labels_of(images: ImageSet) -> list[int]:
    return [images.image(index)[1] for index in range(len(images))]


def assert_pictures(images: ImageSet, numbers: list[int]) -> None:
    for pixels, number in zip(pixels_of(images), numbers, strict=True):
        np.testing.assert_array_equal(pixels, np.asarray(picture(number)))


def train(images: ImageSet, **changes: object) -> list[torch.Tensor]:
    options = dict(
        indices=range(len(images)), batch_size=4, augment=Augment(), seed=3, first_step=0, steps=6, rank=0, world=1
    )
    return list(train_batches(images, CONFIG, **options | changes))  # type: ignore[arg-type]


# Sources


def test_folder_without_labels_is_read_in_natural_order(make_folder: MakeFolder) -> None:
    images = open_images(str(make_folder(12)), "train")
    assert_pictures(images, list(range(12)))
    assert images.label_names is None
    assert labels_of(images) == [-1] * 12
    assert images.where(10).endswith("pictures/10.png")


def test_subfolders_are_the_labels_and_serve_both_splits(make_folder: MakeFolder) -> None:
    folder = str(make_folder(names=["cat/1.png", "cat/2.png", "dog/deeper/fish/1.jpg", "ant/1.png"]))
    for split in ("train", "test"):
        images = open_images(folder, split)
        assert images.label_names == ["ant", "cat", "fish"]
        assert labels_of(images) == [0, 1, 1, 2]
        assert_pictures(images, [3, 0, 1, 2])


@pytest.mark.parametrize("test_name", ["test", "val", "validation"])
def test_split_folders_are_kept_apart(make_folder: MakeFolder, test_name: str) -> None:
    folder = str(make_folder(names=["train/a/0.png", "train/b/0.png", f"{test_name}/a/0.png", f"{test_name}/b/0.png"]))
    assert_pictures(open_images(folder, "train"), [0, 1])
    assert_pictures(open_images(folder, "test"), [2, 3])


def test_a_class_may_be_called_train(make_folder: MakeFolder) -> None:
    images = open_images(str(make_folder(names=["car/0.png", "train/0.png"])), "train")
    assert images.label_names == ["car", "train"]
    assert labels_of(images) == [0, 1]


def test_tar_file(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for number, name in enumerate(["b/1.png", "a/1.png", "a/2.png", "readme.txt"]):
            add(tar, name, png(number))
    images = open_images(str(tmp_path / "set.tar"), "train")
    assert images.label_names == ["a", "b"]
    assert labels_of(images) == [0, 0, 1]
    assert_pictures(images, [1, 2, 0])
    everything = {"indices": range(3), "batch_size": 2, "augment": None, "seed": 0}
    alone = torch.cat([pixels for pixels, _ in batches(images, CONFIG, **everything)])
    # A tar file that was open before the workers were started must not be shared by them.
    shared = torch.cat([pixels for pixels, _ in batches(images, CONFIG, **everything, workers=2)])
    assert torch.equal(alone, shared)
    assert [path.name for path in tmp_path.iterdir()] == ["set.tar"]


def test_webdataset_shards(tmp_path: Path) -> None:
    for shard in range(2):
        with tarfile.open(tmp_path / f"pets-train-{shard:04}.tar", "w") as tar:
            for sample in range(3):
                add(tar, f"pets/{sample}.png", png(3 * shard + sample))
                add(tar, f"pets/{sample}.cls", str(sample + shard).encode())
                add(tar, f"pets/{sample}.json", b"{}")
    with tarfile.open(tmp_path / "pets-val-0000.tar", "w") as tar:
        add(tar, "9.png", png(9))
    training, test = (open_images(f"wds/pets:{tmp_path}", split) for split in ("train", "test"))
    assert_pictures(training, list(range(6)))
    assert labels_of(training) == [0, 1, 2, 1, 2, 3]
    assert_pictures(test, [9])
    assert labels_of(test) == [-1]


def test_shards_listed_in_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, number in (("a.tar", 1), ("b.tar", 2)):
        with tarfile.open(tmp_path / name, "w") as tar:
            add(tar, "x.png", png(number))
    lists = {
        "train": {"filenames": ["b.tar"]},
        "validation": {"filenames": ["a.tar", "b.tar"]},
        "more": {"filenames": []},
    }
    spec, info = f"wds/pets:{tmp_path}", tmp_path / "_info.json"
    assert_pictures(open_images(spec, "train"), [1, 2])
    info.write_text(json.dumps({"splits": lists}))
    assert_pictures(open_images(spec, "train"), [2])
    assert_pictures(open_images(spec, "test"), [1, 2])
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    info.write_text(json.dumps({"splits": {"train": lists["train"]}}))
    assert_pictures(open_images(spec, "test"), [2])
    assert "no test split, so train serves for it" in caplog.text
    for content, message in (
        ({"splits": {"more": lists["more"]}}, "no train or test split among more"),
        ({}, "no list of"),
    ):
        info.write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            open_images(spec, "train")


def test_torchvision_data_set_that_is_there(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    with np.load(FILE, allow_pickle=False) as arrays:
        for stem, split in (("train", "train"), ("t10k", "test")):
            pixels, labels = arrays[f"{split}_images"][:5], arrays[f"{split}_labels"][:5]
            header = np.array([0x00000803, 5, 28, 28], ">i4").tobytes()
            (raw / f"{stem}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
            (raw / f"{stem}-labels-idx1-ubyte").write_bytes(
                np.array([0x00000801, 5], ">i4").tobytes() + labels.tobytes()
            )
    for split in ("train", "test"):
        ours, demo = (open_images(s, split, in_chans=1) for s in (f"torch/fashion_mnist:{tmp_path}", "demo"))
        assert ours.label_names == demo.label_names
        assert labels_of(ours) == labels_of(demo)[:5]
        np.testing.assert_array_equal(pixels_of(ours), pixels_of(demo)[:5])


def test_demo_data_are_balanced_and_the_ones_we_know() -> None:
    assert FILE.stat().st_size < 4_000_000
    digests = {
        "train": "9c60ea689617ecf61d302c10d05e58b17be2ab1527d53ca971e398cff7d6f3fa",
        "test": "911087eadf0617aafb148f7788d087a0ba32f95d80ee1d0a5a3f6eef7934f1c8",
    }
    for split, count in (("train", 6000), ("test", 2000)):
        images = open_images("demo", split, in_chans=1)
        assert np.bincount(labels_of(images)).tolist() == [count // 10] * 10
        content = np.stack(pixels_of(images)).tobytes() + bytes(labels_of(images))
        assert hashlib.sha256(content).hexdigest() == digests[split]


def test_every_colour_mode_becomes_rgb_or_grey(tmp_path: Path) -> None:
    colours = picture(1)
    grey = colours.convert("L")
    deep = Image.fromarray((np.asarray(grey).astype(np.uint16) << 8) | 0x5A)
    saved = {
        "alpha.png": (colours.convert("RGBA"), colours),
        "deep.png": (deep, grey),
        "grey.png": (grey, grey),
        "palette.png": (colours.quantize(256), colours.quantize(256)),
        "print.jpg": (colours.convert("CMYK"), None),
    }
    for name, (image, _) in saved.items():
        image.save(tmp_path / name)
    for in_chans, mode in ((3, "RGB"), (1, "L")):
        images = open_images(str(tmp_path), "train", in_chans=in_chans)
        for index, (name, (_, expected)) in enumerate(saved.items()):
            image, _ = images.image(index)
            assert image.mode == mode
            expected = expected or Image.open(tmp_path / name)
            np.testing.assert_array_equal(np.asarray(image), np.asarray(expected.convert(mode)), err_msg=name)


# Views


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_evaluation_view_is_the_teachers(make_folder: MakeFolder, mode: str) -> None:
    config = CONFIG | {"crop_mode": mode}
    images = open_images(str(make_folder(5)), "train")
    transform = create_transform(**config)
    ((first, labels), (second, _)) = batches(images, config, indices=[4, 0, 2], batch_size=2, augment=None, seed=0)
    for view, number in zip(torch.cat([first, second]), (4, 0, 2), strict=True):
        assert torch.equal(view, transform(picture(number)))
    assert labels.tolist() == [-1, -1]


def test_normalisation_numbers(tmp_path: Path) -> None:
    Image.new("RGB", (32, 24), (255, 102, 0)).save(tmp_path / "0.png")
    Image.new("RGB", (32, 24), (255, 102, 0)).save(tmp_path / "1.png")
    config = CONFIG | {"crop_pct": 1.0}
    images = open_images(str(tmp_path), "train")
    for augment in (None, Augment(color_jitter=0.0)):
        ((pixels, _),) = batches(images, config, indices=[0, 1], batch_size=2, augment=augment, seed=0)
        assert pixels.shape == (2, 3, 24, 32)
        for channel, value in enumerate([(1 - 0.5) / 0.2, (0.4 - 0.4) / 0.3, (0 - 0.3) / 0.4]):
            torch.testing.assert_close(pixels[:, channel], torch.full((2, 24, 32), value), rtol=0, atol=1e-6)


def test_grey_teacher_with_three_means(make_folder: MakeFolder) -> None:
    images = open_images(str(make_folder(2)), "train", in_chans=1)
    config = CONFIG | {"input_size": (1, 24, 32)}
    one = config | {"mean": (0.4,), "std": (0.3,)}
    options = {"indices": [0, 1], "batch_size": 2, "seed": 0}
    for augment in (None, Augment()):
        ((pixels, _),), ((expected, _),) = (batches(images, c, augment=augment, **options) for c in (config, one))
        assert pixels.shape == (2, 1, 24, 32)
        torch.testing.assert_close(pixels, expected)


def test_views_do_not_depend_on_workers_resume_or_processes(make_folder: MakeFolder) -> None:
    images = open_images(str(make_folder(10)), "train")
    whole = train(images)
    assert len(whole) == 6
    for same in (train(images), train(images, workers=2), train(images, indices=np.arange(10))):
        assert torch.equal(torch.stack(whole), torch.stack(same))
    for first_step in (1, 4):
        assert torch.equal(torch.stack(whole[first_step:]), torch.stack(train(images, first_step=first_step)))
    halves = [train(images, rank=rank, world=2, workers=2 * rank) for rank in (0, 1)]
    assert torch.equal(torch.stack(whole), torch.cat([torch.stack(half) for half in halves], dim=1))
    assert not torch.equal(whole[0], train(images, seed=4)[0])


def test_view_depends_on_the_image_and_the_epoch_only(make_folder: MakeFolder) -> None:
    images = open_images(str(make_folder(3)), "train")
    every = {"augment": Augment(), "seed": 3}
    ((alone, _),) = batches(images, CONFIG, indices=[2], batch_size=1, **every)
    ((among, _),) = batches(images, CONFIG, indices=[0, 1, 2], batch_size=3, **every)
    assert torch.equal(alone[0], among[2])
    first, second = train(images, indices=[2], batch_size=1, steps=2)
    assert torch.equal(first, alone)
    assert not torch.equal(first, second)


def test_every_epoch_holds_every_image_once_in_a_new_order(make_folder: MakeFolder) -> None:
    images = open_images(str(make_folder(10)), "train")
    indices = [1, 2, 3, 5, 6, 8, 9]
    seen = torch.cat(train(images, indices=indices, batch_size=4, steps=7, augment=None))
    views = torch.cat([p for p, _ in batches(images, CONFIG, indices=range(10), batch_size=10, augment=None, seed=0)])
    order = [next(number for number in range(10) if torch.equal(view, views[number])) for view in seen]
    epochs = [order[start : start + 7] for start in range(0, 28, 7)]
    assert all(sorted(epoch) == indices for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_global_generators_stay_as_they_are(make_folder: MakeFolder, workers: int) -> None:
    images = open_images(str(make_folder(4)), "train")
    before = random.getstate(), torch.random.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
    train(images, workers=workers)
    split_held_out(100, 10, 0)
    assert random.getstate() == before[0]
    assert torch.equal(torch.random.get_rng_state(), before[1])
    np.testing.assert_array_equal(np.random.get_state()[1], before[2])  # noqa: NPY002


def test_views_follow_the_recipe(tmp_path: Path) -> None:
    # No crop of the whole area has an aspect of at most 4 : 3, so that timm takes the middle, always the same.
    picture(0, (32, 16)).save(tmp_path / "0.png")
    images = open_images(str(tmp_path), "train")
    middle = {"scale": (1.0, 1.0), "flip": False, "color_jitter": 0.0}

    def views(**changes: object) -> list[torch.Tensor]:
        return train(images, indices=[0], batch_size=1, steps=40, augment=Augment(**middle | changes))

    plain, *others = views()
    assert all(torch.equal(plain, view) for view in others)
    unturned = [torch.equal(plain, view) for view in views(flip=True)]
    turned = [torch.equal(plain.flip(-1), view) for view in views(flip=True)]
    assert all(a != b for a, b in zip(unturned, turned, strict=True))
    assert 8 <= sum(turned) <= 32
    assert not any(torch.equal(plain, view) for view in views(scale=(0.2, 0.5)))
    # The pixels of 0..1 times 0.8..1.2, three times over.
    brightness = [((view - plain) * 0.4).abs().max().item() for view in views(color_jitter=0.2)]
    assert 0.1 < max(brightness) < 0.75


def test_held_out_images() -> None:
    train_part, held_out = split_held_out(1000, 128, 0)
    assert len(held_out) == 128
    assert sorted(train_part + held_out) == list(range(1000))
    assert split_held_out(1000, 128, 0)[1] == held_out
    assert split_held_out(1000, 128, 1)[1] != held_out
    assert len(split_held_out(64, 256, 0)[1]) == 12
    assert [len(part) for part in split_held_out(2, 256, 0)] == [1, 1]
    with pytest.raises(UserError, match="at least 2"):
        split_held_out(1, 1, 0)


# Broken files


@pytest.mark.parametrize("workers", [0, 2])
def test_few_unreadable_images_are_stood_in_for(
    make_folder: MakeFolder, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    images = open_images(str(make_folder(200, broken=(57,))), "train")
    options = {"indices": range(200), "batch_size": 32, "augment": None, "seed": 0}
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            views = torch.cat([pixels for pixels, _ in batches(images, CONFIG, **options, workers=workers)])
    assert len(views) == 200
    assert torch.equal(views[57], views[58])
    assert len({view.numpy().tobytes() for view in views}) == 199
    assert (images.tally.seen, images.tally.unreadable) == (200, 1)
    assert len(caplog.records) == 1
    assert "57.png" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_many_unreadable_images_are_an_error(make_folder: MakeFolder, workers: int) -> None:
    images = open_images(str(make_folder(400, broken=tuple(range(7, 400, 20)))), "train")
    with pytest.raises(UserError, match=r"^\d+ of \d+ images are unreadable.* first is .*\d+\.png") as error:
        train(images, batch_size=16, steps=100, workers=workers)
    assert "\n" not in str(error.value)
    assert 100 <= images.tally.seen < 400


def test_three_in_two_hundred_are_an_error_at_the_end_of_the_pass(make_folder: MakeFolder) -> None:
    images = open_images(str(make_folder(200, broken=(3, 4, 199))), "train")
    passed = []
    with pytest.raises(UserError, match=r"^3 of 200 images are unreadable.* first is \S*/3\.png"):
        passed.extend(batches(images, CONFIG, indices=range(200), batch_size=50, augment=None, seed=0))
    assert len(passed) == 3


@pytest.mark.parametrize("content", [b"", b"no image at all", png(0)[:30]])
def test_nothing_readable_is_an_error_at_once(tmp_path: Path, content: bytes) -> None:
    for number in range(50):
        (tmp_path / f"{number}.png").write_bytes(content)
    images = open_images(str(tmp_path), "train")
    with pytest.raises(UserError, match="^4 of 4 images are unreadable"):
        train(images, batch_size=4)


def test_file_that_vanishes_is_unreadable(make_folder: MakeFolder) -> None:
    folder = make_folder(3)
    images = open_images(str(folder), "train")
    (folder / "1.png").unlink()
    with pytest.raises(OSError, match=r"1\.png: .*No such file"):
        images.image(1)


# Mistakes


def test_mistakes_in_the_name_are_told_in_one_line(tmp_path: Path) -> None:
    empty, texts, tars = (tmp_path / name for name in ("empty", "texts", "tars"))
    for folder in (empty, texts, tars):
        folder.mkdir()
    (texts / "notes.txt").write_text("no image")
    (tars / "pictures.tar").write_bytes(b"")
    with tarfile.open(tmp_path / "no_images.tar", "w") as tar:
        add(tar, "notes.txt", b"no image")
    (tmp_path / "cut.tar").write_bytes(b"no tar file" * 100)
    (tars / "cut-train.tar").write_bytes(b"no tar file" * 100)
    for name, content in (("words", b"no number"), ("numbers", b"3")):
        (tmp_path / name).mkdir()
        with tarfile.open(tmp_path / name / "x.tar", "w") as tar:
            add(tar, "1.cls", content)
    said = {
        f"wds/pets:{tmp_path / 'words'}": "x.tar: a .cls file holds no whole number",
        f"wds/pets:{tmp_path / 'numbers'}": "no images in the shards",
        str(empty): "no .jpg, .jpeg or .png images in it$",
        str(texts): "no .jpg, .jpeg or .png images in it$",
        str(tars): "name one of its .tar files",
        str(tmp_path / "no_images.tar"): "no .jpg, .jpeg or .png images in it$",
        str(tmp_path / "cut.tar"): "no complete tar file",
        str(texts / "notes.txt"): "file of another kind; expected a folder of images, a .tar file, demo",
        str(tmp_path / "missing"): "no such file or folder; expected",
        "fashion": "no such file or folder; expected",
        f"torch/cifar10:{tmp_path}": "nothing is downloaded unasked",
        f"torch/cifar1000:{tmp_path}": "no torchvision dataset of this name",
        f"wds/pets:{tmp_path / 'missing'}": "no such folder",
        f"wds/pets:{empty}": "no .tar files",
        f"wds/pets:{tars}": "cut-train.tar: no complete tar file",
        "wds/pets": "expected .*wds/NAME:ROOT",
    }
    for spec, message in said.items():
        with pytest.raises(UserError, match=message) as error:
            open_images(spec, "train")
        assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("cifar*"))


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        open_images("hfds/somebody/pets", "train")


def test_other_channels_and_uneven_shares(make_folder: MakeFolder) -> None:
    folder = str(make_folder(4))
    with pytest.raises(UserError, match="4 input channels"):
        open_images(folder, "train", in_chans=4)
    with pytest.raises(UserError, match="make it a multiple of 3"):
        train(open_images(folder, "train"), world=3)


def test_script_draws_balanced_data_from_the_source(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    source = {
        "train": rng.integers(0, 256, (60, 28, 28), np.uint8),
        "t10k": rng.integers(0, 256, (30, 28, 28), np.uint8),
    }
    for split, pixels in source.items():
        for kind, array in (("images-idx3", pixels), ("labels-idx1", np.arange(len(pixels), dtype=np.uint8) % 10)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            (tmp_path / f"{split}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    script = Path(__file__).parents[1] / "recipes" / "scripts" / "make_demo_data.py"
    options = ["--data", tmp_path, "--output", tmp_path / "made.npz", "--train", "20", "--test", "10"]
    subprocess.run([sys.executable, script, *options], check=True)
    with np.load(tmp_path / "made.npz", allow_pickle=False) as made:
        assert sorted(made) == ["test_images", "test_labels", "train_images", "train_labels"]
        for split, origin, each in (("train", "train", 2), ("test", "t10k", 1)):
            assert np.bincount(made[f"{split}_labels"]).tolist() == [each] * 10
            for pixels, label in zip(made[f"{split}_images"], made[f"{split}_labels"], strict=True):
                (place,) = np.flatnonzero((source[origin] == pixels).all(axis=(1, 2)))
                assert place % 10 == label
