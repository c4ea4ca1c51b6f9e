"""A linear layer of normed patches against fp64: the kernel, in the interpreter or on a GPU, the op, plain torch.

Shapes: B batch, N tokens, P prefix tokens, C channels, R numbers of a patch.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gspn2_kernels.project import project
from gspn2_kernels.testing import TOLERANCES, assert_close
from helpers.layouts import OF_TOKENS
from helpers.norms import NORM, draw_norm, normed, unwritten

pytest.importorskip("triton")
kernels = pytest.importorskip("gspn2_kernels.triton_project")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (B, N, C, R, P)
CASES = [
    pytest.param((1, 2, 8, 2, 1), id="one patch"),
    pytest.param((2, 71, 40, 5, 3), id="ragged"),
    pytest.param((1, 64, 64, 16, 0), id="full tile, no prefix"),
    pytest.param((3, 66, 72, 131, 1), id="two tiles of numbers"),
]


def plain(stream: Tensor, statistics: Tensor, norm_weight: Tensor, norm_bias: Tensor, *others: Any) -> Tensor:
    """The public function on normed tokens that are written, with the op's arguments."""
    *others, prefix = others
    tokens = normed(stream, norm_weight, norm_bias).to(stream)
    found = unwritten(stream, statistics, norm_weight, norm_bias, prefix)
    return project(found._replace(tokens=tokens), *others)


def fused(*arguments: Any) -> Tensor:
    """The same on normed tokens that are not."""
    return project(unwritten(*arguments[:4], prefix=arguments[-1]), *arguments[4:-1])


ROUTES = pytest.mark.parametrize("route", [plain, fused, torch.ops.gspn2.project], ids=["plain", "function", "op"])


def draw(shape: tuple[int, ...], dtype: torch.dtype, shift: float = 0.5) -> dict[str, Any]:
    """All that the op takes: a stream with the mean `shift`, a norm, and a linear layer of about 1."""
    batch, tokens, channels, numbers, prefix = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    stream = (normal(batch, tokens, channels) + shift).to(DEVICE, dtype)
    weight, bias = normal(numbers, channels) / channels**0.5, normal(numbers)
    return draw_norm(stream) | {"weight": weight.to(stream), "bias": bias.to(stream), "prefix": prefix}


def reference(drawn: dict[str, Any]) -> Tensor:
    a = normed(drawn["stream"], drawn["norm_weight"], drawn["norm_bias"])[:, drawn["prefix"] :]
    return a @ drawn["weight"].double().T + (0 if drawn["bias"] is None else drawn["bias"].double())


def check(drawn: dict[str, Any], out: Tensor, tolerance: float | None = None) -> None:
    """Compare with fp64: the normed tokens are rounded as well as the result."""
    assert (out.dtype, out.is_contiguous()) == (drawn["weight"].dtype, True)
    assert_close("out", reference(drawn), out, tolerance or 2 * TOLERANCES[out.dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CASES)
def test_kernel_is_the_product(shape, dtype: torch.dtype) -> None:
    drawn = draw(shape, dtype)
    check(drawn, kernels.project(*drawn.values()))


@pytest.mark.parametrize("missing", [("bias",), ("norm_weight",), ("norm_bias",), (*NORM[2:], "bias")], ids=" ".join)
def test_parts_may_be_missing(missing: tuple[str, ...]) -> None:
    drawn = draw((2, 71, 40, 5, 3), torch.float32) | dict.fromkeys(missing)
    check(drawn, kernels.project(*drawn.values()))
    check(drawn, plain(*drawn.values()))


@pytest.mark.parametrize(("dtype", "shift"), [(torch.float32, 100), (torch.bfloat16, 2), (torch.float16, 100)])
def test_tokens_far_from_zero(dtype: torch.dtype, shift: float) -> None:
    drawn = draw((2, 71, 40, 5, 3), dtype, shift)
    # In fp32 the mean itself is off by some 4e-6 of a deviation.
    check(drawn, kernels.project(*drawn.values()), 1e-5 if dtype == torch.float32 else None)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shift", [0.5, 30])
def test_stream_may_be_wider_than_the_rest(dtype: torch.dtype, shift: float) -> None:
    """As under autocast."""
    drawn = draw((2, 71, 40, 5, 3), torch.float32, shift)
    drawn |= {name: drawn[name].to(dtype) for name in ("weight", "bias")}
    check(drawn, kernels.project(*drawn.values()))


def test_layouts_of_the_rest() -> None:
    drawn = draw((2, 35, 24, 5, 1), torch.float32)
    apart = {name: t.repeat_interleave(2, -1)[..., ::2] for name, t in drawn.items() if isinstance(t, Tensor)}
    assert not any(t.is_contiguous() for t in apart.values())
    assert torch.equal(kernels.project(*drawn.values()), kernels.project(*(drawn | apart).values()))


@pytest.mark.parametrize("view", OF_TOKENS.values(), ids=OF_TOKENS)
def test_layouts_of_the_stream(view) -> None:
    drawn = draw((2, 35, 24, 5, 1), torch.float16)
    drawn["stream"] = view(drawn["stream"])
    assert not drawn["stream"].is_contiguous()
    drawn["statistics"] = draw_norm(drawn["stream"])["statistics"]
    check(drawn, kernels.project(*drawn.values()))


@pytest.mark.parametrize("shape", [(0, 5, 24, 3, 1), (2, 1, 24, 3, 1)], ids=str)
def test_no_patches(shape) -> None:
    drawn = draw(shape, torch.float32)
    for out in (kernels.project(*drawn.values()), plain(*drawn.values())):
        assert out.shape == (shape[0], shape[1] - 1, 3)


def test_poison_around_patches_stays_outside() -> None:
    drawn = draw((3, 70, 24, 5, 2), torch.float16)
    expected = kernels.project(*drawn.values())
    for name in ("stream", "statistics"):
        drawn[name][::2] = float("nan")
        drawn[name][:, :2] = float("nan")
    assert torch.equal(kernels.project(*drawn.values())[1], expected[1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 197, 768, 96, 1), (2, 5476, 1152, 64, 0), (3, 1370, 384, 872, 1)], ids=str)
def test_kernel_on_tokens_of_real_models(shape, dtype: torch.dtype) -> None:
    drawn = draw(shape, dtype)
    runs = [fused(*drawn.values()) for _ in range(2)]
    check(drawn, runs[0])
    assert torch.equal(*runs)


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_function_is_the_product(dtype: torch.dtype) -> None:
    drawn = draw((2, 7, 24, 5, 1), dtype)
    check(drawn, plain(*drawn.values()))


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.gspn2.project.default, tuple(draw((2, 5, 24, 3, 1), torch.float32).values()))


@ROUTES
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_autocast_casts_the_layer(route, dtype: torch.dtype) -> None:
    drawn = draw((2, 9, 24, 3, 1), torch.float32)
    with torch.autocast(DEVICE, dtype):
        actual = route(*drawn.values())
    assert actual.dtype == dtype
    assert_close("out", reference(drawn), actual, 3 * TOLERANCES[dtype])


def test_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: torch.ops.gspn2.project(*t), fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (7, 11):
        drawn = draw((2, tokens, 24, 3, 1), torch.float32)
        check(drawn, compiled(*drawn.values()))


@ROUTES
def test_flops_are_those_of_its_product(route) -> None:
    with FlopCounterMode(display=False) as counter:
        route(*draw((2, 9, 24, 3, 2), torch.float32).values())
    assert counter.get_total_flops() == 2 * 2 * 7 * 24 * 3


BAD = [
    ("stream", lambda t: t[0], r"stream has shape \(9, 24\), expected \(B, N, C\)"),
    ("statistics", lambda t: t[:1], r"statistics has shape \(1, 9, 2\), expected \(B, N, 2\) = \(2, 9, 2\)"),
    ("statistics", lambda t: t.half(), r"statistics has dtype torch.float16, expected torch.float32"),
    (
        "norm_weight",
        lambda t: t.half(),
        r"norm_weight of shape \(24,\) has dtype torch.float16, expected torch.float32",
    ),
    ("norm_bias", lambda t: t[:5], r"norm_bias has shape \(5,\), expected \(C,\) = \(24,\)"),
    ("weight", lambda t: t[:, :5], r"weight has shape \(3, 5\), expected \(R, C\) = \(3, 24\)"),
    ("weight", lambda t: t.to("meta"), r"weight of shape \(3, 24\) is on meta, expected "),
    ("bias", lambda t: t.half(), r"bias of shape \(3,\) has dtype torch.float16, expected torch.float32"),
    ("prefix", lambda _: 10, r"prefix is 10, expected 0 to 9, the number of tokens"),
]


@pytest.mark.parametrize(("name", "edit", "message"), BAD)
def test_bad_inputs_are_named(name: str, edit, message: str) -> None:
    drawn = draw((2, 9, 24, 3, 1), torch.float32)
    drawn[name] = edit(drawn[name])
    with pytest.raises(ValueError, match=message):
        torch.ops.gspn2.project(*drawn.values())
