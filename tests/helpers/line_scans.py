"""Line scans by the Triton kernels, in the interpreter or on a GPU where there is one, and by the reference in fp64."""

import pytest
import torch
from torch import Tensor

from gspn2_kernels import line_scan_ref
from gspn2_kernels.testing import assert_close, random_inputs
from gspn2_kernels.tuning import Plan

pytest.importorskip("triton")
kernels = pytest.importorskip("gspn2_kernels.triton_line_scan")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("y", "dx", "dlam", "dlogits", "du")
# Forward, gradients. The interpreter truncates to bf16 where a GPU rounds: twice the error.
TOLERANCES = {
    torch.float32: (2e-6, 1e-5),
    torch.float16: (1e-3, 4e-3),
    torch.bfloat16: (4e-3, 4e-3) if DEVICE == "cuda" else (8e-3, 8e-3),
}


def run(inputs, dy: Tensor, segment: int, chosen: Plan | None) -> tuple[Tensor, ...]:
    """Return y and the gradients, from memory that is poisoned."""
    y, states = kernels.line_scan_train(*inputs, segment, chosen=chosen)
    return y, *kernels.line_scan_bwd(dy, *inputs, segment, states, chosen=chosen)


def reference(inputs, dy: Tensor, segment: int) -> tuple[Tensor, ...]:
    """Return y and the gradients of the reference in fp64."""
    inputs = [t.detach().double().requires_grad_() for t in inputs]
    y = line_scan_ref(*inputs, segment)
    return (y.detach(), *torch.autograd.grad(y, inputs, dy.double(), materialize_grads=True))


def check(expected, actual, dtype: torch.dtype, *, in_planes: bool = False) -> None:
    """Compare with fp64; all are contiguous, y with the directions outermost if `in_planes`."""
    forward, gradients = TOLERANCES[dtype]
    for name, ref, out in zip(NAMES, expected, actual, strict=True):
        assert out.dtype == dtype
        assert (out.movedim(3, 0) if in_planes and name == "y" else out).is_contiguous()
        assert_close(name, ref, out, forward if name == "y" else gradients)


def draw(shape, groups: int = 1, dtype: torch.dtype = torch.float32, *, packed: bool = False):
    """Draw the inputs of a scan and the gradient of its result."""
    inputs = random_inputs(shape, groups, dtype, DEVICE, packed=packed)
    dy = torch.randn(inputs[1].shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    return inputs, dy
