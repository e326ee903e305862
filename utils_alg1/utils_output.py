"""Everything a person reads on the console, and the copy of it in logs/train.log.

Lines are records of the logger `alg1`, so any module can add one for --verbose:

    logging.getLogger("alg1").debug("what happens inside")
"""

from __future__ import annotations

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

from parameters import PARTS, Parameters, specs
from utils_alg1.base.text import for_terminal, number
from utils_alg1.console.messages import shown_on, terminal_of

if TYPE_CHECKING:
    from utils_alg1.console.terminal import Bar, Part, Terminal
    from utils_alg1.training.progress import Evaluation, Progress

LOGGER = logging.getLogger("alg1")
EARLY_LINES = 1000  # that are kept until there is a log
LOG_ONLY = 5  # the level of what no console shows
ALWAYS = logging.WARNING + 5  # that of what --quiet does not leave out, and is no warning


@dataclass(frozen=True)
class ShellCommand:
    """Something to be typed, shown so that it can be copied, and what to do then."""

    command: str
    remark: str = ""

    SEPARATOR: ClassVar[str] = "   "

    @property
    def pieces(self) -> list[str]:
        """What no line's end may stand in."""
        return [self.command, self.remark] if self.remark else [self.command]

    def __str__(self) -> str:
        return self.SEPARATOR.join(self.pieces)


Block = Mapping[str, "str | ShellCommand"]  # lines by their names

Look = Callable[[int], "Sequence[Part]"]  # how a line looks on a terminal of so many columns


class Console:
    """What a run says: lines that stay, and on a terminal colours and a progress bar below them.

    Args:
        quiet: print only warnings and errors.
        verbose: print what happens inside too.
    """

    def __init__(self, quiet: bool = False, verbose: bool = False):
        self.quiet = quiet
        self._terminal = terminal_of(sys.stdout)
        self._errors: Terminal | None = None
        self._bar: Bar | None = None
        self._lines = _Lines(self._print, logging.DEBUG if verbose else logging.INFO)
        if quiet:
            self._lines.setLevel(logging.WARNING)
        self._early = logging.handlers.MemoryHandler(EARLY_LINES, logging.CRITICAL + 1)
        LOGGER.handlers = [self._lines, self._early]  # an earlier console has spoken its last
        LOGGER.setLevel(LOG_ONLY)
        LOGGER.propagate = False

    def __enter__(self) -> Console:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, Exception):
            self.log_failure(error)
        self.close()

    # --- lines ---

    def say(self, text: str = "", look: Look | None = None) -> None:
        """A line for the person who watches, and how it looks on a terminal where that is not the same."""
        LOGGER.info("%s", text, extra={"look": look})

    def remind(self, text: str, command: str) -> None:
        """A line that --quiet does not leave out: what to type next."""
        from_here = (f"{text}: ", (command, "bold")), (f"{text}:\n", (command, "bold"))
        self.end_progress()
        LOGGER.log(ALWAYS, "%s: %s", text, command, extra={"look": lambda width: _fitting(width, *from_here)})

    def warn(self, text: str) -> None:
        """A line about something that went wrong but does not end the run."""
        look = [("warning:", "bold yellow"), f" {text}"]
        LOGGER.warning("warning: %s", text, extra={"look": lambda _: look})

    def _print(self, record: logging.LogRecord) -> None:
        to_errors = record.levelno == logging.WARNING or (self.quiet and record.levelno >= ALWAYS)
        stream = sys.stderr if to_errors else sys.stdout
        text, look = record.getMessage(), getattr(record, "look", None)
        try:
            terminal = self._terminal_for(stream)
            if self._bar:
                self._bar.before_line()
            if terminal:
                terminal.print(look(terminal.width) if look else [text])
            else:
                print(shown_on(stream, text), file=stream, flush=True)
        except OSError:  # the reader went away, or its disk is full: that is no reason to stop training
            self._give_up()

    def _terminal_for(self, stream: TextIO) -> Terminal | None:
        if not stream.isatty():
            return None
        if stream is sys.stdout or self._bar:  # the bar's terminal knows how to print above it
            return self._terminal
        self._errors = self._errors or terminal_of(stream)
        return self._errors

    def _give_up(self) -> None:
        """Say no more than warnings: the console is gone."""
        self.quiet = True
        self._lines.setLevel(logging.WARNING)
        self.end_progress()

    def log_to(self, path: Path) -> None:
        """Copy every line to a file, those before this too. A disk that refuses costs the copy only."""
        with contextlib.suppress(OSError):
            log = _LogFile(path)
            LOGGER.addHandler(log)
            self._early.setTarget(log)
        self._early.close()
        LOGGER.removeHandler(self._early)

    def log_failure(self, error: BaseException) -> None:
        """Keep an error, with its traceback, in the log."""
        lines = traceback.format_exception(error)
        LOGGER.log(LOG_ONLY, "%s", "".join(lines).rstrip())

    def close(self) -> None:
        self.end_progress()
        if self._lines in LOGGER.handlers:
            for handler in LOGGER.handlers[:]:
                LOGGER.removeHandler(handler)
                with contextlib.suppress(OSError):
                    handler.close()

    # --- a run ---

    def configuration(self, params: Parameters) -> None:
        """Every value and where it came from (--print-config)."""
        flat = params.flat()
        width = max(map(len, flat))
        values = {name: "none" if v is None else str(v) for name, v in flat.items()}
        value_width = min(30, max(map(len, values.values())))
        for part in PARTS:
            print(f"[{part}]")
            for name, spec in specs().items():
                if spec.part == part:
                    line = f"{name:{width}}  {values[name]:{value_width}}  {params.origins[name]}"
                    print(shown_on(sys.stdout, line))

    def block(self, lines: Block) -> None:
        """Lines with a name before each, and an empty one behind them."""
        widest = max(map(len, lines))
        for name, value in lines.items():
            self.say(f"{name:{widest}}  {value}", _look_of_entry(f"{name:{widest}}", value))
        self.say()

    def evaluation(self, evaluation: Evaluation, progress: Progress, rate: float | None) -> None:
        """A line for each evaluation."""
        e = evaluation
        best = "  best" if progress.best_step == e.step else ""
        speed = f"  {rate:,.0f} tok/s" if rate else ""
        train, val = number(e.train_loss), number(e.val_loss)
        lr = f"  lr {e.learning_rate:.1e}"
        if self._bar:
            self._bar.evaluated(e.step, e.val_loss, rate)
        value, mark = (val, "bold cyan" if best else "cyan"), (best, "bold green")
        step = ("step", "bold")
        whole: list[Part] = [step, f" {e.step:6d}  train loss {train}  val loss ", value]
        narrow: list[Part] = [step, f" {e.step}  train {train}  val ", value]
        looks = [*whole, f"{lr}{speed}", mark], [*whole, speed, mark], [*narrow, mark], narrow
        self.say(
            f"step {e.step:6d}  train loss {train}  val loss {val}{lr}{speed}{best}",
            lambda width: _fitting(width, *looks),
        )

    def summary(self, lines: Block, sample: str) -> None:
        """What was reached and what to do next."""
        self.end_progress()
        self.say()
        self.block(lines)
        self.say("a sample:", lambda _: [("a sample:", "bold")])
        self.say(sample)

    def begin_progress(self, step: int, total: int, tokens_per_step: int) -> None:
        """Show a progress bar on a terminal; elsewhere the lines of the evaluations serve."""
        if self._terminal is None or self.quiet:
            return
        from utils_alg1.console.terminal import Bar

        self._bar = Bar(self._terminal, step, total, tokens_per_step)

    def progress(self, step: int, loss: float) -> None:
        """Move the bar; cheap enough for every step."""
        if self._bar is not None:
            try:
                self._bar.update(step, loss)
            except OSError:  # the terminal is gone
                self._give_up()

    def interrupted(self, notice: bytes) -> None:
        """Tell of a signal in the bar's place: from its handler, perhaps in the middle of a print."""
        if self._bar is not None:
            self._bar.erase()
            notice = notice.lstrip(b"\n")
        if self._terminal is not None and len(notice) > self._terminal.width:
            notice = notice.replace(b"; ", b";\n").replace(b": ", b":\n")
        if os.isatty(2):
            notice = for_terminal(notice.decode(errors="replace")).encode()
        with contextlib.suppress(OSError):
            os.write(2, notice)

    def restore_terminal(self) -> None:
        """Take the progress bar away when the process leaves at once."""
        if self._bar is not None:
            self._bar.erase()

    def end_progress(self) -> None:
        if self._bar is not None:
            bar, self._bar = self._bar, None
            with contextlib.suppress(OSError):
                bar.stop()


class _Lines(logging.Handler):
    """Hands the lines to the console."""

    def __init__(self, show: Callable[[logging.LogRecord], None], level: int):
        super().__init__(level)
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        self._show(record)


class _LogFile(logging.FileHandler):
    """A file with the time before each line."""

    def __init__(self, path: Path):
        super().__init__(path, "a", "utf-8", errors="replace")
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))

    def handleError(self, record: logging.LogRecord) -> None:
        """A disk that is full costs the line."""


def _fitting(width: int, *looks: Sequence[Part]) -> Sequence[Part]:
    from utils_alg1.console.terminal import fitting

    return fitting(width, *looks)


def _look_of_entry(name: str, value: str | ShellCommand) -> Look:
    """How a line of a block looks on a terminal."""

    def look(width: int) -> list[Part]:
        from utils_alg1.console.terminal import cell_len, fold

        typed = isinstance(value, ShellCommand)
        separator = value.SEPARATOR if isinstance(value, ShellCommand) else " "
        pieces = value.pieces if isinstance(value, ShellCommand) else value.split(separator)
        pieces = [for_terminal(piece) for piece in pieces]
        indent, gap = len(name) + 2, "  "
        if indent + max(map(cell_len, pieces)) > width:  # below its name there is more room
            indent = 0 if typed else 2
            gap = "\n" + " " * indent
        folded = fold(pieces, width, indent, separator)
        n = len(pieces[0]) if typed else 0
        return [(name, "bold"), gap, (folded[:n], "cyan"), folded[n:]]

    return look
