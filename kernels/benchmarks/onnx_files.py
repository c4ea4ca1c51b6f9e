"""The ONNX files that benchmarks run: nodes of LineScan, and a ViT with its student, exported alike."""

import copy
from pathlib import Path

import onnx
import torch
from conditions import DTYPES
from onnx import TensorProto, helper
from pairs import teacher_and_student
from timm.models import VisionTransformer

from gspn2convert import onnx_graph
from gspn2convert.embedding import make_embedding_portable
from gspn2convert.onnx_function import DOMAIN, NAME, line_scan_function

OPERANDS = ("x", "lam", "logits", "u")
TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
}


def write_scan(path: Path, dtype: str = "fp32", nodes: int = 1) -> Path:
    """Write a model of LineScan nodes that all read x, lam, logits and u, with their body; outputs y0, y1 and so on.

    Their segments, longer than any grid, differ: equal nodes ONNX Runtime would merge.
    """
    shapes = [["B", "H", "W", "C"], ["B", "H", "W", 4, "C"], ["B", "H", "W", 4, "G", 3], ["B", "H", "W", 4, "C"]]
    number = TYPES[DTYPES[dtype]]
    results = [f"y{node}" for node in range(nodes)]
    scans = [
        helper.make_node(NAME, OPERANDS, [y], y, domain=DOMAIN, segment=10**6 + node if node else 0)
        for node, y in enumerate(results)
    ]
    graph = helper.make_graph(
        scans,
        "scan",
        [helper.make_tensor_value_info(n, number, s) for n, s in zip(OPERANDS, shapes, strict=True)],
        [helper.make_tensor_value_info(y, number, shapes[1]) for y in results],
    )
    opsets = [helper.make_opsetid("", onnx_graph.OPSET), helper.make_opsetid(DOMAIN, 1)]
    functions = [line_scan_function(onnx_graph.OPSET)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10), path)
    return path


def awake_pair(name: str, depth: int | None = None) -> tuple[VisionTransformer, VisionTransformer]:
    """Build a ViT and its student, the same on every call, with noise on what mixers leave at 0 or 1."""
    torch.manual_seed(0)
    changes = {} if depth is None else {"depth": depth}
    teacher, student = teacher_and_student(name, **changes)
    for parameter in student.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    return teacher, student


def write_model(
    model: VisionTransformer, path: Path, dtype: str = "fp32", shape: tuple[int, int, int, int] | None = None
) -> Path:
    """Translate a model as `gspn2convert export` does; with a shape, as with `--static`."""
    model = copy.deepcopy(model).requires_grad_(False).to(DTYPES[dtype])
    make_embedding_portable(model)
    patch = model.patch_embed.patch_size[0]
    free = {} if shape else {0: "batch", 2: "height", 3: "width"}
    example = torch.zeros(shape or (2, 3, 14 * patch, 15 * patch), dtype=DTYPES[dtype])
    graph = onnx_graph.translate(model, example, free=free, input_name="image", output_name="logits")
    onnx_graph.save(graph, path)
    return path
