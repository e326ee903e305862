"""The frame of every script: exit codes, signals, heavy imports."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

from utils_alg1.base.errors import DONE, INTERRUPTED, Alg1Error, disk_error
from utils_alg1.console.messages import print_error
from utils_alg1.console.signals import raise_on_signals


def run_script(main: Callable[[], int]) -> None:
    """Run a script's main() and exit with its code.

    An Alg1Error is printed as one `error:` line and, if it has a hint, one `hint:` line.
    """
    # A program that is started with closed streams (`>&-`) has None here.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    # A character that a terminal cannot encode is replaced instead of raising.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        with raise_on_signals():
            code = main()
    except Alg1Error as error:
        print_error(error)
        code = error.exit_code
    except (KeyboardInterrupt, SystemExit) as stop:
        if failure := _failure_before(stop):
            print_error(failure)
            code = failure.exit_code
        elif isinstance(stop, SystemExit):
            raise
        else:
            with contextlib.suppress(OSError):
                print("\n" * sys.stderr.isatty() + "interrupted", file=sys.stderr)  # below the terminal's ^C
            code = INTERRUPTED
    except BrokenPipeError:  # the reader has closed the pipe (`| head`)
        code = DONE
    except OSError as error:  # an unexpected one, such as a name that is too long
        failure = disk_error(f"use {error.filename}" if error.filename else "go on", error)
        print_error(failure)
        code = failure.exit_code
    try:
        sys.stdout.flush()
    except OSError:  # otherwise Python flushes again at exit, and prints a traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    leave(code)


def _failure_before(stop: BaseException) -> Alg1Error | None:
    """Return the error that was ending the program when a signal came, or None.

    When one process of a run is gone, torchrun sends SIGTERM to the others: it may arrive while they close.
    """
    before = stop.__context__
    while before is not None and not isinstance(before, Alg1Error):
        before = before.__context__
    return before


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Disable the garbage collector during heavy imports, and freeze what they create.

    Otherwise it scans the objects of PyTorch again and again and frees nothing: this takes a fifth of the
    import's time, and more in the first steps, where it also unshares the memory of forked processes.
    """
    if "torch" in sys.modules or not gc.isenabled():  # imported by someone else: there may be garbage
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def leave(code: int) -> NoReturn:
    """End the program; one of several processes exits at once, without joining PyTorch's threads.

    Two of some forty runs on loaded cores aborted while Python shut down, after all work was done.
    """
    if world_size() == 1:
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def world_size() -> int:
    """Return the number of processes that torchrun has started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))
