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
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

STOP_SIGNALS = tuple(n for n in signal.Signals if n.name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"))
SAME_REQUEST_SECONDS = 2.0


@contextlib.contextmanager
def signal_handler(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> Iterator[None]:
    """Install `handler` for STOP_SIGNALS until the end of the block.

    A SIGHUP or SIGUSR1 that is ignored, as under nohup, stays ignored.
    """
    always = (signal.SIGINT, signal.SIGTERM)
    caught = [n for n in STOP_SIGNALS if n in always or signal.getsignal(n) != signal.SIG_IGN]
    previous = {number: signal.signal(number, handler) for number in caught}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


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

    def repeats(self, number: int) -> bool:
        """Remember a first signal; return whether this one belongs to the request of the first."""
        now = time.monotonic()
        if self.received is None:
            self.received, self.received_at = number, now
            return False
        return number != self.received and now - self.received_at < SAME_REQUEST_SECONDS


class RaiseSignal(StopHandler):
    """The handler of a whole script: it raises, so that every `with` and `finally` runs."""

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        if not self.repeats(number):  # which would break off what the first one lets run
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


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
        self._of_script: Any = None  # the handler whose place this one takes
        self._delays: list[None] = []  # one for each block of `delayed`
        self._waiting: deque[int] = deque()  # signals that are to be handled

    def __enter__(self) -> StopSignals:
        self._of_script = signal.getsignal(signal.SIGTERM)
        self._installed.enter_context(signal_handler(self._handle))
        # Python drops an exception that is raised in a destructor.
        if isinstance(self._of_script, RaiseSignal) and self._of_script.received is not None:
            self._installed.close()
            raise SystemExit(128 + self._of_script.received)
        return self

    def __exit__(self, *_: object) -> None:
        if isinstance(self._of_script, RaiseSignal) and self.received is not None:
            self._of_script.received, self._of_script.received_at = self.received, self.received_at
        self._installed.close()

    @contextlib.contextmanager
    def delayed(self) -> Iterator[None]:
        """Handle signals at the end of the block; several threads may be in one."""
        self._delays.append(None)
        try:
            yield
        finally:
            self._delays.pop()
            self._handle_waiting()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self._waiting.append(number)
        self._handle_waiting()

    def _handle_waiting(self) -> None:
        while self._waiting and not self._delays:
            with contextlib.suppress(IndexError):  # another thread has taken it
                self._react(self._waiting.popleft())

    def _react(self, number: int) -> None:
        is_first = self.received is None
        if self.repeats(number):
            return
        if not is_first:
            with contextlib.suppress(Exception):
                self._exit_callback()
            os._exit(128 + number)
        with contextlib.suppress(OSError):  # the standard error may be closed
            self._announce(f"{self._notice()}; once more to leave at once")
