"""The frame of every script: exit codes, signals, heavy imports."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

from utils_alg1.base.errors import BAD_INPUT, DONE, INTERRUPTED, Alg1Error, disk_error
from utils_alg1.base.memory import memory_guard
from utils_alg1.base.running_time import running_time
from utils_alg1.base.scripts import FOLDER
from utils_alg1.base.threads import spare_threads, thread_guard
from utils_alg1.console.messages import print_error
from utils_alg1.console.signals import RaiseSignal

INSTALL_HINT = "source .venv/bin/activate, or pip install -e ."
_exit: Callable[[int], NoReturn] = sys.exit  # how run_script ends the process


def run_script(main: Callable[[], int]) -> NoReturn:
    """Run a script's main() and exit with its code.

    An Alg1Error is printed as one `error:` line and, if it has a hint, one `hint:` line.
    """
    if sys.platform == "win32":  # no fork, no fsync of a folder, other locks and signals
        print_error(Alg1Error("ALG1 runs on Linux and macOS", "on Windows use WSL, which is a Linux"))
        sys.exit(BAD_INPUT)
    # A program that is started with closed streams (`<&-`, `>&-`) has None here.
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if not isinstance(stream, io.TextIOWrapper):  # a notebook's, say
            continue
        if stream.isatty():  # a character that it cannot encode is replaced instead of raising
            stream.reconfigure(errors="replace")
        else:  # UTF-8 whatever the locale; only names that are not UTF-8 need an escape
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper) and not sys.stdin.isatty():
        sys.stdin.reconfigure(encoding="utf-8", errors=sys.stdin.errors)
    spare_threads()
    try:
        code = _exit_code(main)
    except Alg1Error as error:
        print_error(error)
        code = error.exit_code
    try:
        sys.stdout.flush()
    except OSError:  # otherwise Python flushes again at exit, and prints a traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    _exit(code)


def _exit_code(main: Callable[[], int]) -> int:
    """Run main() and return its exit code; what a user or a disk can cause is raised as an Alg1Error."""
    try:
        with RaiseSignal().until_exit(), running_time.watch(), memory_guard(""), thread_guard():
            return main()
    except (KeyboardInterrupt, SystemExit) as stop:
        # torchrun sends SIGTERM when a process is gone: it may come while a failed run closes.
        failure = stop.__context__
        while failure is not None and not isinstance(failure, Alg1Error):
            failure = failure.__context__
        if failure is not None:
            raise failure from None
        if isinstance(stop, SystemExit):
            raise
        with contextlib.suppress(OSError):
            print("\n" * sys.stderr.isatty() + "interrupted", file=sys.stderr)  # below the terminal's ^C
        return INTERRUPTED
    except BrokenPipeError:  # the reader has closed the pipe (`| head`)
        return DONE
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        own = {path.stem for path in FOLDER.iterdir()}
        if package in own | sys.stdlib_module_names:  # no matter of pip: a damaged checkout, or Python
            raise
        raise Alg1Error(f"{package} is not installed in this Python", INSTALL_HINT) from error
    except OSError as error:  # an unexpected one, such as a name that is too long
        raise disk_error(f"use {error.filename}" if error.filename else "continue", error) from error


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


def skip_finalization() -> None:
    """Let run_script exit without joining PyTorch's threads: of some forty runs two aborted there."""
    global _exit
    _exit = os._exit
