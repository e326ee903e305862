"""Settings in general: their type, default, help and limits, and how their values are read and written.

Nothing here knows a parameter of ALG1.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import re
from dataclasses import dataclass, field
from typing import Any

LARGEST = 2**31 - 1  # the maximum of an integer without a limit of its own: more could not be allocated
NO_FILE_NAME = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")  # the others stand for bytes that are not UTF-8
TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
SWITCHES = {"true": True, "false": False}


def setting(
    default: Any,
    help: str,
    *,
    above: float | None = None,
    minimum: float | None = None,
    below: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] = (),
    flag: str = "",
    may_change: bool = False,
    is_path: bool = False,
    auto: Any = None,
) -> Any:
    """Return a dataclass field with its help and limits (see `Spec`)."""
    limits = {"above": above, "minimum": minimum, "below": below, "maximum": maximum, "choices": choices}
    about = {"help": help, "flag": flag, "may_change": may_change, "is_path": is_path, "auto": auto}
    return field(default=default, metadata=about | limits)


# A setting that a resumed run may change, since it does not affect the steps so far.
changeable = functools.partial(setting, may_change=True)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a value must be."""

    type: Any  # int, float, bool or str
    default: Any = None  # None: the value may be None; "": it may be empty
    above: float | None = None  # exclusive lower bound
    minimum: float | None = None  # inclusive lower bound
    below: float | None = None  # exclusive upper bound
    maximum: float | None = None  # inclusive upper bound
    choices: tuple[str, ...] = ()
    is_path: bool = False  # a file or a folder, which may begin with ~
    auto: Any = None  # the value that the word `auto` stands for

    def violation(self, value: Any) -> str | None:
        """Return "must be ..." with what a value violates, its type included; None if it is good."""
        if value is None and self.default is None:
            return None
        if type(value) is not self.type and not (self.type is float and type(value) is int):
            return f"must be {TYPE_NAMES[self.type]}"
        if isinstance(value, float) and not math.isfinite(value):
            return "must be finite"
        if self.above is not None and not value > self.above:
            return f"must be above {self.above:g}"
        if self.minimum is not None and not value >= self.minimum:
            return f"must be at least {self.minimum:g}"
        if self.below is not None and not value < self.below:
            return f"must be below {self.below:g}"
        maximum = LARGEST if self.type is int and self.maximum is None else self.maximum
        if maximum is not None and not value <= maximum:
            return f"must be at most {maximum}"
        if self.choices and value not in self.choices:
            return "must be one of " + ", ".join(self.choices)
        if value == "" and self.default != "":
            return "must not be empty"
        if isinstance(value, str) and NO_FILE_NAME.search(value):
            return "must hold no null character or half surrogate"
        return None


@dataclass(frozen=True, kw_only=True)
class Spec(Limits):
    """What is known of one setting."""

    name: str
    part: str  # the group of settings that it belongs to
    help: str
    flag: str  # the command-line flag
    may_change: bool  # see `changeable`

    @property
    def explanation(self) -> str:
        """The help with the choices, for a comment in a file."""
        return self.help + (f" ({', '.join(self.choices)})" if self.choices else "")

    def word(self, value: Any) -> str:
        """Return a value on a command line: --flag=value, or --flag or --no-flag for a boolean."""
        if isinstance(value, bool):
            return self.flag if value else self.flag.replace("--", "--no-", 1)
        return f"{self.flag}={value}"


def coerce(limits: Limits, value: Any) -> Any:
    """Convert `value`, from a file or the command line, to the type of `limits`; `violation` checks the rest.

    PyYAML reads `1e-3` as a string and JSON does not distinguish 1 from 1.0: 10000, 1e4 and 10_000 are the
    same integer. YAML reads `on` and `off` as booleans; nanoGPT writes True and False. The `~` that a path
    begins with is the home folder: a shell replaces it only where a word begins.

    Raises:
        ValueError: with what the value must be.
    """
    if value is None and limits.default is None:
        return None
    word = str(value).lower() if isinstance(value, bool | str) else ""
    if word == "auto" and limits.auto is not None:
        return limits.auto
    if limits.type is bool:
        value = SWITCHES.get(word, value)
    elif word in SWITCHES and "off" in limits.choices:
        value = "on" if SWITCHES[word] else "off"
    elif limits.type in (int, float) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        value = _to_number(limits.type, value)
    if type(value) is not limits.type:
        raise ValueError(f"must be {TYPE_NAMES[limits.type]}")
    return os.path.expanduser(value) if limits.is_path else value


def _to_number(kind: type, value: int | float | str) -> Any:
    """Convert a number, or text that spells one, to int or float; return it as it is where that fails."""
    with contextlib.suppress(ValueError, OverflowError):
        if kind is int and not isinstance(value, float):
            with contextlib.suppress(ValueError):
                return int(value)  # not through a float, which would round large seeds
        number = float(value)
        return int(number) if kind is int and number.is_integer() else number
    return value


def field_names(config_class: type) -> list[str]:
    return [f.name for f in dataclasses.fields(config_class)]


def yaml_value(value: Any) -> str:
    """Format a number, boolean, string or None as YAML on one line; reading it gives the same value.

    A string with control or other unprintable characters is written in double quotes with escapes.
    """
    import yaml

    printable = not isinstance(value, str) or value.isprintable()
    style = None if printable else '"'
    text = yaml.safe_dump(value, default_style=style, allow_unicode=printable, width=math.inf)
    return text.removesuffix("\n").removesuffix("\n...")  # the end mark of a document that is one scalar


def yaml_line(name: str, value: Any, comment: str) -> str:
    """Format a setting as `name: value  # comment`."""
    return f"{f'{name}: {yaml_value(value)}':<28}  # {comment}"
