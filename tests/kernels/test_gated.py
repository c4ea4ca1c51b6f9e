"""The scans of a latent against fp64: the kernels, in the interpreter or on a GPU, the op, plain torch.

Shapes: B batch, H W grid, P prefix tokens, R latent channels, G groups.
"""

import importlib
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gspn2_kernels import gated_scan, line_scan_ref
from gspn2_kernels.testing import TOLERANCES, assert_close
from gspn2_kernels.tuning import Plan
from helpers.norms import draw_norm, normed, unwritten
from helpers.weights import outer_weights

pytest.importorskip("triton")
kernels = pytest.importorskip("gspn2_kernels.triton_gated")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Plans of the scan are given, so that grids that the interpreter can take still have several warps, positions of a
# lane, segments and launches: (WC, GRID, CL, BC, P, NS, AHEAD).
CASES = [
    pytest.param((2, 1, 7, 1), 1, 0, Plan(1, 1, 1, 1, 1, 3), id="one row, one channel"),
    pytest.param((1, 7, 1, 8), 1, 3, Plan(1, 1, 2, 4, 1, 3), id="one column"),
    pytest.param((1, 5, 17, 16), 1, 0, Plan(1, 1, 1, 8, 1, 3), id="two tiles of pixels"),
    pytest.param((1, 19, 3, 8), 1, 0, Plan(1, 1, 2, 4, 2, 3), id="tall, two positions a lane"),
    pytest.param((1, 4, 5, 32), 4, 1, Plan(1, 1, 4, 8, 1, 3), id="a group a lane, every line restarts"),
    pytest.param(
        (1, 5, 7, 72), 1, 2, Plan(2, 1, 2, 8, 1, 3), id="two warps, half a program beyond the channels, two steps"
    ),
    pytest.param((1, 3, 4, 6), 6, 2, Plan(1, 1, 1, 1, 1, 3), id="a group per channel"),
    pytest.param((1, 11, 4, 16), 1, 0, Plan(1, 2, 4, 4, 1, 3), id="a line in two programs"),
    pytest.param((1, 5, 9, 16), 1, 4, Plan(1, 3, 4, 4, 1, 2), id="a line in three programs"),
    pytest.param((2, 4, 5, 4), 1, 2, Plan(1, 1, 1, 4, 1, 3, AHEAD=True), id="a line read ahead"),
    pytest.param((2, 3, 5, 12), 3, 0, None, id="the table's plan"),
    pytest.param((1, 2, 3, 128), 1, 0, None, id="the widest latent in fp32"),
]


def draw(shape: tuple[int, ...], groups: int = 1, dtype: torch.dtype = torch.float32, prefix: int = 0) -> list[Tensor]:
    """A latent of mean 0.5 with prefix tokens that are not a number, and the layer that controls its scans."""
    batch, height, width, channels = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    numbers = 8 * channels + 12 * groups
    latent = normal(batch, prefix + height * width, channels) + 0.5
    latent[:, :prefix] = float("nan")
    weight, bias = normal(numbers, channels) / channels**0.5, normal(numbers)
    return [t.to(DEVICE, dtype) for t in (latent, weight, bias)]


def reference(
    latent: Tensor, source: Tensor, weight: Tensor, bias: Tensor, shape: tuple[int, ...], groups: int, segment: int
) -> Tensor:
    *grid, channels = shape
    control = source.double() @ weight.double().T + bias.double()
    lam, u, logits = control.view(*grid, -1).split([4 * channels, 4 * channels, 12 * groups], -1)
    lam, u = (t.unflatten(-1, (4, channels)) for t in (lam, u))
    return line_scan_ref(latent.double().view(shape), lam, logits.unflatten(-1, (4, groups, 3)), u, segment)


def check(drawn: list[Tensor], shape, groups: int, segment: int, y: Tensor, factor: float = 1.0) -> None:
    """Compare with fp64: of 16 bits lam, u, logits and the result are rounded."""
    latent, weight, bias = drawn
    latent = latent[:, latent.shape[1] - shape[1] * shape[2] :]
    assert (y.dtype, y.is_contiguous()) == (latent.dtype, True)
    tolerance = factor * (2e-6 if y.dtype == torch.float32 else 3 * TOLERANCES[y.dtype])
    assert_close("y", reference(latent, latent, weight, bias, shape, groups, segment), y, tolerance)


@pytest.mark.parametrize(("shape", "groups", "segment", "chosen"), CASES)
def test_kernels_are_the_scan(shape, groups: int, segment: int, chosen: Plan | None) -> None:
    drawn = draw(shape, groups)
    check(drawn, shape, groups, segment, kernels.gated_scan(*drawn, shape[1:3], groups, segment, chosen=chosen))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("channels", [40, 136, 256])
def test_16_bits_in_memory(channels: int, dtype: torch.dtype) -> None:
    shape = (1, 12 if channels < 128 else 2, 5, channels)
    drawn = draw(shape, dtype=dtype)
    check(drawn, shape, 1, 0, kernels.gated_scan(*drawn, shape[1:3], 1, 0, chosen=Plan(1, 1, 2, 8, 1, 3)))


@pytest.mark.parametrize(("channels", "dtype"), [(136, torch.float32), (260, torch.float16)], ids=str)
def test_latents_too_wide_for_the_kernels(channels: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The function does without them, the op says so."""
    monkeypatch.setattr(importlib.import_module("gspn2_kernels.gated"), "by_triton", lambda _: True)
    shape = (1, 2, 3, channels)
    latent, weight, bias = draw(shape, dtype=dtype)
    check([latent, weight, bias], shape, 1, 0, gated_scan(latent, latent, weight, bias, (2, 3)), 2)
    with pytest.raises(ValueError, match=f"latent has {channels} channels, for which there is no kernel in {dtype}"):
        torch.ops.gspn2.gated_scan(latent, weight, bias, 2, 3, 1, 0)


def test_grids_too_large_are_named() -> None:
    latent, weight, bias = draw((1, 1, 1, 96), dtype=torch.bfloat16)
    latent = latent.expand(1, 2400 * 2400, 96)
    with pytest.raises(ValueError, match="a grid of 2400 x 2400 with a latent of 96 channels is too large; split it"):
        kernels.predict(latent, weight, bias, (2400, 2400), 1, 0, Plan(1, 1, 2, 8, 1, 3))


def test_planes_hold_what_a_scan_reads() -> None:
    """lam times the latent, u and weights, each line after line of its direction; scans restart after seven lines."""
    (height, width, channels), groups, segment, blocks = (17, 9, 12), 2, 7, 2
    latent, weight, bias = draw((2, height, width, channels), groups)
    scan = Plan(1, 1, 2, 4, 1, 3)  # eight channels to a plane: of the last one half
    lam, u, weights = kernels.predict(latent, weight, bias, (height, width), groups, segment, scan)
    control = (latent.double() @ weight.double().T + bias.double()).view(2, height, width, -1)
    for d, (name, planes, first) in itertools.product(range(4), (("lam", lam, 0), ("u", u, 4 * channels))):
        expected = control[..., first + d * channels :][..., :channels]
        if name == "lam":
            expected = expected * latent.view(2, height, width, channels)
        lines = (expected if d < 2 else expected.transpose(1, 2)).flatten(1, 2)
        assert planes.shape == (2, 4, blocks, height * width, 8)
        assert_close(f"{name} {d}", lines, planes[:, d].transpose(1, 2).flatten(2)[..., :channels], 2e-6)
    logits = control[..., 8 * channels :].view(2, height, width, 4, groups, 3)
    assert_close("weights", outer_weights(logits, segment), weights, 2e-6)


@pytest.mark.parametrize("shape", [(0, 3, 4, 2), (2, 0, 4, 2), (2, 3, 0, 2)], ids=str)
def test_nothing_in_nothing_out(shape) -> None:
    assert kernels.gated_scan(*draw(shape), shape[1:3], 1, 0).shape == (*shape[:3], 4, shape[3])


def test_layouts_of_the_inputs() -> None:
    shape = (2, 3, 5, 8)
    drawn = draw(shape)
    apart = [t.repeat_interleave(2, -1)[..., ::2] for t in drawn]
    assert not any(t.is_contiguous() for t in apart)
    assert torch.equal(*(kernels.gated_scan(*tensors, (3, 5), 1, 0) for tensors in (drawn, apart)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "groups", "segment"),
    [
        ((2, 14, 14, 96), 1, 0),
        ((2, 74, 74, 64), 1, 0),
        ((3, 37, 50, 128), 4, 16),
        ((1, 128, 128, 96), 1, 0),
        ((16, 147, 90, 64), 1, 0),
        ((1, 300, 70, 48), 1, 0),
        ((1, 300, 70, 16), 1, 0),
    ],
    ids=str,
)
def test_kernels_on_grids_of_real_models(shape, groups: int, segment: int, dtype: torch.dtype) -> None:
    check_twice(shape, groups, segment, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_kernels_on_a_wide_latent(dtype: torch.dtype) -> None:
    check_twice((3, 37, 50, 144), 4, 16, dtype)


def check_twice(shape: tuple[int, ...], groups: int, segment: int, dtype: torch.dtype) -> None:
    drawn = draw(shape, groups, dtype)
    runs = [torch.ops.gspn2.gated_scan(*drawn, *shape[1:3], groups, segment) for _ in range(2)]
    check(drawn, shape, groups, segment, runs[0])
    assert torch.equal(*runs)


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_function_is_the_scan(dtype: torch.dtype) -> None:
    shape = (2, 4, 3, 8)
    latent, weight, bias = draw(shape, 2, dtype, prefix=2)
    y = gated_scan(latent, latent, weight, bias, (4, 3), 2, 3)
    check([latent, weight, bias], shape, 2, 3, y, 1 if DEVICE == "cuda" else 2)


def test_function_takes_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they run and no gradient is wanted; prefix tokens are left out."""
    monkeypatch.setattr(importlib.import_module("gspn2_kernels.gated"), "by_triton", lambda _: True)
    latent, weight, bias = draw((2, 4, 3, 8), prefix=2)
    expected = kernels.gated_scan(latent[:, 2:], weight, bias, (4, 3), 1, 0)
    assert torch.equal(gated_scan(latent, latent, weight, bias, (4, 3)), expected)
    weight.requires_grad_()
    with torch.no_grad():
        assert torch.equal(gated_scan(latent, latent, weight, bias, (4, 3)), expected)
    latent = latent[:, 2:]
    wide = weight.detach().double().requires_grad_()
    gradients = (
        torch.autograd.grad(y.square().sum(), variable)[0]
        for y, variable in (
            (reference(latent, latent, wide, bias, (2, 4, 3, 8), 1, 0), wide),
            (gated_scan(latent, latent, weight, bias, (4, 3)), weight),
        )
    )
    assert_close("gradient of the weight", *gradients, 1e-5)


@pytest.mark.parametrize("written", [True, False])
def test_another_source(written: bool) -> None:
    """Normed tokens, which on a GPU are not written and come beside a latent without prefix tokens."""
    if not written and DEVICE == "cpu":
        pytest.skip("normed tokens are unwritten on a GPU only")
    shape, prefix = (2, 4, 3, 2), 1
    latent, *_ = draw(shape)
    stream = (torch.randn(2, prefix + 12, 24, generator=torch.Generator().manual_seed(1)) + 0.5).to(DEVICE)
    weight, bias = (torch.randn(28, *size).to(DEVICE) for size in ((24,), ()))
    tokens = draw_norm(stream)
    a = normed(tokens["stream"], tokens["norm_weight"], tokens["norm_bias"])
    found = unwritten(*tokens.values(), prefix)
    source = found._replace(tokens=a.to(stream)) if written else found
    expected = reference(latent, a[:, prefix:], weight, bias, shape, 1, 0)
    assert_close("y", expected, gated_scan(latent, source, weight, bias, (4, 3)), 1e-5)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.gspn2.gated_scan.default, (*draw((1, 2, 3, 4)), 2, 3, 1, 0))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_autocast_casts_all(dtype: torch.dtype) -> None:
    shape = (1, 3, 4, 8)
    drawn = draw(shape)
    with torch.autocast(DEVICE, dtype):
        y = torch.ops.gspn2.gated_scan(*drawn, 3, 4, 1, 0)
    check([t.to(dtype) for t in drawn], shape, 1, 0, y)


def test_compiles_as_one_graph() -> None:
    torch._dynamo.reset()

    def run(latent: Tensor, weight: Tensor, bias: Tensor, height: int) -> Tensor:
        return torch.ops.gspn2.gated_scan(latent, weight, bias, height, 3, 1, 0)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for height in (4, 5):
        drawn = draw((2, height, 3, 4))
        check(drawn, (2, height, 3, 4), 1, 0, compiled(*drawn, height))


def test_flops_are_those_of_its_parts() -> None:
    drawn = draw((2, 3, 4, 8), 2)
    with FlopCounterMode(display=False) as counter:
        torch.ops.gspn2.gated_scan(*drawn, 3, 4, 2, 0)
    latent, weight, bias = drawn
    with FlopCounterMode(display=False) as apart, torch.enable_grad():
        gated_scan(latent.requires_grad_(), latent, weight, bias, (3, 4), 2)
    padding = 2 * 2 * 12 * 8 * 4 * 2  # the product of the fourth logits
    assert counter.get_total_flops() == apart.get_total_flops() - padding


BAD = [
    (0, lambda t: t[0], r"latent has shape \(12, 8\), expected \(B, H W, R\)"),
    (0, lambda t: t[:, 1:], r"latent has shape \(2, 11, 8\), expected \(B, H W, R\) = \(2, 12, 8\)"),
    (0, lambda t: t.double(), "latent has dtype torch.float64, for which there is no kernel"),
    (1, lambda t: t[1:], r"weight has shape \(87, 8\), expected \(8 R \+ 12 G, R\) = \(88, 8\)"),
    (1, lambda t: t.half(), r"weight of shape \(88, 8\) has dtype torch.float16, expected torch.float32"),
    (2, lambda t: t[:5], r"bias has shape \(5,\), expected \(8 R \+ 12 G,\) = \(88,\)"),
    (2, lambda t: t.to("meta"), r"bias of shape \(88,\) is on meta, expected "),
    (5, lambda _: 3, "groups is 3, expected a divisor of 8, the channels of the latent"),
    (6, lambda _: -1, "segment is -1, expected 0"),
]


@pytest.mark.parametrize(("place", "edit", "message"), BAD)
def test_bad_inputs_are_named(place: int, edit, message: str) -> None:
    arguments: list[Any] = [*draw((2, 3, 4, 8), 2), 3, 4, 2, 0]
    arguments[place] = edit(arguments[place])
    with pytest.raises(ValueError, match=message):
        torch.ops.gspn2.gated_scan(*arguments)
