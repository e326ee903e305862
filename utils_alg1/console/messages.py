"""Errors and warnings on the standard error, and safe printing of text from outside on a terminal."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, TextIO

from utils_alg1.base.errors import Alg1Error
from utils_alg1.base.text import terminal_safe

if TYPE_CHECKING:
    from utils_alg1.console.terminal import Terminal


def print_error(error: Alg1Error) -> None:
    """Print the `error:` line of an error and, where it has a hint, the `hint:` line."""
    _print_labelled(("error:", "bold red", error.message), ("hint:", "bold cyan", error.hint))


def print_warning(text: str) -> None:
    """Print a warning in a script that has no Console."""
    _print_labelled(("warning:", "bold yellow", text))


def _print_labelled(*lines: tuple[str, str, str | None]) -> None:
    """Print lines of (label, style of the label, text) to the standard error, except those without a text."""
    with contextlib.suppress(OSError):  # stderr may be redirected to a full disk
        terminal = open_terminal(sys.stderr)
        for label, style, text in lines:
            if text and terminal:
                terminal.print([(label, style), f" {text}"])
            elif text:
                print(label, text_for_stream(sys.stderr, text), file=sys.stderr)


def text_for_stream(stream: TextIO, text: str) -> str:
    """Return text ready for a stream: with control characters replaced on a terminal, unchanged in a file."""
    return terminal_safe(text) if stream.isatty() else text


class IncrementalWriter:
    """Writes a text in pieces; the result is that of `text_for_stream` applied to the whole text.

    A CRLF may be split between two pieces, so on a terminal a CR at the end of a piece is held back until the
    next piece. A CR at the very end of the text is not written.
    """

    def __init__(self, stream: TextIO):
        self._stream, self._is_terminal = stream, stream.isatty()
        self._pending_cr = ""

    def write(self, text: str) -> None:
        """Write the next piece."""
        if self._is_terminal:
            text = self._pending_cr + text
            self._pending_cr = "\r" if text.endswith("\r") else ""
            text = terminal_safe(text.removesuffix("\r"))
        self._stream.write(text)


def open_terminal(stream: TextIO) -> Terminal | None:
    """Return the terminal behind a stream; None for a file, a pipe, and a terminal without cursor control."""
    if not stream.isatty() or os.environ.get("TERM", "").lower() in ("dumb", "unknown"):
        return None
    from utils_alg1.console.terminal import Terminal

    return Terminal(stream)
