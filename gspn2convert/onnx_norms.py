"""Residual sums and the norms that read them, joined in an ONNX graph to `ai.gspn2::AddNorm` nodes."""

from __future__ import annotations

from itertools import permutations
from typing import TYPE_CHECKING

import numpy as np

from gspn2convert.onnx_function import ADD_NORM, DOMAIN

if TYPE_CHECKING:
    import onnx_ir


def join_norms(graph: onnx_ir.Model) -> None:
    """Make one node of each residual sum, the bias before it and the LayerNorm after it.

    ONNX Runtime on CUDA passes over the tokens once for a bias, once for a sum and several times for a LayerNorm.
    """
    for norm in list(graph.graph):
        add = norm.inputs[0].producer() if norm.op_type == "LayerNormalization" and norm.inputs[0] else None
        if add is not None and _fits(add, norm):
            _join(graph, add, norm)


def _fits(add: onnx_ir.Node, norm: onnx_ir.Node) -> bool:
    """Tell whether AddNorm does what two nodes do: a sum of two tensors of one shape, and a norm over its last axis.

    A sum that the norm alone reads stays as it is: AddNorm would write it for nobody.
    """
    if add.op_type != "Add" or len(norm.inputs) != 3 or len(norm.outputs) != 1:
        return False
    total, normed = add.outputs[0], norm.outputs[0]
    if total.is_graph_output() or normed.is_graph_output() or len(total.uses()) < 2:
        return False
    x, update = _values(add)
    if x.shape is None or x.dtype is None or not _alike(x, update):
        return False
    attributes = norm.attributes
    last = attributes.get_int("axis", -1) in (-1, len(x.shape) - 1) and attributes.get_int("stash_type", 1) == 1
    vectors = _values(norm)[1:]
    return last and len(vectors) == 2 and all(_is_vector(value) and value.shape == x.shape[-1:] for value in vectors)


def _alike(one: onnx_ir.Value, other: onnx_ir.Value) -> bool:
    """Tell whether two values have one shape; unknown sizes may differ."""
    if one.shape is None or one.shape != other.shape:
        return False
    return all(isinstance(size, int) or size.value is not None for size in one.shape)


def _is_vector(value: onnx_ir.Value) -> bool:
    return value.is_initializer() and value.shape is not None and len(value.shape) == 1


def _join(graph: onnx_ir.Model, add: onnx_ir.Node, norm: onnx_ir.Node) -> None:
    import onnx_ir

    removed = [norm, add]
    x, update = _values(add)
    biased = _biased(update)
    if biased is None:
        x, update = update, x
        biased = _biased(update)
    if biased is None:
        bias = _zero(graph, x)
    else:
        node, update, bias = biased
        removed.append(node)
    joined = onnx_ir.Node(
        DOMAIN,
        ADD_NORM,
        [x, update, bias, *norm.inputs[1:]],
        [onnx_ir.AttrFloat32("epsilon", norm.attributes.get_float("epsilon", 1e-5))],
        num_outputs=2,
        name=norm.name,
    )
    for old, new in zip((add.outputs[0], norm.outputs[0]), joined.outputs, strict=True):
        new.name, new.shape, new.type = old.name, old.shape, old.type
        onnx_ir.convenience.replace_all_uses_with(old, new)
    graph.graph.insert_after(add, joined)
    graph.graph.remove(removed, safe=True)


def _biased(value: onnx_ir.Value) -> tuple[onnx_ir.Node, onnx_ir.Value, onnx_ir.Value] | None:
    """The node that made a value, which nothing else reads, by adding a constant vector; to what, and the vector."""
    node = value.producer()
    if node is None or node.op_type != "Add" or len(value.uses()) != 1 or value.is_graph_output():
        return None
    for rest, vector in permutations(_values(node)):
        if _is_vector(vector) and _alike(rest, value):
            return node, rest, vector
    return None


def _values(node: onnx_ir.Node) -> list[onnx_ir.Value]:
    """Inputs, of which none is left out."""
    return [value for value in node.inputs if value is not None]


def _zero(graph: onnx_ir.Model, like: onnx_ir.Value) -> onnx_ir.Value:
    """The bias of a sum that has none, one for each dtype. No parameter of a module has a name with a colon."""
    import onnx_ir

    assert like.dtype is not None
    name = f"{DOMAIN}:no_bias_{like.dtype.name.lower()}"
    if name not in graph.graph.initializers:
        tensor = onnx_ir.tensor(np.zeros(1, like.dtype.numpy()), name=name)
        value = onnx_ir.Value(name=name, shape=onnx_ir.Shape([1]), type=like.type, const_value=tensor)
        graph.graph.register_initializer(value)
    return graph.graph.initializers[name]
