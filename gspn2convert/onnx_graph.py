"""From a model in PyTorch to a clean ONNX graph with nodes of `ai.gspn2` and their bodies, and to a file."""

from __future__ import annotations

import ast
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gspn2convert.onnx_function import (
    DOMAIN,
    NAME,
    VERSION,
    add_norm_function,
    line_scan_function,
    line_scan_translation,
)
from gspn2convert.onnx_norms import join_norms

if TYPE_CHECKING:
    import onnx_ir

# ONNX Runtime 1.18 reads up to IR 10 and opset 21.
OPSET = 20
IR_VERSION = 10
# By so many bytes a file may grow for a node less.
_SMALL = 2**14
# A protobuf holds 2 GiB; the graph and the checker's copy of it need some of that.
_LARGEST_SINGLE_FILE = 2**31 - 2**27


def translate(
    model: nn.Module, example: Tensor, *, free: dict[int, str], input_name: str, output_name: str
) -> onnx_ir.Model:
    """Translate a model of one input and one output.

    Args:
        model: on the CPU, in eval mode.
        example: an input; the graph depends on its shape in the fixed axes alone.
        free: axes of the input whose size may change, with the names they get.
        input_name: name of the graph's input.
        output_name: name of the graph's output.

    Returns:
        The graph in opset 20 and IR 10, with nothing of what the exporter tells about this machine.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    # Without gradients, as it will run: norm, mixer and residual in few passes.
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            dynamic_shapes=(free,),
            custom_translation_table=line_scan_translation(),
            opset_version=OPSET,
            input_names=[input_name],
            output_names=[output_name],
            verbose=False,
        )
        assert program is not None
        graph = program.model
        _fold(graph)
    graph.ir_version = IR_VERSION
    _name_nodes(graph, {name for name, _ in model.named_modules()})
    join_norms(graph)
    ClearMetadataAndDocStringPass()(graph)
    _add_bodies(graph)  # last: the exporter's passes inline every function that they find
    return graph


def count_nodes(graph: onnx_ir.Model, op_type: str, domain: str = "") -> int:
    """Number of nodes of one operator in the main graph."""
    return sum(node.op_type == op_type and node.domain == domain for node in graph.graph)


def count_line_scans(graph: onnx_ir.Model) -> int:
    """Number of `ai.gspn2::LineScan` nodes."""
    return count_nodes(graph, NAME, DOMAIN)


def weights_file(path: Path) -> Path:
    """Where the weights lie of a file that would be too large with them."""
    return path.with_name(path.name + ".data")


def save(graph: onnx_ir.Model, path: Path) -> None:
    """Save a graph and check the file; near 2 GiB the weights go to `weights_file(path)`."""
    import onnx
    import onnx_ir

    tensors = [value.const_value for value in graph.graph.initializers.values()]
    large = sum(tensor.nbytes for tensor in tensors if tensor is not None) > _LARGEST_SINGLE_FILE
    onnx_ir.save(graph, path, external_data=weights_file(path).name if large else None)
    onnx.checker.check_model(str(path), full_check=True)


def _add_bodies(graph: onnx_ir.Model) -> None:
    """Give the file the function bodies of its nodes."""
    from onnx_ir import serde

    for proto in (line_scan_function(OPSET), add_norm_function(OPSET)):
        if count_nodes(graph, proto.name, DOMAIN):
            function = serde.deserialize_function(proto)
            graph.functions[function.identifier()] = function
    graph.opset_imports.setdefault(DOMAIN, VERSION)


def _fold(graph: onnx_ir.Model) -> None:
    """Compute now what depends on weights alone, as long as the file hardly grows by it."""
    from onnxscript.optimizer import fold_constants_ir

    def saves(node: onnx_ir.Node) -> bool:
        consumed = sum(_bytes(value) for value in node.inputs if value is not None and len(value.uses()) == 1)
        return sum(map(_bytes, node.outputs)) <= consumed + _SMALL

    fold_constants_ir(graph, should_fold=saves)


def _bytes(value: onnx_ir.Value) -> float:
    """Count the bytes of a tensor; where shape or dtype is not known, as infinity."""
    if value.shape is None or value.dtype is None or not value.shape.is_static():
        return math.inf
    return math.prod(value.shape.numpy()) * value.dtype.itemsize


def _name_nodes(graph: onnx_ir.Model, modules: set[str]) -> None:
    """Put the path of its module before each node's name, as in `blocks.3/line_scan_3`."""
    for node in graph.graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        inner = next((scope for scope in reversed(scopes) if scope in modules), "")
        if inner and node.name:
            node.name = f"{inner}/{node.name.removeprefix('node_')}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter, whose notes concern its own passes."""
    loggers = [logging.getLogger(name) for name in ("onnx_ir", "onnxscript", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
