"""Text and numbers as people see them, the same on the console, in tables and in the report."""

from __future__ import annotations

import math
import re

INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
DIGITS_UP_TO = 1e6  # from there on a number is written with an exponent
MOST_DIGITS = 8  # of a number without one


def visible(text: str) -> str:
    """Text that no terminal obeys and any page can hold: a symbol for each control character.

    Line ends and tabs stay.
    """

    def symbol(match: re.Match[str]) -> str:
        code = ord(match[0])
        return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"

    return INVISIBLE.sub(symbol, text)


def for_terminal(text: str) -> str:
    """`visible` text; a CRLF ends a line there like any other line's end."""
    return visible(text.replace("\r\n", "\n"))


def one_line(text: str) -> str:
    """Text without what would break a line or a terminal."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def number(value: float | None, digits: int = 4) -> str:
    """A loss or the like with so many digits behind the point, fewer from 10,000 on; "-" for None."""
    if value is None:
        return "-"
    if abs(value) >= DIGITS_UP_TO:
        return f"{value:.3g}"
    before_the_point = len(f"{abs(value):.0f}")
    return f"{value:.{max(0, min(digits, MOST_DIGITS - before_the_point))}f}"


def counted(n: int, thing: str) -> str:
    """1 step, 2 steps, 3,000 steps."""
    return f"{n:,} {thing}" + "s" * (n != 1)


def duration(seconds: float) -> str:
    """Seconds as 8.4 s, 42 s, m:ss or h:mm:ss, with days before them where there are any."""
    if seconds < 59.5:
        return f"{round(seconds, 1):.2g} s"
    minutes, s = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{s:02d}"
    days, hours = divmod(minutes // 60, 24)
    return (f"{days} d " if days else "") + f"{hours}:{minutes % 60:02d}:{s:02d}"


def perplexity(loss: float) -> float | None:
    """exp(loss): between how many equally likely characters the model wavers; None past a float's range."""
    return math.exp(loss) if loss < 700 else None


def bits_per_character(loss: float) -> float:
    """A loss in nats as bits: what each character would take if the text were coded with the model."""
    return loss / math.log(2)


def loss_in_words(loss: float) -> str:
    """A loss with what it means: its perplexity and its bits per character."""
    bits = bits_per_character(loss)
    return f"{number(loss)} (perplexity {number(perplexity(loss), 2)}, {number(bits, 3)} bits per character)"
