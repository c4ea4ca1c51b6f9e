"""Load the library of the ONNX op into several ONNX Runtimes and compare it with the reference; run by hand.

    python tests/kernels/ort_versions.py [VERSION ...]

Each version gets a new environment with nothing but onnxruntime and NumPy, from PyPI.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

VERSIONS = ("1.18.1", "1.22.1", "newest")
OPERANDS = ("x", "lam", "logits", "u")
# Name of the ONNX type, tolerance of the relative RMS error; as in gspn2_kernels.testing.
TYPES = {"FLOAT": 2e-6, "FLOAT16": 1e-3, "BFLOAT16": 4e-3}
SHAPES = (((2, 5, 7, 24), 1, 0), ((1, 14, 37, 13), 1, 4), ((2, 9, 4, 12), 3, 5), ((0, 3, 4, 2), 1, 0))


def main() -> None:
    """Write models, inputs and results into a folder, then run this file in each environment."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("versions", nargs="*", default=VERSIONS, metavar="VERSION")
    parser.add_argument("--check", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.check:
        check(arguments.check)
        return
    from gspn2_kernels.build import build

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_cases(folder)
        (folder / "library").write_text(str(build(cuda=False)))
        failed = [version for version in arguments.versions if not run_version(version, folder)]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def write_cases(folder: Path) -> None:
    """Write a model of one node and a file of inputs and result for each type and shape."""
    import torch
    from onnx import TensorProto, helper

    from gspn2_kernels import line_scan_ref
    from gspn2_kernels.testing import random_inputs

    for kind in TYPES:
        dtype = {"FLOAT": torch.float32, "FLOAT16": torch.float16, "BFLOAT16": torch.bfloat16}[kind]
        for number, (shape, groups, segment) in enumerate(SHAPES):
            to = getattr(TensorProto, kind)
            nodes = [helper.make_node("Cast", [name], [f"{name}_cast"], to=to) for name in OPERANDS]
            casts = [f"{name}_cast" for name in OPERANDS]
            nodes.append(helper.make_node("LineScan", casts, ["y_cast"], domain="ai.gspn2", segment=segment))
            nodes.append(helper.make_node("Cast", ["y_cast"], ["y"], to=TensorProto.FLOAT))
            values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in (*OPERANDS, "y")]
            graph = helper.make_graph(nodes, "one_node", values[:4], values[4:])
            opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ai.gspn2", 1)]
            model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
            (folder / f"{kind}-{number}.onnx").write_bytes(model.SerializeToString())
            inputs = random_inputs(shape, groups, dtype)
            arrays = {name: tensor.float().numpy() for name, tensor in zip(OPERANDS, inputs, strict=True)}
            want = line_scan_ref(*inputs, segment).float().numpy()
            np.savez(folder / f"{kind}-{number}.npz", y=want, **arrays)


def run_version(version: str, folder: Path) -> bool:
    """Make the environment of a version and check there."""
    environment = folder / version
    packages = [f"onnxruntime=={version}", "numpy<2"] if version < "1.19" else [f"onnxruntime=={version}"]
    packages = ["onnxruntime"] if version == "newest" else packages
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = environment / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True, stderr=subprocess.DEVNULL)
    return subprocess.run([python, __file__, "--check", folder]).returncode == 0


def check(folder: Path) -> None:
    """Compare every case; the environment has no torch."""
    import onnxruntime

    worst = dict.fromkeys(TYPES, 0.0)
    for model in sorted(folder.glob("*.onnx")):
        kind = model.name.partition("-")[0]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.register_custom_ops_library((folder / "library").read_text())
        session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        arrays = dict(np.load(model.with_suffix(".npz")))
        want = arrays.pop("y")
        got = session.run(None, arrays)[0]
        assert got.shape == want.shape, model.name
        if want.size:
            error = float(np.sqrt(np.square(got - want).mean() / np.square(want).mean()))
            worst[kind] = max(worst[kind], error)
    print(f"onnxruntime {onnxruntime.__version__}:", ", ".join(f"{kind} {error:.1e}" for kind, error in worst.items()))
    sys.exit(any(not error <= TYPES[kind] for kind, error in worst.items()))


if __name__ == "__main__":
    main()
