"""What the line scan is timed on: inputs in the memory layouts of a network, and the bytes that a pass must move.

Shapes: B batch, H W grid, C channels, G = 1 group.
"""

from typing import Any, NamedTuple

import torch
from conditions import DTYPES
from torch import Tensor

Shape = tuple[int, int, int, int]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]

LAYOUTS = ("contiguous", "packed", "planar")
# 16-bit inputs keep the states for the backward in 2 bytes up to so many lines, everything else in 4.
SHORT_STATES = 256


class Case(NamedTuple):
    """A shape (B, H, W, C) with the name of a dtype and a layout.

    Layouts: "packed", lam, u and logits are views of one tensor, as one projection would make them; "contiguous",
    each by itself, as a mixer makes them; "planar", each by itself with the directions outermost.
    """

    shape: Shape
    dtype: str
    layout: str = "contiguous"

    @property
    def lines(self) -> int:
        """Lines of the longer pair of scans."""
        return max(self.shape[1:3])

    def label(self) -> str:
        """Name the case in a table."""
        return f"{'x'.join(map(str, self.shape))} {self.dtype} {self.layout}"


def draw(case: Case, device: torch.device) -> Inputs:
    """Draw x, lam, logits and u, the same on every call. x has a mean, which shows errors of a common mode."""
    generator = torch.Generator(device).manual_seed(0)
    *grid, channels = case.shape
    options: dict[str, Any] = {"generator": generator, "dtype": DTYPES[case.dtype], "device": device}
    x = torch.randn(case.shape, **options) + 0.5
    # Every three logits have room for a fourth: kernels read four at once.
    widths = (channels, channels, 4)
    if case.layout == "packed":
        parts = torch.randn(*grid, 4 * sum(widths), **options).split([4 * width for width in widths], -1)
        lam, u, logits = (part.unflatten(-1, (4, -1)) for part in parts)
    elif case.layout == "planar":
        lam, u, logits = (torch.randn(4, *grid, width, **options).movedim(0, 3) for width in widths)
    else:
        lam, u, logits = (torch.randn(*grid, 4, width, **options) for width in widths)
    return x, lam.sigmoid_(), logits.unsqueeze(-2)[..., :3], u


def draw_dy(case: Case, device: torch.device) -> Tensor:
    """Draw the gradient of the result (B, H, W, 4, C), contiguous as that of a linear layer."""
    generator = torch.Generator(device).manual_seed(1)
    *grid, channels = case.shape
    return torch.randn(*grid, 4, channels, generator=generator, dtype=DTYPES[case.dtype], device=device) + 0.5


def bytes_moved(case: Case, name: str) -> int:
    """Count every input read once and every output written once, per pass.

    Infer: x C, lam, u and y 4C numbers each, and four logits (three and their padding) a direction. Train: the states
    too. Backward: the inputs, dy and the states, the gradients of lam and u, a share of that of x for each direction,
    and the sums behind those of the logits, four in fp32 a direction: what the targets were set by, and what a backward
    of one pass writes. With every output written once it would be 3 C numbers and 40 bytes (bf16) less, a tenth.
    """
    batch, height, width, channels = case.shape
    itemsize = DTYPES[case.dtype].itemsize
    states = 4 * channels * (2 if itemsize == 2 and case.lines <= SHORT_STATES else 4)
    infer = (13 * channels + 16) * itemsize
    backward = (25 * channels + 16) * itemsize + states + 64
    train = infer + states
    per_pixel = {"infer": infer, "train": train, "backward": backward, "forward+backward": train + backward}
    return batch * height * width * per_pixel[name]
