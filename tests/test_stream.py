"""Streams: the same views however they are read, and held-out images kept apart."""

import json
import logging
import pickle
import threading

import numpy as np
import pytest
import torch

from gspn2convert.data import batches, open_images, split_images
from gspn2convert.errors import UserError
from gspn2convert.recipe import Augment
from gspn2convert.stream import ahead
from helpers.pictures import encode
from helpers.streams import CLASSES, CONFIG, FEW, numbers_of, picture, train, write_parquet

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def make_stream(tmp_path):
    """Opens a stream of pictures 0, 1, ... in three files, shuffled in windows; those in `broken` are cut short."""

    def make(count=31, *, broken=(), window=8, split="train"):
        folder = tmp_path / "pets"
        for file, numbers in enumerate(np.array_split(range(count), 3) if not folder.exists() else ()):
            contents = [encode(picture(number)) for number in numbers]
            contents = [one[:40] if number in broken else one for number, one in zip(numbers, contents, strict=True)]
            write_parquet(folder / f"train-{file}.parquet", contents, [int(number) % 3 for number in numbers])
        images = open_images(f"hfids/pets:{folder}", split)
        images.stream.window = window
        return images

    return make


def test_workers_that_are_not_forked_can_have_a_stream(make_stream):
    """Where workers are spawned the set is pickled; they read none of the stream by themselves."""
    images = make_stream()
    split_images(images, FEW)
    sent = pickle.loads(pickle.dumps(images))
    assert np.array_equal(*(np.asarray(each.image(2)[0]) for each in (images, sent)))


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


def test_images_of_the_fit_do_not_depend_on_who_asked_for_the_length(make_stream) -> None:
    untouched, asked = make_stream(count=60), make_stream(count=60)
    assert len(asked) == 60
    assert split_images(asked, FEW) == split_images(untouched, FEW)


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


def test_shares_must_be_even(make_stream) -> None:
    with pytest.raises(UserError, match="make it a multiple of 4"):
        train(make_stream(), world=4)


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
