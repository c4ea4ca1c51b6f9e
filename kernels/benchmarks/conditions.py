"""Where, when and with what a benchmark ran, as its JSON says it; and the JSON itself."""

import argparse
import datetime
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
from timing import copy_bandwidth

DEVICES = ("cpu", "cuda")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def set_up(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> torch.device:
    """Apply the options; returns the device."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA device")
    return torch.device(arguments.device)


def conditions(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """Describe the device and the versions, and measure the copy bandwidth that shares of a floor refer to."""
    on_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_cuda else _processor(),
        "copy_gb_per_s": round(copy_bandwidth(device) / 1e9, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "timm": _version("timm"),
        "python": platform.python_version(),
        "cuda": torch.version.cuda if on_cuda else None,
        "cudnn": torch.backends.cudnn.version() if on_cuda else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_cuda else None,
        "clocks": "untouched",
        "commit": commit or _output("git", "rev-parse", "--short", "HEAD"),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "ms": "median, 20 % and 80 % quantiles of a call, warm caches",
    }


def write(path: Path | None, found: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write the JSON of a benchmark, if a file is wanted; as often as wanted, so that a run cut short leaves some."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**found, "rows": rows}, indent=1) + "\n")


def numbers(names: str, example: str) -> Any:  # noqa: ANN401  what argparse takes as a type
    """Make the argparse type of whole numbers joined by x, one for each of the names, which are joined by x too."""

    def parse(text: str) -> tuple[int, ...]:
        parts = text.split("x")
        if len(parts) != len(names.split("x")) or not all(part.isdecimal() and int(part) for part in parts):
            raise argparse.ArgumentTypeError(f"{text!r}: expected {names}, such as {example}")
        return tuple(map(int, parts))

    return parse


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """First line that a program prints, or None where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.partition("\n")[0].strip() or None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
