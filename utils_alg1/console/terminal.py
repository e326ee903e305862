"""The progress bar. This module is imported only if there is a terminal, because importing Rich is slow."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from utils_alg1.base.running_time import running_time
from utils_alg1.base.text import format_duration, format_number
from utils_alg1.console.messages import print_line

REDRAW_INTERVAL = 0.2  # seconds
MIN_RATE_SECONDS = 0.5  # a speed measured over less time is not displayed


class Bar:
    """A progress bar in the last line of the terminal: step, losses, speed and remaining time.

    The loop redraws it, at most once per REDRAW_INTERVAL; the other steps only read the clock.
    The cursor stays visible, because a killed process could not restore it. It rests at the start of the bar:
    `erase` then reaches all of it, also after a narrower window has wrapped it.
    """

    def __init__(
        self, stream: TextIO, step: int, total: int | None, tokens_per_step: int, unit: str = "step"
    ):
        self._total, self._tokens_per_step = total, tokens_per_step
        self._loss: float | None = None
        self._val_loss: float | None = None
        self._rate = "-"  # tokens/s
        self._rate_start: tuple[float, int] | None = None  # time and step of the first since an evaluation
        self._redraw_time = 0.0
        self._stream, self._descriptor = stream, stream.fileno()
        self._console = Console(file=stream)
        count = "{task.completed}" if total is None else f"{{task.completed:{len(str(total))}d}}/{total}"
        self._progress = Progress(
            TextColumn(f"{unit} {count}", style="bold"),
            BarColumn(bar_width=None, complete_style="green", finished_style="green"),
            TextColumn("{task.description}"),  # all figures in one, because each column makes a redraw dearer
            console=self._console,
            auto_refresh=False,  # no thread beside the training
            transient=True,
            redirect_stderr=sys.stderr.isatty(),  # not if stderr is a file
            get_time=running_time,
            speed_estimate_period=math.inf,  # for the remaining time: over the last 1,000 redraws
        )
        self._task = self._progress.add_task("", total=total, completed=step)
        self._progress.start()
        self._console.show_cursor(True)

    def update(self, step: int, loss: float) -> None:
        """Record a finished step, and redraw the bar if it is due."""
        self._loss = loss
        now = running_time()
        if self._rate_start is None:
            self._rate_start = now, step
        start_time, start_step = self._rate_start
        if now - self._redraw_time < REDRAW_INTERVAL and step != self._total:
            return
        self._redraw_time = now
        if now - start_time >= MIN_RATE_SECONDS:
            self._rate = f"{(step - start_step) * self._tokens_per_step / (now - start_time):,.0f}"
        self._set_figures(step)
        self.erase()
        self._progress.refresh()
        os.write(self._descriptor, b"\r")

    def evaluated(self, step: int, val_loss: float) -> None:
        """Record an evaluation; the speed is measured anew after it."""
        self._val_loss, self._rate_start = val_loss, None
        self._set_figures(step)

    def _set_figures(self, step: int) -> None:
        """Set what is displayed, without the figures that a narrow terminal has no room for."""
        seconds = self._progress.tasks[0].time_remaining
        remaining = "-" if seconds is None else format_duration(math.ceil(seconds))
        val = "" if self._val_loss is None else f"val {format_number(self._val_loss)}"
        figures = [  # each with the narrowest terminal that has room for it
            (0, f"loss {format_number(self._loss)}"),
            (60, val),
            (80, f"{self._rate} tok/s"),
            (40, f"{remaining} left"),
        ]
        shown = "  ".join(figure for width, figure in figures if figure and width <= self._console.width)
        self._progress.update(self._task, completed=step, description=shown)

    def print(self, text: str, pattern: str) -> None:
        """Print a line above the bar, as `print_line` does."""
        self.erase()
        print_line(self._stream, text, pattern, self._console)
        os.write(self._descriptor, b"\r")

    def erase(self) -> None:
        """Clear the bar. Safe to call in a signal handler."""
        with contextlib.suppress(OSError):
            os.write(self._descriptor, b"\r\x1b[J")

    def stop(self) -> None:
        """Remove the bar."""
        self.erase()
        self._progress.stop()
