"""Output on a terminal, rendered with Rich: colours, folded lines and the progress bar.

This module is imported only if there is a terminal, because importing Rich is slow.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TextIO

import rich.console
from rich.cells import cell_len
from rich.live import Live
from rich.text import Text

from utils_alg1.base.text import format_duration, format_number, terminal_safe

Part = str | tuple[str, str]  # text, or (text, Rich style)

REDRAW_INTERVAL = 0.1  # seconds between two redraws of the progress bar
RATE_WINDOW = 30  # redraws over which the displayed speed is averaged
MIN_RATE_SECONDS = 0.5  # a speed measured over less time is not displayed
MIN_ETA_SECONDS = 1.0  # training time before the remaining time is estimated
MAX_BAR_WIDTH, MIN_BAR_WIDTH = 40, 8  # columns
RIGHT_MARGIN = 3  # columns kept free behind the progress bar for the ^C that terminals echo
FIELD_STYLES = {"step": "bold", "loss": "", "val": "cyan", "speed": "", "left": "bright_black"}


class _RichConsole(rich.console.Console):
    def on_broken_pipe(self) -> None:
        raise  # Rich would exit the program; a run continues without a reader


class Terminal:
    """The terminal that a text stream writes to."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.rich = _RichConsole(file=stream, highlight=False)

    @property
    def width(self) -> int:
        """The current number of columns, or $COLUMNS."""
        return self.rich.width

    def print(self, parts: Sequence[Part]) -> None:
        """Print a line. The terminal itself wraps it, so that a long one can be copied as one line."""
        safe: list[Part] = [
            terminal_safe(part) if isinstance(part, str) else (terminal_safe(part[0]), part[1])
            for part in parts
        ]
        self.rich.print(Text.assemble(*safe), soft_wrap=True)


def first_that_fits(width: int, *variants: Sequence[Part]) -> Sequence[Part]:
    """Return the first variant of a line that fits into `width` columns, or else the last one."""
    for parts in variants:
        if cell_len("".join(part if isinstance(part, str) else part[0] for part in parts)) <= width:
            return parts
    return variants[-1]


def fold(words: Sequence[str], width: int, indent: int, separator: str = " ") -> str:
    """Wrap words into lines of `width` columns without breaking any; indent all lines but the first."""
    lines = [""]
    for word in words:
        longer = lines[-1] + separator + word if lines[-1] else word
        if lines[-1] and indent + cell_len(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return ("\n" + " " * indent).join(lines)


class Bar:
    """The progress bar in the last line of the terminal: step, losses, speed and remaining time.

    The training loop redraws it, at most once per REDRAW_INTERVAL; the other steps only read the clock.
    The cursor stays visible, because a killed process could not restore it.

    Args:
        terminal: where it is displayed.
        step: the step at which training starts.
        total: the step at which training ends.
        tokens_per_step: converts steps to tokens for the speed.
    """

    def __init__(self, terminal: Terminal, step: int, total: int, tokens_per_step: int):
        self.terminal, self.total, self.tokens_per_step = terminal, total, tokens_per_step
        self.step = step
        self.loss: float | None = None
        self.val_loss: float | None = None
        self.rate: float | None = None  # tokens/s
        self._redraw_time = 0.0
        self._columns = 0  # width of the bar at the last redraw
        self._first: tuple[float, int] | None = None  # (time, step) of the first step
        self._recent: deque[tuple[float, int]] = deque(maxlen=RATE_WINDOW)  # (time, step) of the last redraws
        to_same_terminal = sys.stderr.isatty()
        self._live = Live(
            self,
            console=terminal.rich,
            auto_refresh=False,
            transient=True,
            redirect_stderr=to_same_terminal,  # not if stderr is a file
        )
        self._live.start()
        terminal.rich.show_cursor(True)

    def update(self, step: int, loss: float) -> None:
        """Record a finished step, and redraw the bar if it is due."""
        now = time.monotonic()
        if not self._recent:
            self._recent.append((now, step))
            self._first = self._first or (now, step)
        if now - self._redraw_time < REDRAW_INTERVAL and step < self.total:
            return
        self.step, self.loss, self._redraw_time = step, loss, now
        self._recent.append((now, step))
        start_time, start_step = self._recent[0]
        if now - start_time >= MIN_RATE_SECONDS:
            self.rate = (step - start_step) * self.tokens_per_step / (now - start_time)
        self._clear_wrapped()
        self._live.refresh()

    def evaluated(self, step: int, val_loss: float, rate: float | None) -> None:
        """Record an evaluation; `rate` is the speed since the last one, None if there was no step."""
        self.step, self.val_loss, self.rate = step, val_loss, rate or self.rate

    def before_line(self) -> None:
        """Prepare for a line printed above the bar; the speed ignores the time since the last step."""
        self._recent.clear()
        self._clear_wrapped()

    def _clear_wrapped(self) -> None:
        """Clear the extra rows that the bar occupies after the terminal was made narrower.

        Most terminals rewrap the line in this case; xterm truncates it.
        """
        rows = math.ceil(self._columns / max(1, self.terminal.width))
        if rows > 1 and "XTERM_VERSION" not in os.environ:
            self.terminal.stream.write(f"\x1b[{rows - 1}A\r\x1b[J")
        self._columns = 0

    def seconds_left(self) -> float | None:
        """Estimate the remaining time from the average pace, evaluations included; None at the beginning."""
        if self._first is None:
            return None
        start_time, start_step = self._first
        elapsed = self._redraw_time - start_time
        if elapsed < MIN_ETA_SECONDS:
            return None
        return elapsed / (self.step - start_step) * (self.total - self.step)

    def __rich_console__(
        self, console: rich.console.Console, options: rich.console.ConsoleOptions
    ) -> Iterator[Text]:
        colour = console.color_system is not None and not console.no_color
        text = Text.assemble(*self.line(options.max_width, options.ascii_only, colour))
        self._columns = len(text)
        yield text

    def line(self, width: int, ascii_only: bool = False, colour: bool = True) -> list[Part]:
        """Return the content of the bar for `width` columns, without the fields that do not fit."""
        left = self.seconds_left()
        n = len(str(self.total))
        fields = {
            "step": f"step {self.step:{n}d}/{self.total}",
            "loss": f"loss {format_number(self.loss)}" if self.loss is not None else "",
            "val": f"val {format_number(self.val_loss)}" if self.val_loss is not None else "",
            "speed": f"{self.rate:,.0f} tok/s" if self.rate is not None else "",
            "left": f"{format_duration(math.ceil(left))} left" if left is not None else "",
        }
        available = width - RIGHT_MARGIN
        included: set[str] = set()
        for name in ("step", "loss", "left", "val", "speed"):  # by importance
            needed = len(fields[name]) + 2 * bool(included)
            if fields[name] and needed <= available:
                available -= needed
                included.add(name)
        parts: list[Part] = []
        for name, text in fields.items():
            if name in included:
                parts += ["  "] * bool(parts) + [(text, FIELD_STYLES[name])]
            if name == "step" and available >= MIN_BAR_WIDTH + 2:
                parts += ["  ", *self._bar(min(available - 2, MAX_BAR_WIDTH), ascii_only, colour)]
        return parts

    def _bar(self, columns: int, ascii_only: bool, colour: bool) -> list[Part]:
        done = columns * min(self.step, self.total) // self.total
        filled = "#" if ascii_only else "━"
        empty = filled if colour else "." if ascii_only else "─"
        return [(filled * done, "green"), (empty * (columns - done), "bright_black")]

    def erase(self) -> None:
        """Clear the line of the bar. Safe to call in a signal handler."""
        with contextlib.suppress(OSError, ValueError):
            os.write(self.terminal.stream.fileno(), b"\r\x1b[2K")

    def stop(self) -> None:
        """Remove the bar."""
        self._live.stop()
