"""Folders in which a conversion stopped before its end: how far it came, and how to go on."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

FILE_NAME = "checkpoint.safetensors"
CACHE = "place where views are made (--cache)"  # a name of what must be the same for a run to be resumed
KEY = "gspn2convert.checkpoint.3"  # the file's one metadata entry; the number changes when the content does


def is_unfinished(folder: Path) -> bool:
    """Whether a folder holds the checkpoint of a conversion, and no model yet."""
    return (folder / FILE_NAME).is_file() and not (folder / "config.json").exists()


def how_to_go_on(folder: Path) -> str:
    """Say in one line that a folder's conversion is not finished, how far it came, and by which command it goes on."""
    record = _record(folder)
    asked = record.get("identity")
    if asked is None:
        return (
            f"{folder} holds no model, and a checkpoint that this version cannot read; restore {folder / FILE_NAME} "
            "from a copy, or remove it and start again"
        )
    words = ["gspn2convert", "distill", "--teacher", asked["teacher"], "--data", asked["data"]]
    if asked["keep"] and not asked["student"]:
        words += ["--keep", asked["keep"]]
    if asked["stages"] != "0,1,2,3":
        words += ["--stages", asked["stages"]]
    if asked["precision"] != "fp32":
        words += ["--precision", asked["precision"]]
    if asked[CACHE] == "device":
        words += ["--cache"]
    command = shlex.join([*words, "--output", str(folder), "--resume"])
    return (
        f"{folder} holds an unfinished conversion (saved up to {_saved_up_to(record)}) and no model yet; if no run is "
        f"at work there, go on with: {command}, and what else the run was started with, such as its recipe"
    )


def what_is_kept(folder: Path) -> str:
    """Say in one line what a run has left in its folder that Ctrl-C ended at once, outside of the steps of a stage."""
    if saved := _saved_up_to(_record(folder)):
        return f"stopped; {folder} is saved up to {saved}; resume to go on (the same command with --resume)"
    if (folder / "config.json").exists():
        return f"stopped, but {folder} holds a finished model"
    return "stopped before anything was saved; the same command begins again"


def _record(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of its run, {} where there is none that can be read."""
    try:
        with safe_open(folder / FILE_NAME, framework="pt") as file:
            record = json.loads((file.metadata() or {}).get(KEY, "{}"))
    except (SafetensorError, OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _saved_up_to(record: dict[str, Any]) -> str:
    """Say up to where a checkpoint goes, such as "step 6 of stage align"; "" where it does not tell."""
    stage = record.get("stage", "")
    point = "the end" if stage in record.get("finished", ()) else f"step {record.get('step', 0)}"
    return f"{point} of stage {stage}" if stage else ""
