"""The weights that a scan reads, against those of the reference in fp64: in the interpreter, or on a GPU.

Shapes: B batch, H W grid, G groups.
"""

import pytest
import torch

from gspn2_kernels.testing import assert_close
from helpers.weights import outer_weights

pytest.importorskip("triton")
kernels = pytest.importorskip("gspn2_kernels.triton_weights")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "segment"),
    [((2, 1, 1, 1), 0), ((1, 17, 9, 3), 7), ((2, 3, 33, 1), 1), ((1, 16, 16, 2), 5), ((1, 5, 2, 4), 0)],
    ids=str,
)
def test_weights_are_the_references(shape: tuple[int, ...], segment: int, dtype: torch.dtype) -> None:
    """Line after line, of logits that are cut out of wider pixels; the first line of a scan has none."""
    batch, height, width, groups = shape
    generator = torch.Generator().manual_seed(0)
    wide = 3 * torch.randn(batch, height, width, 4, groups + 1, 4, generator=generator, dtype=torch.float64)
    logits = wide.to(DEVICE, dtype)[..., 1:, :3]
    actual = kernels.line_weights(logits, segment)
    assert actual.is_contiguous()
    assert_close("weights", outer_weights(logits.double(), segment), actual, 2e-6)


@pytest.mark.parametrize("level", [-300.0, -30.0, 300.0])
def test_weights_of_extreme_logits_add_up(level: float) -> None:
    """Where all sigmoids are 0 or 1 in fp32 the weights are still those of the reference."""
    logits = torch.tensor([-1.0, 0.5, 1.0, 0.0], device=DEVICE).expand(1, 3, 4, 4, 1, 4) + level
    logits = logits.contiguous()[..., :3]
    expected = outer_weights(logits.double(), 0)
    assert expected.sum() > 0
    assert_close("weights", expected, kernels.line_weights(logits, 0), 1e-5)
