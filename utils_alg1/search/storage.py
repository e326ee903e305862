"""The database of a study: opening it, and what is said where it fails, is held by others or is damaged."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from utils_alg1.base.errors import DISK_FAILED, Alg1Error, first_line
from utils_alg1.base.locks import check_locks

if TYPE_CHECKING:
    from optuna.storages import RDBStorage

FILE_NAME = "study.db"  # of a study without --storage
HEARTBEAT_SECONDS = 5
GRACE_SECONDS = 15  # without a heartbeat until a trial is queued again
BUSY_SECONDS = 60  # to wait for a lock of SQLite
STORAGE_HINT = "check the disk; --storage names a database that SQLAlchemy knows, its driver installed"
LOCKED_HINT = "end it, or let it continue: a search that was stopped with Ctrl-Z holds it too"
DAMAGED_HINT = "put a copy of it back, or move it away to search anew; the runs stay"
NO_LOCKS_HINT = "start it in a folder of another file system, such as a local disk, or name a --storage there"


def open_storage(url: str) -> RDBStorage:
    """Open a database, with heartbeats. Raises Alg1Error if that fails."""
    import optuna
    from sqlalchemy import event
    from sqlalchemy.exc import DBAPIError

    is_sqlite = url.startswith("sqlite")
    if is_sqlite:
        with contextlib.suppress(OSError):  # told when it is opened
            check_locks(Path(url.removeprefix("sqlite:///")).parent, NO_LOCKS_HINT)
    for attempts_left in (2, 1, 0):
        try:
            storage = optuna.storages.RDBStorage(
                url,
                {"connect_args": {"timeout": BUSY_SECONDS, "isolation_level": None}} if is_sqlite else None,
                heartbeat_interval=HEARTBEAT_SECONDS,
                grace_period=GRACE_SECONDS,
                heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(),
            )
            break
        except Exception as error:  # depends on the database driver
            if known := known_failure(url, error):
                raise known from None
            if not attempts_left or not isinstance(error, DBAPIError):
                raise Alg1Error(
                    f"the storage {url} cannot be used: {first_line(error)}", STORAGE_HINT
                ) from None
            time.sleep(0.5)  # another process creates the tables of the new database
    if is_sqlite:  # otherwise two workers may take the same trial out of the queue
        event.listen(
            storage.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE")
        )
    return storage


def known_failure(url: str, error: BaseException) -> Alg1Error | None:
    """Return what to say of a failure of SQLite that has a cause of its own; None for any other."""
    url = url.removeprefix("sqlite:///")
    reason = first_line(error)
    if "database is locked" in reason:
        return Alg1Error(f"{url} is held by another program", LOCKED_HINT)
    # A file of another name may never have been a database.
    if "malformed" in reason or ("not a database" in reason and Path(url).name == FILE_NAME):
        return Alg1Error(f"{url} is damaged: {reason}", DAMAGED_HINT)
    return None


@contextlib.contextmanager
def storage_guard(url: str) -> Iterator[None]:
    """Turn a failure of the database into an Alg1Error (exit code 4; 2 if it is held or damaged)."""
    import optuna

    hook = threading.excepthook
    threading.excepthook = lambda _: None  # where a heartbeat fails, the next access of this thread does too
    try:
        yield
    except Alg1Error:
        raise
    except Exception as error:  # Optuna stumbles where it cannot store how a trial has ended
        cause: BaseException | None = error
        while cause and not isinstance(cause, optuna.exceptions.StorageInternalError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        reason = cause.__cause__ or cause
        failed = f"the storage failed: {first_line(reason)}"
        known = known_failure(url, reason)
        raise known or Alg1Error(failed, "fix that and start again", DISK_FAILED) from error
    finally:
        threading.excepthook = hook
