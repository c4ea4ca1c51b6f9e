"""Two chains of launches side by side on a GPU: what one leaves idle, such as a scan, the other takes."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Results = TypeVar("Results", bound=tuple[Tensor | None, ...])
Other = TypeVar("Other")

# Most images: with more, both chains take all of a GPU, and only get in each other's way.
FEW = 8
# The second stream of each device and stream in use.
_second: dict[tuple[int, int], torch.cuda.Stream] = {}


def beside(t: Tensor, first: Callable[[], Results], other: Callable[[], Other]) -> tuple[Results, Other]:
    """Call two functions that do not need each other, on a GPU the first one's launches on a stream of their own.

    One after the other where there are more images than FEW, where t is on no GPU, and where a program is compiled,
    traced or exported.

    A CUDA graph that is recorded keeps the memory of all results for itself.

    Args:
        t: A tensor on the device where they run, one row an image.
        first: Returns tensors; what it reads must live until this function returns.
        other: Returns anything.

    Returns:
        What both return, ready for the current stream.
    """
    recorded = torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.jit.is_tracing()
    # Tensors of another class, such as fake ones, need not have memory.
    if not t.is_cuda or type(t) is not Tensor or recorded or t.shape[0] > FEW:
        return first(), other()
    current = torch.cuda.current_stream(t.device)
    key = current.device_index, current.cuda_stream
    if key not in _second:
        _second[key] = torch.cuda.Stream(t.device)
    second = _second[key]
    second.wait_stream(current)
    try:
        with torch.cuda.stream(second):
            results = first()
        found = other()
    finally:
        current.wait_stream(second)
    for result in results:
        if result is not None:
            # Their memory is the second stream's, which must not use it again before this one is done with it.
            result.record_stream(current)
    return results, found
