"""What the console looks like on a terminal: colours, folded lines and the progress bar, drawn by Rich.

It is imported where there is a terminal only, since importing Rich takes a moment.
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

from utils_alg1.base.text import duration, for_terminal, number

Part = str | tuple[str, str]  # some text, or text and a style of Rich's

REDRAW_INTERVAL = 0.1  # seconds between two looks of the progress bar
RATE_WINDOW = 30  # redraws that the shown speed is the mean of
RATE_SECONDS = 0.5  # fewer make no speed worth showing
LEFT_SECONDS = 1.0  # of training, before the time left is guessed
LONGEST_BAR, SHORTEST_BAR = 40, 8  # columns
KEPT_FREE = 3  # columns behind the progress bar, for the ^C that a terminal puts there


class _RichConsole(rich.console.Console):
    def on_broken_pipe(self) -> None:
        raise  # Rich would end the program; a run goes on without a reader


class Terminal:
    """A terminal behind a text stream."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.rich = _RichConsole(file=stream, highlight=False)

    @property
    def width(self) -> int:
        """Columns at this moment, or $COLUMNS."""
        return self.rich.width

    def print(self, parts: Sequence[Part]) -> None:
        """Print a line. What is wider than the terminal is left to the terminal, so that it copies whole."""
        harmless: list[Part] = [
            for_terminal(part) if isinstance(part, str) else (for_terminal(part[0]), part[1])
            for part in parts
        ]
        self.rich.print(Text.assemble(*harmless), soft_wrap=True)


def fitting(width: int, *forms: Sequence[Part]) -> Sequence[Part]:
    """The first form of a line that fits into `width` columns, or the last one."""
    for parts in forms:
        if cell_len("".join(part if isinstance(part, str) else part[0] for part in parts)) <= width:
            return parts
    return forms[-1]


def fold(words: Sequence[str], width: int, indent: int, separator: str = " ") -> str:
    """Words in lines of `width` columns, none broken; all lines but the first are indented."""
    lines = [""]
    for word in words:
        longer = lines[-1] + separator + word if lines[-1] else word
        if lines[-1] and indent + cell_len(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return ("\n" + " " * indent).join(lines)


class Bar:
    """The last line of the terminal while a run trains: how far it is, how well it does, how long it takes.

    It is drawn by the loop itself, at most once in REDRAW_INTERVAL; all other steps cost a look at the clock.
    The cursor stays visible, since a process that is killed could not bring it back.
    """

    def __init__(self, terminal: Terminal, step: int, total: int, tokens_per_step: int):
        self.terminal, self.total, self.tokens_per_step = terminal, total, tokens_per_step
        self.step = step
        self.loss: float | None = None
        self.val_loss: float | None = None
        self.rate: float | None = None  # tokens/s
        self._drawn = 0.0
        self._columns = 0  # that it fills
        self._first: tuple[float, int] | None = None  # when the first step was done, and its number
        self._recent: deque[tuple[float, int]] = deque(maxlen=RATE_WINDOW)
        to_same_terminal = sys.stderr.isatty()
        self._live = Live(
            self,
            console=terminal.rich,
            auto_refresh=False,
            transient=True,
            redirect_stderr=to_same_terminal,  # a file gets its lines as ever
        )
        self._live.start()
        terminal.rich.show_cursor(True)

    def update(self, step: int, loss: float) -> None:
        """A step is done."""
        now = time.monotonic()
        if not self._recent:
            self._recent.append((now, step))
            self._first = self._first or (now, step)
        if now - self._drawn < REDRAW_INTERVAL and step < self.total:
            return
        self.step, self.loss, self._drawn = step, loss, now
        self._recent.append((now, step))
        began, first = self._recent[0]
        if now - began >= RATE_SECONDS:
            self.rate = (step - first) * self.tokens_per_step / (now - began)
        self._clear_wrapped()
        self._live.refresh()

    def evaluated(self, step: int, val_loss: float, rate: float | None) -> None:
        """There was an evaluation; `rate` is the speed of the steps before it, where there were any."""
        self.step, self.val_loss, self.rate = step, val_loss, rate or self.rate

    def before_line(self) -> None:
        """A line will be printed above; what was done since the last step is left out of the speed."""
        self._recent.clear()
        self._clear_wrapped()

    def _clear_wrapped(self) -> None:
        """Clear the rows that the bar fills since the terminal was made narrower, but for the last.

        Most terminals wrap a line then; xterm cuts it off.
        """
        rows = math.ceil(self._columns / max(1, self.terminal.width))
        if rows > 1 and "XTERM_VERSION" not in os.environ:
            self.terminal.stream.write(f"\x1b[{rows - 1}A\r\x1b[J")
        self._columns = 0

    def seconds_left(self) -> float | None:
        """At the pace since the first step, evaluations included; None while that is too short to tell."""
        if self._first is None:
            return None
        began, first = self._first
        elapsed = self._drawn - began
        if elapsed < LEFT_SECONDS:
            return None
        return elapsed / (self.step - first) * (self.total - self.step)

    def __rich_console__(
        self, console: rich.console.Console, options: rich.console.ConsoleOptions
    ) -> Iterator[Text]:
        colour = console.color_system is not None and not console.no_color
        text = Text.assemble(*self.line(options.max_width, options.ascii_only, colour))
        self._columns = len(text)
        yield text

    def line(self, width: int, ascii_only: bool = False, colour: bool = True) -> list[Part]:
        """What is shown in `width` columns: the less important is left out where there is little room."""
        left = self.seconds_left()
        n = len(str(self.total))
        fields = {
            "step": f"step {self.step:{n}d}/{self.total}",
            "loss": f"loss {number(self.loss)}" if self.loss is not None else "",
            "val": f"val {number(self.val_loss)}" if self.val_loss is not None else "",
            "speed": f"{self.rate:,.0f} tok/s" if self.rate is not None else "",
            "left": f"{duration(math.ceil(left))} left" if left is not None else "",
        }
        room = width - KEPT_FREE
        shown: set[str] = set()
        for name in ("step", "loss", "left", "val", "speed"):  # by importance
            needed = len(fields[name]) + 2 * bool(shown)
            if fields[name] and needed <= room:
                room -= needed
                shown.add(name)
        parts: list[Part] = []
        for name, text in fields.items():
            if name in shown:
                parts += ["  "] * bool(parts) + [(text, STYLES[name])]
            if name == "step" and room >= SHORTEST_BAR + 2:
                parts += ["  ", *self._bar(min(room - 2, LONGEST_BAR), ascii_only, colour)]
        return parts

    def _bar(self, columns: int, ascii_only: bool, colour: bool) -> list[Part]:
        done = columns * min(self.step, self.total) // self.total
        mark = "#" if ascii_only else "━"
        rest = mark if colour else "." if ascii_only else "─"
        return [(mark * done, "green"), (rest * (columns - done), "bright_black")]

    def erase(self) -> None:
        """Clear the line of the bar, also in the middle of anything else: from a signal's handler."""
        with contextlib.suppress(OSError, ValueError):
            os.write(self.terminal.stream.fileno(), b"\r\x1b[2K")

    def stop(self) -> None:
        """Take the bar away."""
        self._live.stop()


STYLES = {"step": "bold", "loss": "", "val": "cyan", "speed": "", "left": "bright_black"}
