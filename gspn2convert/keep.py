"""Which blocks of the teacher keep their attention."""

import re

from gspn2convert.errors import UserError
from gspn2convert.recipe_parser import show

KEEP_FORMS = "'none', block numbers such as '0,5', 'last:2' or 'every:6'"

_KEEP = re.compile(r"none|(last|every):([1-9][0-9]{0,3})|[0-9]{1,4}(,[0-9]{1,4})*")


def is_keep(text: str) -> bool:
    """Whether `parse_keep` knows this form; it may still not suit the teacher's depth."""
    return _KEEP.fullmatch(text.replace(" ", "")) is not None


def parse_keep(text: str, depth: int) -> tuple[int, ...]:
    """Work out which blocks keep their attention.

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
