"""What all tables of the READMEs share."""

from collections.abc import Iterable, Sequence
from typing import Any

Document = dict[str, Any]
Row = Sequence[str]


def grid(head: Row, rows: Iterable[Row]) -> list[str]:
    """Lines of a table; all columns but the first stand to the right."""
    return [f"| {' | '.join(row)} |" for row in (head, [":--", *["--:"] * (len(head) - 1)], *rows)]


def percent(share: float) -> str:
    """A share of 1 as text."""
    return f"{share:.1%}"


def series(texts: Sequence[str]) -> str:
    """One text or more, as people list them."""
    *others, last = texts
    return f"{', '.join(others)} and {last}" if others else last
