"""The exception for errors that a user can cause, the exit codes, and the guard of optional work."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import threading
from collections.abc import Callable, Iterator
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


PLENTY_OF_THREADS = 1000  # a limit that is not reached
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
    errno.EAGAIN: "raise the limit on processes (ulimit -u), or end other programs",
}
EXIT_CODES = {errno.ENAMETOOLONG: BAD_INPUT, errno.ENOMEM: CANNOT_TRAIN}  # whatever was tried
# What PyTorch and safetensors say of too little memory, where they have no type for it. A library that cannot
# even start on a GPU, because another program holds its memory, says NOT_INITIALIZED.
HOST_MEMORY = re.compile(r"can't allocate memory|not enough memory|bad_alloc|os error 12\b")
DEVICE_MEMORY = re.compile(
    r"(?i:out of memory)|[A-Z]+_STATUS_(?:ALLOC_FAILED|NOT_INITIALIZED)"  # CUDA, HIP, MPS, XPU, libraries
    r"|OUT_OF_(?:HOST_MEMORY|DEVICE_MEMORY|RESOURCES)|Invalid buffer size"  # the drivers of XPU and MPS
)


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


def out_of_memory(error: Exception, where: str = "", hint: str | None = None) -> Alg1Error | None:
    """Return the Alg1Error (exit code 3) for an exception that tells of too little memory; None for another.

    Args:
        where: in what, for the message.
        hint: what needs less memory. Where it is that of an accelerator, `--device cpu` is named too.
    """
    if isinstance(error, Alg1Error):
        return None
    text = str(error)
    if "CUDA-capable device(s) is/are busy" in text or "CUDA-capable devices are busy" in text:
        message = "another program uses the GPU, and does not share it"
        return Alg1Error(message, "use --device cpu, or end that program", CANNOT_TRAIN)
    on_device = DEVICE_MEMORY.search(text) if isinstance(error, RuntimeError) else None
    if on_device or type(error).__name__ == "OutOfMemoryError":  # that of PyTorch, which is not imported here
        status = on_device[0] if on_device and on_device[0].isupper() else ""
        message = " ".join(filter(None, ("out of memory", where, status and f"({status})")))
        hint = f"{hint}; or --device cpu, if" if hint else "use --device cpu, or end them, if"
        return Alg1Error(message, f"{hint} other programs hold the memory of the GPU", CANNOT_TRAIN)
    no_memory = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if isinstance(error, MemoryError) or no_memory or HOST_MEMORY.search(text):
        return Alg1Error(f"out of memory {where}".rstrip(), hint or OTHER_PROGRAMS, CANNOT_TRAIN)
    return None


@contextlib.contextmanager
def memory_guard(where: str, find_hint: Callable[[], str] | None = None) -> Iterator[None]:
    """Turn running out of memory into an Alg1Error; see `out_of_memory`."""
    try:
        yield
    except Exception as error:
        failure = out_of_memory(error, where, find_hint and find_hint())
        if failure is None:
            raise
        raise failure from error


def lacks_threads(error: BaseException) -> bool:
    """Return whether an exception says that no thread can be started; there is no type for it."""
    texts = ("can't start new thread", os.strerror(errno.EAGAIN))  # Python's, and those of C++
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def thread_limit() -> str:
    """Return what to say where no thread or process can be started."""
    import resource

    limit = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    is_low = 0 <= limit < PLENTY_OF_THREADS
    where = f"ulimit -u: {limit}" if is_low else "of the system or its container"
    return f"the limit on threads and processes is reached ({where})"


def first_line(problem: object) -> str:
    """Return the first line of the text of an exception or a problem."""
    return (str(problem).splitlines() or [type(problem).__name__])[0]


def type_and_text(error: BaseException) -> str:
    """Return the type and the first line of an exception, at most 200 characters."""
    return first_line(f"{type(error).__name__}: {error}".removesuffix(": "))[:200]


class Guard:
    """Runs code that training can do without. Its first failure is one warning and disables it for good.

    `explain` returns what the warning says of an exception.
    """

    def __init__(
        self, name: str, warn: Callable[[str], None], explain: Callable[[BaseException], str] = type_and_text
    ):
        self.name = name
        self.enabled = True
        self._warn, self._explain = warn, explain
        self._lock = threading.Lock()

    def attempt(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """Call a function and return its result; None if it fails or the guard is disabled."""
        if not self.enabled:
            return None
        try:
            return function(*args, **kwargs)
        except (Exception, SystemExit) as error:  # third-party trackers raise anything
            self.fail(thread_limit() if lacks_threads(error) else self._explain(error))
            return None

    def fail(self, reason: str) -> None:
        """Disable, with a warning that names the reason."""
        self.disable(f"{self.name} is switched off, training goes on: {reason}")

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
