"""ONNX Runtime's execution providers, and the settings under which converted models run best on them."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from typing import Any

from gspn2convert.errors import UserError

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"

_SUFFIX = "ExecutionProvider"
_NHWC_SINCE = (1, 20)


def pick_providers(available: Sequence[str], asked: str | Sequence[str] | None) -> list[str]:
    """Turn short names, or one, into those of ONNX Runtime, or choose where nothing is asked for.

    Raises:
        UserError: this ONNX Runtime has no provider of a name, or the list is empty.
    """
    if asked is None:
        return [CUDA, CPU] if CUDA in available and has_cuda_device() else [CPU]
    short = {name.removesuffix(_SUFFIX).lower(): name for name in available}
    picked = []
    for name in [asked] if isinstance(asked, str) else asked:
        key = name.removesuffix(_SUFFIX).lower()
        if key not in short:
            hint = "; for CUDA install onnxruntime-gpu in place of onnxruntime" if key == "cuda" else ""
            raise UserError(f"provider {name!r}: this ONNX Runtime has {', '.join(sorted(short))}{hint}")
        picked.append(short[key])
    if not picked:
        raise UserError(f"no provider given; this ONNX Runtime has {', '.join(sorted(short))}")
    return picked


def has_cuda_device() -> bool:
    """Ask the driver, for PyTorch may be a build without CUDA."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def settings(providers: Sequence[str], version: str, *, static: bool) -> dict[str, Any]:
    """What an `InferenceSession` is best made with, as its keyword arguments.

    For CUDA, timed by hand on an H100 with a converted ViT-B at 1024 px: with channels-last convolutions it took 15
    instead of 16 ms, and 12 where a Gemm does not add the biases, which it would first copy to every row. A stopwatch's
    choice of convolutions, made again for each size of images, was no faster than the rule of thumb.

    Where CUDA does not start, ONNX Runtime runs on the CPU and keeps its part of these settings. The session's
    `get_providers()` tells; `onnx_session` then makes another for the CPU.

    Args:
        providers: ONNX Runtime's own names.
        version: of ONNX Runtime.
        static: the file takes inputs of one shape. Others compute shapes, which ONNX Runtime leaves on the CPU unless
            it changes layouts: then each of them is a copy that the CPU waits for.
    """
    if CUDA not in providers:
        return {"providers": list(providers)}
    options = {"cudnn_conv_algo_search": "HEURISTIC"}
    if static and tuple(map(int, version.split(".")[:2])) >= _NHWC_SINCE:
        options["prefer_nhwc"] = "1"
    chosen = [(name, options) if name == CUDA else name for name in providers]
    return {"providers": chosen, "disabled_optimizers": ["MatMulAddFusion"]}
