"""Weights files, fetched and looked at before anything loads them. Only safetensors are read: a pickle can run code."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn

from gspn2convert.errors import UserError

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "model.safetensors"

# A zip archive (torch.save, numpy.savez) or the protocol byte that opens a bare pickle.
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_PICKLE_SUFFIXES = {".bin", ".ckpt", ".npz", ".pickle", ".pkl", ".pt", ".pth", ".tar"}
_CONVERT = "convert it where you trust it: safetensors.torch.save_file(state_dict, 'weights.safetensors')"


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a safetensors file; the tensors are not read.

    Raises:
        UserError: there is no such file, it is a pickle, or it is truncated or no safetensors file at all.
    """
    if not path.is_file():
        raise UserError(f"no weights file at {path}; expected a .safetensors file")
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if start.startswith(_PICKLES) or path.suffix.lower() in _PICKLE_SUFFIXES:
        raise UserError(f"{path} is a pickled checkpoint, which can run code and is never loaded; {_CONVERT}")
    if path.suffix != ".safetensors":
        raise UserError(f"{path} is no .safetensors file; give one, or rename it if that is what it holds")
    try:
        with safe_open(path, framework="pt") as weights:
            return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or truncated ({error}); copy or download it again") from error


def check_match(path: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Check names and shapes of a file against those of a model.

    Raises:
        UserError: they differ; up to three differences are named.
    """
    faults = [f"{name} is missing" for name in expected if name not in found]
    faults += [
        f"{name} is {'x'.join(map(str, found[name]))}, expected {'x'.join(map(str, shape))}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    faults += [f"{name} is unknown" for name in found if name not in expected]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UserError(f"{path} holds weights of another model: {', '.join(faults[:3])}{more}; give matching weights")


def check_finite(path: str | Path, model: nn.Module) -> None:
    """Check that weights are numbers.

    Raises:
        UserError: one of them is NaN or infinite.
    """
    broken = [name for name, value in model.named_parameters() if not torch.isfinite(value).all()]
    if broken:
        raise UserError(f"{broken[0]} in {path} holds NaN or infinity; copy or download the file again")


def folder_weights(folder: Path) -> Path:
    """The weights file of a saved model.

    Raises:
        UserError: there is none, or a pickled one alone.
    """
    path = folder / WEIGHTS_FILE
    if path.is_file():
        return path
    pickled = sorted(item.name for item in folder.iterdir() if item.suffix in _PICKLE_SUFFIXES)
    if pickled:
        raise UserError(f"{folder} has {pickled[0]}, a pickle that is never loaded, but no {WEIGHTS_FILE}; {_CONVERT}")
    raise UserError(f"{folder} has no {WEIGHTS_FILE}; give a folder that holds one")


def hub_file(repository: str, filename: str) -> Path:
    """Path of a file of the Hugging Face hub, from the local cache or the network.

    Args:
        repository: OWNER/NAME, with @REVISION if one is wanted.
        filename: in the repository.

    Raises:
        UserError: it cannot be had.
    """
    name, _, revision = repository.partition("@")
    fill = f"fill the cache where there is a network: hf download {name} config.json {WEIGHTS_FILE}"
    try:
        return Path(hf_hub_download(name, filename, revision=revision or None))
    except LocalEntryNotFoundError as error:
        logger.debug("%s of %s is not to be had", filename, name, exc_info=True)
        raise UserError(
            f"no network, and {filename} of {name} is not in the cache; give --teacher-weights FILE, or {fill}"
        ) from error
    except EntryNotFoundError as error:
        raise UserError(f"{name} on the hub has no {filename}, and pickles are never loaded; {_CONVERT}") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{name} is not on the hub, or asks for a login; check the name, or log in with: hf auth login"
        ) from error
    except Exception as error:  # the client's errors have no common base: its own, those of two HTTP libraries, OSError
        logger.debug("downloading %s of %s failed", filename, name, exc_info=True)
        raise UserError(
            f"cannot download {filename} of {name} ({type(error).__name__}); give --teacher-weights FILE, or {fill}"
        ) from error
