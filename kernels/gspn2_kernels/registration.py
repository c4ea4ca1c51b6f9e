"""How torch gets to know the ops.

`torch.library.custom_op` would do, but its first call in a process imports torch._dynamo, which takes seconds.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

LIBRARY = torch.library.Library("gspn2", "FRAGMENT")
Function = TypeVar("Function", bound=Callable[..., Any])


def define(schema: str) -> Callable[[Function], Function]:
    """Make the decorated function the op `gspn2::` of a schema, for all devices; it changes none of its arguments."""

    def register(function: Function) -> Function:
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(schema.partition("(")[0], function, "CompositeExplicitAutograd")
        return function

    return register
