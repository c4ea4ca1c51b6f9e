"""What the tests of sessions share."""

import pytest
import torch

from gspn2_kernels.build import library_path
from gspn2_kernels.testing import assert_close
from gspn2convert.session import OnnxSession

# What tells a whole library of its kind, and nothing that could be loaded.
LIBRARY = b"\x7fELF\2\1" + bytes(58)
built = pytest.mark.skipif(library_path() is None, reason="needs the library: gspn2convert build-ops")

# What ONNX Runtime for the CPU says when it is asked for CUDA, and leaves it out; that for CUDA logs an error.
no_cuda = pytest.mark.filterwarnings("ignore:Specified provider .* is not in available provider names")


def images(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def compare(session: OnnxSession, student: torch.nn.Module, pixels: torch.Tensor, tolerance: float) -> None:
    with torch.no_grad():
        want = student(pixels)
    assert_close("output", want, torch.from_numpy(session.run(pixels.numpy())).float(), tolerance)
