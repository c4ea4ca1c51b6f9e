"""The Triton kernels against the reference: in the interpreter, and on a GPU where there is one.

Shapes: B batch, H W grid, C channels, G groups.
"""

from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gspn2_kernels import backend, line_scan, register_backend
from gspn2_kernels.eager import line_scan_bwd as eager_bwd
from gspn2_kernels.eager import line_scan_fwd as eager_fwd
from gspn2_kernels.line_scan import Training
from gspn2_kernels.testing import assert_close
from gspn2_kernels.tuning import Plan
from helpers.layouts import planar
from helpers.line_scans import DEVICE, NAMES, TOLERANCES, check, draw, kernels, reference, run

# Plans are given, so that grids of a size that the interpreter can take still have several warps, positions of a
# lane, segments and launches: (WC, GRID, CL, BC, P, NS, AHEAD).
CASES = [
    pytest.param((2, 1, 7, 1), 1, 0, Plan(1, 1, 1, 1, 1, 3), id="one row, one channel"),
    pytest.param((1, 7, 1, 8), 1, 3, Plan(1, 1, 2, 4, 1, 3), id="one column"),
    pytest.param((1, 5, 14, 16), 1, 0, Plan(1, 1, 2, 8, 1, 3), id="wide"),
    pytest.param((1, 19, 3, 8), 1, 0, Plan(1, 1, 2, 4, 2, 3), id="tall, two positions a lane"),
    pytest.param((1, 4, 5, 32), 4, 1, Plan(1, 1, 4, 8, 1, 3), id="a group a lane, every line restarts"),
    pytest.param((1, 5, 7, 64), 1, 2, Plan(4, 1, 8, 8, 1, 3), id="four warps, ragged last segment"),
    pytest.param((1, 5, 4, 24), 1, 0, Plan(1, 1, 2, 8, 1, 3), id="a program half beyond the channels"),
    pytest.param((1, 3, 4, 3), 3, 2, Plan(1, 1, 1, 1, 1, 3), id="a group per channel"),
    pytest.param((1, 2, 3, 36), 3, 0, Plan(1, 1, 1, 4, 1, 3), id="three groups of twelve channels"),
    pytest.param((1, 2, 3, 520), 1, 0, Plan(2, 1, 8, 4, 1, 3), id="more channels than a program has numbers"),
    pytest.param((1, 11, 4, 16), 1, 0, Plan(1, 2, 4, 4, 1, 3), id="a line in two programs"),
    pytest.param((1, 5, 9, 16), 1, 4, Plan(1, 3, 4, 4, 1, 2), id="a line in three programs"),
    pytest.param((1, 4, 21, 8), 2, 0, Plan(2, 2, 8, 1, 2, 3), id="two warps and two positions a lane in each of two"),
    pytest.param((1, 4, 5, 4), 1, 2, Plan(1, 1, 1, 4, 1, 3, AHEAD=True), id="a line read ahead"),
    pytest.param((1, 3, 9, 16), 1, 0, Plan(2, 1, 4, 4, 1, 4, AHEAD=True), id="two warps that read ahead"),
    pytest.param((1, 7, 18, 16), 1, 3, Plan(2, 2, 4, 4, 1, 3, AHEAD=True), id="restarts within launches, read ahead"),
    pytest.param((1, 18, 7, 16), 1, 7, Plan(2, 2, 4, 4, 1, 3), id="restarts where launches begin"),
    pytest.param((1, 3, 66, 4), 1, 0, Plan(2, 2, 1, 4, 1, 3), id="two warps of a lane a position in each of two"),
    pytest.param((1, 4, 17, 32), 2, 3, Plan(2, 1, 4, 4, 2, 3), id="lanes share out weights, two groups"),
    pytest.param((1, 13, 12, 16), 1, 0, Plan(1, 2, 4, 4, 2, 2), id="the same in two programs and two launches"),
    pytest.param((1, 3, 7, 12), 1, 0, Plan(1, 1, 4, 4, 4, 2), id="a lane without channels, which others would rely on"),
]


@pytest.mark.parametrize("apart", [False, True], ids=["logits", "weights"])
@pytest.mark.parametrize(("shape", "groups", "segment", "chosen"), CASES)
def test_kernels_are_the_reference(shape, groups: int, segment: int, chosen: Plan, apart: bool) -> None:
    chosen = chosen._replace(APART=apart)
    inputs, dy = draw(shape, groups)
    actual = run(inputs, dy, segment, chosen)
    check(reference(inputs, dy, segment), actual, torch.float32)
    assert torch.equal(kernels.line_scan_fwd(*inputs, segment, chosen=chosen), actual[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bits_in_memory_32_in_the_state(dtype: torch.dtype) -> None:
    inputs, dy = draw((1, 12, 5, 32), dtype=dtype, packed=True)
    check(reference(inputs, dy, 0), run(inputs, dy, 0, Plan(2, 1, 4, 8, 1, 3)), dtype)


def test_two_runs_give_equal_bits() -> None:
    inputs, dy = draw((1, 4, 7, 16))
    first, second = (run(inputs, dy, 0, Plan(2, 1, 4, 4, 1, 3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("level", [-300.0, -60.0, 60.0])
def test_weights_of_extreme_logits(level: float) -> None:
    """The sigmoids under- or overflow; their ratios do not. At the ends of a line, two neighbours are left."""
    (x, lam, logits, u), dy = draw((1, 3, 4, 4))
    logits = 3 * logits + level
    logits[0, 1, 2, :, :, 1] = 5.0
    logits[0, :, 0, :, :, 0] = 10.0  # a neighbour outside, above all that exist
    inputs = (x, lam, logits, u)
    check(reference(inputs, dy, 0), run(inputs, dy, 0, Plan(1, 1, 1, 4, 1, 3)), torch.float32)


@pytest.mark.parametrize(
    "make",
    [
        lambda x, lam, logits, u: (x, *map(planar, (lam, logits, u))),
        lambda x, lam, logits, u: (x[:, ::2], lam[:, ::2], logits[:, ::2], u[:, ::2]),
        lambda x, lam, logits, u: (x[:, :, 1:2], lam[:, :, 1:2], logits[:, :, 1:2], u[:, :, 1:2]),
        lambda x, lam, logits, u: (x, lam, torch.cat([logits, logits], -1)[..., :3], u),
        lambda x, lam, logits, u: (x.transpose(1, 2), *(t.transpose(1, 2) for t in (lam, logits, u))),
    ],
    ids=["directions outermost", "every other row", "one column of many", "room after the logits", "transposed"],
)
def test_strides_of_the_inputs_do_not_matter(make) -> None:
    inputs = make(*draw((1, 4, 3, 8))[0])
    dy = torch.ones(()).to(DEVICE).expand(inputs[1].shape)
    actual, in_planes = run(inputs, dy, 0, Plan(1, 1, 2, 4, 1, 3)), inputs[1].movedim(3, 0).is_contiguous()
    check(reference(inputs, dy, 0), actual, torch.float32, in_planes=in_planes)


def test_planes_of_several_images_and_segments() -> None:
    """Strides of y between images and between directions, across launches."""
    (x, lam, logits, u), dy = draw((3, 9, 6, 4))
    inputs, dy = (x, *map(planar, (lam, logits, u))), planar(dy)
    check(reference(inputs, dy, 4), run(inputs, dy, 4, Plan(1, 4, 1, 4, 1, 3)), torch.float32, in_planes=True)


@pytest.mark.parametrize("shape", [(0, 3, 4, 2), (2, 0, 4, 2), (2, 3, 0, 2)], ids=str)
def test_nothing_in_nothing_out(shape) -> None:
    inputs, dy = draw(shape)
    check(reference(inputs, dy, 0), run(inputs, dy, 0, None), torch.float32)


def test_offsets_that_32_bits_do_not_hold_are_named() -> None:
    """Directions far apart in memory, as in planes of a large batch."""
    x, _, logits, u = (t.to("meta") for t in draw((1, 2, 3, 4))[0])
    lam = torch.empty_strided(u.shape, (24, 12, 4, 760_000_000, 1), device="meta")
    with pytest.raises(ValueError, match=r"spans over 2\^31 elements; split it"):
        kernels.line_scan_fwd(x, lam, logits, u, 0)


def test_saved_states_of_large_values_stay_finite() -> None:
    """Twenty lines of 4000 add up to 80000, and fp16 ends at 65504."""
    (x, lam, logits, u), dy = draw((1, 20, 1, 2), dtype=torch.float16)
    inputs = (torch.full_like(x, 4000.0), torch.ones_like(lam), logits, 0.1 * u)
    dy = 1e-2 * dy
    check(reference(inputs, dy, 0), run(inputs, dy, 0, Plan(1, 1, 1, 2, 1, 3)), torch.float16)


@pytest.mark.parametrize(("scale", "level", "gradient"), [(50.0, 0.0, 1e-6), (1.0, 8.0, 2e3)], ids=["small", "large"])
def test_gradients_of_states_that_fp16_does_not_hold(scale: float, level: float, gradient: float) -> None:
    """Small ones come times large inputs; large ones, which pile up where logits lead all one way, times small lam."""
    (x, lam, logits, u), dy = draw((1, 12, 12, 4), dtype=torch.float16)
    logits = logits + level * torch.tensor([-1.0, 0.0, 1.0], dtype=logits.dtype, device=DEVICE)
    inputs = (scale * x, lam if scale > 1 else 0.01 * lam, logits, u)
    dy = gradient * dy
    _, states = kernels.line_scan_train(*inputs, 0)
    actual = kernels.line_scan_bwd(dy, *inputs, 0, states, chosen=Plan(1, 1, 1, 4, 1, 3))
    for name, ref, out in zip(NAMES[1:], reference(inputs, dy, 0)[1:], actual, strict=True):
        if name != "dx" or scale == 1:  # small, it is as coarse as fp16 is there
            assert_close(name, ref, out, 4e-3)


@pytest.fixture
def _on_this_device() -> Iterator[None]:
    """Lets the torch op run the kernels where the tests run."""
    if DEVICE == "cpu":
        training = Training(kernels.line_scan_train, kernels.line_scan_bwd, kernels.empty_states)
        register_backend("cpu", "triton", kernels.line_scan_fwd, kernels.line_scan_recomputed_bwd, training)
    yield
    if DEVICE == "cpu":
        register_backend("cpu", "eager", eager_fwd, eager_bwd)


@pytest.mark.usefixtures("_on_this_device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_op_trains_with_saved_states(dtype: torch.dtype) -> None:
    assert backend(DEVICE) == "triton"
    inputs, dy = draw((1, 3, 4, 4), 1, dtype, packed=True)
    tracked = [t.detach().requires_grad_() for t in inputs]
    y = line_scan(*tracked, 2)
    assert any(t.shape == (1, 4, 12, 4) for t in y.grad_fn.saved_tensors)
    actual = (y.detach(), *torch.autograd.grad(y, tracked, dy))
    check(reference(inputs, dy, 2), actual, dtype)
    # The plain op keeps nothing and scans again.
    y = torch.ops.gspn2.line_scan(*tracked, 2)
    for name, kept, again in zip(NAMES[1:], actual[1:], torch.autograd.grad(y, tracked, dy), strict=True):
        assert torch.equal(kept, again), name


class _Zeros(TorchDispatchMode):
    """Notes the sizes of tensors of zeros that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if "zeros" in str(function):
            self.made.append(result.numel())
        return result


@pytest.mark.usefixtures("_on_this_device")
def test_no_gradient_is_made_for_saved_states() -> None:
    """PyTorch would fill as much memory with zeros as the states take."""
    inputs, dy = draw((1, 3, 4, 4))
    tracked = [t.detach().requires_grad_() for t in inputs]
    y = line_scan(*tracked)
    with _Zeros() as zeros:
        torch.autograd.grad(y, tracked, dy)
    assert zeros.made == []


@pytest.mark.usefixtures("_on_this_device")
def test_opcheck_with_saved_states() -> None:
    inputs, dy = draw((1, 2, 2, 2), dtype=torch.bfloat16, packed=True)
    tracked = tuple(t.detach().requires_grad_() for t in inputs)
    torch.library.opcheck(torch.ops.gspn2.line_scan_train.default, (*tracked, 2))
    _, states = kernels.line_scan_train(*inputs, 2)
    torch.library.opcheck(torch.ops.gspn2.line_scan_backward.default, (dy, *inputs, 2, states))


@pytest.mark.usefixtures("_on_this_device")
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_training_compiles_as_one_graph(autocast: bool) -> None:
    torch._dynamo.reset()
    inputs, dy = draw((1, 3, 4, 2))
    expected = reference([t.to(torch.bfloat16) if autocast else t for t in inputs], dy, 0)
    compiled = torch.compile(line_scan, fullgraph=True, backend="aot_eager")
    tracked = [t.detach().requires_grad_() for t in inputs]
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        y = compiled(*tracked)
    gradients = torch.autograd.grad(y, tracked, dy.to(y.dtype))
    for name, ref, out in zip(NAMES, expected, (y, *gradients), strict=True):
        assert_close(name, ref, out, 2e-2 if autocast else 1e-5)


@pytest.mark.usefixtures("_on_this_device")
def test_fp64_runs_in_plain_torch() -> None:
    inputs, dy = draw((1, 3, 4, 2), dtype=torch.float64)
    tracked = [t.detach().requires_grad_() for t in inputs]
    y = line_scan(*tracked)
    for name, ref, out in zip(NAMES, reference(inputs, dy, 0), (y, *torch.autograd.grad(y, tracked, dy)), strict=True):
        assert_close(name, ref, out, 1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize(
    ("shape", "groups", "segment"),
    [
        ((3, 14, 14, 96), 1, 0),
        ((40, 14, 21, 64), 2, 5),
        ((2, 37, 24, 48), 1, 0),
        ((20, 74, 53, 64), 1, 0),
        ((5, 147, 147, 64), 1, 0),
        ((1, 64, 64, 32), 1, 0),
        ((1, 130, 90, 24), 3, 64),
        ((1, 40, 517, 8), 1, 0),
        ((1, 509, 40, 8), 1, 100),
        ((1, 128, 90, 96), 1, 0),
        ((2, 300, 33, 5), 5, 0),
        ((24, 33, 200, 64), 1, 7),
    ],
    ids=str,
)
def test_tuned_kernels_on_a_gpu(shape, groups: int, segment: int, dtype: torch.dtype) -> None:
    inputs, dy = draw(shape, groups, dtype, packed=True)
    expected = reference(inputs, dy, segment)
    actual = run(inputs, dy, segment, None)
    forward, gradients = TOLERANCES[dtype]
    for name, ref, out in zip(NAMES, expected, actual, strict=True):
        limit = 1e-2 if name == "dlogits" and dtype != torch.float32 else gradients
        assert_close(name, ref, out, forward if name == "y" else limit)
    again = run(inputs, dy, segment, None)
    assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))
