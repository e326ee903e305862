"""Errors and warnings for a person, and foreign text as a terminal may show it."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, TextIO

from utils_alg1.base.errors import Alg1Error
from utils_alg1.base.text import for_terminal

if TYPE_CHECKING:
    from utils_alg1.console.terminal import Terminal


def print_error(error: Alg1Error) -> None:
    _print_labelled(("error:", "bold red", error.message), ("hint:", "bold cyan", error.hint))


def print_warning(text: str) -> None:
    """A warning of a script that has no Console."""
    _print_labelled(("warning:", "bold yellow", text))


def _print_labelled(*lines: tuple[str, str, str | None]) -> None:
    """Lines for the standard error: a label, its style and a text."""
    with contextlib.suppress(OSError):  # a full disk may be where stderr goes, too
        terminal = terminal_of(sys.stderr)
        for label, style, text in lines:
            if text and terminal:
                terminal.print([(label, style), f" {text}"])
            elif text:
                print(label, shown_on(sys.stderr, text), file=sys.stderr)


def shown_on(stream: TextIO, text: str) -> str:
    """Text that comes from outside as a stream is given it: no terminal obeys it; a file gets it as it is."""
    return for_terminal(text) if stream.isatty() else text


class Typewriter:
    """Writes text piece by piece, as `shown_on` shows the whole.

    A CRLF may come in two pieces, so on a terminal a CR waits for what follows it. One at the very end is
    not written.
    """

    def __init__(self, stream: TextIO):
        self._stream, self._terminal = stream, stream.isatty()
        self._held = ""  # the CR that waits

    def write(self, text: str) -> None:
        if self._terminal:
            text = self._held + text
            self._held = "\r" if text.endswith("\r") else ""
            text = for_terminal(text.removesuffix("\r"))
        self._stream.write(text)


def terminal_of(stream: TextIO) -> Terminal | None:
    """The terminal behind a stream; None for a file or a pipe, and for a terminal that knows lines only."""
    if not stream.isatty() or os.environ.get("TERM", "").lower() in ("dumb", "unknown"):
        return None
    from utils_alg1.console.terminal import Terminal

    return Terminal(stream)
