"""Runs a tracker in a background process, where it can neither slow down, block nor crash the training.

The process (tracker_process.py) reads the scalars from the run's metrics file, at its own pace: however far
it is behind, also after a resume that sends a whole run again, nothing waits for it and no memory is taken.
All else that is logged goes through a pipe. closing.py flushes and closes the trackers of a run together.

What a tracker raises is caught in its process; the guard of `BackgroundTracker` is for the process itself:
that it cannot start, dies, or takes no more.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import logging
import multiprocessing
import pickle
import queue
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils_alg1.base.errors import describe
from utils_alg1.base.guard import Guard
from utils_alg1.base.scripts import command
from utils_alg1.base.summaries import Kind
from utils_alg1.base.text import shell_quote
from utils_alg1.base.threads import enough_threads, thread_limit
from utils_alg1.console.signals import block_signals
from utils_alg1.tracking import tracker_process
from utils_alg1.tracking.tracker_process import DESCRIPTORS, Answer, CreateTracker, Method, run_tracker

LOGGER = logging.getLogger("alg1")
QUEUE_SIZE = 1000  # calls that may wait to be sent
TICK_SECONDS = 1.0  # seconds between two answers at most
LEAVE_SECONDS = 3.0  # seconds that a tracker with rows left has to leave without them
# A forked process has PyTorch imported already. Forking is only safe on Linux.
START_METHOD = "fork" if DESCRIPTORS.exists() else "spawn"

Call = tuple[Method, bytes]  # a method and, pickled, the same with its arguments
CLOSE = (Method.CLOSE, pickle.dumps((Method.CLOSE, ())))
LEAVE = (Method.LEAVE, pickle.dumps((Method.LEAVE, ())))
TICK = (Method.FLUSH, pickle.dumps((Method.FLUSH, ())))


class BackgroundTracker:
    """A tracker in a process of its own, which is given the rows of a metrics file, and what is logged here.

    Each call is sent when the one before is done. A tracker that raises, hangs or crashes costs one warning.

    Attributes:
        flushed_step: the tracker has flushed all scalars before it: after a resume it is given the others.
        run_hash: the tracker's own name of the run, once it is known.
        left: the share of the metrics file that it has not read yet; 0.0 while it keeps up.
        answer_time: when its process last answered (`time.monotonic`).
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
        self.left, self.answer_time = 0.0, 0.0
        self.ready, self.ended = threading.Event(), threading.Event()
        self._guard = Guard(name, warn)
        self._run_dir = metrics_path.parent.parent
        self._calls: queue.Queue[Call] = queue.Queue(QUEUE_SIZE)
        self._leaves = False
        self._has_run = flushed_step > 0  # whether the run is there, maybe without its end
        if not enough_threads():  # a library of a tracker may abort its process when it gets none
            self._fail_to_start(thread_limit())
            return
        try:
            self._start_process(create, metrics_path)
        except BlockingIOError:  # of the fork
            self._fail_to_start(thread_limit())
        except Exception as error:  # not SystemExit: in this process it comes from a signal
            self._fail_to_start(describe(error))

    def _fail_to_start(self, reason: str) -> None:
        self._guard.fail(reason)
        self.ended.set()

    def _start_process(self, create: CreateTracker, metrics_path: Path) -> None:
        context: Any = multiprocessing.get_context(START_METHOD)
        self._connection, theirs = context.Pipe()
        with theirs, block_signals(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # forking while PyTorch's threads sleep
            arguments = (theirs, self.name, create, metrics_path.absolute())  # whatever changes the folder
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
                self._connection.close()  # its process leaves
                self._fail_to_start(thread_limit())
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
        method = Method.OPEN
        while True:
            answer: Answer = self._connection.recv()
            self._has_run = True
            self._take(method, answer)
            if method is Method.LEAVE or (method is Method.CLOSE and not (answer.left and self.working)):
                return
            method, call = self._next_call(method)
            self._connection.send_bytes(call)

    def _take(self, method: Method, answer: Answer) -> None:
        """Take the answer to a call of `method`."""
        self.run_hash = answer.run_hash or self.run_hash
        for failure in answer.failures:
            self._guard.disable(failure)
        if method is Method.OPEN and answer.remark:
            LOGGER.info("%s", answer.remark)
        self.left, self.answer_time = answer.left, time.monotonic()
        if method is not Method.LOG and self.working:
            self.flushed_step = answer.step
        if method in (Method.OPEN, Method.FLUSH):
            self.ready.set()

    def _next_call(self, method: Method) -> Call:
        """Return what to send after a call of `method`."""
        if not self.working or (method is Method.CLOSE and self._leaves):
            return LEAVE
        if method is Method.CLOSE:  # there were rows left
            return CLOSE
        try:
            return self._calls.get(timeout=TICK_SECONDS)
        except queue.Empty:
            return TICK

    def log(self, kind: Kind, payload: Any, step: int) -> None:
        self._call(Method.LOG, kind, payload, step)

    def start_flush(self, step: int) -> None:
        """Request a flush of what was logged before `step`. The tracker must be `ready`."""
        self.ready.clear()
        self._call(Method.FLUSH, step)
        if not self.working or self.ended.is_set():  # there will be no answer
            self.ready.set()

    def start_close(self) -> None:
        """Request the end."""
        self._call(Method.CLOSE)

    def _call(self, method: Method, *arguments: Any) -> None:
        if not self.working:
            return
        call = self._guard.attempt(pickle.dumps, (method, arguments))
        try:
            self._calls.put((method, call) if self.working else LEAVE, timeout=tracker_process.TIMEOUT)
        except queue.Full:
            self._guard.fail(f"it took nothing for {tracker_process.TIMEOUT:.0f} seconds")

    def give_up(self, reason: str) -> None:
        """End the tracker's process: without the rows that are left, or by force."""
        lacks = "may lack the end of the run" if self._has_run else "lacks the whole run"
        if self.left:
            self._leaves = True
            self.ended.wait(min(LEAVE_SECONDS, tracker_process.TIMEOUT))
            lacks = f"lacks the steps from {self.flushed_step} on"
        sends = f"{command('compare.py')} {shell_quote(str(self._run_dir))} --send-to {self.name.lower()}"
        self._guard.disable(
            f"{self.name} {lacks}: {reason}; a resume sends the missing curves, and so does: {sends}"
        )
        self._process.kill()
        with contextlib.suppress(queue.Full):
            self._calls.put_nowait(LEAVE)  # a signal may have kept `close` from being sent
        self.ended.wait(tracker_process.TIMEOUT)
