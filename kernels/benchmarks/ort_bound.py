"""What the parts of onnx_op_cuda.py share: sessions of ONNX Runtime on tensors of PyTorch, settings, rows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import onnxruntime
import torch
from onnx_files import TYPES
from timing import Call, measure
from torch import Tensor

from gspn2_kernels import onnx_op
from gspn2convert.providers import CPU, CUDA, settings

Row = dict[str, Any]


class Setting(NamedTuple):
    """How a part runs.

    Attributes:
        device: Where.
        files: Folder of the models' files.
        seconds: Time for each row.
        copy_gb_per_s: Bandwidth of a copy there.
        compiled: Whether torch.compile is wanted.
        dry: Whether shapes are small.
    """

    device: torch.device
    files: Path
    seconds: float
    copy_gb_per_s: float
    compiled: bool
    dry: bool

    def measured(self, call: Call, *, capture: bool = False) -> Row:
        """Time a call; what ONNX Runtime runs cannot be captured by PyTorch."""
        return measure(call, self.device, self.seconds, capture=capture)


def attempted(title: Row, function: Callable[..., Row], *arguments: Any, **named: Any) -> Row:
    """Make a row out of what a call returns or, as `failed`, of the error that it raises."""
    try:
        return {**title, **function(*arguments, **named)}
    except Exception as error:  # whatever it is, the other rows are worth having
        return {**title, "failed": f"{type(error).__name__}: {' '.join(str(error).split())[:2000]}"}


class Bound:
    """A session with its inputs and outputs bound to tensors; a call runs it and does not wait.

    On a GPU it runs on the stream that is current when it is made. Keep it until that stream has been waited for: ONNX
    Runtime gives pinned memory back in a callback of the stream, and where that is the last to know the memory, CUDA
    refuses ("cudaFreeHost: operation not permitted") and ends the process.
    """

    def __init__(
        self,
        path: Path,
        inputs: dict[str, Tensor],
        outputs: dict[str, Tensor],
        *,
        library: bool,
        static: bool = False,
        graph: bool = False,
        optimized: Path | None = None,
    ) -> None:
        """Open a file.

        Args:
            path: The file.
            inputs: Contiguous tensors by name, all on one device.
            outputs: Likewise.
            library: Whether LineScan runs in the library.
            static: Whether the file takes inputs of one shape.
            graph: Whether ONNX Runtime captures a CUDA graph in the first call and replays it from then on.
            optimized: Where to write the graph as it runs.

        Raises:
            RuntimeError: The library does not fit, or the provider did not start.
        """
        device = next(iter(inputs.values())).device
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
        provider = CUDA if device.type == "cuda" else CPU
        if library and not onnx_op.register(options, [provider]):
            raise RuntimeError("the library does not fit this ONNX Runtime, or has no CUDA kernels")
        chosen = settings([provider], onnxruntime.__version__, static=static)
        if provider == CUDA:
            ((name, tuned),) = chosen["providers"]
            chosen["providers"] = [(name, {**tuned, **_bound_options(device, graph)})]
        self._session = onnxruntime.InferenceSession(path, options, **chosen)
        if self._session.get_providers()[0] != provider:
            raise RuntimeError(f"{provider} did not start")
        self._tensors = inputs, outputs  # bound by their addresses
        self._binding = self._session.io_binding()
        for names, bind in ((inputs, self._binding.bind_input), (outputs, self._binding.bind_output)):
            for name, t in names.items():
                assert t.is_contiguous()
                bind(name, t.device.type, 0, TYPES[t.dtype], tuple(t.shape), t.data_ptr())
        self._options = onnxruntime.RunOptions()
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def __call__(self) -> None:
        """Run."""
        self._session.run_with_iobinding(self._binding, self._options)


def _bound_options(device: torch.device, graph: bool) -> dict[str, Any]:
    return {
        "device_id": 0,
        "user_compute_stream": str(torch.cuda.current_stream(device).cuda_stream),
        "enable_cuda_graph": str(int(graph)),
    }


def memcpy_nodes(path: Path) -> dict[str, Any]:
    """Find copies between host and device in an optimised graph, and among them those of a LineScan's tensors."""
    nodes = onnx.load(str(path), load_external_data=False).graph.node
    scans = [node for node in nodes if node.op_type == "LineScan"]
    copies = [node for node in nodes if node.op_type.startswith("Memcpy")]
    tensors = {name for node in scans for name in (*node.input, *node.output)}
    at_scans = [node.name for node in copies if tensors & {*node.input, *node.output}]
    return {
        "nodes": len(nodes),
        "line_scans": len(scans),
        "memcpy": [f"{node.op_type} {node.name}: {', '.join(node.input)}" for node in copies],
        "memcpy_at_line_scans": at_scans,
    }
