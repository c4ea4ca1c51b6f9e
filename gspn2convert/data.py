"""Batches of images as the teacher wants to see them.

What a view looks like depends on the seed, the epoch and the index of its image and on nothing else: not on the
number of workers or processes, and not on where a run was resumed. Streams keep this promise too: they are cut into
windows, and each is shuffled by a seed of its own.

Shape letters: B batch, C channels, H W image size.
"""

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from gspn2convert.errors import UserError
from gspn2convert.images import ImageSet, open_images
from gspn2convert.interrupt import held_back, leave_to_the_parent
from gspn2convert.recipe import Augment, Recipe
from gspn2convert.stream import Row, Stream, ahead
from gspn2convert.views import Views, collate, generator, make_transform

__all__ = [
    "ImageSet",
    "batches",
    "load",
    "once",
    "open_images",
    "own_share",
    "split_held_out",
    "split_images",
    "train_batches",
    "training_order",
]

Keys = list[tuple[int, int]]  # of the views of a batch: epoch and position
Rows = list[tuple[int, Row]]  # the same of a stream

_log = logging.getLogger(__name__)


def split_images(images: ImageSet, recipe: Recipe) -> tuple[Sequence[int], Sequence[int]]:
    """Set images aside that are not trained on; of a stream its first ones, those for calibration come next.

    Returns:
        The indices to train on and the indices held out. Of a stream the former are those at hand; training goes
        through it from the first of them to its end.

    Raises:
        UserError: the set has fewer than two images.
    """
    if images.stream is None:
        return split_held_out(len(images), recipe.held_out, recipe.seed)
    held_out, wanted = recipe.held_out, recipe.held_out + recipe.fit.images
    count = images.stream.keep(wanted)
    if count < wanted:
        held_out = _number_held_out(count, held_out)
    return range(held_out, count), range(held_out)


def split_held_out(count: int, held_out: int, seed: int) -> tuple[list[int], list[int]]:
    """Set images aside that are not trained on.

    Args:
        count: images in the set.
        held_out: images to set aside; at most a fifth of the set is, and at least one image.
        seed: decides which.

    Returns:
        The indices to train on and the indices held out, both in ascending order.

    Raises:
        UserError: the set has fewer than two images.
    """
    wanted = _number_held_out(count, held_out)
    order = torch.randperm(count, generator=generator(seed, "held out")).tolist()
    return sorted(order[wanted:]), sorted(order[:wanted])


def _number_held_out(count: int, held_out: int) -> int:
    if count < 2:
        raise UserError(f"the data hold {count} image; at least 2 are needed, one to train on and one held out")
    wanted = max(1, min(held_out, count // 5))
    if wanted < held_out:
        _log.warning("%d held out instead of %d: a fifth of the %d images that there are", wanted, held_out, count)
    return wanted


def batches(
    images: ImageSet,
    data_config: dict[str, Any],
    *,
    indices: Sequence[int],
    batch_size: int,
    augment: Augment | None,
    seed: int,
    workers: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Go through images once, in the order of `indices`.

    Args:
        images: the set.
        data_config: the teacher's, from `timm.data.resolve_model_data_config`.
        indices: which images.
        batch_size: images per batch; the last batch may be smaller.
        augment: how training views are made; None gives the teacher's evaluation view.
        seed: decides the views.
        workers: processes that read ahead; 0 reads in this one.

    Returns:
        Iterator over normalised float32 images (B, C, H, W) and int64 labels (B,), -1 where an image has none.
        It raises UserError when more than 1 % of the images are unreadable.
    """
    views = Views(images, indices, make_transform(data_config, augment, images.in_chans), seed)
    return ((pixels, labels) for pixels, labels, _ in load(views, once(len(indices), batch_size), workers))


def once(count: int, batch_size: int) -> list[Keys]:
    """Keys of each image in its order, in batches of which the last may be smaller."""
    keys = [(0, position) for position in range(count)]
    return [keys[start : start + batch_size] for start in range(0, count, batch_size)]


def train_batches(
    images: ImageSet,
    data_config: dict[str, Any],
    *,
    indices: Sequence[int],
    batch_size: int,
    augment: Augment | None,
    seed: int,
    first_step: int,
    steps: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
) -> Iterator[Tensor]:
    """Give the training images of the steps from `first_step` to `steps`, epoch after epoch in a new order.

    Args:
        images: the set.
        data_config: the teacher's, from `timm.data.resolve_model_data_config`.
        indices: the images to train on; of a stream see `split_images`.
        batch_size: images per step, of all processes together.
        augment: how views are made; None gives the teacher's evaluation view.
        seed: decides order and views; the images of step s depend on the seed and s alone.
        first_step: the first step to give, counted from 0.
        steps: the step to stop before.
        rank: number of this process.
        world: number of processes; each gets its part of every step's images, in the order of the ranks.
        workers: reading processes of this process; 0 reads in this one.

    Returns:
        Iterator over normalised float32 images (B / world, C, H, W), one batch per step. It raises UserError when
        more than 1 % of the images are unreadable.

    Raises:
        UserError: the batch cannot be shared out evenly.
    """
    own = own_share(batch_size, rank, world)
    order: Iterable[Keys] | Iterable[Rows]
    if images.stream is None:
        order = training_order(len(indices), batch_size, own, seed, range(first_step, steps))
    else:
        order = stream_order(images.stream, indices[0], batch_size, own, seed, range(first_step, steps))
    views = Views(images, indices, make_transform(data_config, augment, images.in_chans), seed)
    return (pixels for pixels, _, _ in load(views, order, workers))


def own_share(batch_size: int, rank: int, world: int) -> range:
    """Places of a batch that are this process's.

    Raises:
        UserError: the batch cannot be shared out evenly.
    """
    if batch_size % world:
        raise UserError(f"batch_size {batch_size} cannot be shared by {world} processes; make it a multiple of {world}")
    return range(rank * batch_size // world, (rank + 1) * batch_size // world)


def training_order(count: int, batch_size: int, own: range, seed: int, steps: Iterable[int]) -> Iterator[Keys]:
    """Yield the (epoch, position) of each view of a step; a batch may span epochs, so that no image is left out."""
    shuffled: tuple[int, list[int]] = (-1, [])
    for step in steps:
        batch = []
        for number in own:
            epoch, place = divmod(step * batch_size + number, count)
            if shuffled[0] != epoch:
                shuffled = (epoch, torch.randperm(count, generator=generator(seed, "epoch", epoch)).tolist())
            batch.append((epoch, shuffled[1][place]))
        yield batch


def stream_order(stream: Stream, first: int, batch_size: int, own: range, seed: int, steps: range) -> Iterator[Rows]:
    """Yield the (epoch, row) of each view of a step; training passes over the stream from the image `first` on."""
    rows = _shuffled(stream, first, seed, steps.start * batch_size)
    for _ in steps:
        batch = list(itertools.islice(rows, batch_size))
        yield [batch[number] for number in own]


def _shuffled(stream: Stream, first: int, seed: int, start: int) -> Iterator[tuple[int, Row]]:
    """Yield epoch after epoch from the place `start` on; how long an epoch is, only its end tells."""
    epoch = 0
    while True:
        if stream.facts["count"] is not None:
            passed, start = divmod(start, stream.facts["count"] - first)
            epoch += passed
        number, skip = divmod(start, stream.window)
        rows = ahead(stream.rows(first + number * stream.window), stream.window)
        while window := list(itertools.islice(rows, stream.window)):
            order = torch.randperm(len(window), generator=generator(seed, "window", epoch, number)).tolist()
            yield from ((epoch, window[place]) for place in order[skip:])
            start += len(order[skip:])
            number, skip = number + 1, 0


def load(views: Views, order: Iterable[Keys] | Iterable[Rows], workers: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield pixels (B, C, H, W), labels and aspects (B,) of the batches in `order`, counting what cannot be read."""
    # The loader asks for this many as it starts its workers, deaf to Ctrl-C; a stream may take long to tell them.
    rest: Iterator[Any] = iter(order)
    first = list(itertools.islice(rest, 2 * workers))
    loader = DataLoader(
        views,
        batch_sampler=cast(Sampler[list[Any]], itertools.chain(first, rest)),  # any iterable will do
        num_workers=workers,
        collate_fn=collate,
        generator=torch.Generator(),  # else the loader draws a number from the global one
        worker_init_fn=leave_to_the_parent,
    )
    tally = views.images.tally
    for pixels, labels, aspects, asked in _started(loader):
        for index, problem in asked:
            tally.add(index, problem)
        tally.check(hopeless=pixels is None)
        yield pixels, labels, aspects


def _started(loader: DataLoader[Any]) -> Iterator[Any]:
    with held_back():
        return iter(loader)
