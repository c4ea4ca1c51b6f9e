"""Options that several commands have, and how their values are read."""

import math
from pathlib import Path

import click

Size = tuple[int, int]
Shape = tuple[int, int, int, int]
Value = str | None

# Pixels of a side at most: beyond, some number of a model's overflows before it says so.
LARGEST = 1 << 16

FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
PRECISION = click.Choice(["fp32", "bf16", "fp16"])

folder_argument = click.argument("folder", type=FOLDER)
device_option = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where to run."
)
workers_option = click.option(
    "--workers", type=click.IntRange(0), default=0, show_default=True, help="Processes that read images."
)
teacher_weights_option = click.option(
    "--teacher-weights", type=FILE, help="The teacher's weights (safetensors), instead of a download."
)


def read_size(context: click.Context, parameter: click.Parameter, value: Value) -> Size | None:
    """Read `224` or `224x308` (height x width)."""
    return None if value is None else _size(value)


def read_sizes(context: click.Context, parameter: click.Parameter, value: Value) -> tuple[Size, ...] | None:
    """Read several sizes with commas between them."""
    return None if value is None else tuple(_size(part) for part in value.split(","))


def read_numbers(context: click.Context, parameter: click.Parameter, value: Value) -> tuple[float, ...] | None:
    """Read numbers with commas between them."""
    if value is None:
        return None
    try:
        numbers = tuple(float(part) for part in value.split(","))
    except ValueError:
        numbers = (math.nan,)
    if not all(map(math.isfinite, numbers)):
        raise click.BadParameter(f"{value!r}: expected numbers such as 0.5 or 0.485,0.456,0.406")
    return numbers


def read_shape(context: click.Context, parameter: click.Parameter, value: Value) -> Shape | None:
    """Read `8,3,224,224`: images, channels, height, width."""
    if value is None:
        return None
    parts = [part.strip() for part in value.split(",")]
    if len(parts) != 4 or not all(part.isdecimal() and int(part) for part in parts):
        raise click.BadParameter(f"{value!r}: expected images, channels, height, width such as 8,3,224,224")
    images, channels, height, width = map(int, parts)
    _check_largest(height, width)
    return images, channels, height, width


def read_stages(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    """Read stages such as `0,1,2`, in ascending order."""
    parts = [part.strip() for part in value.split(",")]
    if not set(parts) <= {"0", "1", "2", "3"}:
        stages = "0 (fit), 1 (align), 2 (recover), 3 (curriculum)"
        raise click.BadParameter(f"{value!r}: expected some of {stages}, such as 0,1,2")
    return tuple(sorted({int(part) for part in parts}))


def _size(text: str) -> Size:
    height, by, width = text.strip().lower().partition("x")
    try:
        size = int(height), int(width if by else height)
    except ValueError:
        size = (0, 0)
    if min(size) < 1:
        raise click.BadParameter(f"{text!r}: expected pixels such as 224, or height x width such as 224x308")
    _check_largest(*size)
    return size


def _check_largest(height: int, width: int) -> None:
    if max(height, width) > LARGEST:
        raise click.BadParameter(f"{height}x{width}: expected at most {LARGEST} pixels a side")
