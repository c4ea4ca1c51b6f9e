"""The local perception against `F.conv2d` in fp64: the kernels, in the interpreter or on a GPU, the ops, plain torch.

Shapes: B batch, H W grid, C channels, P prefix tokens.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gspn2_kernels.local import local_perception
from gspn2_kernels.testing import TOLERANCES, assert_close

pytest.importorskip("triton")
kernels = pytest.importorskip("gspn2_kernels.triton_local")
gradient = pytest.importorskip("gspn2_kernels.triton_local_gradient")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PREFIX = 3
NAMES = ("out", "da", "dweight", "dbase")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# A tile is 16 positions by 128 channels of two bytes, or 8 by 256; a program takes two or three rows of such grids.
CASES = [
    pytest.param((1, 1, 1, 8), id="one position"),
    pytest.param((2, 1, 7, 16), id="one row"),
    pytest.param((1, 4, 1, 5), id="one column"),
    pytest.param((1, 2, 17, 24), id="wide, two tiles of positions"),
    pytest.param((1, 5, 3, 20), id="tall, vectors of four"),
    pytest.param((1, 2, 2, 131), id="square, ragged blocks of channels"),
]
ROUTES = pytest.mark.parametrize("route", ["ops", "functions"])


def draw(shape, dtype: torch.dtype, device: str = DEVICE) -> dict[str, Tensor]:
    """All that the function takes, and a gradient; a is a slice of tokens, nothing has mean 0."""
    batch, height, width, channels = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return (torch.randn(size, generator=generator, dtype=torch.float64) + 0.5).to(device, dtype)

    return {
        "a": normal(batch, PREFIX + height * width, channels)[:, PREFIX:].unflatten(1, (height, width)),
        "weight": normal(channels, 1, 3, 3),
        "base": normal(*shape),
        "dout": normal(*shape),
    }


def convolve(a: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(a.permute(0, 3, 1, 2), weight, padding=1, groups=weight.shape[0]).permute(0, 2, 3, 1)


def reference(a: Tensor, weight: Tensor, base: Tensor | None) -> Tensor:
    return convolve(a, weight) if base is None else base + convolve(a, weight)


def with_gradients(function, a: Tensor, weight: Tensor, base: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
    """Return the result and the gradients of a, weight and base."""
    inputs = [t.detach().requires_grad_() for t in (a, weight, base)]
    out = function(*inputs)
    return (out.detach(), *torch.autograd.grad(out, inputs, dout.to(out.dtype)))


def in_fp64(drawn: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return with_gradients(reference, *(drawn[name].double() for name in ("a", "weight", "base", "dout")))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CASES)
def test_kernels_are_the_convolution(shape, dtype: torch.dtype) -> None:
    drawn = draw(shape, dtype)
    a, weight, base, dout = (drawn[name] for name in ("a", "weight", "base", "dout"))
    actual = kernels.forward(a, weight, base), *kernels.backward(dout, a, weight)
    for name, ref, out in zip(NAMES, in_fp64(drawn), actual, strict=False):
        assert out.dtype == dtype
        assert out.is_contiguous()
        assert_close(name, ref, out)


def test_a_program_sums_up_several_tiles_and_images(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (kernels, gradient):
        monkeypatch.setattr(module, "PROGRAMS", 1)
    drawn = draw((2, 3, 17, 70), torch.float32)
    da, dweight = kernels.backward(drawn["dout"], drawn["a"], drawn["weight"])
    _, da_ref, dweight_ref, _ = in_fp64(drawn)
    assert_close("da", da_ref, da)
    assert_close("dweight", dweight_ref, dweight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_fp32(dtype: torch.dtype) -> None:
    """A filter that takes differences of neighbours, on activations that are far from zero."""
    drawn = draw((1, 3, 6, 8), dtype)
    a, dout = drawn["a"] + 16, drawn["dout"] + 16
    centred = (drawn["weight"] * 8).round() / 8
    centred[:, :, 1, 1] -= centred.sum((1, 2, 3))[:, None]
    assert not centred.sum((1, 2, 3)).any()
    exact = with_gradients(reference, a.double(), centred.double(), torch.zeros_like(a).double(), dout.double())
    actual = kernels.forward(a, centred, None), *kernels.backward(dout, a, centred)
    for name, ref, out in zip(NAMES, exact, actual, strict=False):
        assert_close(name, ref, out, 1e-5 if dtype == torch.float32 else None)


@pytest.mark.parametrize("shape", [(0, 3, 4, 8), (2, 0, 4, 8), (2, 3, 0, 8)], ids=str)
def test_empty_grids(shape) -> None:
    drawn = draw(shape, torch.float32)
    a, weight, base, dout = (drawn.pop(name) for name in ("a", "weight", "base", "dout"))
    da, dweight = kernels.backward(dout, a, weight)
    assert kernels.forward(a, weight, base).shape == da.shape == shape
    assert torch.equal(dweight, torch.zeros_like(weight))


def test_layouts_that_are_no_slice_of_tokens() -> None:
    drawn = draw((2, 2, 3, 8), torch.float32)
    drawn["a"] = drawn["a"].transpose(1, 2).contiguous().transpose(1, 2)
    drawn["base"] = drawn["base"].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    drawn["dout"] = torch.ones((), device=DEVICE).expand(2, 2, 3, 8)
    a, weight, base, dout = (drawn[name] for name in ("a", "weight", "base", "dout"))
    actual = kernels.forward(a, weight, base), *kernels.backward(dout, a, weight)
    for name, ref, out in zip(NAMES, in_fp64(drawn), actual, strict=False):
        assert out.is_contiguous()
        assert_close(name, ref, out)


def test_two_runs_give_equal_bits() -> None:
    drawn = draw((1, 3, 4, 8), torch.float32)
    runs = [kernels.backward(drawn["dout"], drawn["a"], drawn["weight"]) for _ in range(2)]
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 14, 14, 768), (3, 37, 37, 384), (2, 65, 147, 1152), (1, 200, 9, 192)], ids=str)
def test_kernels_on_grids_of_real_models(shape, dtype: torch.dtype) -> None:
    drawn = draw(shape, dtype)
    a, weight, base, dout = (drawn[name] for name in ("a", "weight", "base", "dout"))
    for name, ref, out in zip(
        NAMES, in_fp64(drawn), with_gradients(local_perception, a, weight, base, dout), strict=True
    ):
        # The gradient of the weight sums up thousands of products.
        assert_close(name, ref, out, 1e-5 if dtype == torch.float32 else None)


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
def test_function_is_the_convolution(dtype: torch.dtype) -> None:
    drawn = draw((2, 5, 3, 20), dtype)
    a, weight, base, dout = (drawn.pop(name) for name in ("a", "weight", "base", "dout"))
    actual = with_gradients(local_perception, a, weight, base, dout)
    expected = with_gradients(reference, *(t.double() for t in (a, weight, base, dout)))
    for name, ref, out in zip(NAMES, expected, actual, strict=True):
        assert out.dtype == dtype
        assert_close(name, ref, out)
    assert actual[0].is_contiguous()
    assert_close("without base", convolve(a.double(), weight.double()), local_perception(a, weight))


def test_gradients_of_the_op() -> None:
    drawn = draw((1, 4, 3, 8), torch.float32)
    a, weight, base, dout = (drawn[name] for name in ("a", "weight", "base", "dout"))
    actual = with_gradients(torch.ops.gspn2.local_perception, a, weight, base, dout)
    for name, ref, out in zip(NAMES, in_fp64(drawn), actual, strict=True):
        assert_close(name, ref, out)


def test_opcheck() -> None:
    drawn = draw((1, 2, 3, 4), torch.float32)
    a, weight, base, dout = (drawn.pop(name) for name in ("a", "weight", "base", "dout"))
    ops = torch.ops.gspn2
    torch.library.opcheck(ops.local_perception_backward.default, (dout, a, weight))
    inputs = [t.detach().requires_grad_() for t in (a, weight, base)]
    torch.library.opcheck(ops.local_perception.default, tuple(inputs))


class Local(torch.nn.Module):
    """The local perception of patches after prefix tokens, added to a projection."""

    def __init__(self, route: str) -> None:
        super().__init__()
        self.perception = local_perception if route == "functions" else torch.ops.gspn2.local_perception
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.proj = torch.nn.Linear(8, 8)
            self.lpu = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.to(DEVICE)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        a = tokens[:, PREFIX:].unflatten(1, grid)
        return self.perception(a, self.lpu.weight, self.proj(a))


def tokens_of(grid: tuple[int, int], batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, PREFIX + grid[0] * grid[1], 8, generator=generator).to(DEVICE)


@ROUTES
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_compiles_as_one_graph(route: str, autocast: bool) -> None:
    torch._dynamo.reset()
    module = Local(route)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for grid in ((2, 3), (3, 2)):
        tokens = tokens_of(grid)
        results = []
        for function in (module, compiled):
            module.zero_grad()
            with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
                out = function(tokens, grid)
            assert out.dtype == (torch.bfloat16 if autocast else torch.float32)
            out.float().square().sum().backward()
            results.append([out, *(p.grad.clone() for p in module.parameters())])
        for i, (ref, actual) in enumerate(zip(*results, strict=True)):
            assert_close(f"{grid} {i}", ref, actual, 0 if autocast else 1e-6)


def test_exports_as_a_standard_convolution_for_every_size() -> None:
    class Exported(Local):
        def forward(self, patches: Tensor) -> Tensor:
            return local_perception(patches, self.lpu.weight, self.proj(patches))

    module = Exported("functions").eval()
    sizes = {i: torch.export.Dim(name, min=1) for i, name in enumerate(("batch", "height", "width"))}
    program = torch.export.export(module, (torch.randn(2, 3, 5, 8, device=DEVICE),), dynamic_shapes=(sizes,))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count("aten.conv2d.default") == 1
    assert not [target for target in targets if target.startswith("gspn2")]
    for size in ((2, 3, 5, 8), (1, 7, 4, 8), (3, 1, 4, 8)):
        patches = torch.randn(size, device=DEVICE)
        assert_close(str(size), module(patches), program.module()(patches), 1e-6)


@ROUTES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_all_inputs_to_its_dtype(route: str, dtype: torch.dtype) -> None:
    perception = local_perception if route == "functions" else torch.ops.gspn2.local_perception
    a, weight, base, dout = draw((1, 2, 3, 8), torch.float32).values()
    base = base.to(torch.bfloat16)  # a projection under autocast beside parameters in fp32
    with torch.autocast(DEVICE, dtype):
        actual = with_gradients(perception, a, weight, base, dout)
    expected = with_gradients(perception, *(t.to(dtype) for t in (a, weight, base, dout)))
    assert actual[0].dtype == dtype
    assert [t.dtype for t in actual[1:]] == [a.dtype, weight.dtype, base.dtype]
    for name, ref, out in zip(NAMES, expected, actual, strict=True):
        assert torch.equal(ref.to(out.dtype), out), name


BAD = [
    ("a", lambda t: t[0], r"a has shape \(3, 5, 8\), expected \(B, H, W, C\)"),
    ("a", lambda t: t.int(), r"a has dtype torch.int32, expected one of torch.float64, "),
    ("weight", lambda t: t[:4], r"weight has shape \(4, 1, 3, 3\), expected \(C, 1, 3, 3\) = \(8, 1, 3, 3\)"),
    ("weight", lambda t: t.half(), r"weight of shape \(8, 1, 3, 3\) has dtype torch.float16, expected torch.float32"),
    ("base", lambda t: t[:, :2], r"base has shape \(2, 2, 5, 8\), expected \(B, H, W, C\) = \(2, 3, 5, 8\)"),
    ("base", lambda t: t.to("meta"), r"base of shape \(2, 3, 5, 8\) is on meta, expected "),
]


@ROUTES
@pytest.mark.parametrize(("name", "edit", "message"), BAD)
def test_bad_inputs_are_named(route: str, name: str, edit, message: str) -> None:
    drawn = draw((2, 3, 5, 8), torch.float32)
    drawn[name] = edit(drawn[name])
    perception = local_perception if route == "functions" else torch.ops.gspn2.local_perception
    with pytest.raises(ValueError, match=message):
        perception(drawn["a"], drawn["weight"], drawn["base"])


@ROUTES
def test_flops_are_those_of_a_convolution(route: str) -> None:
    perception = local_perception if route == "functions" else torch.ops.gspn2.local_perception
    drawn = draw((1, 2, 3, 8), torch.float32)
    a, weight = drawn["a"].requires_grad_(), drawn["weight"].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        out = perception(a, weight, None)
        assert counter.get_total_flops() == 18 * a.numel()
        out.sum().backward()
    if route == "ops":
        assert counter.get_total_flops() == 3 * 18 * a.numel()
