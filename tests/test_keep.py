"""Which blocks keep their attention."""

import re

import pytest

from gspn2convert.errors import UserError
from gspn2convert.keep import Auto, is_keep, parse_keep, read_keep


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


@pytest.mark.parametrize(
    ("text", "auto"),
    [
        ("auto:1", Auto(count=1)),
        ("auto: 11", Auto(count=11)),
        ("auto:budget=0.98", Auto(budget=0.98)),
        ("auto:budget=.5", Auto(budget=0.5)),
        ("auto:budget = 0.980", Auto(budget=0.98)),
    ],
)
def test_blocks_to_be_chosen(text: str, auto: Auto) -> None:
    assert is_keep(text)
    assert read_keep(text, 12) == auto
    assert read_keep(str(auto), 12) == auto
    with pytest.raises(UserError, match="expected 'none', block numbers"):
        parse_keep(text, 12)


@pytest.mark.parametrize("text", ["none", "0,5", "last:2", "every:6"])
def test_what_is_known_beforehand_is_not_chosen(text: str) -> None:
    assert read_keep(text, 12) == parse_keep(text, 12)


@pytest.mark.parametrize("text", ["auto", "auto:0", "auto:-1", "auto:1.5", "auto:budget", "auto:budget=", "auto:0,5"])
def test_rule_that_is_not_known(text: str) -> None:
    assert not is_keep(text)
    with pytest.raises(UserError, match=re.escape(f"keep {text!r}: expected 'none', block numbers such as '0,5'")):
        read_keep(text, 12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("auto:12", "keep 'auto:12': expected 1 to 11, for the teacher has 12 blocks and one at least is converted"),
        ("auto:budget=1", "keep 'auto:budget=1.0': expected a budget above 0 and below 1, such as 0.98"),
        ("auto:budget=0", "keep 'auto:budget=0.0': expected a budget above 0 and below 1"),
        ("auto:budget=98", "keep 'auto:budget=98.0': expected a budget above 0 and below 1"),
    ],
)
def test_rule_that_does_not_suit_the_teacher(text: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        read_keep(text, 12)


@pytest.mark.parametrize(
    ("auto", "kept", "retention", "satisfied"),
    [
        (Auto(count=2), 1, 1.0, False),
        (Auto(count=2), 2, 0.0, True),
        (Auto(budget=0.9), 0, 0.9, True),
        (Auto(budget=0.9), 5, 0.89, False),
    ],
)
def test_enough_blocks(auto: Auto, kept: int, retention: float, satisfied: bool) -> None:
    assert auto.satisfied(kept, retention) == satisfied
