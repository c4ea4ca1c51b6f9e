"""The table of constants of the Triton kernels."""

import itertools

import pytest

from gspn2_kernels.tuning import plan


@pytest.mark.parametrize("kernel", ["forward", "train", "planes", "backward"])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("shared", [99 * 1024, 227 * 1024])
def test_table_gives_plans_that_cover_the_shape(itemsize: int, kernel: str, shared: int) -> None:
    """Within the shared memory of a processor of compute capability 8.6 or 8.9, and of an H100."""
    channels, positions = (1, 5, 8, 24, 48, 64, 96, 1152), (1, 14, 37, 74, 81, 147, 161, 256, 300, 512, 1024, 4096)
    for batch, c, m in itertools.product((1, 64), channels, positions):
        for groups in {1, c}:
            chosen = plan(batch, m, 3, c, groups, itemsize, kernel, shared=shared)
            own, lines = -(-m // chosen.GRID), chosen.lines_per_launch(m, 3)
            assert own + (min(2, chosen.GRID - 1) * lines if chosen.GRID > 1 else 0) <= chosen.held
            assert lines >= (8 if chosen.GRID > 1 else m)
            assert c // groups % chosen.BC == 0
            assert chosen.shared(itemsize) <= shared
