"""The one exception that a user can cause, and the exit code that each kind of failure ends with."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

DONE = 0
BAD_INPUT = 2  # a value, a file, a checkpoint or a lock is not as it must be
CANNOT_TRAIN = 3  # loss or gradient not finite, or out of memory
DISK_FAILED = 4  # the disk or the file system refused
INTERRUPTED = 130  # by SIGINT; SIGTERM ends with 143, SIGHUP with 129


class Alg1Error(Exception):
    """Something a user can put right: said in one line, with the fix as a hint, never as a traceback.

    Args:
        message: what is wrong and where.
        hint: what to do about it; None where nothing useful can be said.
        exit_code: what the process ends with (see the constants of this module).
    """

    def __init__(self, message: str, hint: str | None = None, exit_code: int = BAD_INPUT):
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code


def disk_error(action: str, error: OSError) -> Alg1Error:
    """The Alg1Error for an operating system error met while doing `action` ("write runs/x")."""
    hints = {
        errno.ENOSPC: "free some space",
        errno.EDQUOT: "free some of your quota",
        errno.EFBIG: "raise the file-size limit (ulimit -f)",
        errno.EACCES: "allow writing there, or choose another folder",
        errno.EPERM: "allow writing there, or choose another folder",
        errno.EROFS: "the file system is read-only; choose another folder",
        errno.ENAMETOOLONG: "choose a shorter name",
    }
    reason = error.strerror or str(error)
    hint = hints.get(error.errno or 0, "check the disk, or choose another folder")
    exit_code = BAD_INPUT if error.errno == errno.ENAMETOOLONG else DISK_FAILED
    return Alg1Error(f"cannot {action}: {reason}", hint, exit_code)


def unreadable(path: object, error: OSError) -> Alg1Error:
    """The Alg1Error for an operating system error met while reading a file that a user has named."""
    hints = {
        errno.EISDIR: "this is a folder; name a file in it",
        errno.ENOTDIR: "check its path: a part of it is a file and no folder",
        errno.EACCES: "allow reading it: chmod +r",
        errno.ENAMETOOLONG: "choose a shorter name",
    }
    hint = hints.get(error.errno or 0, "use another copy of it")
    return Alg1Error(f"{path}: cannot be read: {error.strerror or error}", hint)


def first_line(problem: object) -> str:
    """The first line of an exception's or a problem's text."""
    return (str(problem).splitlines() or [type(problem).__name__])[0]


class Guard:
    """Runs what training can do without: its first failure is one warning and switches it off for good.

    Attributes:
        enabled: False after a failure.
    """

    def __init__(self, name: str, warn: Callable[[str], None]):
        self.name = name
        self.enabled = True
        self._warn = warn

    def attempt(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """The function's result; None when it failed or an earlier one did."""
        if not self.enabled:
            return None
        try:
            return function(*args, **kwargs)
        except (Exception, SystemExit) as error:  # whatever a third-party tracker comes up with
            self.fail(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
            return None

    def fail(self, reason: str) -> None:
        """Switch off, with one warning the first time."""
        if self.enabled:
            self.enabled = False
            self._warn(f"{self.name} is switched off, training goes on: {first_line(reason)[:200]}")
