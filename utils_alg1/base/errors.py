"""The exception for errors that a user can cause, the exit codes, and the guard of optional work."""

from __future__ import annotations

import errno
import functools
import threading
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec

P = ParamSpec("P")

DONE = 0
BAD_INPUT = 2  # a bad value, file or checkpoint, or a lock that another process holds
CANNOT_TRAIN = 3  # loss or gradient not finite, or out of memory
DISK_FAILED = 4  # an error of the disk or the file system
INTERRUPTED = 130  # by SIGINT; SIGTERM ends with 143, any signal with 128 + its number


class Alg1Error(Exception):
    """An error that a user can fix: what is wrong and where, and how to fix it, if that can be said.

    It is printed as one line and a hint, never as a traceback, and the process ends with `exit_code`.
    """

    def __init__(self, message: str, hint: str | None = None, exit_code: int = BAD_INPUT):
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code


HINTS = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the file-size limit (ulimit -f)",
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "change its permissions, or choose another place",
    errno.EROFS: "the file system is read-only; choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EISDIR: "this is a folder; name a file in it",
    errno.ENOTDIR: "check its path: a part of it is a file and no folder",
}


def disk_error(action: str, error: OSError) -> Alg1Error:
    """Return the Alg1Error for an OSError raised by `action`, such as "write runs/x"."""
    hint = HINTS.get(error.errno or 0, "check the disk, or choose another place")
    exit_code = BAD_INPUT if error.errno == errno.ENAMETOOLONG else DISK_FAILED
    return Alg1Error(f"cannot {action}: {error.strerror or error}", hint, exit_code)


def unreadable(path: object, error: OSError) -> Alg1Error:
    """Return the Alg1Error for an OSError raised while reading a file that the user named."""
    hint = HINTS.get(error.errno or 0, "use another copy of it")
    return Alg1Error(f"{path}: cannot be read: {error.strerror or error}", hint)


def first_line(problem: object) -> str:
    """Return the first line of the text of an exception or a problem."""
    return (str(problem).splitlines() or [type(problem).__name__])[0]


class Guard:
    """Runs code that training can do without. Its first failure is one warning and disables it for good."""

    def __init__(self, name: str, warn: Callable[[str], None]):
        self.name = name
        self.enabled = True
        self._warn = warn
        self._lock = threading.Lock()

    def attempt(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """Call a function and return its result; None if it fails or the guard is disabled."""
        if not self.enabled:
            return None
        try:
            return function(*args, **kwargs)
        except (Exception, SystemExit) as error:  # third-party trackers raise anything
            self.fail(f"{type(error).__name__}: {error}".removesuffix(": "))
            return None

    def fail(self, reason: str) -> None:
        """Disable, with a warning that names the reason."""
        self.disable(f"{self.name} is switched off, training goes on: {first_line(reason)[:200]}")

    def disable(self, warning: str) -> None:
        """Disable, with this warning; a guard that is already disabled does not warn again."""
        with self._lock:  # several threads may find the same failure
            was_enabled, self.enabled = self.enabled, False
        if was_enabled:
            self._warn(warning)


def guarded(method: Callable[Concatenate[Any, P], None]) -> Callable[Concatenate[Any, P], None]:
    """Decorate a method of a class with `enabled` and a `Guard` named `_guard`: it never raises.

    While `enabled` is False, the method does nothing.
    """

    @functools.wraps(method)
    def guarded_method(self: Any, *args: P.args, **kwargs: P.kwargs) -> None:
        if self.enabled:
            self._guard.attempt(method, self, *args, **kwargs)

    return guarded_method
