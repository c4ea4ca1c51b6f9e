"""Images from everywhere: folders, archives, data sets, in every colour mode."""

import gzip
import hashlib
import json
import logging
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gspn2convert.data import ImageSet, batches, open_images
from gspn2convert.demo_data import FILE
from gspn2convert.errors import UserError
from helpers.pictures import CONFIG, MakeFolder, add, picture, png


def pixels_of(images: ImageSet) -> list[np.ndarray]:
    return [np.asarray(images.image(index)[0]) for index in range(len(images))]


def labels_of(images: ImageSet) -> list[int]:
    return [images.image(index)[1] for index in range(len(images))]


def assert_pictures(images: ImageSet, numbers: list[int]) -> None:
    for pixels, number in zip(pixels_of(images), numbers, strict=True):
        np.testing.assert_array_equal(pixels, np.asarray(picture(number)))


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


def test_all_kinds_of_files_are_read_from_folders(tmp_path: Path) -> None:
    kinds = ("bmp", "gif", "jpeg", "jpg", "png", "tif", "tiff", "webp", "WEBP")
    for number, kind in enumerate(kinds):
        picture(number).save(tmp_path / f"{number}.{kind}")
    (tmp_path / "notes.txt").write_text("no image")
    images = open_images(str(tmp_path), "train")
    assert [Path(images.where(index)).name for index in range(len(images))] == [
        f"{number}.{kind}" for number, kind in enumerate(kinds)
    ]
    for exact in (0, 4, 5, 6):
        np.testing.assert_array_equal(pixels_of(images)[exact], np.asarray(picture(exact)))


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
    assert training.label_names == ["0", "1", "2", "3"]
    assert_pictures(test, [9])
    assert labels_of(test) == [-1]
    assert test.label_names is None


@pytest.mark.parametrize("names", [("latest-train-0", "latest-val-0"), ("trainset", "testset")], ids=lambda n: n[0])
def test_shards_of_a_name_that_holds_another_split(tmp_path: Path, names: tuple[str, str]) -> None:
    for number, name in enumerate(names):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            add(tar, "x.png", png(number))
    assert_pictures(open_images(f"wds/mine:{tmp_path}", "train"), [0])
    assert_pictures(open_images(f"wds/mine:{tmp_path}", "test"), [1])


@pytest.mark.parametrize("odd", ["99999999999999999999", "-7"])
def test_shards_whose_cls_are_no_classes_have_no_labels(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, odd: str
) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for sample, label in enumerate(("0", odd)):
            add(tar, f"{sample}.png", png(sample))
            add(tar, f"{sample}.cls", label.encode())
    images = open_images(f"wds/mine:{tmp_path}", "train")
    assert_pictures(images, [0, 1])
    assert (images.label_names, labels_of(images)) == (None, [-1, -1])
    assert f"a .cls file holds {odd}, which is no number of a class: labels are left out" in caplog.text


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
