"""A process for each tracker: slow, failing, blocked or crashed, it costs one warning and never the run."""

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
from utils_alg1.base.summaries import Embedding, Histogram, Image
from utils_alg1.console.signals import STOP_SIGNALS, block_signals
from utils_alg1.tracking.metrics_file import Tracker

LOGGER = logging.getLogger("alg1")
QUEUE_SIZE = 10_000  # calls a tracker may be behind
PARCEL = 500  # calls that are sent together at most, so that a slow tracker can be told from one that hangs
HANDOVER = 0.1  # seconds between two parcels
NICENESS = 10  # of a tracker's process: where there are fewer cores than work, the training comes first
PATIENCE = 20.0  # seconds a tracker may keep the run waiting; 8 were too few right after an installation
SILENCE = 3.0  # seconds of that without a word to who watches
FLUSH_PATIENCE = 1.0  # seconds a checkpoint waits; rows that are late by then are sent again after a resume

# A forked process has PyTorch imported already; elsewhere than on Linux forking is not safe.
START_METHOD = "fork" if sys.platform == "linux" else "spawn"

Call = tuple[str, tuple]  # a method of Tracker, its arguments
CLOSE: Call = ("close", ())


class Starter(Protocol):
    """Opens a tracker in its own process. It travels there, so it holds plain values only."""

    def __call__(self, warn: Callable[[str], None]) -> Any: ...


def run_tracker(connection: Connection, name: str, start: Starter) -> None:
    """All that the process of a tracker does."""
    for number in STOP_SIGNALS:  # they are for the parent, which sends what is left and then `close`
        signal.signal(number, signal.SIG_IGN)
    LOGGER.disabled = True  # the console and the log are the parent's
    if hasattr(os, "nice"):  # not on Windows
        os.nice(NICENESS)
    for stream, descriptor in (("stdout", 1), ("stderr", 2)):  # without what the parent has buffered
        with contextlib.suppress(OSError):
            setattr(sys, stream, open(descriptor, "w", buffering=1, errors="replace", closefd=False))  # noqa: SIM115
    let_go_of_files(keep={1, 2, connection.fileno()})
    threading.Thread(target=_outlive, args=(os.getppid(), PATIENCE), daemon=True).start()
    serve(connection, name, start)
    os._exit(0)  # whatever threads and exit hooks the tracker has made are left behind


def let_go_of_files(keep: set[int]) -> None:
    """In a forked process: the parent's open files, the lock of its run among them, are its own.

    They become /dev/null instead of being closed, since Python may still close those numbers some day.
    """
    if sys.platform != "linux":  # nothing was inherited
        return
    try:
        descriptors = [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:
        descriptors = list(range(1024))
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in descriptors:
        with contextlib.suppress(OSError):  # not open
            if descriptor not in keep | {nowhere} and os.fstat(descriptor):
                os.dup2(nowhere, descriptor, inheritable=False)
    os.close(nowhere)


def _outlive(parent: int, patience: float) -> None:
    """In a thread of a tracker's process: leave when the parent is gone and the tracker does not close."""
    while os.getppid() == parent:
        time.sleep(1)
    time.sleep(patience)
    os._exit(1)


def serve(connection: Connection, name: str, start: Starter) -> None:
    """Open a tracker and do what is sent, in order, until `close`; a parent that is gone counts as that.

    The parent is told ("started", identity), ("flushed", None), ("closed", None), or ("failed", a line): the
    tracker is closed then, and nothing else is heard.
    """
    told: list[str] = []

    def tell(what: str, value: str | None = None) -> None:
        with contextlib.suppress(OSError):  # a parent that is gone
            connection.send((what, value))

    def warn(text: str) -> None:
        if not told:
            tell("failed", text)
        told.append(text)

    def receive() -> list[Call]:
        with contextlib.suppress(EOFError, OSError):
            return connection.recv()
        return [CLOSE]

    guard = Guard(name, warn)
    tracker = guard.attempt(start, warn)
    if tracker is not None:
        tell("started", getattr(tracker, "identity", None))
    calls: list[Call] = []
    while not told:
        calls = calls or receive()
        method, arguments = calls.pop(0)
        guard.attempt(getattr(tracker, method), *arguments)
        if not told and method == "flush":
            tell("flushed")
        if method == "close":
            if not told:
                tell("closed")
            return
    if tracker is not None:  # it holds locks and files
        with contextlib.suppress(Exception, SystemExit):
            tracker.close()


class Background(Tracker):
    """Feeds one tracker in a process of its own, in order.

    There it can neither hold up the loop, as a thread of this process would, nor hang or crash it. Its calls
    are sent some times a second, all that have come together.

    Attributes:
        name: what people call the tracker.
        synced: points before this step have reached the tracker and were flushed.
        identity: what the tracker calls the run, once that is known.
        started: whether the tracker is open by now.
    """

    def __init__(
        self,
        name: str,
        start: Starter,
        warn: Callable[[str], None],
        synced: int = 0,
        identity: str | None = None,
    ):
        self.name = name
        self.synced = synced
        self.identity = identity
        self.started = False
        self._warn = _once(warn)
        self._guard = Guard(name, self._warn)
        self._calls: queue.Queue[Call] = queue.Queue(QUEUE_SIZE)
        self._urgent, self._flush, self._ended = (threading.Event() for _ in range(3))
        self._flush.set()
        self._connection: Any = None
        self._process: Any = None
        try:
            self._fork(start)
        except Exception as error:  # but no SystemExit: in this process it is a signal's
            self._guard.fail(f"{type(error).__name__}: {error}")

    def _fork(self, start: Starter) -> None:
        context: Any = multiprocessing.get_context(START_METHOD)
        ours, theirs = context.Pipe()
        with theirs, block_signals(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking while PyTorch's threads sleep
            process = context.Process(target=run_tracker, args=(theirs, self.name, start))
            # Else the standard streams are flushed first, which fails for good once their reader is gone.
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                process.start()
            atexit.register(process.kill)  # where an exception has kept `close` from being called
        self._connection, self._process = ours, process

    def attend(self) -> Background:
        """Begin to send and to listen; once all are forked, since a fork does not go well with threads."""
        if self._process is None:
            self._ended.set()
            return self
        for work in (self._send, self._listen):
            threading.Thread(target=work, name=self.name, daemon=True).start()
        return self

    @property
    def working(self) -> bool:
        """Whether nothing has failed so far."""
        return self._guard.enabled

    @property
    def ended(self) -> bool:
        """Whether its process is gone."""
        return self._ended.is_set()

    @property
    def caught_up(self) -> bool:
        """Whether the last flush is done."""
        return self._flush.is_set()

    def _send(self) -> None:
        """In a thread: send what has come, up to `close`; after a failure only that."""
        method = ""
        while self.working and method != "close":
            if self._calls.qsize() < PARCEL:
                self._urgent.wait(HANDOVER)
                self._urgent.clear()
            calls = self._take(PARCEL)
            if calls:
                self._guard.attempt(self._deliver, calls)
                method = calls[-1][0]
        self._take(QUEUE_SIZE)  # who waits for a place in the queue need not
        if method != "close":
            self._deliver([CLOSE])

    def _take(self, most: int) -> list[Call]:
        calls: list[Call] = []
        with contextlib.suppress(queue.Empty):
            while len(calls) < most:
                calls.append(self._calls.get_nowait())
        return calls

    def _deliver(self, calls: list[Call]) -> None:
        with contextlib.suppress(OSError):  # `_listen` sees what has become of the process
            self._connection.send(calls)

    def _listen(self) -> None:
        """In a thread: hear what the process says, until it ends."""
        what = ""
        with contextlib.suppress(EOFError, OSError):
            while True:
                what, value = self._connection.recv()
                if what == "started":
                    self.identity, self.started = value or self.identity, True
                    LOGGER.debug("%s has opened the run", self.name)
                elif what == "failed":
                    self._guard.enabled = False
                    self._warn(value)
                if what in ("flushed", "failed"):
                    self._flush.set()
        self._process.join()
        if what == "closed":
            LOGGER.debug("%s has everything", self.name)
        else:
            self._guard.fail(f"its process has ended ({self._process.exitcode})")
        atexit.unregister(self._process.kill)
        self._ended.set()
        self._flush.set()

    def _call(self, method: str, *arguments: Any) -> None:
        if self.working:
            try:
                self._calls.put((method, arguments), timeout=PATIENCE)
            except queue.Full:
                self._guard.fail(f"it took nothing for {PATIENCE:.0f} seconds")

    def log_scalars(self, values: dict[str, float], step: int) -> None:
        self._call("log_scalars", values, step)

    def log_histograms(self, histograms: list[Histogram], step: int) -> None:
        self._call("log_histograms", histograms, step)

    def log_images(self, images: list[Image], step: int) -> None:
        self._call("log_images", images, step)

    def log_texts(self, texts: dict[str, str], step: int) -> None:
        self._call("log_texts", texts, step)

    def log_embedding(self, embedding: Embedding, step: int) -> None:
        self._call("log_embedding", embedding, step)

    def start_flush(self) -> threading.Event:
        """Ask for a flush; the event is set when it is done."""
        self._flush.clear()
        self._call("flush")
        self._urgent.set()
        if not self.working or self._ended.is_set():  # nobody will answer
            self._flush.set()
        return self._flush

    def flushed(self, step: int) -> None:
        """A flush after all points before `step` is done: the tracker has them, unless it failed."""
        if self.working:
            self.synced = step

    def start_close(self) -> threading.Event:
        """Ask for the end; the event is set when the tracker has let go."""
        self._call("close")
        self._urgent.set()
        return self._ended

    def give_up(self, why: str) -> None:
        """End the process of a tracker that is not waited for any longer."""
        self._guard.enabled = False
        self._warn(f"{self.name} may lack the end of the run: {why}")
        self._process.kill()
        self._ended.wait(PATIENCE)


def _once(warn: Callable[[str], None]) -> Callable[[str], None]:
    """`warn` for the first text; what fails in two ways, or is found by two threads, is still one warning."""
    left = [warn]

    def warn_once(text: str) -> None:
        try:
            first = left.pop()
        except IndexError:
            return
        first(text)

    return warn_once


def _wait_for_all(events: list[threading.Event], seconds: float) -> list[bool]:
    """Wait for all together: which of them were set in time."""
    end = time.monotonic() + seconds
    return [event.wait(max(0.0, end - time.monotonic())) for event in events]


def flush_all(copies: Iterable[Background], step: int) -> None:
    """Make what was told before `step` durable in all; who is late has it later, or again after a resume."""
    copies = list(copies)
    events = [copy.start_flush() for copy in copies]
    for copy, done in zip(copies, _wait_for_all(events, FLUSH_PATIENCE), strict=True):
        if done:
            copy.flushed(step)


def close_all(copies: Iterable[Background]) -> None:
    """Close all; the process of one that does not answer in PATIENCE seconds or before a signal is ended."""
    end = time.monotonic() + PATIENCE  # a full queue takes some of it
    copies = list(copies)
    why = f"it did not close within {PATIENCE:.0f} seconds"
    try:
        events = [copy.start_close() for copy in copies]
        _wait_for_all(events, min(SILENCE, PATIENCE))
        if late := [copy.name for copy in copies if not copy.ended]:
            wait = f"{PATIENCE:.0f} seconds at most; Ctrl-C goes without"
            LOGGER.info("waiting for %s to take the rest, %s", " and ".join(late), wait)
        _wait_for_all(events, end - time.monotonic())
    except (KeyboardInterrupt, SystemExit):  # the run is done, or saved: a signal can mean nothing else
        why = "it was not waited for"
    for copy in copies:
        if not copy.ended:
            copy.give_up(why)
