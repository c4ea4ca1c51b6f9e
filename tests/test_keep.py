"""Which blocks keep their attention."""

import re

import pytest

from gspn2convert.errors import UserError
from gspn2convert.keep import is_keep, parse_keep


@pytest.mark.parametrize(
    ("text", "depth", "blocks"),
    [
        ("none", 12, ()),
        ("0,5", 12, (0, 5)),
        ("5, 0", 6, (0, 5)),
        ("3,3", 12, (3,)),
        ("11", 12, (11,)),
        ("last:2", 12, (10, 11)),
        ("every:6", 12, (5, 11)),
        ("every:6", 13, (5, 11)),
        ("every:12", 12, (11,)),
    ],
)
def test_blocks(text: str, depth: int, blocks: tuple[int, ...]) -> None:
    assert parse_keep(text, depth) == blocks


@pytest.mark.parametrize(
    "text", ["", "all", "last", "last:0", "last:-1", "every:0", "0,,5", "-1", "1.5", "0;5", "None", "0," * 9]
)
def test_form_that_is_not_known(text: str) -> None:
    assert not is_keep(text)
    with pytest.raises(UserError, match=re.escape(f"keep {text!r}: expected 'none', block numbers such as '0,5'")):
        parse_keep(text, 12)


@pytest.mark.parametrize("text", ["12", "0,12", "last:13", "every:13", "9999"])
def test_block_that_the_teacher_lacks(text: str) -> None:
    assert is_keep(text)
    with pytest.raises(UserError, match=re.escape(f"keep {text!r}: the teacher has 12 blocks, numbered 0 to 11")):
        parse_keep(text, 12)


@pytest.mark.parametrize("text", ["0,1", "last:2", "every:1"])
def test_nothing_left_to_convert(text: str) -> None:
    with pytest.raises(UserError, match="keeps all 2 blocks, which leaves none to convert"):
        parse_keep(text, 2)
