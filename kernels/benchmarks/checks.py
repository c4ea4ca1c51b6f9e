"""The gate before the stopwatch: results and gradients agree with the fp64 reference, and two runs give equal bits."""

from typing import Any

import torch
from cases import Case, Inputs
from providers import Provider, Scan
from torch import Tensor

from gspn2_kernels.testing import assert_close, relative_rms

NAMES = ("y", "dx", "dlam", "dlogits", "du")
RIGHT = 2
# Largest image, in numbers (H, W, C), that the reference can take in fp64 with its graph, and the crop of a larger one.
LARGEST = {"cuda": 1 << 24, "cpu": 1 << 21}
CROP = 160
# fp32 alone, beyond CROP lines: the reference itself, in fp32, is 1.5e-5 off the logits' gradients after 1024.
LONG_SCANS = 3e-5

Results = dict[str, Tensor]


def check(who: Provider, case: Case, inputs: Inputs, dy: Tensor) -> dict[str, Any]:
    """Compare the first image's part of a result with the reference, and the whole result with that of a second run.

    The provider runs on the whole batch, for that is what is timed. An image that is too large for fp64 is cropped,
    and then the provider runs on the crop alone.

    Returns:
        `checked`, what was compared, `errors`, relative RMS errors by name, and `deterministic`.

    Raises:
        AssertionError: The provider is wrong, or promised equal bits and did not keep it.
    """
    _, height, width, channels = case.shape
    checked = "first image"
    if height * width * channels > LARGEST[dy.device.type]:
        checked = f"first image, at most {CROP} x {CROP}"
        inputs = tuple(t[:1, :CROP, :CROP] for t in inputs)
        dy = dy[:1, :CROP, :CROP]
        height, width = (min(size, CROP) for size in (height, width))
    found = solve(who.scan, inputs, dy)
    deterministic = all(torch.equal(found[name], again) for name, again in solve(who.scan, inputs, dy).items())
    if who.repeatable and not deterministic:
        raise AssertionError(f"{who.name}, {case.label()}: two runs differ")
    found = {name: t[:1].clone() for name, t in found.items()}
    expected = solve(who.truth, tuple(t[:1].double() for t in inputs), dy[:1].double())
    y, gradients, dlogits = who.tolerances[case.dtype]
    if case.dtype == "fp32" and max(height, width) > CROP:
        dlogits = max(dlogits, LONG_SCANS)
    limits = {"y": y, "dlogits": dlogits}
    for name, ref in expected.items():
        assert_close(f"{who.name}, {case.label()}: {name}", ref, found[name], limits.get(name, gradients))
    errors = {name: float(f"{relative_rms(ref, found[name]):.1e}") for name, ref in expected.items()}
    return {"checked": checked, "errors": errors, "deterministic": deterministic}


def solve(scan: Scan, inputs: Inputs, dy: Tensor) -> Results:
    """Run a scan forward and backward: y and the gradients of x, lam, logits and u, for a scan that has them."""
    inputs = tuple(t.detach().requires_grad_() for t in inputs)
    y = scan(*inputs)
    if y.ndim < dy.ndim:
        dy = dy[..., RIGHT, :]
    gradients = torch.autograd.grad(y, inputs, dy, allow_unused=True)
    return {name: t for name, t in zip(NAMES, (y.detach(), *gradients), strict=True) if t is not None}
