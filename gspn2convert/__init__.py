"""Turn a pretrained Vision Transformer into one that mixes tokens with GSPN-2 line scans.

The import registers `gspn2_vit` with timm, so that converted folders load by
`timm.create_model("local-dir:FOLDER", pretrained=True)`.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gspn2convert.artifact import load as load
    from gspn2convert.artifact import save_student as save_student
    from gspn2convert.convert import convert as convert
    from gspn2convert.distill import distill as distill
    from gspn2convert.errors import UserError as UserError
    from gspn2convert.mixer import Gspn2Mixer as Gspn2Mixer
    from gspn2convert.model import Gspn2Vit as Gspn2Vit
    from gspn2convert.recipe import Recipe as Recipe
    from gspn2convert.recipe import load_recipe as load_recipe
    from gspn2convert.session import onnx_session as onnx_session
    from gspn2convert.teachers import load_teacher as load_teacher

__version__ = "0.1.0"

_HOMES = {
    "Gspn2Mixer": "mixer",
    "Gspn2Vit": "model",
    "Recipe": "recipe",
    "UserError": "errors",
    "convert": "convert",
    "distill": "distill",
    "load": "artifact",
    "load_recipe": "recipe",
    "load_teacher": "teachers",
    "onnx_session": "session",
    "save_student": "artifact",
}

__all__ = [
    "Gspn2Mixer",
    "Gspn2Vit",
    "Recipe",
    "UserError",
    "__version__",
    "convert",
    "distill",
    "load",
    "load_recipe",
    "load_teacher",
    "onnx_session",
    "save_student",
]


class _Package(ModuleType):
    """Looks names up when they are first used, so that the command line starts without torch."""

    def __getattr__(self, name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

    def __setattr__(self, name: str, value: object) -> None:
        # The import of a submodule binds its name here: `convert` and `distill` stay the functions.
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

# The command line (console script or `python -m gspn2convert`) answers --help at once, and registers when it loads.
_program = Path(sys.argv[0]).stem if sys.argv else ""
if _program != "gspn2convert" and not (_program == "-m" and "gspn2convert" in sys.orig_argv):
    importlib.import_module("gspn2convert.model")
