"""Targets of stage 3 on another grid, against the definition."""

import pytest
import torch
import torch.nn.functional as F

from gspn2convert.curriculum import ReducedStage, resize_patches
from gspn2convert.losses import token_deviations
from gspn2convert.model import build_student
from gspn2convert.recipe import RecoverLosses

pytestmark = pytest.mark.usefixtures("one_thread")


# Targets


@pytest.mark.parametrize(("grid", "wanted"), [((4, 6), (7, 11)), ((5, 3), (8, 8)), ((7, 7), (9, 9)), ((6, 8), (3, 4))])
@pytest.mark.parametrize("prefix", [0, 2])
def test_a_ramp_stays_a_ramp(grid, wanted, prefix):
    """Bilinear resizing is exact for linear values, but at the border, which it continues flat."""
    rows, columns = torch.meshgrid(*(torch.arange(size) + 0.5 for size in grid), indexing="ij")
    ramps = torch.stack([3 * rows, -2 * columns + 100, rows + 0.5 * columns], -1).flatten(0, 1)
    front = torch.randn(2, prefix, 3, generator=torch.Generator().manual_seed(0))
    tokens = torch.cat([front, ramps.expand(2, -1, -1)], 1)
    found = resize_patches(tokens, grid, wanted)
    assert torch.equal(found[:, :prefix], front)
    places = [(torch.arange(new) + 0.5) * old / new for old, new in zip(grid, wanted, strict=True)]
    rows, columns = torch.meshgrid(
        *(place.clamp(0.5, old - 0.5) for place, old in zip(places, grid, strict=True)), indexing="ij"
    )
    expected = torch.stack([3 * rows, -2 * columns + 100, rows + 0.5 * columns], -1).flatten(0, 1)
    torch.testing.assert_close(found[:, prefix:], expected.expand(2, -1, -1), atol=1e-4, rtol=0)


def test_resizing_is_torchs_and_keeps_dtype_and_grid():
    tokens = torch.randn(2, 1 + 15, 8, generator=torch.Generator().manual_seed(0)) + 5
    image = tokens[:, 1:].transpose(1, 2).reshape(2, 8, 3, 5)
    expected = F.interpolate(image, (7, 4), mode="bilinear").reshape(2, 8, 28).transpose(1, 2)
    torch.testing.assert_close(resize_patches(tokens, (3, 5), (7, 4))[:, 1:], expected)
    torch.testing.assert_close(resize_patches(tokens, (3, 5), (3, 5)), tokens, atol=1e-6, rtol=0)
    low = tokens.bfloat16()
    found = resize_patches(low, (3, 5), (7, 4))
    assert torch.equal(found, resize_patches(low.float(), (3, 5), (7, 4)).bfloat16())


def reduced_stage(teacher, size, guide=None, **losses):
    student = build_student(teacher, (0, 1), {"proxy_dim": 8})
    images = torch.randn(2, 3, *teacher.patch_embed.img_size, generator=torch.Generator().manual_seed(3))
    deviations = token_deviations([teacher.forward_features(images).detach()], teacher.num_prefix_tokens)
    return ReducedStage(student, teacher, RecoverLosses(**losses), deviations, guide or teacher, size)


@pytest.mark.parametrize("kind", [{}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 2}])
def test_targets_are_what_the_guide_says_of_the_reduced_image(make_teacher, kind):
    teacher = make_teacher(**kind)
    prefix = teacher.num_prefix_tokens
    images = torch.randn(2, 3, 48, 80, generator=torch.Generator().manual_seed(1)) + 0.5
    with torch.no_grad():
        same = reduced_stage(teacher, (48, 80)).target(images)
        torch.testing.assert_close(same, teacher.forward_features(images), atol=1e-4, rtol=1e-4)
        found = reduced_stage(teacher, (32, 48)).target(images)
        small = F.interpolate(images, (32, 48), mode="bicubic", antialias=True)
        tokens = teacher.forward_features(small)
    grid = tokens[:, prefix:].transpose(1, 2).reshape(2, 32, 4, 6)
    patches = F.interpolate(grid, (6, 10), mode="bilinear").flatten(2).transpose(1, 2)
    torch.testing.assert_close(found, torch.cat([tokens[:, :prefix], patches], 1))


def test_the_checkpoint_has_a_previous_student_and_never_the_teacher(tiny_teacher):
    previous = build_student(tiny_teacher, (0, 1), {"proxy_dim": 8})
    for value in previous.parameters():
        value.data.add_(0.01)
    plain, guided = (reduced_stage(tiny_teacher, (32, 48), guide) for guide in (None, previous))
    student = {f"student.{name}" for name in previous.state_dict()}
    assert plain.state_dict().keys() == student | {"deviations"}
    held = {f"previous.{name}": value for name, value in previous.state_dict().items()}
    assert guided.state_dict().keys() == student | {"deviations"} | held.keys()
    assert all(torch.equal(guided.state_dict()[name], value) for name, value in held.items())
    for stage in (plain, guided):
        trained = {name for name, value in stage.named_parameters() if value.requires_grad}
        assert trained == {f"student.{name}" for name, _ in previous.named_parameters()}
        assert "mixer" not in stage(torch.zeros(1, 3, 48, 80), 0.0)
