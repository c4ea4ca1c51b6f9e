"""The torch op against the reference, and its registrations.

Shapes: B batch, H W grid, C channels, G groups.
"""

import logging

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gspn2_kernels import backend, line_scan, line_scan_ref, register_backend
from gspn2_kernels.eager import line_scan_bwd, line_scan_fwd
from gspn2_kernels.testing import TOLERANCES, assert_close, random_inputs, relative_rms
from helpers.layouts import planar

NAMES = ("y", "dx", "dlam", "dlogits", "du")
# Lines of one position and of one line, odd sizes, one square grid per code path, the grids of ViT-S/16 and S/14.
CASES = [
    pytest.param((2, 1, 7, 1), 1, 0, id="one row"),
    pytest.param((2, 7, 1, 5), 1, 3, id="one column"),
    pytest.param((1, 1, 1, 5), 5, 0, id="one position"),
    pytest.param((2, 7, 14, 5), 1, 0, id="wide"),
    pytest.param((2, 14, 7, 32), 2, 1, id="tall, every line restarts"),
    pytest.param((1, 7, 7, 32), 2, 3, id="square, ragged last segment"),
    pytest.param((2, 14, 14, 32), 1, 0, id="square"),
    pytest.param((1, 14, 37, 5), 5, 3, id="a group per channel"),
    pytest.param((1, 37, 14, 32), 2, 100, id="segment longer than the grid"),
    pytest.param((1, 37, 37, 1), 1, 7, id="one channel"),
]


def with_gradients(scan, inputs, dy: Tensor, segment: int = 0) -> tuple[Tensor, ...]:
    """Return y and the gradients of the four inputs."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    y = scan(*inputs, segment)
    return (y.detach(), *torch.autograd.grad(y, inputs, dy, materialize_grads=True))


def test_memory_is_poisoned() -> None:
    """What the other tests rely on: an element of a result that nobody writes is NaN, and fails."""
    assert torch.empty(3).isnan().all()


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize(("shape", "groups", "segment"), CASES)
def test_op_is_the_reference(shape, groups: int, segment: int, dtype: torch.dtype, packed: bool) -> None:
    inputs = random_inputs(shape, groups, dtype, packed=packed)
    dy = torch.randn(inputs[1].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = with_gradients(line_scan_ref, [t.double() for t in inputs], dy.double(), segment)
    actual = with_gradients(line_scan, inputs, dy, segment)
    for name, ref, out in zip(NAMES, expected, actual, strict=True):
        assert out.dtype == dtype
        assert out.is_contiguous()
        assert_close(name, ref, out)


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 1, 1, 2), (2, 0, 3, 4)], ids=str)
def test_planes_in_planes_out(shape) -> None:
    """Where lam has the directions outermost in memory, so has y."""
    x, lam, logits, u = random_inputs(shape)
    inputs = (x, planar(lam), logits, u)
    dy = torch.randn(lam.shape, generator=torch.Generator().manual_seed(1))
    expected = with_gradients(line_scan_ref, [t.double() for t in inputs], dy.double(), 2)
    y, *gradients = with_gradients(line_scan, inputs, dy, 2)
    assert y.movedim(3, 0).is_contiguous()
    for name, ref, out in zip(NAMES, expected, (y, *gradients), strict=True):
        assert_close(name, ref, out)
    torch.library.opcheck(torch.ops.gspn2.line_scan.default, (*(t.detach().requires_grad_() for t in inputs), 2))


@pytest.mark.parametrize("layout", [Tensor.contiguous, planar], ids=["pixels", "planes"])
@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 1, 1, 2), (0, 2, 3, 4)], ids=str)
def test_result_may_be_changed_in_place(shape, layout) -> None:
    x, lam, logits, u = random_inputs(shape)
    y = line_scan(x.requires_grad_(), layout(lam), logits, u)
    expected = 2 * y.detach()
    assert torch.equal(y.mul_(2), expected)


@pytest.mark.parametrize("layout", [Tensor.contiguous, planar], ids=["pixels", "planes"])
def test_export_of_a_number_of_images_that_depends_on_data(layout) -> None:
    class Chosen(torch.nn.Module):
        def forward(self, x: Tensor, lam: Tensor, logits: Tensor, u: Tensor, which: Tensor) -> Tensor:
            x, lam, logits, u = (t[which] for t in (x, lam, logits, u))
            return line_scan(x, layout(lam), logits, u, 2) * 2

    inputs, which = random_inputs((3, 4, 5, 2)), torch.tensor([True, False, True])
    exported = torch.export.export(Chosen(), (*inputs, which)).module()
    for chosen in (which, ~which):
        assert torch.equal(exported(*inputs, chosen), Chosen()(*inputs, chosen))


def test_gradient_of_the_logits_on_a_long_scan() -> None:
    """The state grows far above the differences of neighbours that this gradient lives on.

    Taken from the states instead of their differences, it would be off by 2.6e-6 here.
    """
    inputs = random_inputs((1, 147, 5, 8))
    dy = torch.ones_like(inputs[1])
    expected = with_gradients(line_scan_ref, [t.double() for t in inputs], dy.double())
    for name, ref, out in zip(NAMES, expected, with_gradients(line_scan, inputs, dy), strict=True):
        assert_close(name, ref, out)


def test_gradient_arrives_expanded() -> None:
    inputs = random_inputs((2, 3, 4, 2))
    dy = torch.ones(()).expand(inputs[1].shape)
    expected = with_gradients(line_scan_ref, inputs, dy)
    for name, ref, out in zip(NAMES, expected, with_gradients(line_scan, inputs, dy), strict=True):
        assert_close(name, ref, out)


def test_two_runs_give_equal_bits() -> None:
    inputs = random_inputs((3, 14, 14, 32), groups=2)
    first = with_gradients(line_scan, inputs, torch.ones_like(inputs[1]))
    second = with_gradients(line_scan, inputs, torch.ones_like(inputs[1]))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("segment", [0, 2])
def test_opcheck(segment: int, dtype: torch.dtype) -> None:
    inputs = random_inputs((2, 3, 4, 4), groups=2, dtype=dtype, packed=True)
    dy = torch.ones_like(inputs[1])
    torch.library.opcheck(torch.ops.gspn2.line_scan_backward.default, (dy, *inputs, segment))
    inputs = tuple(t.detach().requires_grad_() for t in inputs)
    torch.library.opcheck(torch.ops.gspn2.line_scan.default, (*inputs, segment))


class Mixer(torch.nn.Module):
    """The op between two projections, as in a model."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.down, self.control, self.merge = (torch.nn.Linear(a, b) for a, b in ((8, 4), (8, 44), (16, 8)))

    def forward(self, tokens: Tensor) -> Tensor:
        lam, u, logits = self.control(tokens).split([16, 16, 12], dim=-1)
        lam, u, logits = lam.unflatten(-1, (4, 4)), u.unflatten(-1, (4, 4)), logits.unflatten(-1, (4, 1, 3))
        return self.merge(line_scan(self.down(tokens), lam, logits, u, 2).flatten(-2))


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_compiles_as_one_graph_for_every_size(autocast: bool) -> None:
    torch._dynamo.reset()
    mixer = Mixer()
    compiled = torch.compile(mixer, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((2, 3, 5, 8), (3, 6, 4, 8), (2, 4, 4, 8)):
        tokens = torch.randn(size, generator=torch.Generator().manual_seed(0))
        results = []
        for module in (mixer, compiled):
            mixer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = module(tokens)
            y.float().square().sum().backward()
            results.append([y, *(p.grad.clone() for p in mixer.parameters())])
        for i, (ref, out) in enumerate(zip(*results, strict=True)):
            assert_close(f"{size} {i}", ref, out, 0 if autocast else 1e-6)


def test_exports_as_one_node_for_every_size() -> None:
    mixer = Mixer().eval()
    sizes = {i: torch.export.Dim(name, min=1) for i, name in enumerate(("batch", "height", "width"))}
    program = torch.export.export(mixer, (torch.randn(2, 3, 5, 8),), dynamic_shapes=(sizes,))
    scans = [node for node in program.graph.nodes if node.target is torch.ops.gspn2.line_scan.default]
    assert len(scans) == 1
    assert scans[0].args[4] == 2
    for size in ((2, 3, 5, 8), (1, 7, 4, 8), (3, 4, 4, 8)):
        tokens = torch.randn(size)
        assert_close(str(size), mixer(tokens), program.module()(tokens), 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_all_inputs_to_its_dtype(dtype: torch.dtype) -> None:
    x, *others = random_inputs((2, 3, 4, 4))
    inputs = [x.to(torch.bfloat16), *others]  # a projection under autocast beside parameters in fp32
    dy = torch.ones(others[0].shape, dtype=dtype)
    with torch.autocast("cpu", dtype):
        actual = with_gradients(line_scan, inputs, dy)
    cast = with_gradients(line_scan, [t.to(dtype) for t in inputs], dy)
    assert actual[0].dtype == dtype
    assert [t.dtype for t in actual[1:]] == [t.dtype for t in inputs]
    for name, ref, out in zip(NAMES, cast, actual, strict=True):
        assert torch.equal(ref.to(out.dtype), out), name


def test_autocast_leaves_fp64_alone() -> None:
    inputs = random_inputs((2, 3, 4, 4), dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = line_scan(*inputs)
    assert_close("y", line_scan_ref(*inputs), y)


def change(index: int, edit) -> list[Tensor]:
    inputs = list(random_inputs((2, 3, 5, 4)))
    inputs[index] = edit(inputs[index])
    return inputs


@pytest.mark.parametrize(
    ("index", "edit", "message"),
    [
        (0, lambda t: t[0], r"x has shape \(3, 5, 4\), expected \(B, H, W, C\)"),
        (0, lambda t: t.int(), r"x has dtype torch.int32, expected one of torch.float64, "),
        (1, lambda t: t[:, :2], r"lam has shape \(2, 2, 5, 4, 4\), expected .* = \(2, 3, 5, 4, 4\)"),
        (1, lambda t: t.double(), r"lam has dtype torch.float64, expected torch.float32, the dtype of x"),
        (2, lambda t: t[..., :2], r"logits has shape \(2, 3, 5, 4, 1, 2\), expected .* = \(2, 3, 5, 4, G, 3\)"),
        (2, lambda t: t.squeeze(4), r"logits has shape \(2, 3, 5, 4, 3\), expected \(B, H, W, 4, G, 3\)"),
        (2, lambda t: t.repeat(1, 1, 1, 1, 3, 1), r"logits has 3 groups, expected a divisor of the 4 channels of x"),
        (2, lambda t: t[:, :, :, :, :0], r"logits has 0 groups, expected a divisor of the 4 channels of x"),
        (3, lambda t: t[:, :, :, :3], r"u has shape \(2, 3, 5, 3, 4\), expected .* = \(2, 3, 5, 4, 4\)"),
        (3, lambda t: t.to("meta"), r"u is on meta, expected cpu, the device of x"),
    ],
)
def test_bad_inputs_are_named(index: int, edit, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        line_scan(*change(index, edit))


def test_negative_segment_is_refused() -> None:
    with pytest.raises(ValueError, match=r"segment is -1, expected 0"):
        line_scan(*random_inputs((2, 3, 5, 4)), segment=-1)


def test_registered_backend_runs_on_its_device(caplog: pytest.LogCaptureFixture) -> None:
    inputs = random_inputs((2, 3, 5, 4))
    dy = torch.ones_like(inputs[1])
    expected = with_gradients(line_scan, inputs, dy)

    def forward(*arguments) -> Tensor:
        return 2 * line_scan_fwd(*arguments)

    def backward(*arguments) -> tuple[Tensor, ...]:
        return tuple(3 * gradient for gradient in line_scan_bwd(*arguments))

    assert backend("cpu") == "eager"
    assert backend(torch.device("cuda", 1)) == backend("cuda")
    with caplog.at_level(logging.INFO):
        register_backend("cpu", "scaled", forward, backward)
    try:
        assert backend("cpu") == "scaled"
        assert "scaled" in caplog.text
        actual = with_gradients(line_scan, inputs, dy)
    finally:
        register_backend("cpu", "eager", line_scan_fwd, line_scan_bwd)
    for name, factor, ref, out in zip(NAMES, (2, 3, 3, 3, 3), expected, actual, strict=True):
        assert_close(name, factor * ref, out)


def test_flops_are_ten_per_element() -> None:
    with FlopCounterMode(display=False) as counter:
        line_scan(*random_inputs((2, 3, 5, 4)))
    assert counter.get_total_flops() == 10 * 2 * 3 * 5 * 4 * 4


def test_assert_close_measures_the_relative_rms() -> None:
    ref = torch.tensor([3.0, 4.0])
    assert relative_rms(ref, ref + torch.tensor([0.03, 0.04])) == pytest.approx(0.01)
    assert relative_rms(torch.zeros(2), torch.full((2,), 0.5)) == pytest.approx(0.5)
    with pytest.raises(AssertionError, match=r"h: relative RMS error 1.00e-02, expected at most 2.00e-06"):
        assert_close("h", ref, 1.01 * ref)
    with pytest.raises(AssertionError, match="relative RMS error nan"):
        assert_close("h", ref, torch.full((2,), torch.nan))
    with pytest.raises(AssertionError, match=r"h has shape \(1, 2\), expected \(2,\)"):
        assert_close("h", ref, ref[None])
