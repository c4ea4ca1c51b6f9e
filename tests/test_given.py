"""Students to go on from, and sizes that contradict each other."""

from dataclasses import replace

import pytest
import timm

from gspn2convert.artifact import save_student
from gspn2convert.curriculum import check_sizes, teacher_size
from gspn2convert.errors import UserError
from gspn2convert.given import load_given
from gspn2convert.model import build_student
from gspn2convert.recipe import load_recipe
from gspn2convert.teachers import load_teacher


def test_a_student_with_patches_of_another_size_is_told_apart(make_teacher, tmp_path):
    """Its image size, 24 x 24, is no multiple of its patch of 16 pixels; that is not what is wrong."""
    teacher, other = (make_teacher(patch_size=patch, img_size=size) for patch, size in ((8, 24), (16, 32)))
    save_student(build_student(other, [0], {"proxy_dim": 4}), tmp_path / "out", recipe_text="", metrics={}, teacher="x")
    message = "out is no student of this teacher: its patches are of 16x16 px, the teacher's of 8x8; name the"
    with pytest.raises(UserError, match=message):
        load_given(tmp_path / "out", teacher, None)


@pytest.mark.parametrize(
    ("img_size", "stages", "told"),
    [(448, (0, 1, 2, 3), True), (224, (0, 3), False), (None, (0, 3), False), (518, (3,), False)],
)
def test_another_size_than_the_recipes_does_not_pass_in_silence(caplog, img_size, stages, told):
    assert teacher_size(load_recipe("hires"), img_size, stages) == img_size
    assert ("stages 0 to 2 are at the recipe's 224 px" in caplog.text) == told


def test_a_teacher_too_large_for_the_memory_is_not_told_of_weights(monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 103079215488 bytes")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        load_teacher("vit_tiny", img_size=65536, pretrained=False)


@pytest.mark.parametrize(
    ("stages", "steps", "later", "refused"),
    [
        ((0, 3), 0, 4, True),
        ((2, 3), 4, 4, True),
        ((2, 3), 0, 4, False),
        ((3,), 4, 4, False),  # of a student that is given
        ((0, 3), 4, 0, False),
    ],
)
def test_stage_3_does_not_begin_below_what_came_before(tiny_teacher, stages, steps, later, refused):
    """The teacher takes 32 x 48; 40 x 40 has more pixels, 32 x 32 has fewer."""
    default = load_recipe("default")
    for side in (32, 40):
        recipe = replace(
            default,
            align=replace(default.align, steps=steps),
            recover=replace(default.recover, steps=steps),
            curriculum=replace(default.curriculum, sizes=(side,), steps=later),
        )
        if refused and side == 32:
            with pytest.raises(UserError, match="begins at 32, and the stages before it are at 32x48 px"):
                check_sizes(tiny_teacher, recipe, stages)
        else:
            check_sizes(tiny_teacher, recipe, stages)
