"""Whole exported students against PyTorch, and what cannot be exported."""

import json
import resource
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import timm
import torch
from onnx import TensorProto, helper
from safetensors.torch import load_file
from torch import nn

from gspn2_kernels.testing import assert_close
from gspn2convert import onnx_graph
from gspn2convert.errors import UserError
from gspn2convert.export import ParityError, export_onnx, export_safetensors
from gspn2convert.mixer import Gspn2Mixer
from gspn2convert.model import Gspn2Vit, build_student
from gspn2convert.onnx_function import ADD_NORM, DOMAIN, NAME
from gspn2convert.session import onnx_session
from helpers.onnx_runs import run_evaluator, run_onnxruntime


@pytest.fixture
def make_student(make_teacher: Callable[..., nn.Module]) -> Callable[..., Gspn2Vit]:
    """Makes students of the small teacher, 32 x 48 pixels in patches of 8, whose mixers depend on what they see."""

    def make(mixer: dict[str, Any] | None = None, layers: tuple[int, ...] = (0, 1), **changes: Any) -> Gspn2Vit:
        student = build_student(make_teacher(**changes), layers, {"proxy_dim": 8, **(mixer or {})})
        generator = torch.Generator().manual_seed(1)
        for module in student.modules():
            if isinstance(module, Gspn2Mixer):
                for parameter in module.parameters():
                    parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        return student

    return make


def check_file(path: Path, student: nn.Module, shapes: list[tuple[int, ...]], tolerance: float) -> onnx.ModelProto:
    """Compare an exported file with the student at more shapes than the export did, and look inside."""
    model = onnx.load(path)
    assert model.ir_version == 10
    assert {(opset.domain, opset.version) for opset in model.opset_import} == {("", 20), (DOMAIN, 1)}
    assert {(function.domain, function.name) for function in model.functions} == {(DOMAIN, NAME), (DOMAIN, ADD_NORM)}
    assert not any(node.op_type == "Resize" for node in model.graph.node)
    machine = (str(Path(__file__).parents[1]), str(path.parent), str(Path(timm.__file__).parents[1]), sys.prefix, ".py")
    assert not [text for text in machine if text.encode() in path.read_bytes()]
    element = model.graph.input[0].type.tensor_type.elem_type
    for shape in shapes:
        image = torch.randn(shape, generator=torch.Generator().manual_seed(7))
        image = image.half() if element == TensorProto.FLOAT16 else image
        with torch.no_grad():
            want = student(image.float())
        got = run_onnxruntime(model, {"image": image.numpy()})
        assert got.dtype == image.dtype
        assert_close(str(shape), want, got.float(), tolerance)
    return model


def line_scans(model: onnx.ModelProto) -> dict[str, int]:
    """Names of the LineScan nodes and their segments."""
    nodes = [node for node in model.graph.node if node.op_type == NAME]
    return {node.name: helper.get_node_attr_value(node, "segment") for node in nodes}


def test_exported_student(make_student: Callable[..., Gspn2Vit], tmp_path: Path) -> None:
    student = make_student({"groups": 2, "segment": 3}).train()
    student.pretrained_cfg["label_names"] = ["ant", "bee", "cat", "dog", "eel"]
    student.set_grad_checkpointing()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    path = tmp_path / "student.onnx"
    result = export_onnx(student, path, metadata={"teacher": "a tiny one"})

    assert student.training
    assert student.blocks[0].grad_checkpointing
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert "_pos_embed" not in vars(student)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())

    model = check_file(path, student.eval(), [(5, 3, 40, 40), (1, 3, 8, 72), (2, 3, 64, 8), (1, 3, 8, 8)], 1e-5)
    assert line_scans(model) == {"blocks.0/line_scan": 3, "blocks.1/line_scan_1": 3}
    # One for each mixer's local perception, none for the patches.
    assert sum(node.op_type == "Conv" for node in model.graph.node) == 2
    assert result["line_scans"] == 2
    assert result["bytes"] == path.stat().st_size
    assert result["dynamic"] == ["batch", "height", "width"]
    assert [one["shape"] for one in result["parity"]] == [[1, 3, 32, 48], [3, 3, 32, 48], [2, 3, 32, 64]]
    assert all(one["relative_rms"] < 1e-5 and one["top1_agreement"] == 1 for one in result["parity"])
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata["label_names"]) == ["ant", "bee", "cat", "dog", "eel"]
    assert json.loads(metadata["mean"]) == list(student.pretrained_cfg["mean"])
    assert json.loads(metadata["input_size"]) == [3, 32, 48]
    assert json.loads(metadata["size_multiple"]) == [8, 8]
    assert json.loads(metadata["parity"]) == result["parity"]
    assert metadata["teacher"] == "a tiny one"

    image = torch.randn(2, 3, 24, 56)
    assert_close("evaluator", student(image).detach(), run_evaluator(model, {"image": image.numpy()}), 1e-5)


@pytest.mark.parametrize(
    "changes",
    [{}, {"class_token": False, "global_pool": "avg"}, {"qk_norm": True, "reg_tokens": 2}],
    ids=["class token", "no prefix tokens", "qk norm and registers"],
)
def test_regions_at_any_size(make_student: Callable[..., Gspn2Vit], tmp_path: Path, changes: dict[str, Any]) -> None:
    student = make_student({"regions": 3}, **changes)
    export_onnx(student, tmp_path / "student.onnx")
    check_file(tmp_path / "student.onnx", student, [(2, 3, 40, 24), (1, 3, 8, 72), (3, 3, 8, 8)], 1e-5)


@pytest.mark.parametrize("static", [None, (2, 3, 37, 51)], ids=["any size", "one size"])
def test_images_that_the_model_pads(make_student: Callable[..., Gspn2Vit], tmp_path: Path, static) -> None:
    student = make_student(img_size=(37, 51), dynamic_img_pad=True)
    export_onnx(student, tmp_path / "student.onnx", static=static)
    check_file(
        tmp_path / "student.onnx", student, [(2, 3, 37, 51)] if static else [(1, 3, 33, 18), (2, 3, 40, 41)], 1e-5
    )
    images = torch.randn(2, 3, 37, 51)
    outputs = onnx_session(tmp_path / "student.onnx", library=False).run(images.numpy())
    assert_close("session", student(images).detach(), torch.from_numpy(outputs), 1e-5)


def test_a_padding_model_with_registers_needs_one_size(make_student: Callable[..., Gspn2Vit], tmp_path: Path) -> None:
    student = make_student(img_size=(37, 51), dynamic_img_pad=True, reg_tokens=2)
    with pytest.raises(UserError, match="pads images of any size and has register tokens; .* --static N,C,H,W"):
        export_onnx(student, tmp_path / "student.onnx")
    assert not list(tmp_path.iterdir())
    export_onnx(student, tmp_path / "student.onnx", static=(1, 3, 37, 51))


@pytest.mark.parametrize("regions", [0, 3])
def test_a_file_leaves_nothing_to_compute_from_weights_alone(
    make_student: Callable[..., Gspn2Vit], tmp_path: Path, regions: int
) -> None:
    export_onnx(make_student({"regions": regions}, init_values=0.1), tmp_path / "student.onnx", static=(2, 3, 32, 48))
    graph = onnx.load(tmp_path / "student.onnx").graph
    known = {tensor.name: tensor for tensor in graph.initializer}
    uses = Counter(name for node in graph.node for name in node.input)
    for node in graph.node:
        if known.keys() >= set(node.input):
            # What is left would make the file larger: a weight in a second form, a constant for every image.
            assert node.op_type in {"Expand", "ConstantOfShape"} or max(uses[name] for name in node.input) > 1, node


def test_exported_student_in_fp16(make_student: Callable[..., Gspn2Vit], tmp_path: Path) -> None:
    student = make_student(reg_tokens=4, no_embed_class=True, qk_norm=True, init_values=0.1)
    result = export_onnx(student, tmp_path / "student.onnx", dtype="fp16", size=(48, 40))
    model = check_file(tmp_path / "student.onnx", student, [(5, 3, 40, 40), (1, 3, 32, 48)], 5e-3)
    assert len(line_scans(model)) == 2
    assert [one["shape"] for one in result["parity"]] == [[1, 3, 48, 40], [3, 3, 48, 40], [2, 3, 48, 48]]
    weights = {onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in model.graph.initializer}
    assert "FLOAT16" in weights


def test_exported_features_of_a_hybrid_without_prefix_tokens(
    make_student: Callable[..., Gspn2Vit], tmp_path: Path
) -> None:
    student = make_student(layers=(1,), class_token=False, global_pool="avg", num_classes=0)
    result = export_onnx(student, tmp_path / "student.onnx")
    model = check_file(tmp_path / "student.onnx", student, [(5, 3, 40, 40), (1, 3, 8, 72)], 1e-5)
    assert list(line_scans(model)) == ["blocks.1/line_scan"]
    assert [output.name for output in model.graph.output] == [result["output"]] == ["features"]
    assert "top1_agreement" not in result["parity"][0]


def test_model_of_one_size_keeps_it(
    make_student: Callable[..., Gspn2Vit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A limit that this small model reaches.
    monkeypatch.setattr(onnx_graph, "_LARGEST_SINGLE_FILE", 1000)
    student = make_student(depth=1, layers=(0,), dynamic_img_size=False)
    result = export_onnx(student, tmp_path / "large.onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["large.onnx", "large.onnx.data"]
    assert result["bytes"] == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert result["dynamic"] == ["batch"]
    check_file(tmp_path / "large.onnx", student, [(5, 3, 32, 48)], 1e-5)
    session = onnxruntime.InferenceSession(tmp_path / "large.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 3, 32, 48]
    with pytest.raises(UserError, match="takes 32x48 alone"):
        export_onnx(student, tmp_path / "other.onnx", size=(48, 48))


@pytest.mark.parametrize(
    ("dynamic", "regions"), [(True, 0), (False, 0), (True, 3)], ids=["dynamic", "fixed", "regions"]
)
def test_static_file_takes_one_shape(
    make_student: Callable[..., Gspn2Vit], tmp_path: Path, dynamic: bool, regions: int
) -> None:
    student = make_student({"regions": regions}, depth=1, layers=(0,), dynamic_img_size=dynamic)
    path = tmp_path / "static.onnx"
    shape = (1, 3, 40, 24) if dynamic else (3, 3, 32, 48)
    result = export_onnx(student, path, static=shape)
    model = check_file(path, student, [shape], 1e-5)
    assert result["dynamic"] == []
    assert [one["shape"] for one in result["parity"]] == [list(shape)]
    dimensions = model.graph.input[0].type.tensor_type.shape.dim
    assert tuple(dimension.dim_value for dimension in dimensions) == shape
    # Nothing is left to be found out while it runs: CUDA graphs allow no operator that works on shapes.
    assert not [node.op_type for node in model.graph.node if node.op_type in ("Shape", "Range", "If", "Loop", "Scan")]
    metadata = {entry.key: json.loads(entry.value) for entry in model.metadata_props if entry.key.startswith("input_")}
    assert metadata == {"input_size": list(shape[1:])}


def test_static_shape_must_fit_the_model(make_student: Callable[..., Gspn2Vit], tmp_path: Path) -> None:
    for shape, message in (
        ((2, 1, 32, 48), r"shape \(2, 1, 32, 48\): expected one image or more of 3 channels"),
        ((0, 3, 32, 48), "expected one image or more"),
        ((1, 3, 30, 48), "30x48 is no multiple of the patch 8x8"),
    ):
        with pytest.raises(UserError, match=message):
            export_onnx(make_student(), tmp_path / "static.onnx", static=shape)
    assert not list(tmp_path.iterdir())


def test_file_that_computes_something_else_is_not_left(make_student: Callable[..., Gspn2Vit], tmp_path: Path) -> None:
    student = make_student(depth=1, layers=(0,), dynamic_img_size=False)
    student.head.weight.data.mul_(1e5)  # beyond the largest fp16 number
    with pytest.raises(ParityError, match="use --dtype fp32"):
        export_onnx(student, tmp_path / "student.onnx", dtype="fp16")
    assert not list(tmp_path.iterdir())


def test_full_disk_leaves_nothing(make_student: Callable[..., Gspn2Vit], tmp_path: Path) -> None:
    student = make_student(depth=1, layers=(0,), dynamic_img_size=False)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        for export, name in ((export_onnx, "student.onnx"), (export_safetensors, "student.safetensors")):
            with pytest.raises(UserError, match=f"cannot write .*{name}: File too large"):
                export(student, tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("export", [export_onnx, export_safetensors])
def test_refusals(export: Callable[..., Any], make_student: Callable[..., Gspn2Vit], tmp_path: Path) -> None:
    student, taken = make_student(), tmp_path / "taken"
    taken.write_bytes(b"mine")
    with pytest.raises(UserError, match="taken exists; remove it"):
        export(student, taken)
    with pytest.raises(UserError, match="no bf16 convolution on the CPU; use fp32 or fp16"):
        export(student, tmp_path / "new", dtype="bf16")
    with pytest.raises(UserError, match="'int8' given, expected one of fp32, fp16"):
        export(student, tmp_path / "new", dtype="int8")
    with pytest.raises(UserError, match="no-such-folder does not exist"):
        export(student, tmp_path / "no-such-folder" / "new")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"mine"]


def test_size_must_fit_the_patch(make_student: Callable[..., Gspn2Vit], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="image size 30x48 is no multiple of the patch 8x8"):
        export_onnx(make_student(), tmp_path / "student.onnx", size=(30, 48))


def test_missing_packages_are_named(
    make_student: Callable[..., Gspn2Vit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r'needs onnxruntime: pip install "gspn2convert\[onnx,ort\]"'):
        export_onnx(make_student(), tmp_path / "student.onnx")


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("fp32", torch.float32), ("fp16", torch.float16)])
def test_safetensors_hold_the_weights(
    dtype: str, torch_dtype: torch.dtype, make_student: Callable[..., Gspn2Vit], tmp_path: Path
) -> None:
    student, path = make_student(), tmp_path / "student.safetensors"
    result = export_safetensors(student, path, dtype=dtype)
    saved, weights = load_file(path), student.state_dict()
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[name], weights[name].to(torch_dtype)) for name in weights)
    assert result == {"path": str(path), "bytes": path.stat().st_size, "dtype": dtype, "tensors": len(weights)}


@pytest.mark.parametrize("static", [None, (2, 3, 32, 48)], ids=["any size", "one size"])
def test_residual_sums_and_their_norms_are_one_node(
    make_student: Callable[..., Gspn2Vit], tmp_path: Path, static: tuple[int, int, int, int] | None
) -> None:
    student = make_student()
    export_onnx(student, tmp_path / "model.onnx", static=static)
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    found = {node.name: list(node.input) for node in nodes if node.op_type == ADD_NORM}
    # The first norm follows no residual, and the last one alone reads its sum.
    assert [name.partition("/")[0] for name in found] == ["blocks.0", "blocks.1", "blocks.1"]
    zero = "ai.gspn2:no_bias_float"
    assert [inputs[2] for inputs in found.values()] == [zero, "blocks.0.mlp.fc2.bias", zero]
    assert sum(node.op_type == "LayerNormalization" for node in nodes) == 2
