"""What a session runs on: which providers it gets, and CUDA that does not start."""

import ctypes
import os
import shutil

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from gspn2_kernels.build import library_path
from gspn2_kernels.testing import assert_close
from gspn2convert import providers as module
from gspn2convert.errors import UserError
from gspn2convert.providers import CPU, CUDA, pick_providers, settings
from gspn2convert.session import KERNEL, onnx_session
from helpers.sessions import built, compare, images, no_cuda


@pytest.fixture
def cuda_that_does_not_start(monkeypatch):
    """This machine, taken for one that has a GPU: ONNX Runtime leaves CUDA out and goes on."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") != "" and torch.cuda.is_available():
        pytest.skip("CUDA starts here")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(module, "has_cuda_device", lambda: True)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)


@no_cuda
@pytest.mark.parametrize("fixture", [None, "cuda_that_does_not_start"], ids=["cpu", "cuda"])
def test_files_that_are_no_model_are_refused(classifier, tmp_path, request, fixture):
    if fixture:
        request.getfixturevalue(fixture)
    with pytest.raises(UserError, match=r"nowhere.onnx: no such file; gspn2convert export writes one"):
        onnx_session(tmp_path / "nowhere.onnx")
    path = tmp_path / "other.onnx"
    for content in (b"", b"hello", b"\xff" * 99, classifier.path.read_bytes()[:5000]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"other\.onnx: no ONNX file, or not all of it"):
            onnx_session(path, library=False)


@pytest.mark.parametrize(
    ("version", "static", "nhwc"),
    [("1.18.1", True, False), ("1.20.0", True, True), ("2.0", True, True), ("2.0", False, False)],
)
def test_cuda_gets_settings_of_its_own_and_the_cpu_none(version, static, nhwc):
    assert settings([CPU], version, static=static) == {"providers": [CPU]}
    found = settings([CUDA, CPU], version, static=static)
    (name, options), last = found["providers"]
    assert (name, last) == (CUDA, CPU)
    assert ("prefer_nhwc" in options) == nhwc
    assert found["disabled_optimizers"] == ["MatMulAddFusion"]


def linear_model(path):
    """A product of all pixels and a sum, which ONNX Runtime makes one Gemm for the CPU; with their operands."""
    weight, bias = images(48, 5), images(5)
    constants = [onnx.numpy_helper.from_array(one.numpy(), name) for one, name in ((weight, "w"), (bias, "b"))]
    nodes = [
        helper.make_node("Flatten", ["x"], ["rows"]),
        helper.make_node("MatMul", ["rows", "w"], ["product"]),
        helper.make_node("Add", ["product", "b"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [2, 3, 4, 4]), ("y", [2, 5]))]
    graph = helper.make_graph(nodes, "linear", values[:1], values[1:], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path, weight, bias


def test_providers_are_picked_by_short_or_full_names():
    available = ["TensorrtExecutionProvider", CUDA, CPU]
    assert pick_providers(available, ["cuda", CPU]) == [CUDA, CPU]
    assert pick_providers(available, ["tensorrt"]) == ["TensorrtExecutionProvider"]
    with pytest.raises(UserError, match="provider 'rocm': this ONNX Runtime has cpu, cuda, tensorrt$"):
        pick_providers(available, ["rocm"])
    with pytest.raises(UserError, match="'cuda': this ONNX Runtime has cpu; for CUDA install onnxruntime-gpu"):
        pick_providers([CPU], ["cuda"])
    with pytest.raises(UserError, match="no provider given"):
        pick_providers([CPU], [])


@pytest.mark.parametrize(("devices", "picked"), [(1, [CUDA, CPU]), (0, [CPU])])
def test_cuda_is_the_default_where_there_is_a_device(monkeypatch, devices, picked):
    monkeypatch.setattr(module, "has_cuda_device", lambda: devices > 0)
    assert pick_providers([CUDA, CPU], None) == picked
    assert pick_providers([CPU], None) == [CPU]


def test_driver_is_asked_for_devices():
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        assert not module.has_cuda_device()
    else:
        assert module.has_cuda_device() == torch.cuda.is_available()


@no_cuda
@pytest.mark.parametrize("asked", [["cuda"], ["cuda", "cpu"], ["cpu", "cuda"]], ids="-".join)
def test_provider_that_was_asked_for_and_does_not_start_is_an_error(classifier, cuda_that_does_not_start, asked):
    with pytest.raises(UserError, match=f"^{CUDA} did not start"):
        onnx_session(classifier.path, asked, library=False)


@no_cuda
def test_cpu_in_place_of_cuda_runs_what_suits_the_cpu(cuda_that_does_not_start, monkeypatch, tmp_path, caplog):
    path, weight, bias = linear_model(tmp_path / "linear.onnx")
    plain = onnxruntime.SessionOptions

    def telling():
        options = plain()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        options.log_severity_level = 3
        return options

    def operators():
        return [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]

    monkeypatch.setattr(onnxruntime, "SessionOptions", telling)
    onnxruntime.InferenceSession(path, telling(), **settings([CUDA, CPU], onnxruntime.__version__, static=True))
    assert {"MatMul", "Add"} <= set(operators())
    onnx_session(path, ["cpu"], library=False)
    wanted = operators()
    assert "MatMul" not in wanted
    assert not caplog.text

    session = onnx_session(path, library=False)
    assert operators() == wanted
    assert f"{CUDA} did not start" in caplog.text
    assert f"{CPU} runs instead" in caplog.text
    assert session.describe()["providers"] == [CPU]
    pixels = images(2, 3, 4, 4)
    assert_close("output", pixels.flatten(1) @ weight + bias, torch.from_numpy(session.run(pixels.numpy())), 1e-5)


@built
@no_cuda
def test_cpu_in_place_of_cuda_has_the_library_of_the_cpu(classifier, cuda_that_does_not_start, monkeypatch, tmp_path):
    path = tmp_path / "library.so"
    shutil.copy(library_path(), path)  # without the file beside it that may say that it has CUDA kernels
    monkeypatch.setenv("GSPN2_ORT_LIBRARY", str(path))
    session = onnx_session(classifier.path)
    described = session.describe()
    assert (described["line_scan"], described["library"]) == (KERNEL, str(path))
    compare(session, classifier.student, images(3, 3, 16, 24), 1e-5)
