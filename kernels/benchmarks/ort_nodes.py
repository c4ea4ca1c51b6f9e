"""Nodes of LineScan in ONNX Runtime: right against the reference, and timed; parts of onnx_op_cuda.py.

Shapes are (B, H, W, C): batch, grid, channels.
"""

from collections.abc import Iterator

import torch
from cases import Case, bytes_moved, draw
from conditions import DTYPES
from onnx_files import OPERANDS, write_scan
from ort_bound import Bound, Row, Setting, attempted
from torch import Tensor

from gspn2_kernels import line_scan, line_scan_ref
from gspn2_kernels.testing import random_inputs, relative_rms

TOLERANCES = {"fp32": 2e-6, "fp16": 4e-3, "bf16": 4e-3}
Shape = tuple[int, int, int, int]
Inputs = tuple[Tensor, ...]

# Shapes and groups to compare.
PARITY: list[tuple[Shape, int]] = [
    ((2, 14, 14, 64), 1),
    ((1, 64, 64, 32), 1),
    ((3, 33, 47, 48), 2),
    ((32, 74, 74, 64), 1),
    ((8, 147, 147, 64), 1),
]
# Shapes to time, and how many nodes are timed as one.
TIMED: list[tuple[Shape, int]] = [((32, 74, 74, 64), 10), ((32, 147, 147, 64), 4), ((1, 64, 64, 32), 40)]
# 1024 pixels, the proxy of a ViT-B.
WITH_BODY: Shape = (8, 64, 64, 96)
SMALL: Shape = (2, 9, 8, 16)


def parity(setting: Setting) -> Iterator[Row]:
    """Compare nodes with the reference in fp64 of the same, rounded, inputs."""
    for shape, groups in [(SMALL, 2)] if setting.dry else PARITY:
        drawn = random_inputs((min(shape[0], 3), *shape[1:]), groups, torch.float64)
        images = torch.arange(shape[0]) % 3
        for dtype in TOLERANCES:
            inputs = tuple(t[images].to(setting.device, DTYPES[dtype]) for t in drawn)
            yield attempted({"shape": shape, "groups": groups, "dtype": dtype}, compared, setting, inputs, dtype)


def compared(setting: Setting, inputs: Inputs, dtype: str, *, library: bool = True) -> Row:
    """Run a node twice and compare.

    Raises:
        AssertionError: It is wrong, or the runs differ.
    """
    y = torch.full_like(inputs[1], torch.nan)
    session = open_nodes(setting, inputs, [y], dtype, library=library)
    session()
    first = y.clone()
    y.fill_(torch.nan)
    session()
    error, limit = relative_rms(line_scan_ref(*(t.double() for t in inputs)), first), TOLERANCES[dtype]
    if not error <= limit:
        raise AssertionError(f"relative RMS error {error:.2e}, expected at most {limit:.0e}")
    if not torch.equal(y, first):
        raise AssertionError("two runs differ")
    return {"error": error, "tolerance": limit, "same_bits": True}


def open_nodes(
    setting: Setting, inputs: Inputs, results: list[Tensor], dtype: str, *, library: bool, graph: bool = False
) -> Bound:
    """Open a session of as many nodes as there are results."""
    path = write_scan(setting.files / f"scan_{len(results)}_{dtype}.onnx", dtype, len(results))
    outputs = {f"y{i}": y for i, y in enumerate(results)}
    return Bound(path, dict(zip(OPERANDS, inputs, strict=True)), outputs, library=library, graph=graph)


def node(setting: Setting) -> Iterator[Row]:
    """Time nodes in bf16, and the Triton kernel as the torch op launches it; share_of_floor as in line_scan.py."""
    for shape, nodes in [(SMALL, 3)] if setting.dry else TIMED:
        case = Case(shape, "bf16")
        inputs = tuple(t.contiguous() for t in draw(case, setting.device))
        title: Row = {"shape": shape, "dtype": "bf16"}
        yield (checked := attempted(title, compared, setting, tuple(t[:1] for t in inputs), "bf16"))
        if "failed" in checked:
            continue
        for what, many, graph in (("one node", 1, False), ("nodes", nodes, False), ("nodes, CUDA graph", nodes, True)):
            named = {**title, "what": what, "nodes": many}
            yield attempted(named, node_figures, setting, case, inputs, many, graph=graph)
        yield attempted({**title, "what": "torch op, CUDA graph", "nodes": 1}, torch_figures, setting, case)


def node_figures(setting: Setting, case: Case, inputs: Inputs, nodes: int, *, graph: bool) -> Row:
    """Time a session of nodes that all write the same y."""
    results = [torch.empty_like(inputs[1])] * nodes
    session = open_nodes(setting, inputs, results, case.dtype, library=True, graph=graph)
    return shares(setting.measured(session), case, setting, nodes)


def torch_figures(setting: Setting, case: Case) -> Row:
    """Time the torch op, on logits with room for a fourth, as a mixer makes them."""
    inputs = draw(case, setting.device)
    return shares(setting.measured(lambda: line_scan(*inputs), capture=True), case, setting, 1)


def shares(times: Row, case: Case, setting: Setting, nodes: int) -> Row:
    """Turn the time of some nodes into that of one, and into a share of the time of a copy of its bytes."""
    ms = times["ms"] / nodes
    floor = bytes_moved(case, "infer") / setting.copy_gb_per_s / 1e6
    return {**times, "ms_a_node": round(ms, 5), "share_of_floor": round(floor / ms, 4)}


def body(setting: Setting) -> Iterator[Row]:
    """Time a node by the library and by the function body."""
    shape = SMALL if setting.dry else WITH_BODY
    inputs = tuple(t.contiguous() for t in draw(Case(shape, "fp16"), setting.device))
    times = {}
    for name, library in (("library", True), ("body", False)):
        row = attempted({"shape": shape, "dtype": "fp16", "what": name}, body_figures, setting, inputs, library)
        times[name] = row.get("ms")
        yield row
    if all(times.values()):
        yield {"speedup": round(times["body"] / times["library"], 2)}


def body_figures(setting: Setting, inputs: Inputs, library: bool) -> Row:
    """Compare and time a node by the library or by the body."""
    found = compared(setting, inputs, "fp16", library=library)
    session = open_nodes(setting, inputs, [torch.empty_like(inputs[1])], "fp16", library=library)
    return {**found, **setting.measured(session)}
