"""How every script begins and ends: exit codes, signals, heavy imports."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType

from errors import DONE, INTERRUPTED, Alg1Error, disk_error
from utils_alg1.utils_output import print_error
from utils_alg1.utils_processes import catch_signals, leave


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
        with contextlib.suppress(OSError):
            print("\n" * sys.stderr.isatty() + "interrupted", file=sys.stderr)  # below the terminal's ^C
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
    """Let SIGINT, SIGTERM and SIGHUP end the program through every `with` and `finally` on the way.

    An exception that comes in the middle of an import or a callback of Python's can get lost there, so the
    signal is noted too: see `leave_if_told`.
    """
    global _told_to_leave
    _told_to_leave = None

    def unwind(number: int, _frame: FrameType | None) -> None:
        global _told_to_leave
        _told_to_leave = number
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    previous = catch_signals(unwind)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def leave_if_told() -> None:
    """End the program now if a signal has asked for it earlier, and was not heard."""
    if _told_to_leave is not None:
        raise SystemExit(128 + _told_to_leave)
