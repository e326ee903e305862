"""The exception for errors that a user can cause, the exit codes, and how errors are told."""

from __future__ import annotations

import errno

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


OTHER_PROGRAMS = "end other programs, or use a machine with more memory"
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
    errno.ENOMEM: OTHER_PROGRAMS,
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.EAGAIN: "raise the limit on processes (ulimit -u), or end other programs",
}
EXIT_CODES = {errno.ENAMETOOLONG: BAD_INPUT, errno.ENOMEM: CANNOT_TRAIN}  # whatever was tried


def disk_error(action: str, error: OSError) -> Alg1Error:
    """Return the Alg1Error for an OSError raised by `action`, such as "write runs/x"."""
    hint = HINTS.get(error.errno or 0, "check the disk, or choose another place")
    exit_code = EXIT_CODES.get(error.errno or 0, DISK_FAILED)
    return Alg1Error(f"cannot {action}: {error.strerror or error}", hint, exit_code)


def unreadable(path: object, error: OSError) -> Alg1Error:
    """Return the Alg1Error for an OSError raised while reading a file that the user named."""
    hint = HINTS.get(error.errno or 0, "use another copy of it")
    exit_code = EXIT_CODES.get(error.errno or 0, BAD_INPUT)
    return Alg1Error(f"{path}: cannot be read: {error.strerror or error}", hint, exit_code)


def first_line(problem: object) -> str:
    """Return the first line of the text of an exception or a problem."""
    return (str(problem).splitlines() or [type(problem).__name__])[0]


def describe(error: BaseException) -> str:
    """Return what an exception says in a line of at most 200 characters, with its type unless it is clear."""
    match error:
        case Alg1Error():
            text = error.message
        case OSError(strerror=str(reason), filename=name):
            text = f"{reason}: {name}" if name else reason
        case _:
            text = f"{type(error).__name__}: {error}".removesuffix(": ")
    return first_line(text)[:200]
