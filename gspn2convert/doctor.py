"""What this installation can do, what is missing, and the command that mends it."""

import platform
import sys
from dataclasses import dataclass
from pathlib import Path

from gspn2convert.environment import device_name, package_version

_CUDA = "CUDAExecutionProvider"
_OLDEST = {"torch": (2, 8), "timm": (1, 0, 29)}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        value: what was found.
        ok: nothing to mend.
        remedy: what to do, empty if `ok`.
        required: nothing works without it.
    """

    name: str
    value: str
    ok: bool = True
    remedy: str = ""
    required: bool = False


def report() -> list[Check]:
    """Look at everything once; nothing is changed and the network is not used."""
    checks = [*_python(), *_packages()]
    if package_version("torch") is not None:
        checks += [*_devices(), *_kernels()]
    checks += _onnx()
    return [*checks, _library()] if package_version("torch") is not None else checks


def _python() -> list[Check]:
    ok = sys.version_info >= (3, 10)
    remedy = "" if ok else "install Python 3.10 or newer"
    return [Check(name="python", value=platform.python_version(), ok=ok, remedy=remedy, required=True)]


def _packages() -> list[Check]:
    return [_package(name) for name in ("gspn2convert", "torch", "timm", "accelerate", "safetensors")]


def _package(name: str) -> Check:
    found = package_version(name)
    if found is None:
        return Check(name=name, value="missing", ok=False, remedy=f'pip install "{name}"', required=True)
    oldest = _OLDEST.get(name, ())
    if _numbers(found) < oldest:
        remedy = f'pip install --upgrade "{name}>={".".join(map(str, oldest))}"'
        return Check(name=name, value=found, ok=False, remedy=remedy, required=True)
    return Check(name=name, value=found, required=True)


def _numbers(found: str) -> tuple[int, ...]:
    return tuple(int(part) for part in found.split("+")[0].split(".")[:3] if part.isdigit())


def _devices() -> list[Check]:
    import torch

    checks = [Check(name="cpu", value=device_name(torch.device("cpu")))]
    if torch.cuda.is_available():
        gpus = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        return [*checks, Check(name="cuda", value=f"{gpus}; CUDA {torch.version.cuda}")]
    if Path("/proc/driver/nvidia/version").exists():
        remedy = "install a PyTorch for this driver: https://pytorch.org/get-started/locally"
        return [*checks, Check(name="cuda", value="a driver, but PyTorch sees no GPU", ok=False, remedy=remedy)]
    return [*checks, Check(name="cuda", value="no GPU (none is needed)")]


def _kernels() -> list[Check]:
    import torch

    from gspn2_kernels import backend

    triton = package_version("triton")
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return [
        Check(name="triton", value=triton or "absent (only GPUs use it)"),
        *(Check(name=f"line scan on {device}", value=backend(device)) for device in devices),
    ]


def _onnx() -> list[Check]:
    remedy = 'pip install "gspn2convert[onnx,ort]"'
    missing = [name for name in ("onnx", "onnxscript") if package_version(name) is None]
    found = ", ".join(f"{name} {package_version(name) or 'missing'}" for name in ("onnx", "onnxscript"))
    return [Check(name="onnx export", value=found, ok=not missing, remedy=remedy if missing else ""), _onnxruntime()]


def _onnxruntime() -> Check:
    name = "onnxruntime"
    installed = {package: package_version(package) for package in ("onnxruntime", "onnxruntime-gpu")}
    found = ", ".join(f"{package} {number}" for package, number in installed.items() if number is not None)
    if not found:
        return Check(name=name, value="missing", ok=False, remedy='pip install "gspn2convert[ort]"')
    if None not in installed.values():
        # Both unpack into one folder, and whichever came last wins.
        remedy = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"
        return Check(name=name, value=f"{found}: they overwrite each other", ok=False, remedy=remedy)
    import onnxruntime

    providers = onnxruntime.get_available_providers()
    value = f"{found}; {', '.join(providers)}"
    if installed["onnxruntime-gpu"] is not None and _CUDA not in providers:
        # What an overwritten or half removed installation looks like.
        remedy = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"
        return Check(name=name, value=f"{value}: no CUDA provider", ok=False, remedy=remedy)
    return Check(name=name, value=value)


def _library() -> Check:
    """The library that runs LineScan in ONNX Runtime; a GPU is wasted without it, a CPU does with the file's body."""
    import torch

    from gspn2_kernels.build import has_cuda, is_whole, library_path

    name, path = "LineScan library", library_path()
    wants_cuda = torch.cuda.is_available() and package_version("onnxruntime-gpu") is not None
    build = "gspn2convert build-ops"
    if path is None:
        if wants_cuda:
            return Check(name=name, value="not built", ok=False, remedy=build)
        return Check(name=name, value=f"not built; exported files run without it, faster with it: {build}")
    if not is_whole(path):
        wrong = "no library, or not all of one" if path.exists() else "no such file"
        return Check(name=name, value=f"{path}: {wrong}", ok=False, remedy="unset GSPN2_ORT_LIBRARY")
    if has_cuda(path):
        return Check(name=name, value=f"CPU and CUDA: {path}")
    remedy = f"{build} --cuda" if wants_cuda else ""
    return Check(name=name, value=f"CPU alone: {path}", ok=not wants_cuda, remedy=remedy)
