"""Runs a few LineScan nodes on ONNX Runtime's CUDA provider, without PyTorch: what compute-sanitizer can watch.

    compute-sanitizer --tool racecheck --kernel-name kns=gspn2 python tests/kernels/cuda_nodes.py LIBRARY

Every kind of kernel and dtype runs; results are compared with those of the library on the CPU.
"""

import sys
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

OPERANDS = ("x", "lam", "logits", "u")
TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
TOLERANCES = {"fp32": 2e-6, "fp16": 4e-3, "bf16": 4e-3}
# (B, H, W, C), groups, segment.
CASES = [
    ((16, 14, 15, 64), 1, 0),  # wide tiles
    ((16, 30, 37, 64), 8, 4),
    ((16, 9, 75, 64), 1, 0),
    ((1, 19, 40, 32), 1, 5),  # direct: two warps a line
    ((1, 50, 40, 24), 2, 3),  # direct: a warp with two positions a lane, in 16 bits; in 32
    ((1, 50, 40, 12), 2, 3),
    ((2, 31, 18, 16), 2, 3),  # direct: a warp
    ((1, 19, 90, 32), 1, 0),  # thin tiles, with warps that help
    ((2, 12, 13, 24), 12, 4),
    ((1, 70, 300, 16), 1, 0),
    ((3, 11, 10, 7), 1, 4),  # plain
]


def make_model(dtype: str, segment: int) -> bytes:
    """One node, fp32 outside."""
    casts = [helper.make_node("Cast", [name], [f"{name}_cast"], to=TYPES[dtype]) for name in OPERANDS]
    scan = helper.make_node("LineScan", [f"{n}_cast" for n in OPERANDS], ["y_cast"], domain="ai.gspn2", segment=segment)
    graph = helper.make_graph(
        [*casts, scan, helper.make_node("Cast", ["y_cast"], ["y"], to=TensorProto.FLOAT)],
        "one_node",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in OPERANDS],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ai.gspn2", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def open_session(library: str, provider: str, model: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.register_custom_ops_library(library)
    session = onnxruntime.InferenceSession(model, options, providers=[provider])
    assert session.get_providers()[0] == provider, f"{provider} did not start"
    return session


def draw_feeds(shape: tuple[int, ...], groups: int) -> dict[str, Any]:
    *grid, channels = shape
    sizes = (shape, (*grid, 4, channels), (*grid, 4, groups, 3), (*grid, 4, channels))
    draw = np.random.default_rng(0)
    return {name: draw.standard_normal(size, dtype=np.float32) for name, size in zip(OPERANDS, sizes, strict=True)}


def main() -> int:
    library, failed = sys.argv[1], 0
    provider = sys.argv[2] if len(sys.argv) > 2 else "CUDAExecutionProvider"
    for dtype, tolerance in TOLERANCES.items():
        for wanted in sorted({segment for *_, segment in CASES}):
            model = make_model(dtype, wanted)
            sessions = [open_session(library, where, model) for where in ("CPUExecutionProvider", provider)]
            for shape, groups, segment in CASES:
                if segment == wanted:
                    feeds = draw_feeds(shape, groups)
                    want, got = (session.run(None, feeds)[0] for session in sessions)
                    error = float(np.sqrt(np.square(got - want).mean() / np.square(want).mean()))
                    failed += not error <= tolerance
                    print(f"{shape} groups {groups} segment {segment} {dtype}: {error:.1e}", flush=True)
    print("failed:", failed)
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
