"""Everything a person reads on the console, and the copy of it in logs/train.log."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from errors import DONE, INTERRUPTED, Alg1Error, disk_error
from parameters import PARTS, Parameters, specs
from utils_alg1.utils_processes import leave

if TYPE_CHECKING:
    from utils_alg1.utils_training import Evaluation, Progress

PROGRESS_INTERVAL = 0.1  # seconds between redraws of the progress bar


def run_script(main: Callable[[], int]) -> None:
    """Run a script's main() and exit with its code.

    A failure that a user can cause ends in one `error:` line and, where there is one, a `hint:` line.
    """
    # A program started without them (`>&-`) has no streams at all.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    # A terminal that cannot show a character shows a stand-in instead of ending the program.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        with _signals_unwind():
            code = main()
    except Alg1Error as error:
        print_error(error)
        code = error.exit_code
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:  # the reader went away (`| head`): nobody is left to tell
        code = DONE
    except OSError as error:  # met where nobody expected one, such as a name that is too long
        failure = disk_error(f"use {error.filename}" if error.filename else "go on", error)
        print_error(failure)
        code = failure.exit_code
    try:
        sys.stdout.flush()
    except OSError:  # else Python tries again at exit, and complains
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    leave(code)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """For the heavy imports: in here the garbage collector rests, and what they leave is out of its sight.

    It would go through all that PyTorch makes again and again, finding nothing: a fifth of the time that its
    import takes, and once more in the first steps, where it also unshares the memory of forked processes.
    """
    if "torch" in sys.modules or not gc.isenabled():  # not by us, and there may be garbage
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


_told_to_leave: int | None = None  # the signal that came while no loop was there to stop


@contextlib.contextmanager
def _signals_unwind() -> Iterator[None]:
    """Let SIGINT and SIGTERM end the program through every `with` and `finally` on the way.

    An exception that comes in the middle of an import or a callback of Python's can get lost there, so the
    signal is noted too: see `leave_if_told`.
    """
    global _told_to_leave
    _told_to_leave = None

    def leave(number: int, _frame: FrameType | None) -> None:
        global _told_to_leave
        _told_to_leave = number
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    previous = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def leave_if_told() -> None:
    """End the program now if a signal has asked for it earlier, and was not heard."""
    if _told_to_leave is not None:
        raise SystemExit(128 + _told_to_leave)


def print_error(error: Alg1Error) -> None:
    with contextlib.suppress(OSError):  # a full disk may be where stderr goes, too
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)


class Console:
    """What a run says: lines that stay, and on a terminal a progress bar below them.

    Args:
        quiet: print only warnings and errors.
        verbose: print what happens inside too.
    """

    def __init__(self, quiet: bool = False, verbose: bool = False):
        self.quiet, self.verbose = quiet, verbose
        self._log: TextIO | None = None
        self._bar: Any = None
        self._task: Any = None
        self._redrawn = 0.0

    # --- lines ---

    def say(self, text: str = "") -> None:
        """A line for the person who watches."""
        self._write_log(text)
        if not self.quiet:
            self._print(text, sys.stdout)

    def remind(self, text: str) -> None:
        """A line that --quiet does not leave out: what to do next."""
        self._write_log(text)
        self._print(text, sys.stderr if self.quiet else sys.stdout)

    def detail(self, text: str) -> None:
        """A line for --verbose, and for the log."""
        self._write_log(text)
        if self.verbose:
            self._print(text, sys.stdout)

    def warn(self, text: str) -> None:
        """A line about something that went wrong but does not end the run."""
        self._write_log(f"warning: {text}")
        self._print(f"warning: {text}", sys.stderr)

    def _print(self, text: str, stream: TextIO) -> None:
        try:
            if self._bar is not None and stream.isatty():
                self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                print(text, file=stream, flush=True)
        except OSError:  # the reader went away, or its disk is full: that is no reason to stop training
            self.quiet, self.verbose = True, False

    def log_to(self, path: Path) -> None:
        """Copy every line to a file from now on. A disk that refuses costs the copy only."""
        with contextlib.suppress(OSError):
            self._log = path.open("a", encoding="utf-8", errors="replace", buffering=1)

    def _write_log(self, text: str) -> None:
        if self._log is not None:
            with contextlib.suppress(OSError, ValueError):
                self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def log_failure(self, error: BaseException) -> None:
        """Keep an error, with its traceback, in the log."""
        lines = traceback.format_exception(error)
        self._write_log("".join(lines).rstrip())

    def close(self) -> None:
        self.end_progress()
        if self._log is not None:
            with contextlib.suppress(OSError):
                self._log.close()
            self._log = None

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
                    print(f"{name:{width}}  {values[name]:{value_width}}  {params.origins[name]}")

    def start(self, lines: dict[str, str]) -> None:
        """The block that a run begins with."""
        width = max(map(len, lines))
        for name, value in lines.items():
            self.say(f"{name:{width}}  {value}")
        self.say()

    def evaluation(self, evaluation: Evaluation, progress: Progress, rate: float | None) -> None:
        """A line for each evaluation."""
        e = evaluation
        best = "  best" if progress.best_step == e.step else ""
        speed = f"  {rate:,.0f} tok/s" if rate else ""
        self.say(
            f"step {e.step:6d}  train loss {e.train_loss:.4f}  val loss {e.val_loss:.4f}"
            f"  lr {e.learning_rate:.1e}{speed}{best}"
        )

    def summary(self, lines: dict[str, str], sample: str) -> None:
        """What was reached and what to do next."""
        self.say()
        width = max(map(len, lines))
        for name, value in lines.items():
            self.say(f"{name:{width}}  {value}")
        self.say()
        self.say("a sample:")
        self.say(sample)

    def begin_progress(self, step: int, total: int) -> None:
        """Show a progress bar on a terminal; elsewhere the lines of the evaluations serve."""
        if self.quiet or not sys.stdout.isatty():
            return
        from rich import progress as rich_progress

        self._bar = rich_progress.Progress(
            rich_progress.TextColumn("step {task.completed:,.0f}/{task.total:,.0f}"),
            rich_progress.BarColumn(),
            rich_progress.TextColumn("loss {task.fields[loss]}"),
            rich_progress.TimeRemainingColumn(),
            transient=True,
            auto_refresh=False,
        )
        self._bar.start()
        self._task = self._bar.add_task("", total=total, completed=step, loss="-")

    def progress(self, step: int, loss: float) -> None:
        """Move the bar; cheap enough for every step."""
        if self._bar is None:
            return
        now = time.monotonic()
        if now - self._redrawn >= PROGRESS_INTERVAL:
            self._redrawn = now
            self._bar.update(self._task, completed=step, loss=f"{loss:.4f}", refresh=True)

    def restore_terminal(self) -> None:
        """Show the cursor again that the progress bar hides; for leaving at once."""
        if self._bar is not None:
            os.write(1, b"\x1b[?25h\n")

    def end_progress(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def loss_in_words(loss: float) -> str:
    """A loss with what it means: its perplexity and its bits per character."""
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return f"{loss:.4f} (perplexity {perplexity:.2f}, {loss / math.log(2):.3f} bits per character)"
