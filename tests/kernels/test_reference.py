"""The reference against the definition: dense matrices, symmetries and invariants.

Shapes: B batch, H W grid, C channels, G groups; T lines along the scan, M positions in a line.
"""

import math

import pytest
import torch
from torch import Tensor

from gspn2_kernels import line_scan, line_scan_ref
from gspn2_kernels.testing import assert_close, random_inputs

DIRECTIONS = range(4)
both = pytest.mark.parametrize("scan", [line_scan_ref, line_scan], ids=["reference", "op"])


def scan_order(height: int, width: int, direction: int) -> list[list[tuple[int, int]]]:
    """List the lines of a scan, each a list of (row, column)."""
    if direction < 2:
        lines = [[(row, column) for column in range(width)] for row in range(height)]
    else:
        lines = [[(row, column) for row in range(height)] for column in range(width)]
    return lines[::-1] if direction % 2 else lines


def dense_matrix(logits: Tensor, direction: int, segment: int) -> Tensor:
    """Build G of h = G (lam x) for one image and group, scalar by scalar: logits (H, W, 4, 3) to (H W, H W)."""
    height, width = logits.shape[:2]
    matrix = torch.eye(height * width, dtype=torch.float64)
    previous: list[tuple[int, int]] = []
    for i, line in enumerate(scan_order(height, width, direction)):
        if i % segment if segment else i:
            for j, (row, column) in enumerate(line):
                sigmoids = {
                    j + k - 1: 1 / (1 + math.exp(-logits[row, column, direction, k].item()))
                    for k in range(3)
                    if 0 <= j + k - 1 < len(line)
                }
                for neighbour, sigmoid in sigmoids.items():
                    source = previous[neighbour][0] * width + previous[neighbour][1]
                    matrix[row * width + column] += sigmoid / sum(sigmoids.values()) * matrix[source]
        previous = line
    return matrix


@pytest.mark.parametrize("segment", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("shape", [(4, 5), (1, 4), (3, 1)], ids=str)
def test_reference_is_the_dense_form(shape: tuple[int, int], segment: int) -> None:
    x, lam, logits, u = random_inputs((2, *shape, 6), groups=2, dtype=torch.float64)
    y = line_scan_ref(x, lam, logits, u, segment)
    for image in range(2):
        for direction in DIRECTIONS:
            for group in range(2):
                channels = slice(3 * group, 3 * group + 3)
                dense = dense_matrix(logits[image, :, :, :, group], direction, segment)
                value = (lam[image, :, :, direction, channels] * x[image, ..., channels]).flatten(0, 1)
                expected = u[image, :, :, direction, channels] * (dense @ value).view(*shape, 3)
                assert_close(f"y {image} {direction} {group}", expected, y[image, :, :, direction, channels], 1e-14)


@pytest.mark.parametrize("argument", [0, 1, 2, 3], ids=["x", "lam", "logits", "u"])
@pytest.mark.parametrize(("shape", "groups", "segment"), [((1, 3, 3, 2), 1, 0), ((1, 3, 2, 4), 2, 2)], ids=str)
@both
def test_gradcheck(scan, shape: tuple[int, int, int, int], groups: int, segment: int, argument: int) -> None:
    inputs = list(random_inputs(shape, groups, torch.float64))

    def of_one(value: Tensor) -> Tensor:
        return scan(*inputs[:argument], value, *inputs[argument + 1 :], segment)

    assert torch.autograd.gradcheck(of_one, inputs[argument].requires_grad_())


def transform_inputs(inputs: tuple[Tensor, ...], transpose: bool, flip_rows: bool, flip_columns: bool):
    """Move the image by one symmetry of the square, and with it the directions and the order of the neighbours."""
    x, lam, logits, u = inputs
    order = [0, 1, 2, 3]
    if transpose:
        x, lam, logits, u = (t.transpose(1, 2) for t in (x, lam, logits, u))
        order = [2, 3, 0, 1]
    lam, logits, u = (t[:, :, :, order] for t in (lam, logits, u))
    for flipped, axis, along, across in ((flip_rows, 1, [0, 1], [2, 3]), (flip_columns, 2, [2, 3], [0, 1])):
        if flipped:
            x, lam, logits, u = (t.flip(axis) for t in (x, lam, logits, u))
            swapped = [1, 0, 2, 3] if along == [0, 1] else [0, 1, 3, 2]
            lam, logits, u = (t[:, :, :, swapped] for t in (lam, logits, u))
            logits[:, :, :, across] = logits[:, :, :, across].flip(-1)
    return x, lam, logits, u


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("flip_rows", [False, True])
@pytest.mark.parametrize("flip_columns", [False, True])
@both
def test_symmetries_of_the_square(scan, transpose: bool, flip_rows: bool, flip_columns: bool) -> None:
    inputs = random_inputs((1, 4, 6, 2), dtype=torch.float64)
    moved = transform_inputs(inputs, transpose, flip_rows, flip_columns)
    # y moves as u does.
    expected = transform_inputs((inputs[0], inputs[1], inputs[2], scan(*inputs)), transpose, flip_rows, flip_columns)
    assert_close("y", expected[3], scan(*moved), 1e-14)


def lines_of(y: Tensor, direction: int) -> Tensor:
    """Bring one direction of (B, H, W, 4, C) into scan order (T, B, M, C)."""
    lines = y[:, :, :, direction].movedim(1 if direction < 2 else 2, 0)
    return lines.flip(0) if direction % 2 else lines


@both
def test_equal_weights_keep_the_total(scan) -> None:
    """Equal logits walk at random over the existing neighbours, which keeps the total weighted by their number."""
    x, lam, logits, u = random_inputs((2, 5, 6, 3), dtype=torch.float64)
    y = scan(x, torch.ones_like(lam), torch.full_like(logits, 0.7), torch.ones_like(u))
    for direction in DIRECTIONS:
        state, value = lines_of(y, direction), lines_of(x.unsqueeze(3).expand_as(lam), direction)
        neighbours = torch.full((state.shape[2], 1), 3.0, dtype=torch.float64)
        neighbours[0], neighbours[-1] = 2, 2
        total = (neighbours * value).sum(2).cumsum(0)
        assert_close(f"total {direction}", total, (neighbours * state).sum(2), 1e-14)


@both
def test_weights_of_a_position_sum_to_one(scan) -> None:
    """A constant input grows by itself on every line, whatever the logits are."""
    x, lam, logits, u = random_inputs((2, 5, 6, 4), groups=2, dtype=torch.float64)
    y = scan(torch.ones_like(x), torch.ones_like(lam), 5 * logits, torch.ones_like(u))
    for direction in DIRECTIONS:
        state = lines_of(y, direction)
        steps = torch.arange(1, len(state) + 1, dtype=torch.float64)
        assert_close(f"y {direction}", steps.view(-1, 1, 1, 1).expand_as(state), state, 1e-14)


@both
def test_middle_neighbour_alone_is_a_cumulative_sum(scan) -> None:
    x, lam, logits, u = random_inputs((2, 5, 6, 3), dtype=torch.float64)
    logits = torch.full_like(logits, -60.0)
    logits[..., 1] = 60.0
    y = scan(x, lam, logits, torch.ones_like(u))
    for direction in DIRECTIONS:
        total = lines_of(lam * x.unsqueeze(3), direction).cumsum(0)
        assert_close(f"y {direction}", total, lines_of(y, direction), 1e-14)


@both
def test_state_grows_at_most_linearly(scan) -> None:
    """The Stability-Context Condition of GSPN: |h| <= T L X."""
    x, lam, logits, u = random_inputs((2, 40, 3, 3), dtype=torch.float64)
    y = scan(x, lam, 20 * logits, torch.ones_like(u))
    bound = lam.max() * x.abs().max()
    for direction in DIRECTIONS:
        state = lines_of(y, direction).abs()
        lines = torch.arange(1, len(state) + 1, dtype=torch.float64)
        assert (state.amax((1, 2, 3)) <= lines * bound).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@both
def test_weights_survive_sigmoids_that_underflow(scan, dtype: torch.dtype) -> None:
    """Where every sigmoid of a position is 0 in fp32, the weights still have their limit, the softmax."""
    x, lam, logits, u = random_inputs((1, 3, 4, 2), dtype=dtype)
    logits = (logits - 3000).requires_grad_()
    y = scan(x, lam, logits, u)
    (dlogits,) = torch.autograd.grad(y.sum(), logits)
    limit = logits.detach().double() + 2990  # sigmoids near 4e-5: within 1e-4 of the limit, far from underflow
    assert_close("y", line_scan_ref(x.double(), lam.double(), limit, u.double()), y, 1e-3)
    assert dlogits.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 3, 4, 2), (2, 0, 4, 2), (2, 3, 0, 2)], ids=str)
@both
def test_empty_grids(scan, shape: tuple[int, int, int, int]) -> None:
    inputs = [t.requires_grad_() for t in random_inputs(shape)]
    y = scan(*inputs)
    assert y.shape == inputs[1].shape
    y.sum().backward()
    assert all(t.grad is None or t.grad.shape == t.shape for t in inputs)
