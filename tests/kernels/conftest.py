"""Poisoned memory for every test of the operator, the interpreter's bfloat16, and the library of the ONNX op."""

import importlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gspn2_kernels.build import BuildError, build, has_cuda, library_path


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fills uninitialised tensors with NaN, so that an element nobody writes fails the test.

    PyTorch does so itself in deterministic mode, which also refuses operations that are not deterministic.
    """
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="session")
def _interpreted_products() -> Iterator[None]:
    """Mends Triton's interpreter, which keeps bfloat16 as its bits (NumPy has no such type) and multiplies those."""
    if importlib.util.find_spec("triton") is None:
        yield
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    product = interpreter.InterpreterBuilder.create_dot

    def widened(t: Any) -> Any:
        if t.dtype.scalar != interpreter.tl.bfloat16:
            return t
        return interpreter.TensorHandle((t.data.astype(np.uint32) << 16).view(np.float32), interpreter.tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return product(self, widened(a), widened(b), *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
        yield


@pytest.fixture(scope="session")
def built_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of the ONNX op, without CUDA, built once for all workers.

    Where something is missing for that the tests are skipped, unless GSPN2_REQUIRE_ORT_OP is set.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        try:
            return build()
        except BuildError as error:
            if os.environ.get("GSPN2_REQUIRE_ORT_OP"):
                pytest.fail(f"GSPN2_REQUIRE_ORT_OP is set, but: {error}")
            pytest.skip(str(error))


@pytest.fixture
def library(built_library: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, found by `onnx_op.register`."""
    monkeypatch.setenv("GSPN2_ORT_LIBRARY", str(built_library))
    return built_library


@pytest.fixture(scope="session")
def library_with_cuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that `onnx_op.register` finds, if it has CUDA kernels, else one for the device at hand."""
    found = library_path()
    if found is not None and has_cuda(found):
        return found
    major, minor = torch.cuda.get_device_capability()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("CUDAARCHS", f"{major}{minor}-real")
        try:
            return build(cuda=True)
        except BuildError as error:
            pytest.skip(str(error))


@pytest.fixture
def cuda_library(library_with_cuda: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The same, found by `onnx_op.register`."""
    monkeypatch.setenv("GSPN2_ORT_LIBRARY", str(library_with_cuda))
    yield library_with_cuda
    torch.cuda.synchronize()
