"""Which blocks of the teacher keep their attention."""

from __future__ import annotations

import re
from dataclasses import dataclass

from gspn2convert.errors import UserError
from gspn2convert.recipe_parser import show

KEEP_FORMS = "'none', block numbers such as '0,5', 'last:2', 'every:6', 'auto:3' or 'auto:budget=0.98'"

_KEEP = re.compile(r"none|(last|every):([1-9][0-9]{0,3})|[0-9]{1,4}(,[0-9]{1,4})*")
_AUTO = re.compile(r"auto:(?:([1-9][0-9]{0,3})|budget=([0-9]{1,4}(?:\.[0-9]{0,9})?|\.[0-9]{1,9}))")


@dataclass(frozen=True)
class Auto:
    """Blocks that are chosen in the course of the conversion; exactly one of the two is given.

    Attributes:
        count: how many blocks keep attention.
        budget: as few as it takes for the predicted retention to reach this share, above 0 and below 1.
    """

    count: int | None = None
    budget: float | None = None

    def __str__(self) -> str:
        """The form that `read_keep` reads."""
        return f"auto:{self.count}" if self.budget is None else f"auto:budget={self.budget}"

    def check(self, depth: int) -> None:
        """Check that a teacher of so many blocks can keep that many.

        Raises:
            UserError: it cannot.
        """
        assert (self.count is None) != (self.budget is None)
        if self.count is not None and not 0 < self.count < depth:
            raise UserError(
                f"keep {show(str(self))}: expected 1 to {depth - 1}, for the teacher has {depth} blocks "
                "and one at least is converted"
            )
        if self.budget is not None and not 0 < self.budget < 1:
            raise UserError(f"keep {show(str(self))}: expected a budget above 0 and below 1, such as 0.98")

    def satisfied(self, kept: int, retention: float) -> bool:
        """Whether so many blocks, which retain so much, are enough."""
        if self.budget is not None:
            return retention >= self.budget
        return kept == self.count


def is_keep(text: str) -> bool:
    """Whether `read_keep` knows this form; it may still not suit the teacher's depth."""
    plain = text.replace(" ", "")
    return bool(_KEEP.fullmatch(plain) or _AUTO.fullmatch(plain))


def read_keep(text: str, depth: int) -> tuple[int, ...] | Auto:
    """Work out which blocks keep their attention, or by which rule they are to be chosen.

    Args:
        text: what `parse_keep` takes, or "auto:3" (three blocks) or "auto:budget=0.98" (as few as retain 98 %).
        depth: Blocks of the teacher.

    Raises:
        UserError: The text has another form, or does not suit the teacher.
    """
    match = _AUTO.fullmatch(text.replace(" ", ""))
    if match is None:
        return parse_keep(text, depth)
    auto = Auto(count=int(match[1])) if match[1] else Auto(budget=float(match[2]))
    auto.check(depth)
    return auto


def parse_keep(text: str, depth: int) -> tuple[int, ...]:
    """Work out which blocks keep their attention, where this is known beforehand.

    Args:
        text: "none", block numbers "0,5", the last k "last:2", or every k-th "every:6" (blocks 5, 11, ...).
        depth: Blocks of the teacher.

    Returns:
        Block numbers, ascending.

    Raises:
        UserError: The text has another form, names a block that the teacher lacks, or leaves none to convert.
    """
    match = _KEEP.fullmatch(text.replace(" ", ""))
    if match is None:
        raise UserError(f"keep {show(text)}: expected {KEEP_FORMS}")
    blocks = _blocks(match, depth)
    if blocks and not 0 <= blocks[0] <= blocks[-1] < depth:
        raise UserError(f"keep {show(text)}: the teacher has {depth} blocks, numbered 0 to {depth - 1}")
    if len(blocks) == depth:
        raise UserError(f"keep {show(text)}: keeps all {depth} blocks, which leaves none to convert")
    return tuple(blocks)


def _blocks(match: re.Match[str], depth: int) -> list[int]:
    """Block numbers, ascending; some are out of range where the rule does not suit the depth."""
    if match[1] == "last":
        return list(range(depth - int(match[2]), depth))
    if match[1] == "every":
        step = int(match[2])
        return list(range(step - 1, max(depth, step), step))
    return [] if match[0] == "none" else sorted({int(number) for number in match[0].split(",")})
