"""The end of a mixer against its sum in fp64: the kernel, in the interpreter or on a GPU, the op, plain torch.

Shapes: B batch, H W grid, N = P + H W tokens, P prefix tokens, C channels, R scanned channels, S columns of the share.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gspn2_kernels.merge import divide, merge
from gspn2_kernels.testing import TOLERANCES, assert_close

pytest.importorskip("triton")
kernels = pytest.importorskip("gspn2_kernels.triton_merge")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WIDE = ("residual", "gamma")
LINES = (3, 7)
# (B, H, W, C, R, S, P)
CASES = [
    pytest.param((1, 1, 1, 8, 2, 1, 1), id="one patch"),
    pytest.param((2, 3, 7, 20, 5, 6, 3), id="ragged"),
    pytest.param((1, 1, 19, 16, 4, 20, 1), id="one row, more columns of the share than a step"),
    pytest.param((2, 9, 1, 33, 3, 2, 5), id="one column"),
    pytest.param((1, 4, 4, 16, 8, 3, 0), id="no prefix"),
    pytest.param((2, 12, 11, 136, 33, 17, 2), id="ragged tiles of the product"),
]
ROUTES = pytest.mark.parametrize("route", [merge, torch.ops.gspn2.merge], ids=["function", "op"])


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: str = DEVICE) -> dict[str, Any]:
    """All that the op takes; nothing has mean 0, a and residual are every second row of a longer tensor."""
    batch, height, width, channels, scanned, columns, prefix = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return (torch.randn(size, generator=generator, dtype=torch.float64) + 0.5).to(device, dtype)

    def tokens() -> Tensor:
        return normal(batch, prefix + height * width, 2, channels)[:, :, 0]

    return {
        "y": normal(batch, height, width, 4, scanned),
        "weight": normal(channels, 4 * scanned),
        "lines": LINES,
        "a": tokens(),
        "filters": normal(channels, 1, 3, 3),
        "share": normal(batch, height * width, columns),
        "values": normal(batch, columns, channels),
        "row": normal(batch, channels),
        "residual": tokens(),
        "gamma": normal(channels),
        "prefix_out": normal(batch, prefix, channels) if prefix else None,
    }


def reference(drawn: dict[str, Any]) -> Tensor:
    """The sum of what is there, in fp64."""
    t = {name: part.double() if isinstance(part, Tensor) else part for name, part in drawn.items()}
    grid, prefix = t["y"].shape[1:3], 0 if t["prefix_out"] is None else t["prefix_out"].shape[1]
    lines = t["y"].new_tensor(t["lines"])[[0, 0, 1, 1], None]
    out = (t["y"] / lines).flatten(3).flatten(1, 2) @ t["weight"].T + t["row"][:, None]
    if t["filters"] is not None:
        patches = t["a"][:, prefix:].unflatten(1, grid).permute(0, 3, 1, 2)
        out = out + F.conv2d(patches, t["filters"], padding=1, groups=len(t["filters"])).flatten(2).mT
    if t["share"] is not None:
        out = out + t["share"] @ t["values"]
    out = out if t["prefix_out"] is None else torch.cat([t["prefix_out"], out], 1)
    return t["residual"] + (out if t["gamma"] is None else out * t["gamma"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CASES)
def test_kernel_is_the_sum(shape, dtype: torch.dtype) -> None:
    drawn = draw(shape, dtype)
    out = kernels.merge(**drawn)
    assert out.dtype == dtype
    assert out.is_contiguous()
    # The product of scans and weights is rounded, as is that of share and values.
    assert_close("out", reference(drawn), out, None if dtype == torch.float32 else 2 * TOLERANCES[dtype])


class Merge(torch.nn.Module):
    forward = staticmethod(merge)


@pytest.mark.parametrize("missing", [(), ("share", "values")], ids=["all", "no share"])
@pytest.mark.parametrize("shape", CASES)
def test_an_export_gives_the_sum(shape, missing: tuple[str, ...]) -> None:
    drawn = draw(shape, torch.float32) | dict.fromkeys(missing)
    program = torch.export.export(Merge(), tuple(drawn.values()))
    assert_close("out", reference(drawn), program.module()(*drawn.values()))


PARTS = ("filters", "share", "values", "gamma")


@pytest.mark.parametrize("missing", [("filters",), ("share", "values"), ("gamma",), PARTS])
def test_parts_may_be_missing(missing: tuple[str, ...]) -> None:
    drawn = draw((2, 3, 5, 24, 4, 6, 1), torch.float32) | dict.fromkeys(missing)
    expected = reference(drawn)
    assert_close("kernel", expected, kernels.merge(**drawn))
    assert_close("function", expected, merge(**drawn))


def test_residual_may_be_wider_than_the_rest() -> None:
    """As under autocast: the stream and LayerScale in fp32, what the projections give in fp16."""
    shape = (1, 3, 4, 16, 4, 2, 1)
    drawn = draw(shape, torch.float16) | {name: draw(shape, torch.float32)[name] for name in WIDE}
    for name, out in (("kernel", kernels.merge(**drawn)), ("function", merge(**drawn))):
        assert out.dtype == torch.float32
        assert_close(name, reference(drawn), out, TOLERANCES[torch.float16])


@pytest.mark.parametrize("shape", [(0, 3, 4, 8, 2, 1, 1), (2, 0, 4, 8, 2, 1, 1), (2, 3, 0, 8, 2, 1, 1)], ids=str)
def test_empty_grids(shape) -> None:
    drawn = draw(shape, torch.float32)
    assert_close("out", reference(drawn | {"filters": None}), kernels.merge(**drawn))


def test_poison_around_an_image_stays_outside() -> None:
    """Neither other images nor what lies between the rows of a slice is read."""
    drawn = draw((3, 3, 5, 16, 4, 2, 1), torch.float32)
    expected = reference(drawn)[1]
    for name in ("a", "residual", "y", "share", "values", "row"):
        drawn[name][::2] = float("nan")
    assert_close("out", expected, kernels.merge(**drawn)[1])


def test_two_runs_give_equal_bits() -> None:
    drawn = draw((2, 3, 7, 20, 5, 6, 3), torch.float16)
    assert torch.equal(*(kernels.merge(**drawn) for _ in range(2)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(64, 14, 14, 768, 96, 24, 1), (3, 37, 37, 384, 48, 12, 1), (2, 65, 47, 1152, 64, 96, 5)], ids=str
)
def test_kernel_on_grids_of_real_models(shape, dtype: torch.dtype) -> None:
    drawn = draw(shape, dtype)
    assert_close("out", reference(drawn), merge(**drawn), None if dtype == torch.float32 else 2 * TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_function_is_the_sum(dtype: torch.dtype) -> None:
    drawn = draw((2, 5, 3, 20, 5, 6, 3), dtype)
    out = merge(**drawn)
    assert out.dtype == dtype
    assert out.is_contiguous()
    # Plain torch rounds each of the sums.
    assert_close("out", reference(drawn), out, 2 * TOLERANCES[dtype])


def test_opcheck() -> None:
    arguments = tuple(draw((1, 2, 3, 4, 1, 1, 1), torch.float32).values())
    torch.library.opcheck(torch.ops.gspn2.merge.default, arguments)


@ROUTES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_all_but_the_stream(route, dtype: torch.dtype) -> None:
    drawn = draw((1, 2, 3, 8, 2, 2, 1), torch.float32)
    with torch.autocast(DEVICE, dtype):
        actual = route(*drawn.values())
    cast = [t if name in (*WIDE, "lines") else t.to(dtype) for name, t in drawn.items()]
    assert actual.dtype == torch.float32
    assert torch.equal(route(*cast), actual)


BAD = [
    ("y", lambda t: t[0], r"y has shape \(3, 5, 4, 2\), expected \(B, H, W, 4, R\)"),
    ("y", lambda t: t.int(), r"y has dtype torch.int32, expected one of torch.float64, "),
    ("weight", lambda t: t[:, :5], r"weight has shape \(8, 5\), expected \(C, 4 R\) = \(8, 8\)"),
    ("lines", lambda t: t[:1], r"lines are \(3,\), expected two numbers"),
    ("a", lambda t: t[:, 1:], r"a has shape \(2, 15, 8\), expected \(B, N, C\) = \(2, 16, 8\)"),
    ("filters", lambda t: t.half(), r"filters of shape \(8, 1, 3, 3\) has dtype torch.float16, expected torch.float32"),
    ("share", lambda t: t[:, 1:], r"share has shape \(2, 14, 3\), expected \(B, H W, S\) = \(2, 15, 3\)"),
    ("values", lambda t: None, r"share and values belong together"),
    ("row", lambda t: t.to("meta"), r"row of shape \(2, 8\) is on meta, expected "),
    ("residual", lambda t: t.double(), r"residual of shape .* has dtype torch.float64, expected torch.float32"),
    ("gamma", lambda t: t[:, None], r"gamma has shape \(8, 1\), expected \(C,\) = \(8,\)"),
    ("prefix_out", lambda t: None, r"residual has shape \(2, 16, 8\), expected \(B, N, C\) = \(2, 15, 8\)"),
]


@ROUTES
@pytest.mark.parametrize(("name", "edit", "message"), BAD)
def test_bad_inputs_are_named(route, name: str, edit, message: str) -> None:
    drawn = draw((2, 3, 5, 8, 2, 3, 1), torch.float32)
    drawn[name] = edit(drawn[name])
    with pytest.raises(ValueError, match=message):
        route(*drawn.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_are_divided_and_rounded_once(dtype: torch.dtype) -> None:
    """259 lines are 260 in bfloat16."""
    weight = torch.randn(6, 20).to(dtype)
    vertical, horizontal = weight.float().chunk(2, 1)
    expected = torch.cat([vertical / 259, horizontal / 1027], 1).to(dtype)
    assert torch.equal(divide(weight, (259, 1027)), expected)


@ROUTES
def test_flops_are_those_of_its_products(route) -> None:
    drawn = draw((1, 2, 3, 8, 2, 3, 1), torch.float32)
    with FlopCounterMode(display=False) as counter:
        route(*drawn.values())
    assert counter.get_total_flops() == 2 * 6 * 8 * (4 * 2 + 9 + 3)
