"""How every script begins and ends: exit codes, signals, heavy imports."""

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
        with raise_on_signals():
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


def leave(code: int) -> NoReturn:
    """End the program; one of several processes at once, without taking PyTorch's threads apart.

    Two of some forty runs on loaded cores ended with an abort after all was done, while Python shut down.
    """
    if world_size() == 1:
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def world_size() -> int:
    """How many processes torchrun has started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))
