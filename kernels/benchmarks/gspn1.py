"""GSPN-1's released CUDA extension as a provider: one direction a call, weights for every channel.

The extension is the work of others (repository NVlabs/GSPN, `ops/gaterecurrent/src`), under a licence for
non-commercial use. It is measured where its user has built it, outside of this repository, and nothing of it is here:
neither its code nor the way to build it.

What is called, all tensors contiguous (B, C, H, W), lines along W from left to right:

    forward(lines, X, B, G1, G2, G3, H)
    backward(lines, H, dH, X, B, G1, G2, G3, dX, dB, dG1, dG2, dG3)

with h[:, w] = B x + G1 h[above, w - 1] + G2 h[same, w - 1] + G3 h[below, w - 1]. `lines` is the length of a scan.
dH is overwritten with the gradient of the state; each timed backward therefore copies it first, one tensor of 13.
A call launches one kernel a line on the default stream, which no CUDA graph captures: the times are by events. Its
outputs are allocated but not cleared, which its own Python wrapper does.
"""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from cases import Case, Inputs
from checks import RIGHT
from conditions import DTYPES
from providers import Passes, Provider, Scan
from timing import Call
from torch import Tensor

from gspn2_kernels import line_scan_ref
from gspn2_kernels.reference import neighbour_weights

# It keeps its state in the dtype of the tensors, and sums in it: in 16 bits the check finds wrong wiring, no more.
TOLERANCES = {"fp32": (2e-6, 3e-5, 3e-5), "fp16": (5e-2, 5e-2, 2e-1), "bf16": (5e-2, 1e-1, 5e-1)}


def gspn1(path: Path) -> Provider:
    """Load the extension from its .so file, or from a folder that holds it under its own name."""
    if path.is_dir():
        path = next(iter(sorted(path.rglob("gaterecurrent*.so"))), path)
    spec = importlib.util.spec_from_file_location(path.name.partition(".")[0], path)
    if spec is None or spec.loader is None or not path.is_file():
        raise SystemExit(f"--gspn1 {path}: expected the built extension, a .so file, or its folder")
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    return provider(extension)


def provider(extension: ModuleType) -> Provider:
    """Make a provider of the loaded extension."""

    class Right(torch.autograd.Function):
        """One scan to the right, of tensors (B, C, H, W)."""

        @staticmethod
        def forward(ctx: Any, *tensors: Tensor) -> Tensor:  # noqa: ANN401
            h = torch.zeros_like(tensors[0])
            extension.forward(h.shape[3], *tensors, h)
            ctx.save_for_backward(h, *tensors)
            return h

        @staticmethod
        def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, ...]:  # noqa: ANN401
            h, *tensors = ctx.saved_tensors
            # A copy in any case, for it is overwritten.
            dh = dh.clone(memory_format=torch.contiguous_format)
            gradients = tuple(torch.zeros_like(t) for t in tensors)
            extension.backward(h.shape[3], h, dh, *tensors, *gradients)
            return gradients

    def scan(x: Tensor, lam: Tensor, logits: Tensor, u: Tensor) -> Tensor:
        return Right.apply(*_tensors(x, lam, logits)).permute(0, 2, 3, 1)

    def passes(_: Scan, inputs: Inputs, dy: Tensor) -> Passes:
        return _passes(extension, _tensors(*inputs[:3]), dy)

    options: dict[str, Any] = {"directions": 1, "capture": False, "repeatable": False}
    return Provider("gspn1", scan, passes, truth=_truth, tolerances=TOLERANCES, work=_work, **options)


def _passes(extension: ModuleType, tensors: tuple[Tensor, ...], dy: Tensor) -> Passes:
    lines = tensors[0].shape[3]

    def infer() -> Tensor:
        h = torch.empty_like(tensors[0])
        extension.forward(lines, *tensors, h)
        return h

    def backward() -> Call:
        h, dh = infer(), _planes(dy[..., RIGHT, :])

        def call() -> tuple[Tensor, ...]:
            gradients = tuple(torch.empty_like(t) for t in tensors)
            extension.backward(lines, h, dh.clone(), *tensors, *gradients)
            return gradients

        return call

    return {"infer": lambda: infer, "train": lambda: infer, "backward": backward}


def _tensors(x: Tensor, lam: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
    """Make X, B, G1, G2 and G3 of the inputs of a line scan."""
    state = torch.float64 if logits.dtype == torch.float64 else torch.float32
    # Weights know the ends of a line, so the positions, here H, come before the groups.
    weights = neighbour_weights(logits[..., RIGHT, :, :].to(state).transpose(1, 2)).transpose(1, 2)
    weights = weights.repeat_interleave(x.shape[-1] // weights.shape[-2], -2).to(x.dtype)
    return _planes(x), _planes(lam[..., RIGHT, :]), *(_planes(weight) for weight in weights.unbind(-1))


def _planes(t: Tensor) -> Tensor:
    """Turn (B, H, W, C) into contiguous (B, C, H, W)."""
    return t.permute(0, 3, 1, 2).contiguous()


def _truth(x: Tensor, lam: Tensor, logits: Tensor, u: Tensor) -> Tensor:
    return line_scan_ref(x, lam, logits, torch.ones_like(u))[..., RIGHT, :]


def _work(case: Case, name: str) -> dict[str, int]:
    """Bytes of one direction, without gate: of the shared weights' definition, and of its own tensors, as `own_bytes`.

    Shared: x, lam, h and four logits; backward also dh, dx, dlam, and four sums in fp32. Own: X, B, G1, G2, G3 and H;
    backward H, dH and the five, and the gradients of the five.
    """
    batch, height, width, channels = case.shape
    pixels, itemsize = batch * height * width, DTYPES[case.dtype].itemsize
    if name == "backward":
        shared, own = (6 * channels + 4) * itemsize + 16, 12 * channels * itemsize
    else:
        shared, own = (3 * channels + 4) * itemsize, 6 * channels * itemsize
    return {"bytes": pixels * shared, "own_bytes": pixels * own}
