"""Signals that ask a program to stop: Ctrl-C, SIGTERM, SIGHUP of a terminal that is closed, SIGUSR1 of SLURM.

A script installs `RaiseSignal`: a signal ends it through every `with` and `finally`. While it trains,
`StopSignals` takes its place: a signal is a request that the loop reads between two steps. A logout or a
notebook's stop button sends several kinds at once: what follows a signal of another kind within
SAME_REQUEST_SECONDS is the same request.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

STOP_SIGNALS = tuple(n for n in signal.Signals if n.name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"))
SAME_REQUEST_SECONDS = 2.0


Handler = Callable[[int, FrameType | None], None] | signal.Handlers


@contextlib.contextmanager
def signal_handler(handler: Handler) -> Iterator[None]:
    """Install `handler` for STOP_SIGNALS until the end of the block; see `_install`."""
    previous = _install(handler)
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def _install(handler: Handler) -> dict[signal.Signals, Any]:
    """Install `handler` for STOP_SIGNALS; return the handlers before.

    A SIGHUP or SIGUSR1 that is ignored stays ignored: nohup does that on purpose. SIGINT does not: a shell
    script starts its background jobs with SIGINT ignored, and `kill -INT` is to reach these too.
    """
    always = (signal.SIGINT, signal.SIGTERM)
    caught = [n for n in STOP_SIGNALS if n in always or signal.getsignal(n) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in caught}


@contextlib.contextmanager
def block_signals() -> Iterator[None]:
    """Delay STOP_SIGNALS until the end of the block, for this thread and for processes that it forks."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class StopHandler:
    """A handler that remembers the first signal, and when it came."""

    received: int | None = None
    received_at = 0.0  # by time.monotonic()

    def remember(self, number: int) -> None:
        """Remember a signal if it is the first."""
        if self.received is None:
            self.received, self.received_at = number, time.monotonic()

    def is_same_request(self, number: int) -> bool:
        """Return whether a signal belongs to the request of the first: of another kind, and soon after it."""
        soon = time.monotonic() - self.received_at < SAME_REQUEST_SECONDS
        return self.received not in (None, number) and soon


class RaiseSignal(StopHandler):
    """The handler of a whole script: it raises, so that every `with` and `finally` runs."""

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        if not self.is_same_request(number):  # which would break off what the first one lets run
            self.remember(number)
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    @contextlib.contextmanager
    def until_exit(self) -> Iterator[None]:
        """Handle STOP_SIGNALS in this block, which is all of a script.

        After a first signal the other kinds are ignored until the process has ended: Python takes a moment to
        exit, without its handlers, and one of the same request would change the exit code.
        """
        previous = _install(self)
        try:
            yield
        finally:
            for number, before in previous.items():
                signal.signal(number, before if self.received in (None, number) else signal.SIG_IGN)


class StopSignals(StopHandler):
    """Turns STOP_SIGNALS into a request that a loop reads; a second one ends the process at once.

    What is on disk stays valid either way, since every file is written atomically.

    Args:
        notice: returns the line to print at the first signal: what will happen now.
        announce: prints it. It must not use print(): the handler may interrupt a print() that holds its lock.
        exit_callback: called before a second signal ends the process.

    Raises:
        SystemExit: on entry, when a signal came earlier and its exception was lost.
    """

    def __init__(
        self,
        notice: Callable[[], str] = lambda: "stopping after this step",
        announce: Callable[[str], object] = lambda line: os.write(2, f"\n{line}\n".encode()),
        exit_callback: Callable[[], object] = lambda: None,
    ) -> None:
        self._notice, self._announce, self._exit_callback = notice, announce, exit_callback
        self._installed = contextlib.ExitStack()
        self._of_script: RaiseSignal | None = None  # the handler whose place this one takes
        self._n_delays = 0  # threads in a block of `delayed`
        self._lock = threading.Lock()  # of _n_delays; a handler only reads it, and so never waits
        self._waiting: deque[int] = deque()  # signals that are to be handled

    def __enter__(self) -> StopSignals:
        before = signal.getsignal(signal.SIGTERM)
        self._of_script = before if isinstance(before, RaiseSignal) else None
        self._installed.enter_context(signal_handler(self._handle))
        # Python drops an exception that is raised in a destructor.
        if self._of_script and self._of_script.received is not None:
            self._installed.close()
            raise SystemExit(128 + self._of_script.received)
        return self

    def __exit__(self, *_: object) -> None:
        if self._of_script and self.received is not None:
            self._of_script.received, self._of_script.received_at = self.received, self.received_at
        self._installed.close()

    @contextlib.contextmanager
    def delayed(self) -> Iterator[None]:
        """Handle signals at the end of the block; several threads may be in one."""
        with self._lock:
            self._n_delays += 1
        try:
            yield
        finally:
            with self._lock:
                self._n_delays -= 1
            self._handle_waiting()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self._waiting.append(number)
        self._handle_waiting()

    def _handle_waiting(self) -> None:
        while self._waiting and not self._n_delays:
            with contextlib.suppress(IndexError):  # another thread has taken it
                self._react(self._waiting.popleft())

    def _react(self, number: int) -> None:
        if self.is_same_request(number):
            return
        if self.received is not None:
            with contextlib.suppress(Exception):
                self._exit_callback()
            os._exit(128 + number)
        self.remember(number)
        with contextlib.suppress(OSError):  # the standard error may be closed
            again = "press Ctrl-C again to exit" if number == signal.SIGINT else "a second signal exits"
            self._announce(f"{self._notice()}; {again} at once")
