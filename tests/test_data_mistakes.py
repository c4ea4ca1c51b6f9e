"""What happens to broken files and to names of images that are none."""

import logging
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from gspn2convert.data import batches, open_images
from gspn2convert.errors import UserError
from helpers.pictures import CONFIG, MakeFolder, add, png, train

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
        str(empty): "no .bmp, .gif, .jpeg, .jpg, .png, .tif, .tiff, .webp images in it$",
        str(texts): "no .bmp, .gif, .jpeg, .jpg, .png, .tif, .tiff, .webp images in it$",
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
        "": "data '': nothing is named; expected a folder of images",
        "hfids/pets:": "nothing is named after the colon; expected a folder of images",
        "torch/cifar10:": "nothing is named after the colon",
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
