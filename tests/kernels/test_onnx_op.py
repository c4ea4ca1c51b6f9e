"""The library's LineScan in ONNX Runtime against the reference; what it refuses; threads; a whole student."""

import random
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from gspn2_kernels import line_scan_ref, onnx_op
from gspn2_kernels.testing import TOLERANCES, assert_close, random_inputs, relative_rms
from gspn2convert.export import export_onnx
from gspn2convert.mixer import Gspn2Mixer
from gspn2convert.model import build_student

pytestmark = pytest.mark.usefixtures("library")

OPERANDS = ("x", "lam", "logits", "u")
ONNX_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float64: TensorProto.DOUBLE,
}
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def make_model(dtypes: dict[str, int], **attributes: Any) -> bytes:
    """A model of one LineScan without a function body, of any shapes; fp32 outside, for numpy has no bf16."""
    casts = [helper.make_node("Cast", [name], [f"{name}_cast"], to=to) for name, to in dtypes.items()]
    scan = helper.make_node("LineScan", [f"{name}_cast" for name in dtypes], ["y_cast"], "scan", domain="ai.gspn2")
    scan.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    graph = helper.make_graph(
        [*casts, scan, helper.make_node("Cast", ["y_cast"], ["y"], to=TensorProto.FLOAT)],
        "one_node",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in dtypes],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ai.gspn2", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def make_session(model: bytes | Path, *, registered: bool = True, threads: int = 2) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if registered:
        assert onnx_op.register(options)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def scan_session(dtype: torch.dtype = torch.float32, **attributes: Any) -> onnxruntime.InferenceSession:
    return make_session(make_model(dict.fromkeys(OPERANDS, ONNX_TYPES[dtype]), **attributes))


def run(session: onnxruntime.InferenceSession, inputs: tuple[Tensor, ...]) -> Tensor:
    feeds = {name: tensor.float().numpy() for name, tensor in zip(OPERANDS, inputs, strict=True)}
    return torch.from_numpy(session.run(None, feeds)[0])


@every_dtype
@pytest.mark.parametrize(
    ("shape", "groups", "segment"),
    [
        ((2, 5, 7, 24), 1, 0),  # the paper's form, whole vectors of channels
        ((1, 14, 37, 13), 1, 4),  # a rest of channels; last segments shorter than the others
        ((2, 9, 4, 6), 6, 0),  # a weight for each channel
        ((2, 9, 4, 12), 3, 5),  # small groups; segment between the two counts of lines
        ((1, 11, 6, 48), 4, 0),  # groups of whole vectors
        ((1, 300, 70, 150), 2, 0),  # groups cut into blocks
        ((3, 7, 1, 3), 3, 3),  # lines of one position
        ((1, 1, 9, 8), 1, 1),
        ((1, 1, 1, 1), 1, 0),
        ((2, 5, 7, 8), 1, 2**62),
    ],
)
def test_library_is_the_reference(
    shape: tuple[int, int, int, int], groups: int, segment: int, dtype: torch.dtype
) -> None:
    inputs = random_inputs(shape, groups, dtype)
    got = run(scan_session(dtype, segment=segment), inputs)
    assert_close("y", line_scan_ref(*inputs, segment).float(), got, TOLERANCES[dtype])


@every_dtype
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize(("scale", "shift"), [(100, -200), (1, -30_000), (1, 30_000), (3e4, 0)])
def test_weights_of_extreme_logits(scale: float, shift: float, groups: int, dtype: torch.dtype) -> None:
    x, lam, logits, u = random_inputs((1, 9, 6, 16), groups, dtype)
    inputs = x, lam, (scale * logits.float().clamp(-2, 2) + shift).to(dtype), u
    got = run(scan_session(dtype, segment=0), inputs)
    assert_close("y", line_scan_ref(*inputs).float(), got, TOLERANCES[dtype])


@every_dtype
def test_common_mode_stays_exact(dtype: torch.dtype) -> None:
    # A mean that is large against the deviations grows with every line.
    x, lam, logits, u = random_inputs((1, 60, 50, 8), 1, dtype)
    inputs = x + 20, lam, logits, torch.ones_like(u)
    truth = line_scan_ref(*(tensor.double() for tensor in inputs))
    assert_close("y", truth, run(scan_session(dtype), inputs), TOLERANCES[dtype])


def test_one_weight_alone_is_one() -> None:
    # Lines of one position: what a weight is off by would come once more with every line.
    inputs = random_inputs((1, 1, 3000, 2))
    assert_close("y", line_scan_ref(*(t.double() for t in inputs)), run(scan_session(), inputs), 2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bit_numbers_are_rounded_once(dtype: torch.dtype) -> None:
    # On one line y = u (lam x): every number times 1 and times about 1/3.
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(1, 1, -1, 1)
    ones = torch.ones(1, 1, 2**16, 4, 1, dtype=dtype)
    for lam in (ones, ones / 3):
        got = run(scan_session(dtype), (x, lam, torch.zeros(1, 1, 2**16, 4, 1, 3), ones))[0, 0, :, 0, 0]
        want = (x.float() * lam[:, :, :, 0].float()).to(dtype).float().flatten()
        assert torch.equal(got.nan_to_num(1234.5), want.nan_to_num(1234.5))


@every_dtype
@pytest.mark.parametrize("shape", [(0, 3, 4, 2), (2, 0, 4, 2), (2, 3, 0, 2), (2, 3, 4, 0)])
def test_empty(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    got = run(scan_session(dtype, segment=2), random_inputs(shape, 1, dtype))
    assert got.shape == (*shape[:3], 4, shape[3])


def test_infinity_and_nan_stay_where_the_reference_has_them() -> None:
    inputs = random_inputs((1, 6, 7, 9))
    inputs[0][0, 1, 3, 0], inputs[2][0, 2, 2, 0, 0, 1] = torch.inf, torch.nan
    want, got = line_scan_ref(*inputs, 2), run(scan_session(segment=2), inputs)
    assert torch.equal(got.isfinite(), want.isfinite())
    assert torch.equal(got.isnan(), want.isnan())


def test_random_shapes() -> None:
    draw = random.Random(0)
    sessions = {
        (dtype, segment): scan_session(dtype, segment=segment)
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
        for segment in (0, 1, 3, 8)
    }
    sizes = [0, *range(1, 18), 31, 32, 33]
    for number in range(1000):
        height, width = draw.choice(sizes), draw.choice(sizes)
        if number % 50 == 0:
            height, width = draw.sample([1, 5, 200], 2)
        groups = draw.choice([1, 1, 2, 3, 5, 8])
        channels = groups * draw.choice([0, *range(1, 10), 16, 24, 41, 80])
        (dtype, segment), session = draw.choice(list(sessions.items()))
        shape = (draw.choice([0, 1, 1, 2, 3]), height, width, channels)
        inputs = random_inputs(shape, groups, dtype)
        want, got = line_scan_ref(*inputs, segment).float(), run(session, inputs)
        name = f"{shape}, {groups} groups, segment {segment}, {dtype}"
        assert_close(name, want, got, TOLERANCES[dtype])


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("x", (2, 3, 4), r"x has shape \(2, 3, 4\), expected \(B, H, W, C\)"),
        ("x", (), r"x has shape \(\), expected"),
        ("lam", (2, 3, 4, 6), r"lam has shape \(2, 3, 4, 6\), expected \(B, H, W, 4, C\) = \(2, 3, 4, 4, 6\)"),
        ("lam", (2, 3, 4, 4, 1), r"lam has shape"),
        ("lam", (2, 4, 3, 4, 6), r"lam has shape"),
        ("logits", (2, 3, 4, 4, 3), r"logits has shape .*, expected \(B, H, W, 4, G, 3\) = \(2, 3, 4, 4, G, 3\)"),
        ("logits", (2, 3, 4, 4, 2, 2), r"logits has shape"),
        ("logits", (1, 3, 4, 4, 2, 3), r"logits has shape"),
        ("logits", (2, 3, 4, 4, 4, 3), r"logits has 4 groups, expected a divisor of the 6 channels of x"),
        ("logits", (2, 3, 4, 4, 0, 3), r"logits has 0 groups, expected a divisor"),
        ("u", (2, 3, 4, 4, 7), r"u has shape \(2, 3, 4, 4, 7\), expected \(B, H, W, 4, C\)"),
        ("u", (0,), r"u has shape \(0\), expected"),
    ],
)
def test_wrong_shapes_are_named(name: str, shape: tuple[int, ...], message: str) -> None:
    session = scan_session(segment=0)
    inputs = dict(zip(OPERANDS, random_inputs((2, 3, 4, 6), 2), strict=True))
    wrong = inputs | {name: torch.zeros(shape)}
    with pytest.raises(Exception, match=f"ai.gspn2::LineScan: {message}"):
        run(session, tuple(wrong.values()))
    assert_close("a call after that", line_scan_ref(*inputs.values()), run(session, tuple(inputs.values())))


# A type that no input may have is found by ONNX Runtime itself at x, so the words are its own.
DOUBLE = r"Type 'tensor\(double\)' of input parameter \(x_cast\).*LineScan"


@pytest.mark.parametrize(
    ("dtypes", "message"),
    [
        ({"lam": torch.float16}, "ai.gspn2::LineScan: lam has another dtype than x"),
        ({"logits": torch.float16}, "ai.gspn2::LineScan: logits has another dtype than x"),
        ({"u": torch.bfloat16}, "ai.gspn2::LineScan: u has another dtype than x"),
        ({"u": torch.float64}, "ai.gspn2::LineScan: u has another dtype than x"),
        ({"x": torch.float16}, "ai.gspn2::LineScan: lam has another dtype than x"),
        ({"x": torch.float64}, DOUBLE),
        (dict.fromkeys(OPERANDS, torch.float64), DOUBLE),
    ],
)
def test_wrong_dtypes_are_named(dtypes: dict[str, torch.dtype], message: str) -> None:
    types = {name: ONNX_TYPES[dtypes.get(name, torch.float32)] for name in OPERANDS}
    with pytest.raises(Exception, match=message):
        make_session(make_model(types, segment=0))


def test_missing_input_is_an_error() -> None:
    with pytest.raises(Exception, match="LineScan:1.* has input size 3 not in range"):
        make_session(make_model(dict.fromkeys(OPERANDS[:3], TensorProto.FLOAT), segment=0))


def test_attribute_segment() -> None:
    inputs = random_inputs((1, 6, 5, 4))
    assert_close("without", line_scan_ref(*inputs), run(scan_session(), inputs))
    with pytest.raises(Exception, match="ai.gspn2::LineScan: attribute segment is -1, expected 0"):
        scan_session(segment=-1)
    with pytest.raises(Exception, match="ai.gspn2::LineScan: attribute segment is a float, expected an int"):
        scan_session(segment=2.0)
    with pytest.raises(Exception, match="ai.gspn2::LineScan: attribute segment is a text, expected an int"):
        scan_session(segment="2")
    for others in ([2], [2.0], ["2"]):
        with pytest.raises(
            Exception, match="ai.gspn2::LineScan: attribute segment is of another kind, expected an int"
        ):
            scan_session(segment=others)


def test_eight_threads_on_one_session() -> None:
    session, inputs = scan_session(segment=3), random_inputs((2, 12, 17, 20), 2)
    want = run(session, inputs)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: run(session, inputs), range(64)))
    assert all(torch.equal(got, want) for got in results)


def test_eight_sessions_on_one_thread() -> None:
    inputs = random_inputs((2, 12, 17, 20), 2)
    sessions = [scan_session(segment=segment) for segment in range(8)]
    for segment, session in enumerate(sessions):
        assert_close(str(segment), line_scan_ref(*inputs, segment), run(session, inputs))


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("fp16", 2e-3)])
def test_exported_student_with_and_without_the_library(
    dtype: str, tolerance: float, make_teacher: Callable[..., nn.Module], tmp_path: Path
) -> None:
    student = build_student(make_teacher(), (0, 1), {"proxy_dim": 8, "groups": 2, "segment": 3})
    generator = torch.Generator().manual_seed(1)
    for module in student.modules():
        if isinstance(module, Gspn2Mixer):
            for parameter in module.parameters():
                parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    path = tmp_path / "student.onnx"
    export_onnx(student.eval(), path, dtype=dtype)
    image = torch.randn(3, 3, 40, 72, generator=generator).to(torch.float16 if dtype == "fp16" else torch.float32)
    with torch.no_grad():
        want = student(image.float())
    logits = [
        torch.from_numpy(make_session(path, registered=registered).run(None, {"image": image.numpy()})[0]).float()
        for registered in (False, True)
    ]
    assert_close("body", want, logits[0], tolerance)
    assert_close("library", want, logits[1], tolerance)
    assert relative_rms(*logits) < tolerance


def test_library_shows_one_symbol(library: Path) -> None:
    done = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True)
    assert [line.split()[-1] for line in done.stdout.splitlines()] == ["RegisterCustomOps"]


def test_numpy_is_read_as_it_is() -> None:
    # ONNX Runtime hands over the memory of an array that does not start at a vector's boundary.
    inputs = random_inputs((1, 5, 6, 8))
    feeds = {}
    for name, tensor in zip(OPERANDS, inputs, strict=True):
        memory = np.empty(tensor.numel() + 1, np.float32)
        feeds[name] = memory[1:].reshape(tensor.shape)
        feeds[name][...] = tensor.numpy()
    got = scan_session().run(None, feeds)[0]
    assert_close("y", line_scan_ref(*inputs), torch.from_numpy(got))


def test_model_without_library_needs_its_body() -> None:
    with pytest.raises(Exception, match="ai.gspn2:LineScan"):
        make_session(make_model(dict.fromkeys(OPERANDS, TensorProto.FLOAT), segment=0), registered=False)
