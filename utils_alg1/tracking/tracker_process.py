"""The process of a tracker: makes the calls that it receives, and reads the scalars from the metrics file.

What a tracker raises is caught here, in `Server`.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from utils_alg1.base.guard import Guard
from utils_alg1.base.summaries import Tracker
from utils_alg1.console.signals import STOP_SIGNALS
from utils_alg1.tracking.metrics_file import RowReader

LOGGER = logging.getLogger("alg1")
POLL_SECONDS = 0.2  # seconds between two looks at the metrics file
NICE_INCREMENT = 10  # lowers the priority of the tracker's process below that of the training
TIMEOUT = 20.0  # seconds that the training waits for a tracker; 8 were too few right after an installation
FLUSH_TIMEOUT = 1.0  # seconds that a checkpoint waits; rows flushed too late are sent again after a resume
DESCRIPTORS = Path("/proc/self/fd")

# Creates a tracker, in its process: it must be picklable. A tracker fails by raising, or by calling the
# function `warn` that it is given.
CreateTracker = Callable[[Callable[[str], None]], Tracker]


class Method(enum.Enum):
    """What an answer is the answer to."""

    OPEN = enum.auto()  # the start of the process
    LOG = enum.auto()
    FLUSH = enum.auto()
    CLOSE = enum.auto()  # log some of the rows that are left; close if there are none
    LEAVE = enum.auto()  # close without the rows that are left


def run_tracker(connection: Connection, name: str, create: CreateTracker, metrics_path: Path) -> None:
    """The main function of a tracker's process: serves a `Server` and exits."""
    for number in STOP_SIGNALS:  # the parent handles them, and then sends `close`
        signal.signal(number, signal.SIG_IGN)
    LOGGER.disabled = True  # the parent writes the console and the log
    os.nice(NICE_INCREMENT)
    # What a tracker prints is nobody's: a failure is one warning. The inherited stdout may hold output of the
    # parent.
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    release_inherited_files(keep={connection.fileno()})

    def open_watched(warn: Callable[[str], None]) -> Tracker:
        threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()
        return create(warn)

    Server(connection, name, open_watched, metrics_path).serve()
    os._exit(0)  # without waiting for threads and exit hooks of the tracker


def release_inherited_files(keep: set[int]) -> None:
    """Release the files inherited by a forked process: its output, and the lock of the parent's run.

    They are redirected to /dev/null instead of closed, because Python may still close these descriptors.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in {1, 2, *(int(path.name) for path in DESCRIPTORS.glob("*"))} - keep - {null}:
        os.dup2(null, descriptor, inheritable=False)


def _exit_with_parent(parent: int) -> None:
    """In a thread of a tracker's process: exit when the parent is gone and the tracker does not close."""
    while os.getppid() == parent:
        time.sleep(1)
    time.sleep(TIMEOUT)
    os._exit(1)


class Answer(NamedTuple):
    """What the process of a tracker says when the tracker is open, and after each call."""

    run_hash: str | None
    remark: str
    failures: list[str]  # all so far
    step: int  # the scalars of earlier steps were logged
    left: float  # the share of the metrics file that was not read yet


class Server:
    """Makes the calls received, in order, and logs the rows of the metrics file meanwhile, until `close`.

    As long as there are rows left, `close` logs some of them only; `leave` closes without them. After the
    first failure, or when the parent is gone, the tracker is closed too.
    """

    def __init__(self, connection: Connection, name: str, create: CreateTracker, metrics_path: Path):
        self._connection = connection
        self._failures: list[str] = []
        self._guard = Guard(name, self._failures.append)
        self._tracker = self._guard.attempt(create, self._guard.disable) or Tracker()
        self._rows = RowReader(metrics_path, self._tracker.first_step)
        self._closed = False

    def serve(self) -> None:
        with contextlib.suppress(EOFError, OSError):  # the parent is gone
            while self._guard.enabled and not self._closed:
                self._answer()
                while self._guard.enabled and not self._connection.poll(
                    0 if self._rows.left else POLL_SECONDS
                ):
                    self._log_rows(self._connection.poll)
                self._make(*pickle.loads(self._connection.recv_bytes()))
            self._answer()
        if not self._closed:  # release its locks and files
            with contextlib.suppress(Exception, SystemExit):
                self._tracker.close()

    def _answer(self) -> None:
        tracker, rows = self._tracker, self._rows
        answer = Answer(tracker.run_hash, tracker.remark, self._failures, rows.step, rows.left)
        self._connection.send(answer)

    def _make(self, method: Method, arguments: tuple) -> None:
        if method in (Method.FLUSH, Method.CLOSE):
            end = time.monotonic() + FLUSH_TIMEOUT / 2
            self._log_rows(lambda: time.monotonic() > end)
        if method is Method.FLUSH:
            self._guard.attempt(self._tracker.flush)
            if not self._rows.left:
                self._rows.step = max([self._rows.step, *arguments])
        elif method is Method.LOG:
            self._guard.attempt(self._tracker.log, *arguments)
        elif method is Method.LEAVE or not self._rows.left:
            self._guard.attempt(self._tracker.close)
            self._closed = True

    def _log_rows(self, is_enough: Callable[[], bool]) -> None:
        """Log the next rows of the metrics file, until there is none or `is_enough()`."""
        self._guard.attempt(self._log_next_rows, is_enough)

    def _log_next_rows(self, is_enough: Callable[[], bool]) -> None:
        for row in self._rows.read(lambda: not self._guard.enabled or is_enough()):
            self._tracker.log("scalars", row, int(row.pop("step")))
