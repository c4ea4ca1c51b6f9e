"""A block in inference: what it fuses, against the plain sums, and what it must not fuse."""

import copy

import pytest
import torch
from timm.layers import Mlp
from torch import Tensor, nn

from gspn2_kernels.testing import assert_close
from gspn2convert.block import GspnBlock, add_mlp
from gspn2convert.model import build_student

DIM = 32


class Special(nn.Parameter):
    """A weight that is more than a tensor."""


def norm_and_mlp(dtype: torch.dtype, *, bias: bool = True, device: str = "cpu") -> tuple[nn.LayerNorm, Mlp]:
    torch.manual_seed(0)
    norm, mlp = nn.LayerNorm(DIM), Mlp(DIM, 3 * DIM, bias=bias).eval()
    with torch.no_grad():
        for parameter in (*norm.parameters(), *mlp.parameters()):
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return norm.to(device, dtype), mlp.to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(2, 7, DIM), (1, 1, DIM), (0, 7, DIM)], ids=str)
@torch.no_grad()
def test_mlp_adds_to_the_residual(shape: tuple[int, int, int], bias: bool, dtype: torch.dtype) -> None:
    norm, mlp = norm_and_mlp(dtype, bias=bias)
    x = (torch.randn(shape) + 0.5).to(dtype)
    before = x.clone()
    wide_norm, wide_mlp = copy.deepcopy(norm).double(), copy.deepcopy(mlp).double()
    assert_close("sum", x.double() + wide_mlp(wide_norm(x.double())), add_mlp(x, norm, mlp))
    assert torch.equal(x, before)


CASES = ("plain", "listened", "autocast", "layer scale", "dropout", "own forward", "own class")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_only_a_plain_mlp_adds(case: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    init = 0.5 if case == "layer scale" else None
    block = GspnBlock(mixer={"proxy_dim": 8, "has_prefix": True}, dim=DIM, num_heads=2, qkv_bias=True, init_values=init)
    block.eval()
    for parameter in block.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    x = torch.randn(2, 1 + 5 * 3, DIM) + 0.5
    expected = copy.deepcopy(block).double()._mix(x.double(), (5, 3))
    fused: list[nn.Module] = []

    def noted(*arguments):
        fused.append(arguments[2])
        return add_mlp(*arguments)

    monkeypatch.setattr("gspn2convert.block.add_mlp", noted)
    monkeypatch.setattr("gspn2convert.block.by_triton", lambda _: True)
    alter(block.to(device), case)
    with torch.autocast(device, torch.bfloat16, enabled=case == "autocast"):
        actual = block._mix(x.to(device), (5, 3))
    assert bool(fused) == (case == "plain")
    assert_close("block", expected, actual, None if case != "autocast" else 2e-2)


def alter(block: GspnBlock, case: str) -> None:
    """Do to a block's MLP what the case says, which changes nothing of what it computes."""
    assert isinstance(block.mlp, Mlp)
    last = block.mlp.fc2
    if case == "listened":
        last.register_forward_hook(lambda *_: None)
    elif case == "dropout":
        block.mlp.drop2.train()
    elif case == "own forward":
        last.forward = last.forward
    elif case == "own class":
        last.weight.__class__ = Special


@torch.no_grad()
def test_hooks_and_adapters_within_a_mixer_count_in_inference(tiny_teacher) -> None:
    model = build_student(tiny_teacher, [0, 1], {"proxy_dim": 6})
    images, heard = torch.rand(1, 3, *model.patch_embed.img_size), []
    plain = model(images)
    for name in ("attn", "attn.down", "drop_path1"):
        module = model.blocks[0].get_submodule(name)
        handle = module.register_forward_pre_hook(lambda *_, name=name: heard.append(name))
        torch.testing.assert_close(model(images), plain)
        handle.remove()
    assert heard == ["attn", "attn.down", "drop_path1"]

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    for block in model.blocks[:2]:
        block.attn.down.__class__ = Doubled
    adapted = model(images)
    assert not torch.allclose(adapted, plain)
    with torch.enable_grad():
        torch.testing.assert_close(adapted, model(images).detach())


@pytest.mark.parametrize("segment", [0, 3])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_trace_gives_the_same_with_and_without_gradients(make_teacher, segment: int, gradients: bool) -> None:
    teacher = make_teacher()
    model = build_student(teacher, [0, 1], {"proxy_dim": 6, "segment": segment})
    x = torch.randn(2, 3, *teacher.patch_embed.img_size)
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(model, x[:1], check_trace=not gradients)
        torch.testing.assert_close(traced(x), model(x))
