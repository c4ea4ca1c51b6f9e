"""What the tests of teachers share."""

import pytest

from gspn2convert.errors import UserError
from gspn2convert.teachers import load_teacher

# timm's own ViT for tests: 6 blocks of width 64, 160 px, patch 16, 1000 classes.
NAME = "test_vit"


def refusal(name, **options):
    with pytest.raises(UserError) as caught:
        load_teacher(name, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message
