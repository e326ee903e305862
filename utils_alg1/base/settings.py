"""Settings in general: type, default, help and limits, and how their values are read and written.

Nothing here knows a parameter of ALG1.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

LARGEST = 2**31 - 1  # the maximum of an integer without a limit of its own: more could not be allocated
WIDEST_COLUMN = 40  # characters of a column in a listing; longer entries push their line to the right


@dataclass(frozen=True)
class Limits:
    """The help on a field or a flag, and the constraints on its value beyond its type."""

    help: str
    above: float | None = None  # exclusive lower bound
    minimum: float | None = None  # inclusive lower bound
    below: float | None = None  # exclusive upper bound
    maximum: float | None = None  # inclusive upper bound
    choices: tuple[str, ...] = ()
    may_be_empty: bool = False  # whether "" is allowed
    flag: str | None = None  # the command-line flag, where it is not made from the field's name
    may_change: bool = False  # whether a resumed run may change it: it does not affect the steps so far

    @property
    def explanation(self) -> str:
        """The help with the choices, for a comment in a file."""
        return self.help + (f" ({', '.join(self.choices)})" if self.choices else "")

    def violation(self, value: Any) -> str | None:
        """Return "must be ..." with the limit that a value of the right type violates, or None."""
        if value is None:
            return None
        if self.choices and value not in self.choices:
            return "must be one of " + ", ".join(self.choices)
        if isinstance(value, str):
            return None if value or self.may_be_empty else "must not be empty"
        if self.above is not None and not value > self.above:
            return f"must be above {self.above:g}"
        if self.minimum is not None and not value >= self.minimum:
            return f"must be at least {self.minimum:g}"
        if self.below is not None and not value < self.below:
            return f"must be below {self.below:g}"
        maximum = LARGEST if isinstance(value, int) and self.maximum is None else self.maximum
        if maximum is not None and not value <= maximum:
            return f"must be at most {maximum}"
        return None


def setting(default: Any, help: str, **limits: Any) -> Any:
    """Return a dataclass field with its help and limits (see `Limits`)."""
    return field(default=default, metadata={"limits": Limits(help, **limits)})


@dataclass(frozen=True)
class Spec:
    """What is known of one field of a configuration dataclass."""

    name: str
    part: str  # the group of settings that it belongs to
    type: Any  # int, float, bool or str
    optional: bool  # whether None is allowed
    default: Any
    limits: Limits

    @property
    def flag(self) -> str:
        return self.limits.flag or "--" + self.name.replace("_", "-")


def field_names(config_class: type) -> list[str]:
    return [f.name for f in dataclasses.fields(config_class)]


TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def coerce(spec: Spec, value: Any) -> Any:
    """Convert `value`, from a file or the command line, to the field's type.

    PyYAML reads `1e-3` as a string and JSON does not distinguish 1 from 1.0, so strings that spell a number
    and integral floats are accepted (see `as_number`). YAML reads `on` and `off` as booleans.

    Raises:
        ValueError: with what the value must be.
    """
    if value is None and spec.optional:
        return None
    wanted = ValueError(f"must be {TYPE_NAMES[spec.type]}")
    if spec.type is bool:
        words = {"true": True, "false": False}
        if isinstance(value, str) and value.lower() in words:
            return words[value.lower()]
        if not isinstance(value, bool):
            raise wanted
        return value
    if spec.type is str:
        if isinstance(value, bool) and "off" in spec.limits.choices:
            return "on" if value else "off"
        if not isinstance(value, str):
            raise wanted
        if "\0" in value:
            raise ValueError("must not contain a null character")
        try:
            os.fsencode(value)
        except UnicodeEncodeError:
            raise ValueError("must not contain half a surrogate pair") from None
        return value
    return as_number(spec.type, value)


def as_number(kind: type, value: Any) -> int | float:
    """Convert a number, or a string that spells one, to `kind`: int or float.

    10000, 1e4 and 10_000 are the same integer, in files (as in YAML) and on every command line.

    Raises:
        ValueError: with what the value must be.
    """
    wanted = ValueError(f"must be {TYPE_NAMES[kind]}")
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise wanted
    if kind is int and not isinstance(value, float):
        try:
            return int(value)  # not through a float, which would round large seeds
        except ValueError:
            pass
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise wanted from None
    if not math.isfinite(number):
        raise ValueError("must be finite")
    if kind is float:
        return number
    if not number.is_integer():
        raise wanted
    return int(number)


def yaml_value(value: Any, ascii_only: bool = False) -> str:
    """Format a number, boolean, string or None as YAML on one line; reading it gives the same value.

    A string with control or other unprintable characters is written in double quotes with escapes.

    Args:
        ascii_only: escape every character that is not ASCII.
    """
    import yaml

    printable = not isinstance(value, str) or value.isprintable()
    text = yaml.safe_dump(
        value,
        default_style=None if printable else '"',
        allow_unicode=printable and not ascii_only,
        width=math.inf,
    )
    return text.removesuffix("\n").removesuffix("\n...")  # the end mark of a document that is one scalar


def yaml_lines(values: Mapping[str, Any], comments: Mapping[str, str], ascii_only: bool = False) -> list[str]:
    """Format settings as YAML, a line `name: value  # comment` for each; the comments are aligned."""
    entries = {name: f"{name}: {yaml_value(value, ascii_only)}" for name, value in values.items()}
    width = column_width(entries.values())
    return [f"{entry:{width}}  # {comments[name]}" for name, entry in entries.items()]


def column_width(entries: Iterable[str]) -> int:
    """Return the width of a column of a listing, which very long entries do not widen."""
    return max((len(entry) for entry in entries if len(entry) <= WIDEST_COLUMN), default=0)
