"""Runs a tracker in a background process, where it can neither slow down, block nor crash the training.

What a tracker raises is caught in `serve`, in that process; the guard of `BackgroundTracker` is for the
process itself: that it cannot start, dies, or takes no more.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import logging
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from utils_alg1.base.errors import Guard
from utils_alg1.base.summaries import Kind, Tracker
from utils_alg1.console.signals import STOP_SIGNALS, block_signals

LOGGER = logging.getLogger("alg1")
QUEUE_SIZE = 1000  # batches that may wait to be sent
BATCH_SECONDS = 0.1  # seconds between two batches of calls
NICE_INCREMENT = 10  # lowers the priority of the tracker's process below that of the training
TIMEOUT = 20.0  # seconds that the training waits for a tracker; 8 were too few right after an installation
NOTICE_AFTER = 3.0  # seconds of waiting for `close` after which the user is told
FLUSH_TIMEOUT = 1.0  # seconds that a checkpoint waits; rows flushed too late are sent again after a resume

DESCRIPTORS = Path("/proc/self/fd")
# A forked process has PyTorch imported already. Forking is only safe on Linux.
START_METHOD = "fork" if DESCRIPTORS.exists() else "spawn"

CLOSE = ("close", pickle.dumps([("close", ())]))  # a batch: its last method, its pickled calls

# Creates a tracker, in its process: it must be picklable. A tracker fails by raising, or by calling the
# function `warn` that it is given.
CreateTracker = Callable[[Callable[[str], None]], Tracker]


def run_tracker(connection: Connection, name: str, create: CreateTracker) -> None:
    """The main function of a tracker's process."""
    for number in STOP_SIGNALS:  # the parent handles them, and then sends `close`
        signal.signal(number, signal.SIG_IGN)
    LOGGER.disabled = True  # the parent writes the console and the log
    if hasattr(os, "nice"):  # not on Windows
        os.nice(NICE_INCREMENT)
    sys.stdout = sys.stderr = sys.__stderr__  # the inherited stdout may hold output of the parent
    release_inherited_files(keep={2, connection.fileno()})
    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()
    serve(connection, name, create)
    os._exit(0)  # without waiting for threads and exit hooks of the tracker


def release_inherited_files(keep: set[int]) -> None:
    """Release the files inherited by a forked process, such as the lock of the parent's run.

    They are redirected to /dev/null instead of closed, because Python may still close these descriptors.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in {int(path.name) for path in DESCRIPTORS.glob("*")} - keep - {null}:
        os.dup2(null, descriptor, inheritable=False)


def _exit_with_parent(parent: int) -> None:
    """In a thread of a tracker's process: exit when the parent is gone and the tracker does not close."""
    while os.getppid() == parent:
        time.sleep(1)
    time.sleep(TIMEOUT)
    os._exit(1)


def serve(connection: Connection, name: str, create: CreateTracker) -> None:
    """Create a tracker and make the calls received, in order, until `close`.

    Answers with (run hash, failures) when the tracker is open, and after each batch of calls. After the first
    failure, or when the parent is gone, it closes the tracker and returns.
    """
    failures: list[str] = []
    guard = Guard(name, failures.append)
    tracker = guard.attempt(create, guard.disable) or Tracker()
    method = ""
    with contextlib.suppress(EOFError, OSError):  # the parent is gone
        while guard.enabled and method != "close":
            connection.send((tracker.run_hash, failures))
            for method, arguments in connection.recv():
                guard.attempt(getattr(tracker, method), *arguments)
        connection.send((tracker.run_hash, failures))
    if method != "close":  # release its locks and files
        with contextlib.suppress(Exception, SystemExit):
            tracker.close()


class BackgroundTracker:
    """Sends everything, in order, to a tracker in a process of its own.

    Calls are sent in batches, each when the one before is done. A tracker that raises, hangs or crashes costs
    one warning.

    Attributes:
        flushed_step: the tracker has flushed all before it. After a resume the rows from there on are resent.
        run_hash: the tracker's own name of the run, once it is known.
        ready: set while the tracker is open and its last flush is done.
        ended: set when its process has ended.
    """

    def __init__(
        self,
        name: str,
        create: CreateTracker,
        warn: Callable[[str], None],
        flushed_step: int = 0,
        run_hash: str | None = None,
    ):
        self.name, self.flushed_step, self.run_hash = name, flushed_step, run_hash
        self.ready, self.ended = threading.Event(), threading.Event()
        self._guard = Guard(name, warn)
        self._calls: list[tuple[str, tuple]] = []  # the next batch: methods of Tracker, with arguments
        self._send_time = 0.0
        self._has_run = flushed_step > 0  # whether the run is there, maybe without its end
        self._batches: queue.Queue[tuple[str, bytes]] = queue.Queue(QUEUE_SIZE)
        try:
            self._start_process(create)
        except Exception as error:  # not SystemExit: in this process it comes from a signal
            self._guard.fail(f"{type(error).__name__}: {error}")
            self.ended.set()

    def _start_process(self, create: CreateTracker) -> None:
        context: Any = multiprocessing.get_context(START_METHOD)
        self._connection, theirs = context.Pipe()
        with theirs, block_signals(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # forking while PyTorch's threads sleep
            self._process = context.Process(target=run_tracker, args=(theirs, self.name, create))
            # Process.start() flushes the standard streams, which fails if their reader is gone.
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                self._process.start()
            atexit.register(self._process.kill)  # in case an exception skips `close`

    def start(self) -> BackgroundTracker:
        """Start to send and receive. Call it after all processes were forked: forks and threads mix badly."""
        if not self.ended.is_set():
            threading.Thread(target=self._attend, name=self.name, daemon=True).start()
        return self

    @property
    def working(self) -> bool:
        """Whether nothing has failed so far."""
        return self._guard.enabled

    def _attend(self) -> None:
        """In a thread: exchange batches and answers with the tracker's process until it has ended."""
        try:
            self._exchange()
        except (EOFError, OSError):
            self._process.join()
            self._guard.fail(f"its process has ended ({self._process.exitcode})")
        finally:
            self._process.join()
            atexit.unregister(self._process.kill)
            self.ended.set()
            self.ready.set()

    def _exchange(self) -> None:
        last = "open"
        while True:
            run_hash, failures = self._connection.recv()
            self._has_run = True
            self.run_hash = run_hash or self.run_hash
            for failure in failures:
                self._guard.disable(failure)
            if last == "flush" and self.working:
                self.flushed_step = self._flush_step
            if last in ("open", "flush"):
                self.ready.set()
            if last == "close":
                return
            last, calls = self._batches.get() if self.working else CLOSE
            self._connection.send_bytes(calls)

    def log(self, kind: Kind, payload: Any, step: int) -> None:
        self._call("log", kind, payload, step)

    def start_flush(self, step: int) -> None:
        """Request a flush of what was logged before `step`. The tracker must be `ready`."""
        self._flush_step = step
        self.ready.clear()
        self._call("flush")
        if not self.working or self.ended.is_set():  # there will be no answer
            self.ready.set()

    def start_close(self) -> None:
        """Request the end."""
        self._call("close")

    def _call(self, method: str, *arguments: Any) -> None:
        """Add a call to the next batch. Send it if BATCH_SECONDS are over, or to flush or close."""
        if not self.working:
            return
        self._calls.append((method, arguments))
        if method == "log" and time.monotonic() < self._send_time:
            return
        calls = self._guard.attempt(pickle.dumps, self._calls)
        try:
            self._batches.put((method, calls) if self.working else CLOSE, timeout=TIMEOUT)
        except queue.Full:
            self._guard.fail(f"it took nothing for {TIMEOUT:.0f} seconds")
        self._calls, self._send_time = [], time.monotonic() + BATCH_SECONDS

    def kill(self, reason: str) -> None:
        """Kill the tracker's process, and warn of what is missing."""
        lacks = "may lack the end of the run" if self._has_run else "lacks the whole run"
        self._guard.disable(f"{self.name} {lacks}: {reason}; a resume sends the missing curves")
        self._process.kill()
        with contextlib.suppress(queue.Full):
            self._batches.put_nowait(CLOSE)  # a signal may have kept `close` from being sent
        self.ended.wait(TIMEOUT)


def _wait_for_all(events: Iterable[threading.Event], seconds: float) -> None:
    """Wait for all events together."""
    end = time.monotonic() + seconds
    for event in events:
        event.wait(max(0.0, end - time.monotonic()))


def flush_all(trackers: Iterable[BackgroundTracker], step: int) -> None:
    """Flush what was logged before `step`, and wait for it FLUSH_TIMEOUT seconds.

    A tracker whose last flush is not done, or that is not open yet, is not waited for.
    """
    ready = [tracker for tracker in trackers if tracker.ready.is_set()]
    for tracker in ready:
        tracker.start_flush(step)
    _wait_for_all([tracker.ready for tracker in ready], FLUSH_TIMEOUT)


def close_all(trackers: Iterable[BackgroundTracker]) -> None:
    """Close all trackers. After TIMEOUT seconds, or on a signal, kill those that are not closed yet."""
    end = time.monotonic() + TIMEOUT  # a full queue takes some of it
    ended = {tracker.name: tracker.ended for tracker in trackers}
    reason = f"it did not close within {TIMEOUT:.0f} seconds"
    try:
        for tracker in trackers:
            tracker.start_close()
        _wait_for_all(ended.values(), min(NOTICE_AFTER, TIMEOUT))
        if names := [name for name, event in ended.items() if not event.is_set()]:
            limit = f"{TIMEOUT:.0f} seconds at most; Ctrl-C goes without"
            LOGGER.info("waiting for %s to take the rest, %s", " and ".join(names), limit)
        _wait_for_all(ended.values(), end - time.monotonic())
    except (KeyboardInterrupt, SystemExit):  # the run is saved already, so there is nothing else to stop
        reason = "it was not waited for"
    for tracker in trackers:
        if not tracker.ended.is_set():
            tracker.kill(reason)
