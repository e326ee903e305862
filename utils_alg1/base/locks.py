"""Locks of files. The kernel releases them when the process ends that holds them, however it ends."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from utils_alg1.base.errors import DISK_FAILED, Alg1Error, disk_error
from utils_alg1.base.files import NOT_SUPPORTED

if TYPE_CHECKING:
    from filelock import FileLock  # imported when it is needed: it takes longer than all of --help

NO_LOCKS = (*NOT_SUPPORTED, errno.ENOLCK, errno.ENOSYS)  # the last two: of network mounts


class NoLocks(Alg1Error):
    """The file system has no locks (exit code 4)."""


def take_lock(path: Path, timeout: float, in_use: Alg1Error, hint: str) -> FileLock:
    """Lock a folder by a file in it, which is created if need be; wait for the lock so many seconds.

    Args:
        in_use: raised if another process holds the lock.
        hint: what to do if the file system has no locks.

    Raises:
        NoLocks: it has none.
        Alg1Error: `in_use`, or the file system refuses for another reason (exit code 4).
    """
    from filelock import Timeout

    try:
        return _acquire(path, timeout, hint)
    except Timeout:
        raise in_use from None


def check_locks(folder: Path, hint: str) -> None:
    """Raise NoLocks if the file system of a folder has no locks; OSError if no file can be made there."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".lock") as file:
        _acquire(folder / Path(file.name).name, 0, hint).release()


def _acquire(path: Path, timeout: float, hint: str) -> FileLock:
    """See `take_lock`. Raises filelock.Timeout if another process holds the lock."""
    from filelock import FileLock, Timeout

    # Where there is no flock, an existing file would count as a lock, and stay when its process is killed.
    lock = FileLock(path, timeout=timeout, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:  # which is an OSError
        raise
    except OSError as error:
        if error.errno in NO_LOCKS:
            reason = f"its file system has no locks ({error.strerror})"
            raise NoLocks(f"cannot lock {path.parent}: {reason}", hint, DISK_FAILED) from None
        raise disk_error(f"lock {path.parent}", error) from error
    return lock
