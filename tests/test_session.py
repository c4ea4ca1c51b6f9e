"""Exported files in ONNX Runtime: numbers against PyTorch, and what is refused."""

import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

import gspn2convert
from gspn2_kernels.build import has_cuda, library_path
from gspn2convert import session as module
from gspn2convert.errors import UserError
from gspn2convert.export import export_onnx
from gspn2convert.providers import CPU, CUDA
from gspn2convert.session import BODY, KERNEL, onnx_session
from helpers.sessions import LIBRARY, built, compare, images


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
    with pytest.raises(UserError, match=r"library\.so is no library, or not all of one"):
        onnx_session(classifier.path, ["cpu"])
    path.write_bytes(LIBRARY)
    with pytest.raises(UserError, match=r"library\.so: ONNX Runtime cannot load this library .*rebuild it"):
        onnx_session(classifier.path, "cpu")
    assert onnx_session(classifier.path, library=False).describe()["line_scan"] == BODY


def test_library_of_the_cpu_alone_is_left_out_on_cuda(classifier, monkeypatch, tmp_path, caplog):
    (tmp_path / "library.so").write_bytes(LIBRARY)  # nothing beside it says that it has CUDA kernels
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
        ((2, 3, 0, 24), r"images of shape \(2, 3, 0, 24\): classifier.onnx takes"),
    ],
)
def test_images_of_another_shape_are_refused(classifier, shape, message):
    with pytest.raises(UserError, match=message):
        onnx_session(classifier.path, library=False).run(np.zeros(shape, np.float32))


def test_run_that_fails_is_an_error_with_what_onnxruntime_says(tmp_path):
    shape = onnx.numpy_helper.from_array(np.array([-1, 7]), "shape")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 3, "H", "W"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node("Reshape", ["x", "shape"], ["y"])], "sevens", [x], [y], [shape])
    path = tmp_path / "sevens.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    session = onnx_session(path, ["cpu"])
    assert session.run(np.zeros((7, 3, 4, 4), np.float32)).shape == (48, 7)
    message = r"sevens.onnx: ONNX Runtime failed on images of shape \(1, 3, 4, 4\): .*shape"
    with pytest.raises(UserError, match=message):
        session.run(np.zeros((1, 3, 4, 4), np.float32))


def test_images_must_be_what_a_static_file_takes(feature_model):
    session = onnx_session(feature_model.path, library=False)
    for shape in ((1, 3, 16, 24), (2, 3, 24, 24)):
        with pytest.raises(UserError, match=r"features.onnx takes \(2, 3, 16, 24\)$"):
            session.run(np.zeros(shape, np.float32))
    with pytest.raises(UserError, match="images of type uint8: features.onnx takes normalised floating-point images"):
        session.run(np.zeros((2, 3, 16, 24), np.uint8))


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


def test_a_file_with_other_nodes_of_ours_has_no_line_scans(tmp_path, tiny_teacher):
    export_onnx(tiny_teacher, tmp_path / "teacher.onnx")
    assert onnx_session(tmp_path / "teacher.onnx").describe()["line_scan"] is None


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [([1, 3], TensorProto.FLOAT), (["B", "C", 4, 4], TensorProto.FLOAT), ([1, 3, 4, 4], TensorProto.DOUBLE)],
    ids=["no-image", "any-channels", "fp64"],
)
def test_models_of_anything_else_are_refused(tmp_path, shape, dtype):
    with pytest.raises(UserError, match=r"no image model; it takes x: .*, expected one fp32 or fp16 tensor"):
        onnx_session(other_model(tmp_path / "other.onnx", shape, dtype), library=False)


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


def test_missing_or_old_onnxruntime_is_named(classifier, monkeypatch):
    monkeypatch.setattr(onnxruntime, "__version__", "1.17.3")
    with pytest.raises(UserError, match=r"ONNX Runtime 1\.17\.3 is too old: pip install .*onnxruntime>=1\.18"):
        onnx_session(classifier.path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"ONNX Runtime is not installed: pip install 'gspn2convert\[ort\]'"):
        onnx_session(classifier.path)
