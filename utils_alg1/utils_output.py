"""The console output of a run, and the copy of it in logs/train.log.

Every line is a record of the logger `alg1`, so any module can log details that --verbose prints:

    logging.getLogger("alg1").debug("wrote %s", path)
"""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import os
import shutil
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from parameters import Parameters
from utils_alg1.base.text import format_number, without_controls
from utils_alg1.console.messages import WARNING_PATTERN, is_terminal, print_line

if TYPE_CHECKING:
    from utils_alg1.console.terminal import Bar

LOGGER = logging.getLogger("alg1")
MAX_BUFFERED_LINES = 1000  # kept until the log file is opened; those of a Console without one are dropped
LOG_FILE_ONLY = 5  # level of lines written to the log file but never to the console
REMINDER = logging.WARNING + 5  # level of lines that are no warnings but are printed with --quiet too

LabelledLines = Mapping[str, str]  # label -> content


class ShellCommand(str):
    """A command for the user to copy, and what to do next: it is never broken into lines."""

    def __new__(cls, command: str, remark: str = "") -> ShellCommand:
        return super().__new__(cls, f"{command}   {remark}".rstrip())


class Console(logging.Handler):
    """Prints and logs the output of a run: lines and, on a terminal, colours and a progress bar.

    As a context manager it logs an exception that leaves the block, with its traceback, and closes the log.
    `quiet` prints only warnings and errors, `verbose` debug messages too.
    """

    def __init__(self, quiet: bool = False, verbose: bool = False):
        super().__init__(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)
        self._bar: Bar | None = None
        self._buffer = logging.handlers.BufferingHandler(MAX_BUFFERED_LINES)
        LOGGER.handlers = [self, self._buffer]  # replaces those of an earlier Console
        LOGGER.setLevel(LOG_FILE_ONLY)
        LOGGER.propagate = False
        logging.raiseExceptions = False  # a log file on a full disk loses lines, and that is all

    def __enter__(self) -> Console:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, Exception):  # SystemExit and KeyboardInterrupt are no failures
            LOGGER.log(LOG_FILE_ONLY, "failed:", exc_info=error)
        self.close()

    def say(self, text: str = "", pattern: str = "", on_terminal: str | None = None) -> None:
        """Print a line, coloured by a pattern (see `print_line`); a terminal may get it in another form."""
        LOGGER.info("%s", text, extra={"pattern": pattern, "on_terminal": on_terminal})

    def remind(self, text: str, command: str) -> None:
        """Print which command to run next, also with --quiet."""
        self.end_progress()
        LOGGER.log(REMINDER, "%s: %s", text, command, extra={"pattern": ": (?P<bold>.*)"})

    def warn(self, text: str) -> None:
        """Print a warning."""
        LOGGER.warning("warning: %s", text, extra={"pattern": WARNING_PATTERN})

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record of the logger."""
        to_stderr = record.levelno == logging.WARNING or self.level == logging.WARNING  # with --quiet
        stream = sys.stderr if to_stderr else sys.stdout
        text, pattern = record.getMessage(), getattr(record, "pattern", "")
        try:
            if is_terminal(stream):
                text = getattr(record, "on_terminal", None) or text
            if self._bar and stream.isatty():
                self._bar.print(text, pattern)
            else:
                print_line(stream, text, pattern)
        except OSError:  # a closed pipe or a full disk is no reason to stop training
            self._stop_printing()

    def _stop_printing(self) -> None:
        """Print nothing but warnings from now on, because the standard output cannot be written."""
        self.setLevel(logging.WARNING)
        self.end_progress()

    def log_to(self, path: Path) -> None:
        """Copy every line to a file, including the earlier ones. If that fails, there is no log file."""
        with contextlib.suppress(OSError):
            log = logging.FileHandler(path, "a", "utf-8", errors="replace")
            log.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
            LOGGER.addHandler(log)
            for record in self._buffer.buffer:
                log.handle(record)
        LOGGER.removeHandler(self._buffer)
        self._buffer.close()

    def close(self) -> None:
        """Remove the progress bar and close the log file."""
        self.end_progress()
        super().close()
        if self in LOGGER.handlers:  # no later Console has taken its place
            others = [handler for handler in LOGGER.handlers if handler is not self]
            LOGGER.handlers = []
            for handler in others:
                with contextlib.suppress(OSError):
                    handler.close()

    def configuration(self, params: Parameters) -> None:
        """Print every value with its origin, as YAML that --config takes (--print-config)."""
        print(params.to_yaml(), end="")

    def block(self, lines: LabelledLines) -> None:
        """Print lines with aligned labels, on a terminal wrapped at words, followed by an empty line."""
        n, width = max(map(len, lines)), shutil.get_terminal_size().columns
        wrapper = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False)
        wrapper.subsequent_indent = " " * (n + 2 if width >= 60 else 2)
        for label, value in lines.items():
            line = f"{label:{n}}  {value}"
            wrapped = line if isinstance(value, ShellCommand) else wrapper.fill(without_controls(line))
            self.say(line, f"^(?P<bold>{label})", wrapped)
        self.say()

    def evaluation(
        self,
        step: int,
        train_loss: float,
        val_loss: float,
        learning_rate: float,
        is_best: bool,
        tokens_per_second: float | None,
    ) -> None:
        """Print the result of an evaluation; without a step since the last one there is no speed."""
        if self._bar:
            self._bar.evaluated(step, val_loss)
        fields = [
            f"step {step:6d}",
            f"train loss {format_number(train_loss)}",
            f"val loss {format_number(val_loss)}",
            "best" if is_best else "    ",
            f"lr {learning_rate:.1e}",
            f"{tokens_per_second:,.0f} tok/s" if tokens_per_second else "",
        ]
        line = shown = "  ".join(fields).rstrip()
        width = shutil.get_terminal_size().columns
        while len(shown) > width and fields:  # the most important fields come first
            shown = " ".join(" ".join(fields).replace(" loss", "").split())
            fields.pop()
        self.say(line, "^(?P<bold>step) .* val( loss)? (?P<cyan>[^ ]+)( +(?P<green>best))?", shown)

    def summary(self, results: LabelledLines, sample: str, commands: LabelledLines) -> None:
        """Print the results at the end of a run, a sample, and what to type next."""
        self.end_progress()
        self.say()
        self.block(results)
        self.say("a sample:", "(?P<bold>.*)")
        self.say(sample)
        self.say()
        self.block(commands)

    def begin_progress(self, step: int, total: int, tokens_per_step: int) -> None:
        """Show a progress bar if the standard output is a terminal."""
        if is_terminal(sys.stdout) and self.level < logging.WARNING:
            from utils_alg1.console.terminal import Bar

            self._bar = Bar(sys.stdout, step, total, tokens_per_step)

    def progress(self, step: int, loss: float) -> None:
        """Update the progress bar; cheap enough for every step."""
        if self._bar is not None:
            try:
                self._bar.update(step, loss)
            except OSError:  # the terminal was closed
                self._stop_printing()

    def interrupted(self, notice: str) -> None:
        """Print a line in place of the progress bar, without print(): safe to call in a signal handler."""
        if self._bar is None:
            notice = f"\n{notice}"  # below the terminal's ^C
        else:
            self._bar.erase()
        if os.isatty(2):
            notice = without_controls(notice)
        with contextlib.suppress(OSError):
            os.write(2, f"{notice}\n".encode(errors="replace"))

    def end_progress(self) -> None:
        """Remove the progress bar."""
        if self._bar is not None:
            bar, self._bar = self._bar, None
            with contextlib.suppress(OSError):
                bar.stop()
