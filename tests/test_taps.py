"""Taps against a forward pass done by hand, block by block."""

import pytest
import torch

from gspn2convert.model import build_student
from gspn2convert.recipe import Mixer
from gspn2convert.taps import Taps
from gspn2convert.vit import grid_size


@pytest.fixture
def teacher(make_teacher):
    return make_teacher(depth=3)


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def student(teacher):
    return build_student(teacher, [0, 2], Mixer(proxy_dim=4).resolve(32)).eval()


def embed(vit, images):
    return vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))


@torch.no_grad()
def test_captures_attention(teacher, images):
    with Taps(teacher, [0, 2]) as taps:
        teacher(images)
    x = embed(teacher, images)
    for site, block in enumerate(teacher.blocks):
        if site != 1:
            assert torch.equal(taps.inputs[site], block.norm1(x))
            assert torch.equal(taps.outputs[site], block.attn(block.norm1(x)))
        x = block(x)
    assert sorted(taps.inputs) == sorted(taps.outputs) == [0, 2]


@torch.no_grad()
def test_captures_mixers(student, images):
    with Taps(student, [0, 1]) as taps:
        student(images)
    grid = grid_size(student, 32, 48)
    assert grid == (4, 6)
    normed = student.blocks[0].norm1(embed(student, images))
    assert torch.equal(taps.inputs[0], normed)
    assert torch.equal(taps.outputs[0], student.blocks[0].attn(normed, grid))
    assert torch.equal(taps.outputs[1], student.blocks[1].attn(taps.inputs[1]))


def test_gradients_pass_through_a_tap(student, images):
    with Taps(student, [2]) as taps:
        student(images)
    taps.outputs[2].square().sum().backward()
    assert student.patch_embed.proj.weight.grad.abs().sum() > 0


def test_nothing_is_captured_outside_the_block(teacher, images):
    with Taps(teacher, [1]) as taps:
        teacher(images)
    seen = taps.outputs[1]
    teacher(images + 1)
    assert taps.outputs[1] is seen
    assert not any(module._forward_hooks for module in teacher.modules())


def test_hooks_go_when_the_forward_pass_fails(teacher):
    with pytest.raises(AssertionError, match="divisible"), Taps(teacher, [0, 1, 2]):
        teacher(torch.zeros(1, 3, 33, 48))
    assert not any(module._forward_hooks for module in teacher.modules())
