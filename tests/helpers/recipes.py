"""The smallest recipe."""

from typing import Any

import yaml

SMALL = "name: small\nalign: {steps: 3, batch_size: 4}\nrecover: {steps: 5, batch_size: 6}\n"


def small(**changes: Any) -> str:
    """The smallest recipe as YAML, with other values at dotted places (`__` for a dot)."""
    data = yaml.safe_load(SMALL)
    for place, value in changes.items():
        *parts, last = place.split("__")
        target = data
        for part in parts:
            target = target.setdefault(part, {})
        target[last] = value
    return yaml.safe_dump(data)
