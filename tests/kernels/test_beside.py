"""Two chains of launches side by side."""

import importlib

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gspn2_kernels import beside
from gspn2_kernels.beside import FEW


@pytest.mark.parametrize("images", [1, FEW + 1])
def test_both_results(images: int) -> None:
    x = torch.ones(images, 2)
    (doubled, nothing), more = beside(x, lambda: (2 * x, None), lambda: x + 2)
    assert torch.equal(doubled, 2 * x)
    assert nothing is None
    assert torch.equal(more, x + 2)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_tensors(device: str) -> None:
    """They are on a GPU where there is none."""
    with FakeTensorMode():
        x = torch.empty(1, 2, device=device)
        (doubled,), more = beside(x, lambda: (2 * x,), lambda: x + 2)
    assert doubled.shape == more.shape == x.shape


def rounds(x: Tensor) -> Tensor:
    """Calls that hand memory on to each other, each with work that is slow enough to be overtaken."""
    for _ in range(30):
        (first,), other = beside(x, lambda x=x: (torch.tanh(x @ x.mT) @ x,), lambda x=x: torch.sin(x) * 3)
        x = torch.nn.functional.normalize(first + other, dim=-1)
        del first, other
    return x


@pytest.mark.gpu
def test_many_calls_on_a_gpu_and_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 1024, 512, generator=torch.Generator().manual_seed(0)).cuda()
    found = rounds(x)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.graph(graph, stream=stream):
        replayed = rounds(x)
    graph.replay()
    monkeypatch.setattr(importlib.import_module("gspn2_kernels.beside"), "FEW", 0)
    expected = rounds(x)
    assert torch.equal(found, expected)
    assert torch.equal(replayed, expected)
