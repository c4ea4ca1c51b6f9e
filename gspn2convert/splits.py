"""The names that the splits of data sets go by."""

import logging
from collections.abc import Collection

from gspn2convert.errors import UserError

# In order of preference.
SPLIT_NAMES = {"train": ("train", "training"), "test": ("test", "val", "validation", "valid", "eval")}

_log = logging.getLogger(__name__)


def pick_split(available: Collection[str], split: str, data: str) -> str:
    """Choose the split that serves as `train` or `test`; where there is only the other one, it serves as both.

    Args:
        available: names of the splits that there are.
        split: "train" or "test".
        data: what the user called the data.

    Raises:
        UserError: no name means either.
    """
    other = "test" if split == "train" else "train"
    for name in SPLIT_NAMES[split] + SPLIT_NAMES[other]:
        if name in available:
            if name in SPLIT_NAMES[other]:
                _log.warning("data %s: no %s split, so %s serves for it", data, split, name)
            return name
    raise UserError(f"data {data}: no train or test split among {', '.join(available)}")
