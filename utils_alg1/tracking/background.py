"""Runs a tracker in a background process, where it can neither slow down, block nor crash the training.

Whatever a tracker raises is caught in `serve`, in that process; the guard of `BackgroundTracker` is for the
process
itself: that it cannot start, dies, or takes no more. (AimTracker and TensorBoardWriter guard themselves
too, since they are used without this module.)
"""

from __future__ import annotations

import atexit
import contextlib
import io
import logging
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from typing import Any, Protocol

from utils_alg1.base.errors import Guard
from utils_alg1.base.summaries import Kind, Tracker
from utils_alg1.console.signals import STOP_SIGNALS, block_signals

LOGGER = logging.getLogger("alg1")
QUEUE_SIZE = 10_000  # calls that may wait to be sent
BATCH_SIZE = 500  # calls that are sent together, at most
POLL_SECONDS = 0.1  # seconds between two batches
NICE_INCREMENT = 10  # lowers the priority of the tracker's process below that of the training
TIMEOUT = 20.0  # seconds that the training waits for a tracker; 8 were too few right after an installation
NOTICE_AFTER = 3.0  # seconds of waiting for `close` after which the user is told
FLUSH_TIMEOUT = 1.0  # seconds that a checkpoint waits; rows flushed too late are sent again after a resume

# A forked process has PyTorch imported already. Forking is only safe on Linux.
START_METHOD = "fork" if sys.platform == "linux" else "spawn"

Call = tuple[str, tuple]  # a method of Tracker, its arguments
CLOSE: Call = ("close", ())


class TrackerFactory(Protocol):
    """Creates a tracker, in the tracker's process: it must be picklable.

    A tracker fails by raising an exception, or by calling `warn`.
    """

    def __call__(self, warn: Callable[[str], None]) -> Any: ...


def run_tracker(connection: Connection, name: str, create: TrackerFactory) -> None:
    """The main function of a tracker's process."""
    for number in STOP_SIGNALS:  # the parent handles them, and then sends `close`
        signal.signal(number, signal.SIG_IGN)
    LOGGER.disabled = True  # the parent writes the console and the log
    if hasattr(os, "nice"):  # not on Windows
        os.nice(NICE_INCREMENT)
    # New streams: the inherited ones may hold output of the parent in their buffers.
    for stream, descriptor in (("stdout", 1), ("stderr", 2)):
        with contextlib.suppress(OSError):
            setattr(sys, stream, open(descriptor, "w", buffering=1, errors="replace", closefd=False))  # noqa: SIM115
    release_inherited_files(keep={1, 2, connection.fileno()})
    threading.Thread(target=_exit_with_parent, args=(os.getppid(), TIMEOUT), daemon=True).start()
    serve(connection, name, create)
    os._exit(0)  # without waiting for threads and exit hooks of the tracker


def release_inherited_files(keep: set[int]) -> None:
    """Release the files inherited by a forked process, such as the lock of the parent's run.

    They are redirected to /dev/null instead of closed, because Python may still close these descriptors.
    """
    if sys.platform != "linux":  # nothing was inherited
        return
    try:
        descriptors = [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:
        descriptors = list(range(1024))
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in descriptors:
        with contextlib.suppress(OSError):  # not open
            if descriptor not in keep | {null} and os.fstat(descriptor):
                os.dup2(null, descriptor, inheritable=False)
    os.close(null)


def _exit_with_parent(parent: int, timeout: float) -> None:
    """In a thread of a tracker's process: exit when the parent is gone and the tracker does not close."""
    while os.getppid() == parent:
        time.sleep(1)
    time.sleep(timeout)
    os._exit(1)


def serve(connection: Connection, name: str, create: TrackerFactory) -> None:
    """Create a tracker and make the calls received, in order, until `close`.

    Sends the parent the events ("started", identity), ("flushed", None) and ("closed", None). After the
    first failure of the tracker it sends ("failed", warning), closes the tracker and returns.
    """
    failures: list[str] = []
    guard = Guard(name, failures.append)

    def send(event: str, value: str | None = None) -> None:
        with contextlib.suppress(OSError):  # the parent is gone
            connection.send((event, value))

    tracker = guard.attempt(create, failures.append)
    if tracker is not None:
        send("started", getattr(tracker, "identity", None))
    while not failures:
        for method, arguments in _receive_calls(connection):
            guard.attempt(getattr(tracker, method), *arguments)
            if failures:
                break
            if method == "flush":
                send("flushed")
            elif method == "close":
                send("closed")
                return
    send("failed", failures[0])
    if tracker is not None:  # release its locks and files
        with contextlib.suppress(Exception, SystemExit):
            tracker.close()


def _receive_calls(connection: Connection) -> list[Call]:
    """Wait for the next batch of calls; a parent that is gone counts as `close`."""
    with contextlib.suppress(EOFError, OSError):
        return connection.recv()
    return [CLOSE]


class BackgroundTracker(Tracker):
    """Sends everything, in order, to a tracker in a process of its own.

    Calls are queued and sent in batches, a few times per second. A tracker that raises, hangs or crashes
    costs one warning.

    Attributes:
        name: shown in messages.
        flushed_step: everything before this step was flushed by the tracker.
        identity: the tracker's own name of the run, once it is known.
        started: whether the tracker is open.
    """

    def __init__(
        self,
        name: str,
        create: TrackerFactory,
        warn: Callable[[str], None],
        flushed_step: int = 0,
        identity: str | None = None,
    ):
        self.name = name
        self.flushed_step = flushed_step
        self.identity = identity
        self.started = False
        self._guard = Guard(name, warn)
        self._calls: queue.Queue[Call] = queue.Queue(QUEUE_SIZE)
        self._wake, self._flush_done, self._ended = (threading.Event() for _ in range(3))
        self._flush_done.set()
        self._connection: Any = None
        self._process: Any = None
        try:
            self._start_process(create)
        except Exception as error:  # not SystemExit: in this process it comes from a signal
            self._guard.fail(f"{type(error).__name__}: {error}")

    def _start_process(self, create: TrackerFactory) -> None:
        context: Any = multiprocessing.get_context(START_METHOD)
        ours, theirs = context.Pipe()
        with theirs, block_signals(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # forking while PyTorch's threads sleep
            process = context.Process(target=run_tracker, args=(theirs, self.name, create))
            # Process.start() flushes the standard streams, which fails if their reader is gone.
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                process.start()
            atexit.register(process.kill)  # in case an exception skips `close`
        self._connection, self._process = ours, process

    def start(self) -> BackgroundTracker:
        """Start to send and receive. Call it after all processes were forked: forks and threads mix badly."""
        if self._process is None:
            self._ended.set()
            return self
        for work in (self._send_calls, self._receive_events):
            threading.Thread(target=work, name=self.name, daemon=True).start()
        return self

    @property
    def working(self) -> bool:
        """Whether nothing has failed so far."""
        return self._guard.enabled

    @property
    def ended(self) -> bool:
        """Whether the tracker's process has ended."""
        return self._ended.is_set()

    @property
    def flush_done(self) -> bool:
        """Whether the last flush is done."""
        return self._flush_done.is_set()

    def _send_calls(self) -> None:
        """In a thread: send queued calls until `close`; after a failure, send only `close`."""
        method = ""
        while self.working and method != "close":
            if self._calls.qsize() < BATCH_SIZE:
                self._wake.wait(POLL_SECONDS)
                self._wake.clear()
            calls = self._dequeue(BATCH_SIZE)
            if calls:
                self._guard.attempt(self._send, calls)
                method = calls[-1][0]
        self._dequeue(QUEUE_SIZE)  # unblocks a thread that waits for a place in the queue
        if method != "close":
            self._send([CLOSE])

    def _dequeue(self, limit: int) -> list[Call]:
        calls: list[Call] = []
        with contextlib.suppress(queue.Empty):
            while len(calls) < limit:
                calls.append(self._calls.get_nowait())
        return calls

    def _send(self, calls: list[Call]) -> None:
        with contextlib.suppress(OSError):  # `_receive_events` notices the end of the process
            self._connection.send(calls)

    def _receive_events(self) -> None:
        """In a thread: handle the events of the process until it ends."""
        event = ""
        with contextlib.suppress(EOFError, OSError):
            while True:
                event, value = self._connection.recv()
                if event == "started":
                    self.identity, self.started = value or self.identity, True
                    LOGGER.debug("%s has opened the run", self.name)
                elif event == "failed":
                    self._guard.disable(value)
                if event in ("flushed", "failed"):
                    self._flush_done.set()
        self._process.join()
        if event == "closed":
            LOGGER.debug("%s has everything", self.name)
        else:
            self._guard.fail(f"its process has ended ({self._process.exitcode})")
        atexit.unregister(self._process.kill)
        self._ended.set()
        self._flush_done.set()

    def _enqueue(self, method: str, *arguments: Any) -> None:
        if self.working:
            try:
                self._calls.put((method, arguments), timeout=TIMEOUT)
            except queue.Full:
                self._guard.fail(f"it took nothing for {TIMEOUT:.0f} seconds")

    def log(self, kind: Kind, payload: Any, step: int) -> None:
        self._enqueue("log", kind, payload, step)

    def start_flush(self) -> threading.Event:
        """Request a flush; the event is set when it is done."""
        self._flush_done.clear()
        self._enqueue("flush")
        self._wake.set()
        if not self.working or self._ended.is_set():  # there will be no answer
            self._flush_done.set()
        return self._flush_done

    def mark_flushed(self, step: int) -> None:
        """Record that everything logged before `step` is flushed, unless the tracker failed."""
        if self.working:
            self.flushed_step = step

    def start_close(self) -> threading.Event:
        """Request the end; the event is set when the process has ended."""
        self._enqueue("close")
        self._wake.set()
        return self._ended

    def kill(self, reason: str) -> None:
        """Kill the tracker's process."""
        self._guard.disable(f"{self.name} may lack the end of the run: {reason}")
        self._process.kill()
        self._ended.wait(TIMEOUT)


def _wait_for_all(events: list[threading.Event], seconds: float) -> list[bool]:
    """Wait for all events together; returns which of them were set in time."""
    end = time.monotonic() + seconds
    return [event.wait(max(0.0, end - time.monotonic())) for event in events]


def flush_all(trackers: Iterable[BackgroundTracker], step: int) -> None:
    """Flush what was logged before `step`, and mark the trackers that are done in FLUSH_TIMEOUT seconds."""
    trackers = list(trackers)
    events = [tracker.start_flush() for tracker in trackers]
    for tracker, done in zip(trackers, _wait_for_all(events, FLUSH_TIMEOUT), strict=True):
        if done:
            tracker.mark_flushed(step)


def close_all(trackers: Iterable[BackgroundTracker]) -> None:
    """Close all trackers. After TIMEOUT seconds, or on a signal, kill those that are not closed yet."""
    end = time.monotonic() + TIMEOUT  # a full queue takes some of it
    trackers = list(trackers)
    reason = f"it did not close within {TIMEOUT:.0f} seconds"
    try:
        events = [tracker.start_close() for tracker in trackers]
        _wait_for_all(events, min(NOTICE_AFTER, TIMEOUT))
        if names := [tracker.name for tracker in trackers if not tracker.ended]:
            limit = f"{TIMEOUT:.0f} seconds at most; Ctrl-C goes without"
            LOGGER.info("waiting for %s to take the rest, %s", " and ".join(names), limit)
        _wait_for_all(events, end - time.monotonic())
    except (KeyboardInterrupt, SystemExit):  # the run is saved already, so there is nothing else to stop
        reason = "it was not waited for"
    for tracker in trackers:
        if not tracker.ended:
            tracker.kill(reason)
