"""Formatting of text and numbers, the same on the console, in tables and in the report."""

from __future__ import annotations

import glob
import math
import re
import shlex
import unicodedata
from collections.abc import Iterable
from pathlib import Path

CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
UNDECODED = re.compile("[\udc80-\udcff]")  # what surrogateescape makes of a byte that is not UTF-8
SYMBOLS = {" ": "\u2423", "\n": "\u21b5", "\t": "\u21e5"}  # ␣ ↵ ⇥
EXPONENT_THRESHOLD = 1e6  # numbers from here on are written with an exponent
MAX_DIGITS = 8  # digits of a number written without an exponent


def without_controls(text: str) -> str:
    """Replace each control character and each code point that is no character by a visible symbol.

    The result is safe to print on a terminal and valid in HTML. Line feeds and tabs are kept; CRLF becomes a
    line feed.
    """

    def symbol(match: re.Match[str]) -> str:
        code = ord(match[0])
        return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"

    return CONTROL_CHARACTERS.sub(symbol, text.replace("\r\n", "\n"))


def shell_quote(text: str) -> str:
    """Return a text as one word of a shell command.

    Bytes that are not UTF-8 (half surrogates, as Python decodes names of files) cannot be printed: they are
    escaped in the form $'...' that bash and zsh know.
    """
    if not UNDECODED.search(text):
        return shlex.quote(text)
    text = text.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + UNDECODED.sub(lambda byte: f"\\x{ord(byte[0]) - 0xDC00:02x}", text) + "'"


def shell_join(words: Iterable[str]) -> str:
    """Return the words of a shell command as one text."""
    return " ".join(map(shell_quote, words))


def character_symbol(character: str) -> str:
    """Return a character as one names it: that of a space, a line feed or a tab is a symbol, and one that
    leaves no mark of its own is told by its number. (So does `label` of report/templates/elements.js.)
    """
    symbol = SYMBOLS.get(character) or without_controls(character)
    is_seen = unicodedata.category(symbol)[0] not in "CZM"
    return symbol if is_seen else f"U+{ord(character):04X}"


def text_name(path: str) -> str:
    """Return the name of a text for a table: that of its file or folder, or its pattern."""
    return path if glob.has_magic(path) else Path(path).name or path


# Explains the mark "~" of a loss that stands among those of exports.
EVALUATION_NOTE = "~ not of the export: the lowest of the evaluations, which read a part of the val text"


def format_number(value: float | None, decimals: int = 4) -> str:
    """Format a loss or a similar number: with fewer decimals from 10,000 on, and "-" for None."""
    if value is None:
        return "-"
    if abs(value) >= EXPONENT_THRESHOLD:
        return f"{value:.3g}"
    integer_digits = len(f"{abs(value):.0f}")
    return f"{value:z.{max(0, min(decimals, MAX_DIGITS - integer_digits))}f}"  # z: no -0.0000


def format_count(n: int, noun: str) -> str:
    """Format a count with its noun: 1 step, 2 steps, 3,000 steps."""
    return f"{n:,} {noun}" + "s" * (n != 1)


def format_duration(seconds: float) -> str:
    """Format seconds as 8.4 s, 42 s, m:ss or h:mm:ss, preceded by the number of days from one day on."""
    if seconds < 59.5:
        return f"{round(seconds, 1):.2g} s"
    minutes, s = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{s:02d}"
    days, hours = divmod(minutes // 60, 24)
    return (f"{days} d " if days else "") + f"{hours}:{minutes % 60:02d}:{s:02d}"


def perplexity(loss: float) -> float | None:
    """Return exp(loss), or None where that exceeds the range of a float."""
    return math.exp(loss) if loss < 700 else None


def bits_per_character(loss: float) -> float:
    """Convert a loss from nats per character to bits per character."""
    return loss / math.log(2)


def format_loss(loss: float) -> str:
    """Format a loss together with its perplexity and its bits per character."""
    ppl, bits = format_number(perplexity(loss), 2), format_number(bits_per_character(loss), 3)
    return f"{format_number(loss)} (perplexity {ppl}, {bits} bits per character)"
