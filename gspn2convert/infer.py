"""Exported files on images: how a file wants to see them, and what it makes of them.

Shape letters: B batch, C channels, H W image size, M images, L classes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gspn2convert.errors import SizeError, UserError
from gspn2convert.images import ImageSet, UnreadableImage
from gspn2convert.session import OnnxSession
from gspn2convert.views import make_transform

LOGITS = "logits"
_BATCH = 16


def data_config(
    session: OnnxSession,
    *,
    size: tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Read from a file's metadata how its images are made.

    Args:
        session: the file.
        size: height and width, instead of the file's own.
        mean: of each channel, or one for all, instead of the file's.
        std: likewise.

    Returns:
        What timm calls a data config: input_size, mean, std, interpolation, crop_pct and crop_mode. Where the file
        says nothing of the last three: bicubic, the whole of the shorter side, from the middle.

    Raises:
        UserError: neither the file nor an argument says it, or an argument does not fit the file.
    """
    channels, *fixed = session.input_size
    said = session.value("input_size")
    height, width = size or (said[1:] if said else fixed)
    if height is None or width is None:
        raise UserError(f"{session.path}: the file does not say which image size it is for; give --size HxW")
    for want, have in zip(fixed, (height, width), strict=True):
        if want not in (None, have):
            raise SizeError(f"image size {height}x{width}: {session.path.name} takes {fixed[0]}x{fixed[1]} alone")
    rows, columns = session.size_multiple
    if height % rows or width % columns:
        raise SizeError(f"image size {height}x{width}: {session.path.name} takes multiples of {rows}x{columns}")
    return {
        "input_size": (channels, height, width),
        "mean": _per_channel(session, "mean", mean),
        "std": _per_channel(session, "std", std),
        "interpolation": session.metadata.get("interpolation", "bicubic"),
        "crop_pct": session.value("crop_pct") or 1.0,
        "crop_mode": session.metadata.get("crop_mode", "center"),
    }


def label_names(session: OnnxSession, classes: int) -> list[str]:
    """Return the classes' names, their numbers where the file does not name them."""
    found = session.value("label_names")
    return found if found and len(found) == classes else [str(index) for index in range(classes)]


def pick_batch_size(session: OnnxSession, asked: int | None) -> int:
    """Return the images of a call.

    Raises:
        UserError: the file takes another number.
    """
    if session.batch is not None and asked not in (None, session.batch):
        raise UserError(f"batch size {asked}: {session.path.name} takes {session.batch} images at a time")
    return session.batch or asked or _BATCH


def infer(
    session: OnnxSession,
    images: ImageSet,
    config: dict[str, Any],
    *,
    batch_size: int,
    limit: int | None = None,
    done: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
    """Run images through a file, in their order.

    Args:
        session: the file.
        images: what to run.
        config: from `data_config`.
        batch_size: images of a call, from `pick_batch_size`.
        limit: stop after so many images.
        done: told the number of images after each call.

    Returns:
        The file's first output, (M, ...).

    Raises:
        UserError: an image cannot be read.
    """
    transform = make_transform(config, None, images.in_chans)
    count = min(len(images), limit or len(images))
    outputs = []
    for start in range(0, count, batch_size):
        indices = range(start, min(start + batch_size, count))
        pixels = np.stack([_pixels(images, index, transform) for index in indices])
        outputs.append(_first_output(session, pixels))
        done(indices.stop)
    return np.concatenate(outputs)


def top_classes(logits: np.ndarray, count: int) -> list[list[tuple[int, float]]]:
    """Return the most likely classes of each image with their probabilities, the best first.

    Args:
        logits: (M, L).
        count: classes of an image; all if there are fewer.
    """
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    shares = shifted / shifted.sum(axis=1, keepdims=True)
    best = np.argsort(-shares, axis=1, kind="stable")[:, :count]
    return [[(int(index), float(row[index])) for index in order] for row, order in zip(shares, best, strict=True)]


def _pixels(images: ImageSet, index: int, transform: Callable[[Any], Any]) -> np.ndarray:
    try:
        image, _ = images.image(index)
    except UnreadableImage as error:
        raise UserError(f"unreadable image {error}; mend it or leave it out") from error
    pixels: np.ndarray = transform(image).numpy()
    return pixels


def _first_output(session: OnnxSession, pixels: np.ndarray) -> np.ndarray:
    """Run a batch; where the file takes a fixed number of images, the last batch is filled up with zeros."""
    count = len(pixels)
    if session.batch is not None and count < session.batch:
        pixels = np.concatenate([pixels, np.zeros((session.batch - count, *pixels.shape[1:]), pixels.dtype)])
    outputs = session.run(pixels)
    return (outputs[0] if isinstance(outputs, tuple) else outputs)[:count]


def _per_channel(session: OnnxSession, name: str, given: Sequence[float] | None) -> tuple[float, ...]:
    channels = session.input_size[0]
    found = given or session.value(name)
    if not found:
        raise UserError(f"{session.path}: the file does not say how its images are normalised; give --mean and --std")
    if given and len(found) not in (1, channels):
        raise UserError(f"--{name} with {len(found)} values: {session.path.name} takes images of {channels} channels")
    if name == "std" and min(found) <= 0:
        raise UserError(
            f"{'--std' if given else session.path} has a standard deviation of {min(found)}; give one above 0"
        )
    return tuple(found) * channels if len(found) == 1 else tuple(found)
