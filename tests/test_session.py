"""Exported files in ONNX Runtime: numbers against PyTorch, what runs where, and what is refused."""

import ctypes
import os
import shutil
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

import gspn2convert
from gspn2_kernels.build import has_cuda, library_path
from gspn2_kernels.testing import assert_close
from gspn2convert import session as module
from gspn2convert.errors import UserError
from gspn2convert.providers import CPU, CUDA, settings
from gspn2convert.session import BODY, KERNEL, OnnxSession, onnx_session, pick_providers

built = pytest.mark.skipif(library_path() is None, reason="needs the library: gspn2convert build-ops")

# What ONNX Runtime for the CPU says when it is asked for CUDA, and leaves it out; that for CUDA logs an error.
no_cuda = pytest.mark.filterwarnings("ignore:Specified provider .* is not in available provider names")


@pytest.fixture
def cuda_that_does_not_start(monkeypatch):
    """This machine, taken for one that has a GPU: ONNX Runtime leaves CUDA out and goes on."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") != "" and torch.cuda.is_available():
        pytest.skip("CUDA starts here")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(module, "_has_cuda_device", lambda: True)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)


def images(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def compare(session: OnnxSession, student: torch.nn.Module, pixels: torch.Tensor, tolerance: float) -> None:
    with torch.no_grad():
        want = student(pixels)
    assert_close("output", want, torch.from_numpy(session.run(pixels.numpy())).float(), tolerance)


def test_package_offers_it():
    assert gspn2convert.onnx_session is onnx_session


@pytest.mark.parametrize("library", [False, pytest.param(True, marks=built)], ids=["body", "library"])
def test_runs_as_pytorch_does(classifier, library):
    session = onnx_session(classifier.path, ["cpu"], library=library)
    compare(session, classifier.student, images(3, 3, 16, 24), 1e-5)
    compare(session, classifier.student, images(1, 3, 40, 8), 1e-5)
    assert (session.batch, session.input_size, session.size_multiple) == (None, (3, None, None), (8, 8))
    assert session.describe() == {
        "file": str(classifier.path),
        "onnxruntime": onnxruntime.__version__,
        "providers": [CPU],
        "line_scan": KERNEL if library else BODY,
        "line_scan_provider": CPU,
        "library": str(library_path()) if library else None,
        "dtype": "fp32",
        "inputs": ["image: fp32 (batch, 3, height, width)"],
        "outputs": ["logits: fp32 (batch, 5)"],
    }


@pytest.mark.parametrize("library", [False, pytest.param(True, marks=built)], ids=["body", "library"])
def test_runs_a_static_file_in_fp16(feature_model, library):
    session = onnx_session(feature_model.path, ["cpu"], library=library)
    compare(session, feature_model.student, images(2, 3, 16, 24), 5e-3)
    assert (session.batch, session.input_size, session.size_multiple) == (2, (3, 16, 24), (1, 1))
    described = session.describe()
    assert described["dtype"] == "fp16"
    assert described["inputs"] == ["image: fp16 (2, 3, 16, 24)"]
    assert described["outputs"] == ["features: fp16 (2, 32)"]


@pytest.mark.gpu
@pytest.mark.skipif(CUDA not in onnxruntime.get_available_providers(), reason="needs onnxruntime-gpu")
def test_runs_on_cuda(classifier):
    session = onnx_session(classifier.path)
    compare(session, classifier.student, images(3, 3, 16, 24), 1e-3)
    path = library_path()
    assert session.describe()["providers"][0] == CUDA
    assert session.describe()["line_scan"] == (KERNEL if path and has_cuda(path) else BODY)


def test_library_is_optional_and_insisted_on_only_if_asked(classifier, monkeypatch, tmp_path):
    monkeypatch.delenv("GSPN2_ORT_LIBRARY", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert onnx_session(classifier.path).describe()["line_scan"] == BODY
    with pytest.raises(UserError, match="gspn2convert build-ops"):
        onnx_session(classifier.path, library=True)


def test_library_that_was_named_is_not_passed_over(classifier, monkeypatch, tmp_path):
    path = tmp_path / "library.so"
    monkeypatch.setenv("GSPN2_ORT_LIBRARY", str(path))
    with pytest.raises(UserError, match=r"library\.so, which does not exist"):
        onnx_session(classifier.path)
    path.write_bytes(b"no library")
    with pytest.raises(UserError, match=r"library\.so: ONNX Runtime cannot load this library .*rebuild it"):
        onnx_session(classifier.path, ["cpu"])
    assert onnx_session(classifier.path, library=False).describe()["line_scan"] == BODY


def test_library_of_the_cpu_alone_is_left_out_on_cuda(classifier, monkeypatch, tmp_path, caplog):
    (tmp_path / "library.so").touch()  # nothing beside it says that it has CUDA kernels
    monkeypatch.setenv("GSPN2_ORT_LIBRARY", str(tmp_path / "library.so"))
    monkeypatch.setattr(module, "pick_providers", lambda available, asked: [CUDA, CPU])
    monkeypatch.setattr(module, "_preload", lambda runtime: None)
    with pytest.raises(
        UserError, match=r"library\.so has no kernels for CUDAExecutionProvider; run gspn2convert build-"
    ):
        onnx_session(classifier.path, library=True)
    caplog.clear()
    assert module._register(onnxruntime.SessionOptions(), [CUDA, CPU], insist=False) is None
    assert "LineScan runs without its library" in caplog.text


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 1, 16, 24), r"takes \(B, 3, H, W\), H in multiples of 8 and W of 8"),
        ((3, 16, 24), r"images of shape \(3, 16, 24\): classifier.onnx takes \(B, 3, H, W\)"),
        ((2, 3, 16, 20), "multiples of 8"),
    ],
)
def test_images_of_another_shape_are_refused(classifier, shape, message):
    with pytest.raises(UserError, match=message):
        onnx_session(classifier.path, library=False).run(np.zeros(shape, np.float32))


def test_images_must_be_what_a_static_file_takes(feature_model):
    session = onnx_session(feature_model.path, library=False)
    for shape in ((1, 3, 16, 24), (2, 3, 24, 24)):
        with pytest.raises(UserError, match=r"features.onnx takes \(2, 3, 16, 24\)$"):
            session.run(np.zeros(shape, np.float32))
    with pytest.raises(UserError, match="images of type uint8: features.onnx takes normalised floating-point images"):
        session.run(np.zeros((2, 3, 16, 24), np.uint8))


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


def test_file_without_its_body_needs_the_library(classifier, tmp_path):
    model = onnx.load(classifier.path)
    del model.functions[:]
    onnx.save(model, tmp_path / "bare.onnx")
    with pytest.raises(UserError, match="a tool took the bodies of `ai.gspn2` out; run gspn2convert build-ops"):
        onnx_session(tmp_path / "bare.onnx", library=False)


def other_model(path, shape, dtype=TensorProto.FLOAT):
    """A file of ours it is not: two outputs, no metadata, no LineScan."""
    value = [helper.make_tensor_value_info(name, dtype, shape) for name in ("x", "y", "z")]
    nodes = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Neg", ["x"], ["z"])]
    graph = helper.make_graph(nodes, "other", value[:1], value[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_other_image_models_run_too(tmp_path):
    session = onnx_session(other_model(tmp_path / "other.onnx", ["B", 3, None, None]), library=False)
    pixels = images(2, 3, 5, 7).numpy()
    positive, negative = session.run(pixels)
    assert np.array_equal(positive, pixels.clip(0))
    assert np.array_equal(negative, -pixels)
    described = session.describe()
    assert (described["line_scan"], described["line_scan_provider"]) == (None, None)
    assert described["inputs"] == ["x: fp32 (B, 3, ?, ?)"]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [([1, 3], TensorProto.FLOAT), (["B", "C", 4, 4], TensorProto.FLOAT), ([1, 3, 4, 4], TensorProto.DOUBLE)],
    ids=["no-image", "any-channels", "fp64"],
)
def test_models_of_anything_else_are_refused(tmp_path, shape, dtype):
    with pytest.raises(UserError, match=r"no image model; it takes x: .*, expected one fp32 or fp16 tensor"):
        onnx_session(other_model(tmp_path / "other.onnx", shape, dtype), library=False)


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


def check_one_shape(path, *, want):
    """Compare what is read from a file with the inputs that ONNX Runtime has of it."""
    inputs = onnxruntime.InferenceSession(path, providers=[CPU]).get_inputs()
    assert module._takes_one_shape(path) == all(isinstance(size, int) for one in inputs for size in one.shape) == want


def test_an_exported_file_of_one_shape_is_known_by_its_inputs(classifier, feature_model):
    check_one_shape(classifier.path, want=False)
    check_one_shape(feature_model.path, want=True)


@pytest.mark.parametrize(
    ("shape", "want"),
    [([2, 3, 4, 300], True), ([], True), (["B", 3, 4, 4], False), ([2, 3, 4, None], False), ([None], False)],
)
def test_a_file_of_one_shape_is_known_by_its_inputs(tmp_path, shape, want):
    check_one_shape(other_model(tmp_path / "other.onnx", shape), want=want)


def test_one_free_input_is_enough_and_weights_may_lie_elsewhere(tmp_path):
    path = tmp_path / "sum.onnx"
    weight = onnx.numpy_helper.from_array(np.ones((2, 300), np.float32), "w")
    for second, want in ((["B", 300], False), ([2, 300], True)):
        values = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in (("x", [2, 300]), ("y", second), ("z", [2, 300]))
        ]
        graph = helper.make_graph(
            [helper.make_node("Sum", ["x", "y", "w"], ["z"])], "sum", values[:2], values[2:], [weight]
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.save(model, path, save_as_external_data=True, location=f"{want}.data", size_threshold=0)
        check_one_shape(path, want=want)


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
    monkeypatch.setattr(module, "_has_cuda_device", lambda: devices > 0)
    assert pick_providers([CUDA, CPU], None) == picked
    assert pick_providers([CPU], None) == [CPU]


def test_driver_is_asked_for_devices():
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        assert not module._has_cuda_device()
    else:
        assert module._has_cuda_device() == torch.cuda.is_available()


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


def test_missing_or_old_onnxruntime_is_named(classifier, monkeypatch):
    monkeypatch.setattr(onnxruntime, "__version__", "1.17.3")
    with pytest.raises(UserError, match=r"ONNX Runtime 1\.17\.3 is too old: pip install .*onnxruntime>=1\.18"):
        onnx_session(classifier.path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"ONNX Runtime is not installed: pip install 'gspn2convert\[ort\]'"):
        onnx_session(classifier.path)
