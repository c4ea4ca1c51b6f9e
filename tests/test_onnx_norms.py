"""Which residual sums and norms become AddNorm nodes, and that a graph computes the same with them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gspn2_kernels.testing import assert_close
from gspn2convert.onnx_function import ADD_NORM
from gspn2convert.onnx_graph import count_nodes, save, translate

DIM = 16


class Residual(nn.Module):
    """x + MLP(norm(x)), in short."""

    def __init__(self, *, bias: bool = True, norm_bias: bool = True, affine: bool = True, scaled: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM, elementwise_affine=affine, bias=norm_bias)
        self.linear = nn.Linear(DIM, DIM, bias=bias)
        self.gamma = nn.Parameter(torch.rand(DIM)) if scaled else None

    def forward(self, x: Tensor) -> Tensor:
        update = self.linear(self.norm(x) + 1)
        return x + (update if self.gamma is None else update * self.gamma)


class ParameterOfThatName(nn.Module):
    """A parameter called like the bias that is missing."""

    def __init__(self) -> None:
        super().__init__()
        self.no_bias = nn.Parameter(torch.full((DIM,), 3.0))
        self.blocks = nn.Sequential(*(Residual(bias=False) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x * self.no_bias)


class TwoDtypes(nn.Module):
    """Blocks in fp32, then in fp16; both kinds lack a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = (nn.Sequential(*(Residual(bias=False) for _ in range(2))) for _ in range(2))
        self.last.half()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).half()).float()


class ScaleOfTheSum(nn.Module):
    """A norm whose scale is computed from the sum, after it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        total = x + self.linear(x)
        scale = total.mean((0, 1))
        return total + F.layer_norm(total, (DIM,), scale, scale)


class NarrowUpdate(nn.Module):
    """A bias that widens what it is added to."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(DIM, 1, bias=False), nn.LayerNorm(DIM)
        self.bias = nn.Parameter(torch.rand(DIM))

    def forward(self, x: Tensor) -> Tensor:
        total = x + (self.linear(x) + self.bias)
        return total + self.norm(total)


class OneForAll(NarrowUpdate):
    """A sum with a tensor that has no batch."""

    def forward(self, x: Tensor) -> Tensor:
        total = x + self.bias
        return total + self.norm(total)


def blocks(**named: bool) -> nn.Module:
    return nn.Sequential(Residual(), Residual(**named), Residual())


def norm_alone() -> nn.Module:
    return nn.Sequential(Residual(), nn.LayerNorm(DIM))


FREE = {0: "batch", 1: "tokens"}


@pytest.mark.parametrize(
    ("make", "joined", "free"),
    [
        (blocks, 2, {}),
        (blocks, 2, FREE),
        (partial(blocks, bias=False), 2, FREE),
        (partial(blocks, scaled=True), 2, {}),
        (partial(blocks, norm_bias=False), 1, {}),
        (partial(blocks, affine=False), 1, {}),
        (ParameterOfThatName, 2, {}),
        (TwoDtypes, 2, {}),
        (ScaleOfTheSum, 0, {}),
        (NarrowUpdate, 1, FREE),
        (OneForAll, 0, FREE),
        (norm_alone, 0, {}),
    ],
)
def test_graphs_compute_the_same(
    make: Callable[[], nn.Module], joined: int, free: dict[int, str], tmp_path: Path
) -> None:
    model, images = make().eval(), torch.randn(2, 8, DIM) + 1
    graph = translate(model, images, free=free, input_name="x", output_name="y")
    assert count_nodes(graph, ADD_NORM, "ai.gspn2") == joined
    save(graph, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": images.numpy()})
    with torch.no_grad():
        want = model(images)
    assert_close("y", want, torch.from_numpy(found), 4e-3 if make is TwoDtypes else None)
