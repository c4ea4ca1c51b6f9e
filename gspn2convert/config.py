"""The config.json of a saved model, looked at before anything is made of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from timm.data.transforms import str_to_pil_interp
from timm.models._hub import load_model_config_from_path

from gspn2convert.errors import UserError

_CROPS = ("center", "squash", "border")


def read_config(folder: Path) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Read the config.json of a folder as timm does.

    Args:
        folder: with a config.json that timm, the Hugging Face hub or `save_student` wrote.

    Returns:
        timm's pretrained_cfg, the name of the architecture, and the arguments that it was built with.

    Raises:
        UserError: the file cannot be read, or is no config of a timm model; the message names what is wrong in it.
    """
    path = folder / "config.json"
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; check its permissions") from error
    except (ValueError, RecursionError) as error:
        raise _unfit(path, f"no JSON: {error}") from error
    if not isinstance(found, dict):
        raise _unfit(path, "it holds no JSON object")
    if not isinstance(found.get("architecture"), str):
        raise _unfit(path, "it names no architecture")
    for name in ("pretrained_cfg", "model_args"):
        if not isinstance(found.get(name, {}), dict):
            raise _unfit(path, f"{name} is no JSON object")
    _check_views(path, found.get("pretrained_cfg", found))
    try:
        return load_model_config_from_path(folder)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise _unfit(path, repr(error)) from error


def _check_views(path: Path, cfg: dict[str, Any]) -> None:
    """Check what decides how images are made ready."""
    for name in ("mean", "std"):
        values = cfg.get(name, [0.5])
        if not (isinstance(values, list) and values and all(map(_is_number, values))):
            raise _unfit(path, f"{name} is {values!r}, expected a list of numbers")
    if not all(value > 0 for value in cfg.get("std", [1])):
        raise _unfit(path, f"std is {cfg['std']!r}, expected numbers above 0")
    crop = cfg.get("crop_pct", 1.0)
    if not (_is_number(crop) and crop > 0):
        raise _unfit(path, f"crop_pct is {crop!r}, expected a number above 0")
    if cfg.get("crop_mode", "center") not in _CROPS:
        raise _unfit(path, f"crop_mode is {cfg['crop_mode']!r}, expected one of {', '.join(_CROPS)}")
    try:
        str_to_pil_interp(cfg.get("interpolation", "bicubic"))
    except (AttributeError, LookupError, TypeError):
        raise _unfit(path, f"interpolation is {cfg['interpolation']!r}, expected a name such as bicubic") from None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _unfit(path: Path, reason: str) -> UserError:
    what = f"it is no config of a timm model ({reason})"
    return UserError(f"{path} cannot be read: {what}; save or convert the model again")
