"""AddNorm, a residual sum and its LayerNorm, by its function body and by the library, on the CPU and on CUDA."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from gspn2_kernels import onnx_op
from gspn2_kernels.testing import TOLERANCES, assert_close
from gspn2convert.onnx_function import add_norm_function
from gspn2convert.providers import CPU, CUDA

OPSET = 20
EPSILON = 1e-3
INPUTS = ("x", "update", "bias", "scale", "shift")
TYPES = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16}
every_dtype = pytest.mark.parametrize("dtype", TYPES, ids=str)
SHAPES = [(2, 5, 192), (3, 37), (7, 768), (1, 1, 1), (4, 8), (9, 1000), (2, 2050), (0, 16), (2, 0, 16)]


def make_model(dtype: torch.dtype, *, body: bool = False, **wrong: torch.dtype) -> bytes:
    """A model of one node, of any shapes; fp32 outside, for numpy has no bf16."""
    casts = [helper.make_node("Cast", [name], [f"{name}_cast"], to=TYPES[wrong.get(name, dtype)]) for name in INPUTS]
    node = helper.make_node(
        "AddNorm", [f"{name}_cast" for name in INPUTS], ["sum_cast", "normed_cast"], domain="ai.gspn2", epsilon=EPSILON
    )
    back = [helper.make_node("Cast", [f"{name}_cast"], [name], to=TensorProto.FLOAT) for name in ("sum", "normed")]
    graph = helper.make_graph(
        [*casts, node, *back],
        "one_node",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in INPUTS],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("sum", "normed")],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("ai.gspn2", 1)]
    functions = [add_norm_function(OPSET)] if body else []
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10).SerializeToString()


def make_session(model: bytes, *, registered: bool = True, provider: str = CPU) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 2
    if registered:
        assert onnx_op.register(options, [provider])
    session = onnxruntime.InferenceSession(model, options, providers=[provider])
    assert session.get_providers()[0] == provider
    return session


def draw(shape: tuple[int, ...], dtype: torch.dtype, *, one_bias: bool = False, mean: float = 0.5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    of_channels = {"bias": 1 if one_bias else shape[-1], "scale": shape[-1], "shift": shape[-1]}
    sizes = {"x": shape, "update": shape} | {name: (size,) for name, size in of_channels.items()}
    inputs = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    inputs["x"] += mean
    return {name: tensor.to(dtype) for name, tensor in inputs.items()}


def run(session: onnxruntime.InferenceSession, inputs: dict[str, Tensor]) -> list[Tensor]:
    return [torch.from_numpy(out) for out in session.run(None, {name: t.float().numpy() for name, t in inputs.items()})]


def assert_right(session: onnxruntime.InferenceSession, inputs: dict[str, Tensor]) -> None:
    """Compare the sum, and the norm with that of the sum as it is handed on."""
    tolerance = TOLERANCES[inputs["x"].dtype]
    x, update, bias, scale, shift = (inputs[name].double() for name in INPUTS)
    total, normed = run(session, inputs)
    assert_close("sum", x + update + bias, total, tolerance)
    want = torch.nn.functional.layer_norm(total.double(), x.shape[-1:], scale, shift, EPSILON)
    assert_close("normed", want, normed, tolerance)


@every_dtype
@pytest.mark.parametrize("shape", [*SHAPES, (3, 4, 0)])
@pytest.mark.parametrize("one_bias", [False, True])
def test_library(shape: tuple[int, ...], one_bias: bool, dtype: torch.dtype, library: Path) -> None:
    assert_right(make_session(make_model(dtype)), draw(shape, dtype, one_bias=one_bias))


@pytest.mark.gpu
@pytest.mark.skipif(CUDA not in onnxruntime.get_available_providers(), reason="needs onnxruntime-gpu")
@every_dtype
@pytest.mark.parametrize("shape", [*SHAPES, (3, 4, 0), (5, 256), (70, 1152), (11, 2048)])
@pytest.mark.parametrize("one_bias", [False, True])
def test_library_on_cuda(shape: tuple[int, ...], one_bias: bool, dtype: torch.dtype, cuda_library: Path) -> None:
    session = make_session(make_model(dtype), provider=CUDA)
    for mean in (0.5, 20.0):
        assert_right(session, draw(shape, dtype, one_bias=one_bias, mean=mean))


@every_dtype
def test_a_large_mean_leaves_the_variance_exact(dtype: torch.dtype, library: Path) -> None:
    assert_right(make_session(make_model(dtype)), draw((5, 768), dtype, mean=20))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("one_bias", [False, True])
def test_body(shape: tuple[int, ...], one_bias: bool) -> None:
    session = make_session(make_model(torch.float32, body=True), registered=False)
    assert_right(session, draw(shape, torch.float32, one_bias=one_bias))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("x", (), r"x is a scalar, expected \(..., C\)"),
        ("update", (2, 1, 16), r"update has shape \(2, 1, 16\), expected that of x, \(2, 3, 16\)"),
        ("bias", (8,), r"bias has shape \(8\), expected \(1\) or \(C\) = \(16\)"),
        ("scale", (1,), r"scale has shape \(1\), expected \(C\) = \(16\)"),
        ("shift", (3, 16), r"shift has shape \(3, 16\), expected \(C\) = \(16\)"),
    ],
)
def test_wrong_shapes_are_named(name: str, shape: tuple[int, ...], message: str, library: Path) -> None:
    inputs = draw((2, 3, 16), torch.float32) | {name: torch.zeros(shape)}
    with pytest.raises(Exception, match=f"AddNorm: {message}"):
        run(make_session(make_model(torch.float32)), inputs)


def test_wrong_dtypes_are_named(library: Path) -> None:
    with pytest.raises(Exception, match="AddNorm: scale has another dtype than x"):
        make_session(make_model(torch.float32, scale=torch.float16))


def test_infinity_and_nan_stay_in_their_row(library: Path) -> None:
    inputs = draw((4, 24), torch.float32)
    inputs["x"][1, 3], inputs["update"][2, 5] = torch.inf, torch.nan
    _, normed = run(make_session(make_model(torch.float32)), inputs)
    assert np.array_equal(normed.isnan().all(-1).numpy(), [False, True, True, False])
