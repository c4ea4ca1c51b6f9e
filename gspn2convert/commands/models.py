"""Finding the models that a command is about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gspn2convert.errors import SizeError, UserError

if TYPE_CHECKING:
    from timm.models import VisionTransformer

NO_TEACHER = "none"


def is_student(folder: Path) -> bool:
    """Whether a folder holds a converted model."""
    return "gspn2" in _read_json(folder / "config.json")


def metrics_of(folder: Path) -> dict[str, Any]:
    """Return what the conversion measured, empty if the folder does not say."""
    return _read_json(folder / "metrics.json")


def teacher_name(folder: Path) -> str:
    """Return the teacher that a student's folder names.

    Raises:
        UserError: if it names none.
    """
    written = _read_json(folder / "config.json").get("gspn2")
    name = written.get("teacher") if isinstance(written, dict) else None
    if not isinstance(name, str):
        raise UserError(f"{folder}: config.json names no teacher; name one on the command line")
    return name


def load_rival(
    student: VisionTransformer, folder: Path, name: str | None, *, weights: Path | None = None, pretrained: bool = True
) -> VisionTransformer:
    """Load what a student is compared with, at its image size.

    Args:
        student: the converted model.
        folder: where it lies.
        name: teacher as for distill; None for the one that the folder names.
        weights: its weights, instead of a download.
        pretrained: False builds the architecture alone, and downloads nothing.

    Raises:
        UserError: if it cannot be loaded, or has other weights than the one that the folder names.
    """
    from gspn2convert.given import check_origin
    from gspn2convert.teachers import load_teacher

    own = teacher_name(folder) if name is None else name
    size = student.patch_embed.img_size
    try:
        rival = load_teacher(own, weights=weights, img_size=size, pretrained=pretrained)
    except UserError as error:
        if name and isinstance(error, SizeError):
            raise UserError(f"{error} ({name} would have to take images of {folder}'s size)") from error
        hint = f" ({folder} says that it came from this teacher; say on the command line where it is)"
        raise UserError(f"{error}{'' if name else hint}") from error
    if name is None and pretrained:
        check_origin(folder, rival, f"give its own by --teacher-weights, or compare with these by --teacher {own}")
    return rival


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
