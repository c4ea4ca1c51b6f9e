"""Which lines of the L2 cache the scans ask to hold, and which they let go: recorded in the interpreter."""

import numpy as np
import pytest
import torch

from gspn2_kernels.tuning import Plan
from helpers.line_scans import DEVICE, NAMES, check, draw, kernels, reference, run

hints = pytest.importorskip("gspn2_kernels.triton_hold")

LINE = 128  # bytes
Hint = tuple[bool, int, int]  # hold or let go, direction, address


@pytest.fixture
def recorded(monkeypatch) -> list[Hint]:
    """What the kernels hint at, in the order of the calls."""
    from triton.runtime.interpreter import interpreter_builder

    found: list[Hint] = []

    def record(asm, p_x, m_hint) -> None:
        there = np.broadcast_to(m_hint.handle.data, p_x.handle.data.shape).astype(bool)
        direction = interpreter_builder.grid_idx[1]
        found.extend((asm is hints._HOLD, direction, int(address)) for address in p_x.handle.data[there])

    monkeypatch.setattr(hints, "_hint", record)
    monkeypatch.setattr(kernels, "takes_hints", lambda device: True)
    return found


def aligned(x: torch.Tensor) -> torch.Tensor:
    """A copy that begins with a line of the cache."""
    room = torch.empty(x.numel() + LINE, dtype=x.dtype)
    first = -room.data_ptr() % LINE // x.element_size()
    return room[first : first + x.numel()].view(x.shape).copy_(x)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU runs the instructions themselves, in the test below")
@pytest.mark.parametrize(
    ("shape", "chosen"),
    [
        pytest.param((1, 9, 9, 64), Plan(1, 1, 8, 8, 3, 3), id="square"),
        pytest.param((2, 4, 9, 128), Plan(1, 1, 8, 8, 3, 2), id="wide, two programs a pixel"),
        pytest.param((1, 13, 6, 64), Plan(1, 2, 8, 8, 3, 3), id="tall, lines in two programs"),
    ],
)
def test_the_first_reader_holds_a_pixel_and_the_last_lets_it_go(recorded: list[Hint], shape, chosen: Plan) -> None:
    (x, *others), _ = draw(shape, dtype=torch.bfloat16)
    x = aligned(x)
    kernels.line_scan_fwd(x, *others, 0, chosen=chosen)
    height, width = shape[1:3]
    lines = {x.data_ptr() + LINE * n: n // (shape[3] // 64) for n in range(x.numel() // 64)}
    # By axis too: where two edges are equally near, scans of both are first.
    held = {(address, direction // 2): direction for hold, direction, address in recorded if hold}
    freed = {(address, direction // 2): direction for hold, direction, address in recorded if not hold}
    assert len(recorded) == len(held) + len(freed), "more than once"
    assert {address for address, _ in freed} <= set(lines), "beyond x"
    reached = set()
    for (address, axis), direction in held.items():
        row, column = lines[address] // width % height, lines[address] % width
        # How far each scan has come when it reads the pixel, as a part of all its lines.
        times = [row / height, (height - 1 - row) / height, column / width, (width - 1 - column) / width]
        assert times[direction] == min(times)
        assert freed[address, axis] == direction ^ 1, "the opposite scan, which is as fast"
        reached.add(address)
    # A scan holds nothing that it reads before its loop begins, and two that meet in the middle do not either.
    rows, columns = (range(chosen.NS - 1, side - chosen.NS + 1) for side in (height, width))
    inner = {a for a, n in lines.items() if n // width % height in rows and n % width in columns}
    middle = {a for a in inner if 2 * (lines[a] // width % height) == height - 1 or 2 * (lines[a] % width) == width - 1}
    assert inner - middle <= reached
    assert inner - middle


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3, 37, 18, 64), (2, 9, 40, 128), (5, 23, 23, 64)], ids=str)
@pytest.mark.parametrize("grid", [1, 2])
def test_hints_to_the_cache_change_no_bit(shape, grid: int) -> None:
    """Pixels that are lines of the cache are held there between the directions; those across two lines are not."""
    inputs, dy = draw(shape, dtype=torch.bfloat16)
    chosen = Plan(4, grid, 8, 8, 4 // grid, 3)
    across = torch.cat([inputs[0].flatten()[:8], inputs[0].flatten()])[8:].view(shape)
    assert [kernels._holds(x, chosen) for x in (inputs[0], across)] == [True, False]
    held = run(inputs, dy, 0, chosen)
    check(reference(inputs, dy, 0), held, torch.bfloat16)
    for name, a, b in zip(NAMES, held, run((across, *inputs[1:]), dy, 0, chosen), strict=True):
        assert torch.equal(a, b), name
