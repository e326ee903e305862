"""The console output of a run, and the copy of it in logs/train.log.

Every line is a record of the logger `alg1`, so any module can log details that --verbose prints:

    logging.getLogger("alg1").debug("wrote %s", path)
"""

from __future__ import annotations

import codecs
import contextlib
import logging
import logging.handlers
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TextIO

from parameters import Parameters
from utils_alg1.base.text import format_number, terminal_safe
from utils_alg1.console.messages import open_terminal, text_for_stream

if TYPE_CHECKING:
    from utils_alg1.console.terminal import Bar, Part, Terminal

LOGGER = logging.getLogger("alg1")
MAX_BUFFERED_LINES = 1000  # lines kept in memory until the log file is opened
LOG_FILE_ONLY = 5  # level of lines written to the log file but never to the console
REMINDER = logging.WARNING + 5  # level of lines that are no warnings but are printed with --quiet too


@dataclass(frozen=True)
class ShellCommand:
    """A shell command for the user to run, printed so that it can be copied.

    Attributes:
        command: the command.
        remark: what to do next, printed after the command.
    """

    command: str
    remark: str = ""

    SEPARATOR: ClassVar[str] = "   "

    @property
    def parts(self) -> list[str]:
        """The command and the remark, neither of which is broken across lines."""
        return [self.command, self.remark] if self.remark else [self.command]

    def __str__(self) -> str:
        return self.SEPARATOR.join(self.parts)


LabelledLines = Mapping[str, "str | ShellCommand"]  # label -> content

Render = Callable[[int], "Sequence[Part]"]  # terminal width -> styled line


class Console:
    """Prints and logs the output of a run: lines and, on a terminal, colours and a progress bar.

    As a context manager it logs an exception that leaves the block, with its traceback, and closes the log.

    Args:
        quiet: print only warnings and errors.
        verbose: also print debug messages.
    """

    def __init__(self, quiet: bool = False, verbose: bool = False):
        self.quiet = quiet
        self._terminal = open_terminal(sys.stdout)
        self._stderr_terminal: Terminal | None = None
        self._bar: Bar | None = None
        self._handler = _ConsoleHandler(self._print, logging.DEBUG if verbose else logging.INFO)
        if quiet:
            self._handler.setLevel(logging.WARNING)
        self._buffer = logging.handlers.MemoryHandler(MAX_BUFFERED_LINES, logging.CRITICAL + 1)
        LOGGER.handlers = [self._handler, self._buffer]  # replaces those of an earlier Console
        LOGGER.setLevel(LOG_FILE_ONLY)
        LOGGER.propagate = False

    def __enter__(self) -> Console:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, Exception):  # SystemExit and KeyboardInterrupt are no failures
            self.log_failure(error)
        self.close()

    # --- lines ---

    def say(self, text: str = "", render: Render | None = None) -> None:
        """Print a line; `render` styles it on a terminal."""
        LOGGER.info("%s", text, extra={"render": render})

    def remind(self, text: str, command: str) -> None:
        """Print which command to run next, also with --quiet."""
        variants = (f"{text}: ", (command, "bold")), (f"{text}:\n", (command, "bold"))
        self.end_progress()
        render = {"render": lambda width: _first_that_fits(width, *variants)}
        LOGGER.log(REMINDER, "%s: %s", text, command, extra=render)

    def warn(self, text: str) -> None:
        """Print a warning."""
        parts = [("warning:", "bold yellow"), f" {text}"]
        LOGGER.warning("warning: %s", text, extra={"render": lambda _: parts})

    def _print(self, record: logging.LogRecord) -> None:
        to_stderr = record.levelno == logging.WARNING or (self.quiet and record.levelno >= REMINDER)
        stream = sys.stderr if to_stderr else sys.stdout
        text, render = record.getMessage(), getattr(record, "render", None)
        try:
            terminal = self._terminal_for(stream)
            if self._bar:
                self._bar.before_line()
            if terminal:
                terminal.print(render(terminal.width) if render else [text])
            else:
                print(text_for_stream(stream, text), file=stream, flush=True)
        except OSError:  # a closed pipe or a full disk is no reason to stop training
            self._stop_printing()

    def _terminal_for(self, stream: TextIO) -> Terminal | None:
        if not stream.isatty():
            return None
        if stream is sys.stdout or self._bar:  # only the bar's own terminal can print above the bar
            return self._terminal
        self._stderr_terminal = self._stderr_terminal or open_terminal(stream)
        return self._stderr_terminal

    def _stop_printing(self) -> None:
        """Print nothing but warnings from now on, because the standard output cannot be written."""
        self.quiet = True
        self._handler.setLevel(logging.WARNING)
        self.end_progress()

    def log_to(self, path: Path) -> None:
        """Copy every line to a file, including the earlier ones. If that fails, there is no log file."""
        with contextlib.suppress(OSError):
            log = _LogFile(path)
            LOGGER.addHandler(log)
            self._buffer.setTarget(log)
        self._buffer.close()
        LOGGER.removeHandler(self._buffer)

    def log_failure(self, error: BaseException) -> None:
        """Write an exception with its traceback to the log file."""
        lines = traceback.format_exception(error)
        LOGGER.log(LOG_FILE_ONLY, "%s", "".join(lines).rstrip())

    def close(self) -> None:
        """Remove the progress bar and close the log file."""
        self.end_progress()
        if self._handler in LOGGER.handlers:
            for handler in LOGGER.handlers[:]:
                LOGGER.removeHandler(handler)
                with contextlib.suppress(OSError):
                    handler.close()

    # --- a run ---

    def configuration(self, params: Parameters) -> None:
        """Print every value with its origin, as YAML that --config takes (--print-config).

        --config reads UTF-8, so a standard output with another encoding gets ASCII with escapes.
        """
        encoding = codecs.lookup(sys.stdout.encoding or "utf-8").name
        print(params.to_yaml(ascii_only=encoding != "utf-8"), end="")

    def block(self, lines: LabelledLines) -> None:
        """Print lines with aligned labels, followed by an empty line."""
        width = max(map(len, lines))
        for label, value in lines.items():
            self.say(f"{label:{width}}  {value}", _render_entry(f"{label:{width}}", value))
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
            self._bar.evaluated(step, val_loss, tokens_per_second)
        train, val = format_number(train_loss), format_number(val_loss)
        lr, best = f"  lr {learning_rate:.1e}", "  best" if is_best else ""
        speed = f"  {tokens_per_second:,.0f} tok/s" if tokens_per_second else ""
        styled_val, styled_best = (val, "bold cyan" if is_best else "cyan"), (best, "bold green")
        wide: list[Part] = [("step", "bold"), f" {step:6d}  train loss {train}  val loss ", styled_val]
        narrow: list[Part] = [("step", "bold"), f" {step}  train {train}  val ", styled_val]
        variants = (
            [*wide, f"{lr}{speed}", styled_best],
            [*wide, speed, styled_best],
            [*narrow, styled_best],
            narrow,
        )
        self.say(
            f"step {step:6d}  train loss {train}  val loss {val}{lr}{speed}{best}",
            lambda width: _first_that_fits(width, *variants),
        )

    def summary(self, lines: LabelledLines, sample: str) -> None:
        """Print the results at the end of a run, and a sample."""
        self.end_progress()
        self.say()
        self.block(lines)
        self.say("a sample:", lambda _: [("a sample:", "bold")])
        self.say(sample)

    def begin_progress(self, step: int, total: int, tokens_per_step: int) -> None:
        """Show a progress bar if the standard output is a terminal."""
        if self._terminal is None or self.quiet:
            return
        from utils_alg1.console.terminal import Bar

        self._bar = Bar(self._terminal, step, total, tokens_per_step)

    def progress(self, step: int, loss: float) -> None:
        """Update the progress bar; cheap enough for every step."""
        if self._bar is not None:
            try:
                self._bar.update(step, loss)
            except OSError:  # the terminal was closed
                self._stop_printing()

    def interrupted(self, notice: bytes) -> None:
        """Print a notice in place of the progress bar, without print(): safe to call in a signal handler."""
        if self._bar is not None:
            self._bar.erase()
            notice = notice.lstrip(b"\n")
        if self._terminal is not None and len(notice) > self._terminal.width:
            notice = notice.replace(b"; ", b";\n").replace(b": ", b":\n")
        if os.isatty(2):
            notice = terminal_safe(notice.decode(errors="replace")).encode()
        with contextlib.suppress(OSError):
            os.write(2, notice)

    def restore_terminal(self) -> None:
        """Remove the progress bar before the process exits in a signal handler."""
        if self._bar is not None:
            self._bar.erase()

    def end_progress(self) -> None:
        """Remove the progress bar."""
        if self._bar is not None:
            bar, self._bar = self._bar, None
            with contextlib.suppress(OSError):
                bar.stop()


class _ConsoleHandler(logging.Handler):
    """Passes log records to the console."""

    def __init__(self, print_record: Callable[[logging.LogRecord], None], level: int):
        super().__init__(level)
        self._print_record = print_record

    def emit(self, record: logging.LogRecord) -> None:
        self._print_record(record)


class _LogFile(logging.FileHandler):
    """A log file in which every record begins with a timestamp."""

    def __init__(self, path: Path):
        super().__init__(path, "a", "utf-8", errors="replace")
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))

    def handleError(self, record: logging.LogRecord) -> None:
        """Drop a line that cannot be written, as on a full disk."""


def _first_that_fits(width: int, *variants: Sequence[Part]) -> Sequence[Part]:
    from utils_alg1.console.terminal import first_that_fits

    return first_that_fits(width, *variants)


def _render_entry(label: str, value: str | ShellCommand) -> Render:
    """Return how a labelled line looks on a terminal: folded beside its label, or below it if too wide."""

    def render(width: int) -> list[Part]:
        from utils_alg1.console.terminal import cell_len, fold

        is_command = isinstance(value, ShellCommand)
        separator = value.SEPARATOR if isinstance(value, ShellCommand) else " "
        words = value.parts if isinstance(value, ShellCommand) else value.split(separator)
        words = [terminal_safe(word) for word in words]
        indent, gap = len(label) + 2, "  "
        if indent + max(map(cell_len, words)) > width:
            indent = 0 if is_command else 2
            gap = "\n" + " " * indent
        folded = fold(words, width, indent, separator)
        n_styled = len(words[0]) if is_command else 0
        return [(label, "bold"), gap, (folded[:n_styled], "cyan"), folded[n_styled:]]

    return render
