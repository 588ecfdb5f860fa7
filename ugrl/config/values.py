"""From a plain tree to typed values: every fault of every key in one error.

The rules are this project's own. A number may come from a shell as text (``6e-5``), a whole number may be written as
``2e4``, a number of steps may be a share of the run, and ``true`` is no number. With a library such as pydantic each of
these would be a validator of our own, and its messages would have to be made anew from its error codes.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ugrl.config.keys import elsewhere, no_section, show
from ugrl.config.rules import broken_rules
from ugrl.config.tree import Config, Steps
from ugrl.errors import ConfigError
from ugrl.text import line, nearest

T = TypeVar("T")

# What 64 bits hold: beyond it no generator takes a seed, and no array a size.
MOST_INT = 2**63 - 1
MOST_LIST, MOST_CHARACTERS = 1000, 4096
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_BOUNDS = {
    "ge": ("≥", float.__ge__),
    "gt": (">", float.__gt__),
    "le": ("≤", float.__le__),
    "lt": ("<", float.__lt__),
}


def build(tree: Mapping[str, Any]) -> Config:
    """The typed tree of a nested dict.

    Raises:
        ConfigError: Unknown keys, values of the wrong type or out of bounds, or values that do not go together. Each
            of its problems names the key, the value and what was expected.
    """
    problems: dict[str, str] = {}
    cfg = _section(Config, tree, "", problems)
    found = [*problems.values(), *broken_rules(cfg, problems)]
    if found:
        raise ConfigError(*found)
    return cfg


def _section(cls: type[T], tree: Any, prefix: str, problems: dict[str, str]) -> T:
    """A section; keys that cannot be used keep their defaults and are put into ``problems``."""
    values: dict[str, Any] = {}
    if not isinstance(tree, Mapping):
        problems[prefix] = no_section(prefix, tree)
        return cls()
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    for key, value in tree.items():
        path = f"{prefix}{line(key, 60)}"
        if key not in known:
            problems[path] = f"unknown config key '{path}'{elsewhere(str(key)) or nearest(str(key), known)}"
        elif is_dataclass(hints[key]):
            values[key] = _section(hints[key], value, path + ".", problems)
        else:
            try:
                made = _coerce(path, hints[key], value)
                _check_bounds(path, made, known[key].metadata.get("bounds", {}))
                values[key] = made
            except ConfigError as error:
                problems[path] = str(error)
    return cls(**values)


def _coerce(path: str, hint: Any, value: Any) -> Any:
    """``value`` as ``hint``, or a ConfigError that names the path, the value and what was expected."""
    origin = get_origin(hint)
    if origin is Literal and isinstance(value, str) and value in get_args(hint):
        return value
    if hint == Steps:
        number = _number(value)
        if number == 1 and not isinstance(value, int) and str(value) != "1":
            raise ConfigError(
                f"config key '{path}' is {show(value)}: one step, or the whole run? For one step write 1, for the "
                "whole run as many steps as train.steps"
            )
        if number is not None and (number < 1 or number.is_integer()) and abs(number) <= MOST_INT:
            return int(number) if number.is_integer() else number
    elif origin in (Union, types.UnionType):
        if value is None and type(None) in get_args(hint):
            return None
        inner = next(a for a in get_args(hint) if a is not type(None))
        return _coerce(path, inner, value)
    if origin is tuple and isinstance(value, list | tuple) and 0 < len(value) <= MOST_LIST:
        return tuple(_coerce(f"{path}[{i}]", get_args(hint)[0], v) for i, v in enumerate(value))
    if hint is bool and isinstance(value, bool):
        return value
    if hint in (int, float):
        number = _number(value)
        if hint is float and number is not None:
            return number
        if hint is int and number is not None and number.is_integer() and abs(number) <= MOST_INT:
            return int(value) if isinstance(value, int) else int(number)
    if hint is str and isinstance(value, str) and len(value) <= MOST_CHARACTERS and not _CONTROL.search(value):
        return value
    raise ConfigError(f"config key '{path}' is {show(value)}; expected {type_name(hint)}")


def _number(value: Any) -> float | None:
    """A finite float, also of text: a value may come from a shell or from a quoted word."""
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def type_name(hint: Any) -> str:
    """What a field's type takes, in the words of messages and of the configuration reference.

    >>> type_name(float | None), type_name(tuple[int, ...])
    ('a number or null', 'a list of an integer')
    """
    if hint == Steps:
        return "a number of steps, or a share of train.steps below 1"
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join("null" if a is type(None) else type_name(a) for a in get_args(hint))
    if get_origin(hint) is tuple:
        return f"a list of {type_name(get_args(hint)[0])}"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text of one line"}
    return str(names.get(hint, getattr(hint, "__name__", str(hint))))


def _check_bounds(path: str, value: Any, bounds: Mapping[str, float]) -> None:
    """Refuse a number, or a list with a number, outside of its bounds; ``null`` has none."""
    for one in value if isinstance(value, tuple) else (value,):
        if one is not None and not all(_BOUNDS[k][1](float(one), float(b)) for k, b in bounds.items()):
            raise ConfigError(f"config key '{path}' is {show(one)}; expected {bounds_text(bounds)}")


def bounds_text(bounds: Mapping[str, float]) -> str:
    """The bounds of a field, from its metadata.

    >>> bounds_text({"gt": 0, "le": 1})
    '> 0 and ≤ 1'
    """
    return " and ".join(f"{_BOUNDS[k][0]} {b:g}" for k, b in bounds.items())
