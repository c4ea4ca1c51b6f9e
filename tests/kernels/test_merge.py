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
from helpers.norms import NORM, draw_norm, normed, unwritten

pytest.importorskip("triton")
kernels = pytest.importorskip("gspn2_kernels.triton_merge")
convolution = pytest.importorskip("gspn2_kernels.triton_local")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WIDE = (*NORM, "gamma")
LINES = (3, 7)
# (B, H, W, C, R, S, P)
CASES = [
    pytest.param((1, 1, 1, 8, 2, 1, 1), id="one patch"),
    pytest.param((2, 3, 7, 20, 5, 6, 3), id="ragged"),
    pytest.param((1, 1, 19, 16, 4, 20, 1), id="one row, more columns of the share than a step"),
    pytest.param((2, 9, 1, 33, 3, 2, 5), id="one column"),
    pytest.param((1, 4, 4, 16, 8, 3, 0), id="no prefix"),
    pytest.param((2, 12, 11, 136, 33, 17, 2), id="ragged tiles of the product"),
    pytest.param((2, 3, 5, 24, 5, 130, 2), id="more columns of the share than a program holds"),
]


def plain(*arguments: Any) -> Tensor:
    """The public function on normed tokens that are written, with the op's arguments."""
    stream, statistics, weight, bias, y, *others = arguments
    tokens = normed(stream, weight, bias).to(y.dtype)
    return merge(unwritten(stream, statistics, weight, bias)._replace(tokens=tokens), y, *others)


def fused(*arguments: Any) -> Tensor:
    """The same on normed tokens that are not."""
    return merge(unwritten(*arguments[:4]), *arguments[4:])


ROUTES = pytest.mark.parametrize("route", [plain, fused, torch.ops.gspn2.merge], ids=["plain", "function", "op"])


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: str = DEVICE) -> dict[str, Any]:
    """All that the op takes; nothing has mean 0, the stream is every second row of a longer tensor."""
    batch, height, width, channels, scanned, columns, prefix = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return (torch.randn(size, generator=generator, dtype=torch.float64) + 0.5).to(device, dtype)

    return {
        **draw_norm(normal(batch, prefix + height * width, 2, channels)[:, :, 0]),
        "y": normal(batch, height, width, 4, scanned),
        "weight": normal(channels, 4 * scanned),
        "lines": LINES,
        "filters": normal(channels, 1, 3, 3),
        "share": normal(batch, height * width, columns),
        "values": normal(batch, columns, channels),
        "row": normal(batch, channels),
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
        a = normed(*(drawn[name] for name in ("stream", "norm_weight", "norm_bias")))
        patches = a[:, prefix:].unflatten(1, grid).permute(0, 3, 1, 2)
        out = out + F.conv2d(patches, t["filters"], padding=1, groups=len(t["filters"])).flatten(2).mT
    if t["share"] is not None:
        out = out + t["share"] @ t["values"]
    out = out if t["prefix_out"] is None else torch.cat([t["prefix_out"], out], 1)
    return t["stream"] + (out if t["gamma"] is None else out * t["gamma"])


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
    forward = staticmethod(plain)


@pytest.mark.parametrize("missing", [(), ("share", "values")], ids=["all", "no share"])
@pytest.mark.parametrize("shape", CASES)
def test_an_export_gives_the_sum(shape, missing: tuple[str, ...]) -> None:
    drawn = draw(shape, torch.float32) | dict.fromkeys(missing)
    program = torch.export.export(Merge(), tuple(drawn.values()))
    assert_close("out", reference(drawn), program.module()(*drawn.values()))


PARTS = ("filters", "share", "values", "gamma")
MISSING = [("filters",), ("share", "values"), ("gamma",), PARTS, ("norm_weight",), ("norm_bias",), NORM[2:]]


@pytest.mark.parametrize("missing", MISSING, ids=" ".join)
def test_parts_may_be_missing(missing: tuple[str, ...]) -> None:
    drawn = draw((2, 3, 5, 24, 4, 6, 1), torch.float32) | dict.fromkeys(missing)
    expected = reference(drawn)
    assert_close("kernel", expected, kernels.merge(**drawn))
    assert_close("function", expected, plain(*drawn.values()))


def test_stream_may_be_wider_than_the_rest() -> None:
    """As under autocast: the stream and LayerScale in fp32, what the projections give in fp16."""
    shape = (1, 3, 4, 16, 4, 2, 1)
    drawn = draw(shape, torch.float16) | {name: draw(shape, torch.float32)[name] for name in WIDE}
    for name, out in (("kernel", kernels.merge(**drawn)), ("function", plain(*drawn.values()))):
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
    for name in ("stream", "statistics", "y", "share", "values", "row"):
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
    out = fused(*drawn.values())
    assert_close("out", reference(drawn), out, None if dtype == torch.float32 else 2 * TOLERANCES[dtype])


@pytest.mark.parametrize("chosen", [convolution.Plan(3), convolution.Plan(5, 8, vector=16)], ids=str)
@pytest.mark.parametrize("shape", CASES)
def test_any_tile_will_do(shape, chosen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "_plan", lambda _: chosen)
    drawn = draw(shape, torch.float32)
    assert_close("out", reference(drawn), kernels.merge(**drawn))


def test_rows_far_from_zero() -> None:
    """Differences of neighbours on a stream with a mean of 100, whose norm adds as much again."""
    drawn = draw((2, 3, 7, 20, 5, 6, 3), torch.float32)
    drawn |= draw_norm(drawn["stream"] + 100) | {"norm_bias": drawn["norm_bias"] + 100}
    assert_close("out", reference(drawn), kernels.merge(**drawn))


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_function_is_the_sum(dtype: torch.dtype) -> None:
    drawn = draw((2, 5, 3, 20, 5, 6, 3), dtype)
    out = plain(*drawn.values())
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
    ("filters", lambda t: t.half(), r"filters of shape \(8, 1, 3, 3\) has dtype torch.float16, expected torch.float32"),
    ("share", lambda t: t[:, 1:], r"share has shape \(2, 14, 3\), expected \(B, H W, S\) = \(2, 15, 3\)"),
    ("values", lambda t: None, r"share and values belong together"),
    ("row", lambda t: t.to("meta"), r"row of shape \(2, 8\) is on meta, expected "),
    ("gamma", lambda t: t[:, None], r"gamma has shape \(8, 1\), expected \(C,\) = \(8,\)"),
    ("prefix_out", lambda t: None, r"stream has shape \(2, 16, 8\), expected \(B, N, C\) = \(2, 15, 8\)"),
]


@ROUTES
@pytest.mark.parametrize(("name", "edit", "message"), BAD)
def test_bad_inputs_are_named(route, name: str, edit, message: str) -> None:
    drawn = draw((2, 3, 5, 8, 2, 3, 1), torch.float32)
    drawn[name] = edit(drawn[name])
    with pytest.raises(ValueError, match=message):
        route(*drawn.values())


def test_layouts_of_all() -> None:
    drawn = draw((2, 3, 7, 20, 5, 6, 3), torch.float32)
    apart = {name: t.repeat_interleave(2, -1)[..., ::2] for name, t in drawn.items() if isinstance(t, Tensor)}
    assert torch.equal(kernels.merge(**drawn), kernels.merge(**(drawn | apart)))


def test_bad_streams_are_named() -> None:
    drawn = draw((2, 3, 5, 8, 2, 3, 1), torch.float32)
    with pytest.raises(ValueError, match=r"statistics has shape \(2, 15, 2\), expected \(B, N, 2\) = \(2, 16, 2\)"):
        fused(*(drawn | {"statistics": drawn["statistics"][:, 1:]}).values())
    with pytest.raises(ValueError, match=r"stream of shape .* has dtype torch.float64, expected torch.float32"):
        plain(*(drawn | {"stream": drawn["stream"].double()}).values())


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
