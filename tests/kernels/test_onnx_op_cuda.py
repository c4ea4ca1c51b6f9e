"""The library's LineScan on ONNX Runtime's CUDA provider: numbers, errors, CUDA graphs, threads, a whole student."""

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from gspn2_kernels import line_scan_ref, onnx_op
from gspn2_kernels.testing import assert_close, random_inputs
from gspn2convert.providers import CUDA
from gspn2convert.session import KERNEL, onnx_session

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(CUDA not in onnxruntime.get_available_providers(), reason="needs onnxruntime-gpu"),
    pytest.mark.usefixtures("cuda_library"),
]

OPERANDS = ("x", "lam", "logits", "u")
ONNX_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
}
TOLERANCES = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 4e-3}
every_dtype = pytest.mark.parametrize("dtype", ONNX_TYPES, ids=str)


def scan_session(dtype: torch.dtype = torch.float32, segment: int = 0, **options: Any) -> onnxruntime.InferenceSession:
    """A model of one LineScan, of any shapes; fp32 outside, for numpy has no bf16."""
    casts = [helper.make_node("Cast", [name], [f"{name}_cast"], to=ONNX_TYPES[dtype]) for name in OPERANDS]
    operands = [f"{name}_cast" for name in OPERANDS]
    scan = helper.make_node("LineScan", operands, ["y_cast"], "scan", domain="ai.gspn2", segment=segment)
    graph = helper.make_graph(
        [*casts, scan, helper.make_node("Cast", ["y_cast"], ["y"], to=TensorProto.FLOAT)],
        "one_node",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in OPERANDS],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ai.gspn2", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    session_options = onnxruntime.SessionOptions()
    session_options.log_severity_level = 4
    providers = [(CUDA, {"device_id": 0, **options})]
    assert onnx_op.register(session_options, providers)
    session = onnxruntime.InferenceSession(model, session_options, providers=providers)
    assert session.get_providers()[0] == CUDA
    return session


def run(session: onnxruntime.InferenceSession, inputs: tuple[Tensor, ...]) -> Tensor:
    feeds = {name: tensor.float().numpy() for name, tensor in zip(OPERANDS, inputs, strict=True)}
    return torch.from_numpy(session.run(None, feeds)[0])


def bind(session: onnxruntime.InferenceSession, inputs: tuple[Tensor, ...], y: Tensor) -> onnxruntime.IOBinding:
    """Bind fp32 tensors on the device."""
    binding = session.io_binding()
    for name, tensor in zip(OPERANDS, inputs, strict=True):
        binding.bind_input(name, "cuda", 0, TensorProto.FLOAT, tuple(tensor.shape), tensor.data_ptr())
    binding.bind_output("y", "cuda", 0, TensorProto.FLOAT, tuple(y.shape), y.data_ptr())
    return binding


def on_device(inputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
    """Copy inputs to the device in fp32, with a place for y."""
    there = tuple(tensor.float().cuda().contiguous() for tensor in inputs)
    y = torch.full_like(there[1], torch.nan)
    torch.cuda.synchronize()
    return there, y


@every_dtype
@pytest.mark.parametrize(
    ("shape", "groups", "segment"),
    [
        ((2, 14, 14, 64), 1, 0),
        ((1, 64, 64, 32), 1, 0),
        ((3, 33, 47, 48), 2, 0),  # channels that no block of four warps can share out
        ((6, 60, 31, 40), 1, 7),  # a warp half beyond the channels
        ((8, 37, 41, 64), 8, 5),
        ((2, 12, 13, 24), 24, 1),  # a weight for each channel, every line restarts
        ((3, 11, 10, 7), 1, 0),  # rows that no 16 bytes divide: the plain kernel
        ((2, 20, 300, 64), 1, 0),
        ((1, 1024, 6, 8), 1, 100),
        ((2, 1, 9, 16), 1, 0),
        ((1, 1, 1, 1), 1, 0),
        ((2, 5, 7, 8), 1, 2**62),
    ],
)
def test_library_is_the_reference(
    shape: tuple[int, int, int, int], groups: int, segment: int, dtype: torch.dtype
) -> None:
    inputs = random_inputs(shape, groups, dtype)
    got = run(scan_session(dtype, segment), inputs)
    assert_close("y", line_scan_ref(*(t.double().cuda() for t in inputs), segment), got, TOLERANCES[dtype])


@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((1, 40, 37, 32), 1),  # direct kernels: two warps a line, two positions a lane, one
        ((1, 50, 40, 12), 2),
        ((1, 31, 18, 16), 1),
        ((16, 14, 15, 64), 1),
        ((1, 19, 90, 32), 1),
        ((3, 11, 10, 7), 1),
    ],
)
def test_infinity_stays_where_the_reference_has_it(shape: tuple[int, int, int, int], groups: int) -> None:
    inputs = random_inputs(shape, groups)
    inputs[0][0, 0, 0] = torch.inf  # what lanes beyond a line read as well
    want, got = line_scan_ref(*inputs, 3), run(scan_session(segment=3), inputs)
    assert torch.equal(got.isfinite(), want.isfinite())


@every_dtype
@pytest.mark.parametrize("shape", [(0, 3, 4, 2), (2, 0, 4, 2), (2, 3, 0, 2), (2, 3, 4, 0)])
def test_empty(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    got = run(scan_session(dtype, 2), random_inputs(shape, 1, dtype))
    assert got.shape == (*shape[:3], 4, shape[3])


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("x", (2, 3, 4), "x has shape (2, 3, 4), expected (B, H, W, C)"),
        ("lam", (2, 3, 4, 6), "lam has shape (2, 3, 4, 6), expected (B, H, W, 4, C) = (2, 3, 4, 4, 6)"),
        ("logits", (2, 3, 4, 4, 2, 2), "logits has shape (2, 3, 4, 4, 2, 2), expected (B, H, W, 4, G, 3)"),
        ("logits", (2, 3, 4, 4, 4, 3), "logits has 4 groups, expected a divisor of the 6 channels of x"),
        ("u", (2, 3, 4, 4, 7), "u has shape (2, 3, 4, 4, 7), expected (B, H, W, 4, C)"),
    ],
)
def test_wrong_shapes_are_named(name: str, shape: tuple[int, ...], message: str) -> None:
    session = scan_session()
    inputs = dict(zip(OPERANDS, random_inputs((2, 3, 4, 6), 2), strict=True))
    wrong = inputs | {name: torch.zeros(shape)}
    with pytest.raises(Exception, match=re.escape(f"ai.gspn2::LineScan: {message}")):
        run(session, tuple(wrong.values()))
    right = tuple(inputs.values())
    assert_close("a call after that", line_scan_ref(*right), run(session, right), TOLERANCES[torch.float32])


@every_dtype
def test_graph_replays_the_same_bits(dtype: torch.dtype) -> None:
    drawn = random_inputs((4, 33, 40, 64), 2, dtype)
    inputs, y = on_device(drawn)
    session = scan_session(dtype, enable_cuda_graph="1")
    binding = bind(session, inputs, y)
    plain = run(scan_session(dtype), drawn)
    for _ in range(3):
        session.run_with_iobinding(binding)
        torch.cuda.synchronize()
        assert torch.equal(y.cpu(), plain)
        y.fill_(torch.nan)
        torch.cuda.synchronize()
    # What is bound is read anew.
    inputs[0].mul_(2)
    torch.cuda.synchronize()
    session.run_with_iobinding(binding)
    torch.cuda.synchronize()
    assert_close("twice x", 2 * plain, y.cpu(), TOLERANCES[dtype])


def test_runs_on_the_stream_that_is_given() -> None:
    stream = torch.cuda.Stream()
    inputs, y = on_device(random_inputs((8, 64, 64, 64)))
    session = scan_session(user_compute_stream=str(stream.cuda_stream))
    binding = bind(session, inputs, y)
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    session.run_with_iobinding(binding, options)
    stream.synchronize()
    once = y.clone()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        # On another stream the node would read x before it is doubled.
        torch.cuda._sleep(10**8)
        inputs[0].mul_(2)
        session.run_with_iobinding(binding, options)
        twice = y.clone()
    stream.synchronize()
    assert torch.equal(twice, 2 * once)


def test_two_sessions_in_two_threads() -> None:
    # On an H100 one kernel with two sizes of shared memory, both beyond what a kernel gets without asking.
    shapes = [(8, 74, 74, 64), (4, 140, 140, 64)]
    drawn = [random_inputs(shape, 1, torch.bfloat16) for shape in shapes]
    sessions = [scan_session(torch.bfloat16) for _ in shapes]
    bound = [on_device(inputs) for inputs in drawn]
    wanted = [run(session, inputs) for session, inputs in zip(sessions, drawn, strict=True)]

    def repeat(number: int) -> list[Tensor]:
        inputs, y = bound[number]
        binding, results = bind(sessions[number], inputs, y), []
        for _ in range(30):
            sessions[number].run_with_iobinding(binding)
            results.append(y.cpu())
        return results

    with ThreadPoolExecutor(2) as pool:
        for want, results in zip(wanted, pool.map(repeat, range(2)), strict=True):
            assert all(torch.equal(want, got) for got in results)


def test_one_session_in_four_threads() -> None:
    session, inputs = scan_session(segment=3), random_inputs((2, 12, 17, 24), 2)
    want = run(session, inputs)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: run(session, inputs), range(32)))
    assert all(torch.equal(got, want) for got in results)


def test_exported_student(classifier: Any) -> None:
    session = onnx_session(classifier.path, ["cuda", "cpu"], library=True)
    assert session.describe()["line_scan"] == KERNEL
    image = torch.randn(3, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = classifier.student(image)
    # Matrix products in TF32.
    assert_close("logits", want, torch.from_numpy(session.run(image.numpy())), 5e-3)
