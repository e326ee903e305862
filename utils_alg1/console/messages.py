"""Lines on the standard streams: coloured on a terminal, with control characters made visible there."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, TextIO

from utils_alg1.base.errors import Alg1Error
from utils_alg1.base.text import without_controls

if TYPE_CHECKING:
    import rich.console

WARNING_PATTERN = "^(?P<bold>(?P<yellow>warning:))"  # for print_line


def print_error(error: Alg1Error) -> None:
    """Print the `error:` line of an error and, where it has a hint, the `hint:` line."""
    with contextlib.suppress(OSError):  # stderr may be redirected to a full disk
        print_line(sys.stderr, f"error: {error.message}", "^(?P<bold>(?P<red>error:))")
        if error.hint:
            print_line(sys.stderr, f"hint: {error.hint}", "^(?P<bold>(?P<cyan>hint:))")


def print_warning(text: str) -> None:
    """Print a warning in a script that has no Console."""
    with contextlib.suppress(OSError):
        print_line(sys.stderr, f"warning: {text}", WARNING_PATTERN)


def print_note(text: str) -> None:
    """Print what a script does otherwise than one may expect, on the standard error."""
    with contextlib.suppress(OSError):
        print_line(sys.stderr, f"note: {text}", "^(?P<bold>note:)")


def print_line(
    stream: TextIO, text: str, pattern: str = "", console: rich.console.Console | None = None
) -> None:
    """Print a line; a terminal itself wraps a long one, so that it can be copied as one line.

    On a terminal, what a named group of the regular expression `pattern` matches has the Rich style of that
    name. `console` is Rich's console of the stream, if there is one.
    """
    if not is_terminal(stream):
        print(text_for_stream(stream, text), file=stream, flush=True)
        return
    from rich.console import Console
    from rich.text import Text

    line = Text(without_controls(text))
    line.highlight_regex(pattern)
    (console or Console(file=stream)).print(line, soft_wrap=True)


def is_terminal(stream: TextIO) -> bool:
    """Return whether a stream is a terminal that can do more than print lines."""
    return stream.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")


def text_for_stream(stream: TextIO, text: str) -> str:
    """Return text ready for a stream: with control characters replaced on a terminal, unchanged in a file."""
    return without_controls(text) if stream.isatty() else text
