"""Runs a tracker in a background process, where it can neither slow down, block nor crash the training.

The process reads the scalars from the run's metrics file, at its own pace: however far it is behind, also
after a resume that sends a whole run again, nothing waits for it and no memory is taken. All else that is
logged goes through a pipe.

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
from typing import Any, NamedTuple

from utils_alg1.base.errors import describe
from utils_alg1.base.guard import Guard
from utils_alg1.base.summaries import Kind, Tracker
from utils_alg1.base.threads import enough_threads, thread_limit
from utils_alg1.console.signals import STOP_SIGNALS, block_signals
from utils_alg1.tracking.metrics_file import RowReader

LOGGER = logging.getLogger("alg1")
QUEUE_SIZE = 1000  # calls that may wait to be sent
POLL_SECONDS = 0.2  # seconds between two looks at the metrics file
TICK_SECONDS = 1.0  # seconds between two answers at most
NICE_INCREMENT = 10  # lowers the priority of the tracker's process below that of the training
TIMEOUT = 20.0  # seconds that the training waits for a tracker; 8 were too few right after an installation
NOTICE_AFTER = 3.0  # seconds of waiting for `close` after which the user is told
NOTICE_EVERY = 30.0  # seconds after which the user is told again how much is left
FLUSH_TIMEOUT = 1.0  # seconds that a checkpoint waits; rows flushed too late are sent again after a resume

DESCRIPTORS = Path("/proc/self/fd")
# A forked process has PyTorch imported already. Forking is only safe on Linux.
START_METHOD = "fork" if DESCRIPTORS.exists() else "spawn"

Call = tuple[str, bytes]  # a method and, pickled, the same with its arguments
CLOSE = ("close", pickle.dumps(("close", ())))
LEAVE = ("leave", pickle.dumps(("leave", ())))
TICK = ("tick", pickle.dumps(("flush", ())))

# Creates a tracker, in its process: it must be picklable. A tracker fails by raising, or by calling the
# function `warn` that it is given.
CreateTracker = Callable[[Callable[[str], None]], Tracker]


def run_tracker(connection: Connection, name: str, create: CreateTracker, metrics_path: Path) -> None:
    """The main function of a tracker's process."""
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

    def _make(self, method: str, arguments: tuple) -> None:
        if method in ("flush", "close"):
            end = time.monotonic() + FLUSH_TIMEOUT / 2
            self._log_rows(lambda: time.monotonic() > end)
        if method == "flush":
            self._guard.attempt(self._tracker.flush)
            if not self._rows.left:
                self._rows.step = max([self._rows.step, *arguments])
        elif method == "log":
            self._guard.attempt(self._tracker.log, *arguments)
        elif method == "leave" or not self._rows.left:
            self._guard.attempt(self._tracker.close)
            self._closed = True

    def _log_rows(self, is_enough: Callable[[], bool]) -> None:
        """Log the next rows of the metrics file, until there is none or `is_enough()`."""
        self._guard.attempt(self._log_next_rows, is_enough)

    def _log_next_rows(self, is_enough: Callable[[], bool]) -> None:
        for row in self._rows.read(lambda: not self._guard.enabled or is_enough()):
            self._tracker.log("scalars", row, int(row.pop("step")))


class BackgroundTracker:
    """A tracker in a process of its own, which is given the rows of a metrics file, and what is logged here.

    Each call is sent when the one before is done. A tracker that raises, hangs or crashes costs one warning.

    Attributes:
        flushed_step: the tracker has flushed all scalars before it: after a resume it is given the others.
        run_hash: the tracker's own name of the run, once it is known.
        left: the share of the metrics file that it has not read yet; 0.0 while it keeps up.
        ready: set while the tracker is open and its last flush is done.
        ended: set when its process has ended.
    """

    def __init__(
        self,
        name: str,
        create: CreateTracker,
        warn: Callable[[str], None],
        metrics_path: Path,
        flushed_step: int = 0,
        run_hash: str | None = None,
    ):
        self.name, self.flushed_step, self.run_hash = name, flushed_step, run_hash
        self.left, self._answer_time = 0.0, 0.0
        self.ready, self.ended = threading.Event(), threading.Event()
        self._guard = Guard(name, warn)
        self._calls: queue.Queue[Call] = queue.Queue(QUEUE_SIZE)
        self._leaves = False
        self._has_run = flushed_step > 0  # whether the run is there, maybe without its end
        try:
            if not enough_threads():  # a library of a tracker may abort its process when it gets none
                raise BlockingIOError
            self._start_process(create, metrics_path)
        except Exception as error:  # not SystemExit: in this process it comes from a signal
            is_limit = isinstance(error, BlockingIOError)  # what a fork raises
            self._guard.fail(thread_limit() if is_limit else describe(error))
            self.ended.set()

    def _start_process(self, create: CreateTracker, metrics_path: Path) -> None:
        context: Any = multiprocessing.get_context(START_METHOD)
        self._connection, theirs = context.Pipe()
        with theirs, block_signals(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # forking while PyTorch's threads sleep
            arguments = (theirs, self.name, create, metrics_path)
            self._process = context.Process(target=run_tracker, args=arguments)
            # Process.start() flushes the standard streams, which fails if their reader is gone.
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                self._process.start()
            atexit.register(self._process.kill)  # in case an exception skips `close`

    def start(self) -> BackgroundTracker:
        """Start to send and receive. Call it after all processes were forked: forks and threads mix badly."""
        if not self.ended.is_set():
            try:
                threading.Thread(target=self._attend, name=self.name, daemon=True).start()
            except RuntimeError:
                self._guard.fail(thread_limit())
                self._connection.close()  # its process leaves
                self.ended.set()
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
        method = "open"
        while True:
            answer: Answer = self._connection.recv()
            self._has_run = True
            self._take(method, answer)
            if method == "leave" or (method == "close" and not (answer.left and self.working)):
                return
            method, call = self._next_call(method)
            self._connection.send_bytes(call)

    def _take(self, method: str, answer: Answer) -> None:
        """Take the answer to a call of `method`."""
        self.run_hash = answer.run_hash or self.run_hash
        for failure in answer.failures:
            self._guard.disable(failure)
        if method == "open" and answer.remark:
            LOGGER.info("%s", answer.remark)
        self.left, self._answer_time = answer.left, time.monotonic()
        if method != "log" and self.working:
            self.flushed_step = answer.step
        if method in ("open", "flush"):
            self.ready.set()

    def _next_call(self, method: str) -> Call:
        """Return what to send after a call of `method`."""
        if not self.working or (method == "close" and self._leaves):
            return LEAVE
        if method == "close":  # there were rows left
            return CLOSE
        try:
            return self._calls.get(timeout=TICK_SECONDS)
        except queue.Empty:
            return TICK

    def log(self, kind: Kind, payload: Any, step: int) -> None:
        self._call("log", kind, payload, step)

    def start_flush(self, step: int) -> None:
        """Request a flush of what was logged before `step`. The tracker must be `ready`."""
        self.ready.clear()
        self._call("flush", step)
        if not self.working or self.ended.is_set():  # there will be no answer
            self.ready.set()

    def start_close(self) -> None:
        """Request the end."""
        self._call("close")

    def _call(self, method: str, *arguments: Any) -> None:
        if not self.working:
            return
        call = self._guard.attempt(pickle.dumps, (method, arguments))
        try:
            self._calls.put((method, call) if self.working else LEAVE, timeout=TIMEOUT)
        except queue.Full:
            self._guard.fail(f"it took nothing for {TIMEOUT:.0f} seconds")

    def closes_by(self, end: float, patient: bool) -> float:
        """Return until when to wait for the end, which is `end` unless there are rows left.

        They are waited for only by the `patient`, who give TIMEOUT seconds for each of the answers.
        """
        if patient:
            return max(end, self._answer_time + TIMEOUT)
        return 0.0 if self.left else end

    def give_up(self, reason: str) -> None:
        """End the tracker's process: without the rows that are left, or by force."""
        lacks = "may lack the end of the run" if self._has_run else "lacks the whole run"
        if self.left:
            self._leaves = True
            self.ended.wait(min(NOTICE_AFTER, TIMEOUT))
            lacks = f"lacks the steps from {self.flushed_step} on"
        self._guard.disable(
            f"{self.name} {lacks}: {reason}; a resume, or compare.py --send-to, sends the missing curves"
        )
        self._process.kill()
        with contextlib.suppress(queue.Full):
            self._calls.put_nowait(LEAVE)  # a signal may have kept `close` from being sent
        self.ended.wait(TIMEOUT)


def _wait_for_all(events: Iterable[threading.Event], seconds: float) -> None:
    """Wait for all events together."""
    end = time.monotonic() + seconds
    for event in events:
        event.wait(max(0.0, end - time.monotonic()))


def flush_all(trackers: Iterable[BackgroundTracker], step: int) -> None:
    """Flush what was logged before `step`, and wait for it FLUSH_TIMEOUT seconds.

    A tracker whose last flush is not done, that is not open yet, or that is behind, is not waited for.
    """
    ready = [tracker for tracker in trackers if tracker.ready.is_set() and not tracker.left]
    for tracker in ready:
        tracker.start_flush(step)
    _wait_for_all([tracker.ready for tracker in ready], FLUSH_TIMEOUT)


def close_all(trackers: Iterable[BackgroundTracker], patient: bool = False) -> None:
    """Close all trackers; end those that are not closed after TIMEOUT seconds, or on a signal.

    One that is behind is ended sooner, because a resume gives it the rest. The `patient` wait for it, as long
    as it takes rows.
    """
    end = time.monotonic() + TIMEOUT  # a full queue takes some of it
    reason = f"it did not close within {TIMEOUT:.0f} seconds"
    trackers = list(trackers)
    notice_time = time.monotonic() + NOTICE_AFTER
    try:
        for tracker in trackers:
            tracker.start_close()
        _wait_for_all([tracker.ended for tracker in trackers], min(NOTICE_AFTER, TIMEOUT))
        while waiting := [
            t for t in trackers if not t.ended.is_set() and time.monotonic() < t.closes_by(end, patient)
        ]:
            if time.monotonic() >= notice_time:
                LOGGER.info("%s", _notice(waiting))
                notice_time += NOTICE_EVERY
            _wait_for_all([tracker.ended for tracker in waiting], min(TICK_SECONDS, TIMEOUT))
    except (KeyboardInterrupt, SystemExit):  # the run is saved already, so there is nothing else to stop
        reason = "it was not waited for"
    for tracker in trackers:
        if not tracker.ended.is_set():
            tracker.give_up(reason)


def _notice(trackers: list[BackgroundTracker]) -> str:
    """Return what to say while these trackers are waited for."""
    names = " and ".join(tracker.name for tracker in trackers)
    left = max(tracker.left for tracker in trackers)
    limit = f"{left:.0%} of the steps" if left else f"{TIMEOUT:.0f} seconds at most"
    return f"waiting for {names} to take the rest, {limit}; Ctrl-C goes without"
