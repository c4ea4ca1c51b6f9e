"""The teacher of the small conversion, and the conversion."""

import pytest

from gspn2convert.distill import Options, distill_student
from gspn2convert.images import ImageSet
from gspn2convert.recipe import parse_recipe
from helpers.conversions import RECIPE, Pictures


@pytest.fixture
def teacher(make_teacher):
    """Takes the pictures as they are, without resizing."""
    vit = make_teacher()
    vit.pretrained_cfg |= {"crop_pct": 1.0}
    return vit


@pytest.fixture
def run(teacher, tmp_path):
    """Converts the tiny teacher; `run(stages=(0,))`."""

    def go(recipe=RECIPE, *, pictures=None, test=None, keep=(), vit=teacher, output=tmp_path / "out", **options):
        sets = (ImageSet("pictures", pictures or Pictures()), ImageSet("test", test or Pictures(20, seed=1)))
        how = Options(output=output, device="cpu", quiet=True, **options)
        return distill_student(vit, parse_recipe(recipe, "test"), *sets, how, teacher_name="tiny", keep=keep)

    return go
