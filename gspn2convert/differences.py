"""What differs between what a run was asked for before and what it is asked for now, for error messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gspn2convert.errors import RecipeError
from gspn2convert.recipe_parser import read_yaml, show

SHOWN = 3  # at most so many differences are told
# Fingerprints, which say nothing to people.
_UNTOLD = ("teacher weights", "list of images")


def tell_differences(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Say which values are others, and of the recipe which fields.

    Args:
        before: what was asked for, under names that people know; "recipe" is YAML.
        now: what is asked for, likewise.

    Returns:
        Such as " (recipe.seed was 0 and is 1 now)"; "" where there is nothing to tell.
    """
    ours, theirs = dict(_values(now)), dict(_values(before))
    names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    told = [f"{name} was {show(theirs.get(name))} and is {show(ours.get(name))} now" for name in names[:SHOWN]]
    if len(names) > SHOWN:
        told.append(f"and {len(names) - SHOWN} more")
    return f" ({'; '.join(told)})" if told else ""


def _values(asked: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """Names and values that can be told, those of the recipe's fields by their places."""
    for name, value in asked.items():
        if name == "recipe":
            yield from _fields(name, _read(value))
        elif name == "student":
            yield name, f"one of fingerprint {value[:8]}" if value else "none"
        elif name not in _UNTOLD:
            yield name, value or "none"


def _read(recipe: str) -> object:
    try:
        return read_yaml(recipe, "recipe")
    except RecipeError:  # spoilt by hand: then all of its fields are told as missing
        return {}


def _fields(place: str, value: object) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield place, value
        return
    for name, each in value.items():
        yield from _fields(f"{place}.{name}", each)
