"""Views that depend on nothing but their seed."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from gspn2convert.data import batches, open_images, split_held_out
from gspn2convert.errors import UserError
from gspn2convert.recipe import Augment
from helpers.pictures import CONFIG, MakeFolder, picture, train


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
