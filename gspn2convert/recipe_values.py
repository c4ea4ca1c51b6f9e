"""What values the fields of a recipe may have."""

import re
from itertools import pairwise
from typing import Annotated, Literal

from gspn2convert.keep import KEEP_FORMS, is_keep
from gspn2convert.recipe_parser import Rule

_INT_MAX = 2**31 - 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SHARE_OF_WIDTH = re.compile(r"C/([1-9][0-9]{0,3})")


def _is_proxy_dim(value: int | str) -> bool:
    return 1 <= value <= _INT_MAX if isinstance(value, int) else bool(_SHARE_OF_WIDTH.fullmatch(value))


Count = Annotated[int, Rule(lambda value: 1 <= value <= _INT_MAX, "an integer of 1 or more")]
Whole = Annotated[int, Rule(lambda value: 0 <= value <= _INT_MAX, "an integer of 0 or more")]
Regions = Annotated[int, Rule(lambda value: 0 <= value <= 16, "an integer from 0 to 16")]
Positive = Annotated[float, Rule(lambda value: value > 0, "a number above 0")]
Weight = Annotated[float, Rule(lambda value: value >= 0, "a number of 0 or more")]
Fraction = Annotated[float, Rule(lambda value: 0 <= value <= 1, "a number from 0 to 1")]
BelowOne = Annotated[float, Rule(lambda value: 0 <= value < 1, "a number of 0 or more and below 1")]
Interval = Annotated[
    tuple[float, float], Rule(lambda pair: 0 < pair[0] <= pair[1] <= 1, "[low, high] with 0 < low <= high <= 1")
]
Sizes = Annotated[
    tuple[int, ...],
    Rule(
        lambda sizes: all(0 < a < b for a, b in pairwise((0.5, *sizes))), "ascending pixels such as [384, 518], or []"
    ),
]
ProxyDim = Annotated[int | str, Rule(_is_proxy_dim, "an integer of 1 or more, or a share of the width such as 'C/8'")]
OptimizerName = Literal["muon", "adamw"]
Keep = Annotated[str, Rule(is_keep, KEEP_FORMS)]
Name = Annotated[str, Rule(lambda text: bool(_NAME.fullmatch(text)), "a name of letters, digits, '.', '_' and '-'")]
