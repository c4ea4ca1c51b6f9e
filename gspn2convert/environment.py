"""Where a figure was measured: device, versions, commit and date, kept beside every number.

PyTorch is imported inside the functions, so that `doctor` can report on a machine where that fails.
"""

from __future__ import annotations

import datetime
import logging
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from gspn2convert.errors import UserError

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cpu", "cuda")
_PACKAGES = ("gspn2convert", "torch", "triton", "timm", "accelerate", "onnx", "onnxruntime", "onnxruntime-gpu")

_log = logging.getLogger(__name__)


def pick_device(name: str = "auto") -> torch.device:
    """Turn `auto`, `cpu` or `cuda` into a device of this machine.

    Raises:
        UserError: if the name is another one, or `cuda` is asked for and there is none.
    """
    import torch

    if name not in DEVICES:
        raise UserError(f"device {name!r}: expected one of {', '.join(DEVICES)}")
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise UserError("device 'cuda': PyTorch sees no CUDA device; use --device cpu, or see `gspn2convert doctor`")
    device = torch.device("cuda" if has_cuda and name != "cpu" else "cpu")
    _log.info("device: %s (%s)", device.type, device_name(device))
    return device


def device_name(device: torch.device) -> str:
    """Return the name of the processor behind a device, as its maker writes it."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_cpu_name()}, {threads} thread{'s' * (threads != 1)}"


def package_version(package: str) -> str | None:
    """Return the version of an installed distribution, None if it is absent."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment(device: torch.device | None = None) -> dict[str, str]:
    """Describe the device, the versions, the commit of the source tree (if there is one) and the date (UTC)."""
    import torch

    found = {package: package_version(package) for package in _PACKAGES}
    return {
        "device": device_name(device or torch.device("cpu")),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{package: number for package, number in found.items() if number is not None},
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """Return the commit of the source tree, `+changes` if files differ from it, `unknown` outside of one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return "unknown"
    try:
        # Exit code 128 (no commit yet, no permission) and a missing or slow git mean that nothing is known.
        head = _git(root, "rev-parse", "HEAD")
        return head + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()
