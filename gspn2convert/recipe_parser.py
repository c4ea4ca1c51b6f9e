"""Strict reading of YAML into frozen dataclasses: every mistake is a `RecipeError` that names its place."""

import difflib
import re
import reprlib
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar, get_args, get_origin, get_type_hints

import yaml

from gspn2convert.errors import RecipeError

# Bounded in depth and length: a few lines of YAML aliases can stand for a value of gigabytes.
_SHOW = reprlib.Repr()
_SHOW.maxlevel, _SHOW.maxstring, _SHOW.maxother = 2, 60, 60

_TYPE_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
# What annotations are: a class, or something of `typing` with no common class.
Hint: TypeAlias = Any

_EXPONENT = re.compile(r"([-+]?\d+)(\.\d*)?[eE]([-+]?)(\d+)")
_LARGEST = 3.4e38  # what float32, in which models and optimizers compute, can hold


@dataclass(frozen=True)
class Rule:
    """What a value must satisfy beyond its type, with the words that say so."""

    holds: Callable[[Any], bool]
    expected: str


class Part:
    """A part of a recipe; a dataclass that derives from it checks its fields however it is made."""

    place: ClassVar[str]

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self), include_extras=True)
        for field in fields(self):  # type: ignore[arg-type]
            check(f"{self.place}.{field.name}", getattr(self, field.name), hints[field.name])


PartT = TypeVar("PartT", bound=Part)


def check(place: str, value: object, hint: Hint) -> None:
    """Check a value against a field's type hint.

    Args:
        place: Where the value stands, for example `recipe.align.lr`.
        value: The value.
        hint: A plain type, a union of them, `Literal`, `tuple`, a `Part`, or `Annotated[one of these, Rule]`.

    Raises:
        RecipeError: The value has another type or breaks the rule.
    """
    rule = None
    origin: Hint = get_origin(hint)
    if origin is Annotated:
        hint, rule = get_args(hint)
    if not _has_type(value, hint):
        expected = rule.expected if rule else _type_name(hint)
        raise RecipeError(f"{place}: expected {expected}, got {show(value)}{_advice(value, hint)}")
    if rule and not rule.holds(value):
        raise RecipeError(f"{place}: expected {rule.expected}, got {show(value)}")


def parse(cls: type[PartT], data: object) -> PartT:
    """Make a part of a recipe from a mapping.

    Args:
        cls: The dataclass to make.
        data: What YAML read in its place.

    Raises:
        RecipeError: A field is unknown, missing, ill-typed or out of range.
    """
    if not isinstance(data, dict):
        raise RecipeError(f"{cls.place}: expected a mapping of fields, got {show(data)}")
    hints = get_type_hints(cls)
    known = fields(cls)  # type: ignore[arg-type]
    for key in data:
        if key not in [field.name for field in known]:
            raise RecipeError(f"{cls.place}: unknown field {show(key)}{suggest(str(key), [f.name for f in known])}")
    for field in known:
        if field.name not in data and field.default is MISSING and field.default_factory is MISSING:
            raise RecipeError(f"{cls.place}: missing field {field.name!r}")
    return cls(**{name: _from_yaml(value, hints[name]) for name, value in data.items()})


def read_yaml(text: str, source: str) -> object:
    """Read YAML with `yaml.safe_load`'s types, refusing a key that stands twice.

    Raises:
        RecipeError: The text is no YAML; the message names `source` and the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise RecipeError(f"{source}{line}: {error.problem or 'this is no YAML'}") from error
    except RecursionError as error:
        raise RecipeError(f"{source}: nested too deeply; a recipe has three levels") from error
    # PyYAML lets Python's own errors through for tagged or date-like values, such as `!!bool maybe`.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise RecipeError(f"{source}: cannot be read as YAML: {str(error).splitlines()[0]}") from error


def show(value: object) -> str:
    """Write a value in one short line for an error message."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and value.bit_length() > 64:
        return "a huge integer"
    return _SHOW.repr(value)


def suggest(given: str, known: list[str]) -> str:
    """Say which known name was probably meant, or list them all."""
    nearest = difflib.get_close_matches(given, known, n=1)
    return f", did you mean {nearest[0]!r}?" if nearest else f"; known are {', '.join(known)}"


def _has_type(value: object, hint: Hint) -> bool:
    origin: Hint = get_origin(hint)
    if origin is UnionType:
        return any(_has_type(value, option) for option in get_args(hint))
    if origin is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if origin is tuple:
        items = get_args(hint)
        if isinstance(value, tuple) and items[1:] == (...,):
            items = (items[0],) * len(value)
        return isinstance(value, tuple) and len(value) == len(items) and all(map(_has_type, value, items))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST
    return isinstance(value, hint) and not (hint is int and isinstance(value, bool))


def _type_name(hint: Hint) -> str:
    origin: Hint = get_origin(hint)
    if origin is Literal:
        return f"one of {', '.join(get_args(hint))}"
    return _TYPE_NAMES.get(hint) or f"a {hint.__name__}"


def _advice(value: object, hint: Hint) -> str:
    if hint is str and isinstance(value, int | float):
        return "; put it in quotes"
    if hint is float and isinstance(value, str) and (match := _EXPONENT.fullmatch(value)):
        whole, fraction, sign, exponent = match.groups()
        fraction = fraction if fraction and fraction != "." else ".0"
        return f", which YAML reads as text; write {whole}{fraction}e{sign or '+'}{exponent}"
    if hint is float and isinstance(value, int | float) and abs(value) > _LARGEST:
        return f"; float32 ends at {_LARGEST}"
    return ""


def _from_yaml(value: object, hint: Hint) -> object:
    """Give a value from YAML the Python type that its field has; `check` judges it afterwards."""
    if is_dataclass(hint) and isinstance(hint, type) and issubclass(hint, Part):
        return parse(hint, value)
    origin: Hint = get_origin(hint)
    if origin is tuple and isinstance(value, list):
        return tuple(value)
    return value


class _Loader(yaml.SafeLoader):
    """`SafeLoader` that refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Make a dictionary; a key that stands twice is an error (YAML would silently take the last)."""
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"field {key.value!r} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)
