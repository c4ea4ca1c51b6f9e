"""LayerNorm of tokens, what norms them, and their mean against fp64: the kernels, interpreted or on a GPU, the ops.

Shapes: B batch, N tokens, P prefix tokens, C channels.
"""

import pytest
import torch
from torch import Tensor

from gspn2_kernels import Normed
from gspn2_kernels.norm import layer_norm, norm_and_sum, norm_tokens
from gspn2_kernels.testing import TOLERANCES, assert_close
from helpers.layouts import OF_TOKENS
from helpers.norms import DEVICE, EPS, draw
from helpers.norms import normed as reference

pytest.importorskip("triton")
kernels = pytest.importorskip("gspn2_kernels.triton_norm")

NAMES = ("statistics", "first", "mean")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# A chunk is up to 256 channels of two bytes or 128 of four.
CASES = [
    pytest.param((2, 5, 24), 1, id="few tokens, chunk of padding"),
    pytest.param((1, 16, 40), 0, id="full tile, no prefix"),
    pytest.param((2, 33, 192), 5, id="ragged tiles, two chunks"),
    pytest.param((1, 18, 5), 17, id="whole tile of prefix, odd sizes"),
    pytest.param((1, 3, 256), 1, id="one wide chunk"),
]
SHAPES = pytest.mark.parametrize("shape", [*(case.values[0] for case in CASES), (0, 5, 24), (2, 0, 24)], ids=str)
SUMS = pytest.mark.parametrize("function", [norm_and_sum, torch.ops.gspn2.norm_and_sum], ids=["function", "op"])
ROUTES = pytest.mark.parametrize("function", [norm_tokens, torch.ops.gspn2.norm_statistics], ids=["function", "op"])


def of_patches(a: Tensor, prefix: int) -> Tensor:
    return a[:, prefix:].double().sum(1) / max(1, a.shape[1] - prefix)


def check(inputs: tuple, prefix: int, actual: tuple[Tensor, ...], tolerance: float | None = None) -> None:
    """Compare statistics, prefix tokens and mean with fp64."""
    x, _, _, eps = inputs
    deviation = (x.double().var(2, correction=0) + eps).sqrt()
    a = reference(*inputs)
    statistics, first, mean = actual
    assert (statistics.dtype, first.dtype, mean.dtype) == (torch.float32, x.dtype, x.dtype)
    assert all(out.is_contiguous() for out in actual)
    factor, shift = statistics.double().unbind(2)
    assert_close("factor", 1 / deviation, factor, 1e-6)
    # What they are for: differences from the mean, which is rounded to fp32.
    exact, limit = reference(x, None, None, eps), 1e-6 + 2**-24 * float(shift.abs().max())
    assert_close("normed", exact, x.double() * factor[..., None] - shift[..., None], limit)
    assert_close("first", kernels.norm(*inputs)[:, :prefix], first)
    assert_close("mean", of_patches(a, prefix), mean, tolerance)


def check_plain(inputs: tuple, prefix: int, actual: Normed, *tolerances: float | None) -> None:
    """Compare normed tokens with fp64, and their mean with that, in fp64, of the tokens that came out."""
    assert actual.statistics is None
    assert actual.tokens is not None
    for out in (actual.tokens, actual.mean):
        assert out.dtype == inputs[0].dtype
        assert out.is_contiguous()
    assert_close("tokens", reference(*inputs), actual.tokens, tolerances[0] if tolerances else None)
    assert_close("mean", of_patches(actual.tokens, prefix), actual.mean, *tolerances[1:])
    assert torch.equal(actual.first, actual.tokens[:, :prefix])
    assert torch.equal(actual.written(), actual.tokens)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "prefix"), CASES)
def test_kernel_finds_what_norms_tokens(shape, prefix: int, dtype: torch.dtype) -> None:
    inputs = draw(shape, dtype)
    check(inputs, prefix, kernels.statistics(*inputs, prefix))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@SHAPES
def test_kernel_is_the_norm(shape, dtype: torch.dtype) -> None:
    inputs = draw(shape, dtype)
    expected, actual = reference(*inputs), kernels.norm(*inputs)
    assert (actual.dtype, actual.is_contiguous()) == (dtype, True)
    assert_close("kernel", expected, actual)
    assert torch.equal(torch.ops.gspn2.layer_norm(*inputs), actual)
    assert_close("function", expected, layer_norm(*inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@SHAPES
def test_kernel_adds_to_what_it_norms(shape, dtype: torch.dtype) -> None:
    inputs = draw(shape, dtype)
    addend = inputs[2].flip(0) * 3
    normed, total = kernels.norm_and_sum(*inputs, addend)
    assert torch.equal(normed, kernels.norm(*inputs))
    assert_close("total", inputs[0].double() + addend.double(), total)
    for function in (torch.ops.gspn2.norm_and_sum, norm_and_sum):
        others = function(*inputs, addend)
        assert_close("normed", reference(*inputs), others[0])
        assert_close("total", inputs[0].double() + addend.double(), others[1])


@SUMS
def test_a_sum_with_nothing_is_a_copy(function) -> None:
    x, *others = draw((2, 9, 40), torch.float32)
    slice_of_tokens = x[:, 1:]
    normed, total = function(slice_of_tokens, *others, None)
    assert_close("normed", reference(slice_of_tokens, *others), normed)
    assert torch.equal(total, slice_of_tokens)
    assert total.data_ptr() != slice_of_tokens.data_ptr()
    assert total.is_contiguous()


@SUMS
def test_an_addend_that_does_not_fit_is_named(function) -> None:
    with pytest.raises(ValueError, match=r"addend has shape \(23,\), expected \(C,\) = \(24,\)"):
        function(*draw((2, 5, 24), torch.float32), torch.zeros(23, device=DEVICE))


# The mean itself has a rounding error, of half a unit in the last place at least, beside a deviation of 1: in fp32 of
# 4e-6 at 100, and so has its product with the factor. The differences from it are exact where x is two-byte.
@pytest.mark.parametrize(
    ("dtype", "shift", "tolerance"),
    [(torch.float32, 100, 1e-5), (torch.bfloat16, 2, None), (torch.float16, 100, None)],
)
def test_variance_is_that_of_differences(dtype: torch.dtype, shift: float, tolerance: float | None) -> None:
    inputs = draw((2, 17, 192), dtype, shift=shift)
    check(inputs, 1, kernels.statistics(*inputs, 1), tolerance)
    assert_close("norm", reference(*inputs), kernels.norm(*inputs), tolerance)


class Norm(torch.nn.Module):
    forward = staticmethod(norm_tokens)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "prefix"), [*CASES, ((2, 3, 24), 3)])
def test_an_export_gives_norm_and_mean(shape, prefix: int, dtype: torch.dtype) -> None:
    check_export(draw(shape, dtype), prefix)


def test_an_export_sums_as_many_tokens_as_fp16_cannot_count() -> None:
    check_export(draw((1, 70_001, 3), torch.float16), 1)


def check_export(inputs: tuple, prefix: int) -> None:
    program = torch.export.export(Norm(), (*inputs, prefix))
    # The product rounds a sum, and then the mean.
    check_plain(inputs, prefix, program.module()(*inputs, prefix), None, 2 * TOLERANCES[inputs[0].dtype])


@pytest.mark.parametrize("missing", [(1,), (2,), (1, 2)], ids=["no weight", "no bias", "neither"])
def test_norm_without_parameters(missing: tuple[int, ...]) -> None:
    inputs = tuple(None if i in missing else t for i, t in enumerate(draw((2, 5, 40), torch.float32)))
    check(inputs, 1, kernels.statistics(*inputs, 1))
    assert_close("norm", reference(*inputs), kernels.norm(*inputs))
    assert_close("function", reference(*inputs), norm_tokens(*inputs, 1).written())


LAYOUTS = OF_TOKENS | {"one token for all": lambda t: t[:1, :1].expand(2, 7, -1)}


@pytest.mark.parametrize("view", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_of_x(view) -> None:
    x, weight, bias, eps = draw((2, 7, 24), torch.float16)
    inputs = view(x), weight.repeat(2).view(24, 2).T.flatten()[::2], bias, eps
    assert not inputs[0].is_contiguous()
    check(inputs, 1, kernels.statistics(*inputs, 1))
    assert_close("norm", reference(*inputs), kernels.norm(*inputs))


@pytest.mark.parametrize("shape", [(0, 5, 24), (2, 0, 24)], ids=str)
def test_nothing_to_normalise(shape) -> None:
    batch, tokens, channels = shape
    inputs = draw(shape, torch.bfloat16)
    statistics, first, mean = kernels.statistics(*inputs, 0)
    assert [t.shape for t in (statistics, first)] == [(batch, tokens, 2), (batch, 0, channels)]
    for out in (mean, norm_tokens(*inputs, 0).mean):
        assert out.shape == (batch, channels)
        assert not out.any()


def test_mean_of_no_patches_is_zero() -> None:
    inputs = draw((2, 3, 24), torch.float32)
    for mean in (kernels.statistics(*inputs, 3)[2], norm_tokens(*inputs, 3).mean):
        assert not mean.any()


def test_two_runs_give_equal_bits() -> None:
    inputs = draw((2, 35, 40), torch.float16)
    runs = [kernels.statistics(*inputs, 1) for _ in range(2)]
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize("chosen", [kernels.Plan(4, 2, 1), kernels.Plan(8, 2, 7), kernels.Plan(2, 3, 1000)])
def test_programs_share_the_tokens(chosen) -> None:
    inputs = draw((2, 35, 72), torch.float16)
    check(inputs, 1, kernels.statistics(*inputs, 1, chosen=chosen))
    assert_close("norm", reference(*inputs), kernels.norm(*inputs, chosen=chosen))


def test_poison_around_tokens_stays_outside() -> None:
    """No other image, no other token is seen, and no prefix token in the mean."""
    inputs = draw((3, 19, 24), torch.float16)
    expected = kernels.statistics(*inputs, 2)
    inputs[0][::2] = float("nan")
    inputs[0][:, 0] = float("nan")
    for before, after in zip(expected, kernels.statistics(*inputs, 2), strict=True):
        kept = slice(None) if before.ndim == 2 else slice(1, None)
        assert torch.equal(before[1][kept], after[1][kept])


@pytest.mark.parametrize(
    ("channels", "itemsize", "chunk"),
    [(768, 2, 256), (1152, 2, 256), (1024, 2, 256), (384, 2, 128), (768, 4, 128), (1152, 4, 128), (5, 2, 16)],
)
def test_chunks_hold_little_padding(channels: int, itemsize: int, chunk: int) -> None:
    assert kernels._chunk(channels, itemsize) == chunk


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 197, 768), (3, 1370, 384), (2, 5476, 1152)], ids=str)
def test_kernel_on_tokens_of_real_models(shape, dtype: torch.dtype) -> None:
    inputs = draw(shape, dtype)
    normed = [norm_tokens(*inputs, 1) for _ in range(2)]
    assert all(one.tokens is None for one in normed)
    runs = [[getattr(one, name) for name in NAMES] for one in normed]
    check(inputs, 1, runs[0])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
    assert_close("written", reference(*inputs), normed[0].written())


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_function_is_norm_and_mean(dtype: torch.dtype) -> None:
    inputs = draw((2, 7, 24), dtype)
    check_plain(inputs, 1, norm_tokens(*inputs, 1))


def test_opcheck() -> None:
    inputs = draw((2, 3, 24), torch.float32)
    torch.library.opcheck(torch.ops.gspn2.norm_statistics.default, (*inputs, 1))
    torch.library.opcheck(torch.ops.gspn2.norm_statistics.default, (inputs[0], None, None, EPS, 0))
    torch.library.opcheck(torch.ops.gspn2.layer_norm.default, inputs)
    torch.library.opcheck(torch.ops.gspn2.norm_and_sum.default, (*inputs, inputs[1]))


def test_autocast_leaves_it_alone() -> None:
    inputs = draw((2, 3, 24), torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        check(inputs, 1, torch.ops.gspn2.norm_statistics(*inputs, 1))
        assert_close("function", reference(*inputs), norm_tokens(*inputs, 1).written())


def test_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    functions = (lambda *t: norm_tokens(*t).mean), (lambda *t: torch.ops.gspn2.norm_statistics(*t)[2])
    for function in functions:
        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
        for tokens in (5, 9):
            inputs = draw((2, tokens, 24), torch.float32)
            assert_close("mean", of_patches(reference(*inputs), 1), compiled(*inputs, 1))


def test_exports_as_standard_operators() -> None:
    class Exported(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            normed = norm_tokens(x, weight, None, EPS, 1)
            return normed.written(), normed.mean

    x, weight, *_ = draw((2, 5, 24), torch.float32)
    sizes = ({0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("tokens", min=3)}, None)
    program = torch.export.export(Exported(), (x, weight), dynamic_shapes=sizes)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "aten.layer_norm.default" in targets
    assert not [target for target in targets if target.startswith("gspn2")]
    x, *_ = draw((1, 9, 24), torch.float32)
    a, mean = program.module()(x, weight)
    assert_close("tokens", reference(x, weight, None, EPS), a)
    assert_close("mean", of_patches(a, 1), mean)


BAD = [
    (0, lambda t: t[0], r"x has shape \(3, 24\), expected \(B, N, C\)"),
    (0, lambda t: t.int(), r"x has dtype torch.int32, expected one of torch.float64, "),
    (1, lambda t: t[:4], r"weight has shape \(4,\), expected \(C,\) = \(24,\)"),
    (2, lambda t: t[None], r"bias has shape \(1, 24\), expected \(C,\) = \(24,\)"),
    (2, lambda t: t.half(), r"bias of shape \(24,\) has dtype torch.float16, expected torch.float32"),
    (4, lambda _: 4, r"prefix is 4, expected 0 to 3, the number of tokens"),
    (4, lambda _: -1, r"prefix is -1, expected 0 to 3, the number of tokens"),
]


@ROUTES
@pytest.mark.parametrize(("place", "edit", "message"), BAD)
def test_bad_inputs_are_named(function, place: int, edit, message: str) -> None:
    arguments = [*draw((2, 3, 24), torch.float32), 1]
    arguments[place] = edit(arguments[place])
    with pytest.raises(ValueError, match=message):
        function(*arguments)
