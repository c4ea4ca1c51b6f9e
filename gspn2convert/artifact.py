"""The folder that holds a converted model: what timm reads, and where the model came from."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import timm
from timm.models import VisionTransformer

import gspn2convert
from gspn2convert.block import GspnBlock
from gspn2convert.config import read_config
from gspn2convert.errors import UserError, is_disk_full
from gspn2convert.model import Gspn2Vit
from gspn2convert.unfinished import how_to_go_on, is_unfinished
from gspn2convert.vit import GSPN2_VIT, current_arguments, public_cfg
from gspn2convert.weights import WEIGHTS_FILE, check_finite, check_match, folder_weights, read_shapes

_PART = re.compile(r"\..+\.part")  # name of a file on its way

# Of the last stage, in a card: on the test images, and on held-out ones.
_SCORES = ("top1", "agreement", "patch_cosine", "prefix_cosine")
_CARD = """---
library_name: timm
tags:
- image-classification
- gspn2convert
{license}---
# {teacher} as a GSPN-2 Vision Transformer

A copy of the timm model `{teacher}` in which line scans (GSPN-2) have taken the place of attention in
{converted} of {depth} blocks: {layers}.{regions} `recipe.yaml` says how it was made, `metrics.json` what came out.

```python
import gspn2convert, timm  # the import registers gspn2_vit with timm

model = timm.create_model("local-dir:PATH/TO/THIS/FOLDER", pretrained=True).eval()
```

Without `pretrained=True` timm fills the model with random weights and does not say so.
{metrics}"""


def save_student(
    student: Gspn2Vit,
    folder: str | Path,
    *,
    recipe_text: str,
    metrics: dict[str, Any],
    teacher: str,
    teacher_weights: str = "",
) -> None:
    """Save a converted model so that timm can load it.

    The same tensors give the same bytes of model.safetensors.

    Args:
        student: the model; its head, labels and image size are saved as they are now.
        folder: made if it is not there; files of an earlier save are replaced one by one.
        recipe_text: YAML of the recipe.
        metrics: fit for JSON.
        teacher: name of the teacher; of a path only the last part is kept.
        teacher_weights: `origin` of the teacher, by which `distill --student` knows it again; "" leaves it out.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    folder = Path(folder)
    config = _config(student, public_name(teacher), teacher_weights)
    tensors = {name: value.detach().cpu().contiguous() for name, value in student.state_dict().items()}
    make_folder(folder)
    write_atomic(folder / WEIGHTS_FILE, safetensors.torch.save(tensors, metadata={"format": "pt"}))
    write_atomic(folder / "recipe.yaml", recipe_text.encode())
    write_atomic(folder / "metrics.json", _json(metrics))
    write_atomic(folder / "README.md", _card(config, metrics).encode())
    # Last, for timm takes a folder with a config.json for a whole one.
    write_atomic(folder / "config.json", _json(config))


def public_name(name: str) -> str:
    """A name for files that travel: the last part of a path says enough, and nothing of the machine."""
    kind, _, place = name.partition(":")
    if Path(place).is_absolute():  # of a teacher local-dir:, of data torch/NAME: and the like
        return Path(place).name if kind == "local-dir" else f"{kind}:{Path(place).name}"
    return Path(name).name if Path(name).is_absolute() else name


def _config(student: Gspn2Vit, teacher: str, teacher_weights: str) -> dict[str, Any]:
    """What timm reads to rebuild the model; it passes over the block named gspn2."""
    cfg = public_cfg(student)
    layers = [i for i, block in enumerate(student.blocks) if isinstance(block, GspnBlock)]
    labels: dict[str, Any] = {key: cfg.pop(key) for key in ("label_names", "label_descriptions") if key in cfg}
    return {
        "architecture": GSPN2_VIT,
        "num_classes": student.num_classes,
        "num_features": student.num_features,
        "global_pool": student.global_pool,
        **labels,
        "model_args": current_arguments(student),
        "pretrained_cfg": cfg,
        "gspn2": {
            "version": gspn2convert.__version__,
            "teacher": teacher,
            **({"teacher_weights": teacher_weights} if teacher_weights else {}),
            "layers": layers,
            "depth": len(student.blocks),
        },
    }


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _card(config: dict[str, Any], metrics: dict[str, Any]) -> str:
    """Model card for people and for the Hugging Face hub."""
    gspn2 = config["gspn2"]
    numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float | str)}
    last = (metrics.get("stages") or [{}])[-1]
    numbers |= {f"student_{name}": last[name] for name in _SCORES if last.get(name) is not None}
    rows = [
        f"| {name} | {value:.4g} |" if isinstance(value, float) else f"| {name} | {value} |"
        for name, value in numbers.items()
    ]
    license_name = config["pretrained_cfg"].get("license")
    regions = config["model_args"]["mixer"].get("regions", 0)
    return _CARD.format(
        license=f"license: {license_name}\n" if license_name else "",
        teacher=gspn2["teacher"],
        converted=len(gspn2["layers"]),
        depth=gspn2["depth"],
        layers=", ".join(map(str, gspn2["layers"])) or "none",
        regions=f" Their patches also attend to the means of {regions} x {regions} parts of the image."
        if regions
        else "",
        metrics="\n".join(["", "| metric | value |", "|---|---|", *rows, ""]) if rows else "",
    )


def load(folder: str | Path, **kwargs: Any) -> Gspn2Vit:
    """Load a converted model: `timm.create_model("local-dir:FOLDER", pretrained=True)`, checked and in eval mode.

    Args:
        folder: that `save_student` or `gspn2convert distill` wrote.
        kwargs: for timm, such as `num_classes`, `img_size`, `in_chans`, `features_only` and `out_indices`.

    Returns:
        The model; with `features_only`, timm's feature getter around it.

    Raises:
        UserError: the folder is unfinished, incomplete, damaged or holds another kind of model.
    """
    folder = Path(folder)
    if is_unfinished(folder):
        raise UserError(how_to_go_on(folder))
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json; give a folder that gspn2convert distill wrote")
    cfg, architecture, arguments = read_config(folder)
    if architecture != GSPN2_VIT:
        raise UserError(f"{folder} holds a {architecture}, which is not converted; run gspn2convert distill on it")
    weights = folder_weights(folder)
    try:
        if arguments.get("base", "") is None:
            raise TypeError("base is null")  # timm would take the default
        saved = timm.create_model(GSPN2_VIT, pretrained_cfg=cfg, **arguments, device="meta")
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        raise UserError(f"{folder / 'config.json'} describes no model ({reason}); convert the teacher again") from error
    check_match(weights, read_shapes(weights), {name: tuple(v.shape) for name, v in saved.state_dict().items()})
    if cfg.get("num_classes", saved.num_classes) != saved.num_classes:
        raise UserError(f"{folder / 'config.json'} has two numbers of classes; convert the teacher again")
    model = cast(Gspn2Vit, timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs).eval())
    check_finite(weights, model)
    return model


def fingerprint(model: VisionTransformer, *, without: str = "") -> str:
    """SHA-256 of a model's weights in float32, in hexadecimal; those named `without` are left out."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if name != without:
            digest.update(value.float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def origin(teacher: VisionTransformer) -> str:
    """Fingerprint by which a teacher is known again, whatever it is called and at whatever image size it is loaded."""
    return fingerprint(teacher, without="pos_embed")


def check_output_folder(path: str | Path, resume: bool) -> None:
    """Make sure that writing to a folder destroys nothing.

    Raises:
        UserError: it or a folder above it is a file, or it holds something and the run is not to be resumed.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"the output {path} is a file; name a folder that does not exist yet")
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise UserError(f"the output folder {path} cannot be made: {there} is no folder that can be written to")
    if not resume and holds_files(path):
        raise UserError(f"the output folder {path} is not empty; name another, or go on with a stopped run by --resume")


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, unless they are there.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}; choose another") from error


def holds_files(folder: Path) -> bool:
    """Whether there is a folder with anything in it but what a write that was killed has left."""
    return folder.is_dir() and any(not _PART.fullmatch(entry.name) for entry in folder.iterdir())


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write a file so that it is there as a whole or not at all, whatever happens meanwhile.

    Raises:
        UserError: the disk is full or the folder cannot be written; what was at `path` is still there.
    """
    path = Path(path)
    # In the same folder, for a rename is atomic within one file system; one name, so that leftovers do not pile up.
    part = path.with_name(f".{path.name}.part")
    try:
        try:
            with part.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
    except OSError as error:
        if is_disk_full(error):
            raise UserError(
                f"disk full: {path} of {len(data) / 2**20:.1f} MiB could not be written; make room, and run it again"
            ) from error
        raise UserError(f"cannot write {path}: {error.strerror}; check the folder and its permissions") from error


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power failure; Windows has no such call."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
