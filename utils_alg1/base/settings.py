"""A setting: its type, default, help and limits, and how a value of any source is read as it."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass, field
from typing import Any

# What a word may be that stands on a command line without a flag (see Limits.stands_for); or a suffix.
A_FOLDER = "a folder"
A_PATH = "a file or a folder"
A_WORD = "a word"
LARGEST = 2**31 - 1  # of a whole number without a limit of its own; more cannot be allocated anyway


@dataclass(frozen=True)
class Limits:
    """What the value of a field, or of any flag, must satisfy beyond its type, and how it is reached from
    outside."""

    help: str
    above: float | None = None  # exclusive lower bound
    minimum: float | None = None  # inclusive lower bound
    below: float | None = None  # exclusive upper bound
    maximum: float | None = None  # inclusive upper bound
    choices: tuple[str, ...] = ()
    may_be_empty: bool = False  # of text
    stands_for: tuple[str, ...] = ()  # the words that its flag is meant for, if they stand without one
    flag: str | None = None  # the command-line flag, where it is not the field's own name
    may_change: bool = False  # a resumed run may change it: it never shaped the steps already taken

    def broken_by(self, value: Any) -> str | None:
        """What a value of the right type must be to keep the limits; None when it does."""
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
    """A dataclass field with its documentation and limits (see `Limits`)."""
    return field(default=default, metadata={"limits": Limits(help, **limits)})


@dataclass(frozen=True)
class Spec:
    """One field as the outside sees it."""

    name: str
    part: str  # key of PARTS
    type: Any  # int, float, bool or str
    optional: bool  # None is a value too
    default: Any
    limits: Limits

    @property
    def flag(self) -> str:
        return self.limits.flag or "--" + self.name.replace("_", "-")


def field_names(config_class: type) -> list[str]:
    return [f.name for f in dataclasses.fields(config_class)]


TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def coerce(spec: Spec, value: Any) -> Any:
    """`value`, from a file or the command line, as the field's type.

    YAML reads `1e-3` as text, and JSON has no integers of its own: text that is a number and a float
    that is whole serve where a number or a whole number is wanted. YAML reads `on` and `off` as booleans.
    See `as_number` for how a number may be written.

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
    """A number, or text that is one, as an int or a float.

    10000, 1e4 and 10_000 are one whole number, in files (YAML reads it so) and on every command line.

    Raises:
        ValueError: with what the value must be.
    """
    wanted = ValueError(f"must be {TYPE_NAMES[kind]}")
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise wanted
    if kind is int and not isinstance(value, float):
        try:
            return int(value)  # exactly: a float would round large seeds
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
