"""The reading of prefix tokens and patches against fp64: the kernels, in the interpreter or on a GPU, the op.

Shapes: B batch, N tokens, P prefix tokens, C channels, h heads, d head dimension, S columns of the share.
"""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gspn2_kernels.prefix import read_prefix
from gspn2_kernels.testing import TOLERANCES, assert_close
from gspn2convert import prefix as toolkit
from helpers.layouts import OF_TOKENS
from helpers.norms import DEVICE, NORM, draw_norm, unwritten
from helpers.prefix_reads import draw, reference, tokens_of

pytest.importorskip("triton")
kernels = pytest.importorskip("gspn2_kernels.triton_prefix")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = ("read", "share", "values")
# (B, N, C, h, d, P); a tile holds 32, 64 or 128 tokens and up to 64 channels.
CASES = [
    pytest.param((2, 35, 24, 3, 8, 1), id="three heads of 8"),
    pytest.param((1, 131, 144, 2, 72, 2), id="heads of 72, two tiles"),
    pytest.param((2, 70, 40, 4, 10, 5), id="five prefix tokens"),
    pytest.param((1, 9, 20, 1, 20, 1), id="one head, columns that fill up"),
    pytest.param((2, 4, 16, 2, 8, 3), id="one patch"),
    pytest.param((1, 128, 16, 17, 4, 9), id="two groups of heads, wider than the tokens, a full tile"),
    pytest.param((3, 12, 48, 6, 8, 12), id="no patches, more rows than a tile"),
    pytest.param((1, 140, 16, 1, 16, 130), id="more prefix tokens than columns of a program"),
]


def function(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """The public function, with the op's arguments."""
    return read_prefix(unwritten(*arguments[:4]), *arguments[4:])


ROUTES = pytest.mark.parametrize("route", [function, torch.ops.gspn2.read_prefix], ids=["function", "op"])


def run(drawn: dict, **options) -> tuple[Tensor, Tensor, Tensor]:
    return kernels.forward(**drawn, **options)


def check(drawn: dict, actual: tuple[Tensor, ...], tolerance: float | None = None) -> None:
    """Compare with fp64: beside each result the vectors are rounded, and a softmax passes on what its scores got."""
    for name, ref, out in zip(NAMES, reference(drawn), actual, strict=True):
        assert (out.dtype, out.is_contiguous()) == (drawn["projected"].dtype, True)
        assert_close(name, ref, out, tolerance or 2 * TOLERANCES[out.dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CASES)
def test_kernels_read_both_ways(shape, dtype: torch.dtype) -> None:
    drawn = draw(shape, dtype)
    actual, first = run(drawn), shape[5] * shape[3]
    check(drawn, actual)
    assert not actual[1][..., first + shape[3] :].any()
    assert not actual[2][:, first:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_of_queries_and_values_may_be_missing(dtype: torch.dtype) -> None:
    drawn = draw((2, 35, 24, 3, 8, 2), dtype) | {"qkv_bias": None}
    check(drawn, run(drawn))


@pytest.mark.parametrize("missing", [("norm_weight",), ("norm_bias",), ("norm_weight", "norm_bias")], ids=str)
def test_norm_without_parameters(missing: tuple[str, ...]) -> None:
    drawn = draw((2, 35, 24, 3, 8, 2), torch.float32) | dict.fromkeys(missing)
    check(drawn, run(drawn))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shift", [0.5, 30])
def test_stream_may_be_wider_than_the_rest(dtype: torch.dtype, shift: float) -> None:
    """As under autocast; it has digits, and here a number, that the rest has not."""
    drawn = draw((2, 70, 40, 4, 10, 2), torch.float32, shift)
    drawn["stream"][0, 5, 7] = 2e5
    drawn["statistics"] = draw_norm(drawn["stream"])["statistics"]
    drawn |= {name: t.to(dtype) for name, t in drawn.items() if isinstance(t, Tensor) and name not in NORM}
    # The normed tokens are rounded as well.
    check(drawn, run(drawn), 3 * TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_far_from_zero(dtype: torch.dtype) -> None:
    drawn = draw((2, 150, 48, 3, 16, 1), dtype, shift=8)
    check(drawn, run(drawn))


def test_large_scores_overflow_nowhere() -> None:
    """Scores of hundreds, of either sign, in every tile another greatest one."""
    drawn = draw((2, 150, 48, 3, 16, 2), torch.float32, size=200)
    query = drawn["projected"][..., :48].unflatten(2, (3, 16))
    keys = F.linear(tokens_of(drawn).float(), drawn["qkv_weight"][48:96]).unflatten(2, (3, 16))
    scores = torch.einsum("bphd,bnhd->bphn", query, keys) * drawn["scale"]
    assert (scores.amax(-1) > 200).all()
    assert (scores.amin(-1) < -200).all()
    # A score of 500 in fp32 is off by some 3e-5.
    check(drawn, run(drawn), 1e-4)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_large_scores_of_two_bytes_stay_finite(dtype: torch.dtype) -> None:
    for out in run(draw((2, 150, 48, 3, 16, 2), dtype, size=200)):
        assert out.isfinite().all()


LAYOUTS = OF_TOKENS | {"one image for all": lambda t: t[:1].expand(2, -1, -1)}


@pytest.mark.parametrize("view", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_of_x(view) -> None:
    drawn = draw((2, 35, 24, 3, 8, 1), torch.float16)
    drawn["stream"] = view(drawn["stream"])
    drawn["statistics"] = draw_norm(drawn["stream"])["statistics"]
    assert not drawn["stream"].is_contiguous()
    check(drawn, run(drawn))


def test_layouts_of_the_rest() -> None:
    drawn = draw((2, 35, 24, 3, 8, 2), torch.float32)
    apart = {name: t.repeat_interleave(2, -1)[..., ::2] for name, t in drawn.items() if isinstance(t, Tensor)}
    assert not any(t.is_contiguous() for t in apart.values())
    for expected, actual in zip(run(drawn), run(drawn | apart), strict=True):
        assert torch.equal(expected, actual)


@pytest.mark.parametrize("options", [(32, 128, 8, 3), (16, 16, 4, 2)], ids=str)
def test_any_tile_will_do(options: tuple[int, ...]) -> None:
    drawn = draw((2, 300, 144, 2, 72, 2), torch.float16)
    check(drawn, run(drawn, chosen=kernels.Plan(*options)))


def test_poison_in_other_images_stays_there() -> None:
    drawn = draw((3, 70, 24, 3, 8, 2), torch.float16)
    expected = run(drawn)
    for name in ("stream", "statistics"):
        drawn[name][::2] = float("nan")
    drawn["projected"][::2] = float("nan")
    for before, after in zip(expected, run(drawn), strict=True):
        assert torch.equal(before[1], after[1])


def test_two_runs_give_equal_bits() -> None:
    drawn = draw((2, 150, 40, 4, 10, 2), torch.float16)
    assert all(torch.equal(*pair) for pair in zip(run(drawn), run(drawn), strict=True))


def test_no_images() -> None:
    drawn = draw((0, 35, 24, 3, 8, 1), torch.float16)
    for out in (run(drawn), function(*drawn.values())):
        assert [tuple(t.shape) for t in out] == [(0, 1, 24), (0, 34, 8), (0, 8, 24)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(4, 4097, 768, 12, 64, 1), (64, 197, 768, 12, 64, 1), (2, 1374, 1024, 16, 64, 5), (2, 730, 1152, 16, 72, 1)],
    ids=str,
)
def test_kernels_on_tokens_of_real_models(shape, dtype: torch.dtype) -> None:
    drawn = draw(shape, dtype)
    runs = [function(*drawn.values()) for _ in range(2)]
    check(drawn, runs[0])
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def prefix_read(dtype: torch.dtype, channels: int, heads: int) -> toolkit.PrefixRead:
    torch.manual_seed(0)
    read = toolkit.PrefixRead(Attention(channels, heads, qkv_bias=True), exact=True, gate=True)
    for parameter in read.requires_grad_(False).parameters():
        parameter.normal_(0, channels**-0.5)
    return read.to(DEVICE, dtype)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 35, 24, 3, 2), torch.float32),
        pytest.param((4, 1025, 768, 12, 1), torch.bfloat16, marks=pytest.mark.gpu),
        pytest.param((2, 1374, 1024, 16, 5), torch.bfloat16, marks=pytest.mark.gpu),
    ],
    ids=str,
)
@torch.no_grad()
def test_module_gives_the_same_without_the_op(shape, dtype: torch.dtype) -> None:
    batch, tokens, channels, heads, prefix = shape
    read = prefix_read(dtype, channels, heads)
    x = torch.randn(batch, tokens, channels, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype) + 0.5
    norm = draw_norm(x)
    grid = (1, tokens - prefix)
    of_normed = read.of_normed(unwritten(*norm.values(), prefix=prefix), grid)
    # Plain torch has no columns that fill up, and rounds scores and weights as well.
    runs = read(tokens_of(norm).to(dtype), grid), of_normed
    parts = [(out, share @ values) for out, share, values in runs]
    for name, expected, actual in zip(("read", "gated"), *parts, strict=True):
        assert_close(name, expected, actual, 4 * TOLERANCES[dtype])


def test_opcheck() -> None:
    drawn = draw((2, 9, 24, 3, 8, 2), torch.float32)
    for arguments in (drawn, drawn | {"qkv_bias": None}):
        torch.library.opcheck(torch.ops.gspn2.read_prefix.default, tuple(arguments.values()))


@ROUTES
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_autocast_casts_all_but_the_stream(route, dtype: torch.dtype) -> None:
    drawn = draw((2, 9, 24, 3, 8, 1), torch.float32)
    with torch.autocast(DEVICE, dtype):
        actual = route(*drawn.values())
    cast = [t.to(dtype) if isinstance(t, Tensor) and name not in NORM else t for name, t in drawn.items()]
    assert all(torch.equal(*pair) for pair in zip(route(*cast), actual, strict=True))


def test_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *t: torch.ops.gspn2.read_prefix(*t), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for tokens in (7, 11):
        drawn = draw((2, tokens, 24, 3, 8, 1), torch.float32)
        check(drawn, compiled(*drawn.values()))


@ROUTES
def test_flops_are_those_of_its_products(route) -> None:
    drawn = draw((2, 9, 24, 3, 8, 2), torch.float32)
    with FlopCounterMode(display=False) as counter:
        route(*drawn.values())
    scores, pooled, folds = 9 * 24 * (3 + 2) * 3, 9 * 24 * 2 * 3, 2 * 24 * 24
    assert counter.get_total_flops() == 2 * 2 * (scores + pooled + 4 * folds)


BAD = [
    ("stream", lambda t: t[:, :8], r"statistics has shape \(2, 9, 2\), expected \(B, N, 2\) = \(2, 8, 2\)"),
    ("statistics", lambda t: t.half(), r"statistics has dtype torch.float16, expected torch.float32"),
    ("norm_weight", lambda t: t[:8], r"norm_weight has shape \(8,\), expected \(C,\) = \(24,\)"),
    ("norm_bias", lambda t: t.half(), r"norm_bias of shape \(24,\) has dtype torch.float16, expected torch.float32"),
    ("projected", lambda t: t.double(), r"projected has dtype torch.float64, for which there is no kernel"),
    (
        "projected",
        lambda t: t.repeat(1, 5, 1),
        r"projected has 10 prefix tokens, expected 1 to 9, the number of tokens",
    ),
    ("projected", lambda t: t[:, 0], r"projected has shape \(2, 72\), expected \(B, P, 3 h d\)"),
    ("projected", lambda t: t[:1], r"projected has shape \(1, 2, 72\), expected \(B, P, 3 h d\) = \(2, 2, 72\)"),
    ("projected", lambda t: t[:, :0], r"projected has 0 prefix tokens, expected 1 to 9, the number of tokens"),
    ("qkv_bias", lambda t: t.half(), r"qkv_bias of shape \(72,\) has dtype torch.float16, expected torch.float32"),
    ("qkv_weight", lambda t: t[:24], r"qkv_weight has shape \(24, 24\), expected \(3 h d, C\) = \(72, 24\)"),
    ("qkv_bias", lambda t: t[:24], r"qkv_bias has shape \(24,\), expected \(3 h d,\) = \(72,\)"),
    ("proj_weight", lambda t: t[:8], r"proj_weight has shape \(8, 24\), expected \(C, h d\) = \(24, 24\)"),
    ("log_sum_weight", lambda t: t[:2], r"log_sum_weight has shape \(2, 24\), expected \(h, C\) = \(3, 24\)"),
    ("log_sum_bias", lambda t: t.to("meta"), r"log_sum_bias of shape \(3,\) is on meta, expected "),
    ("heads", lambda _: 5, r"heads is 5, expected a divisor of a third of 72, the last size of projected"),
    ("heads", lambda _: 0, r"heads is 0, expected a divisor of a third of 72, the last size of projected"),
]


@ROUTES
@pytest.mark.parametrize(("name", "edit", "message"), BAD)
def test_bad_inputs_are_named(route, name: str, edit, message: str) -> None:
    drawn = draw((2, 9, 24, 3, 8, 2), torch.float32)
    drawn[name] = edit(drawn[name])
    with pytest.raises(ValueError, match=message):
        route(*drawn.values())
