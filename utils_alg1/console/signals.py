"""Signals that ask a program to stop: Ctrl-C, SIGTERM, and SIGHUP of a terminal that is closed.

A script installs `RaiseSignal`: a signal ends it through every `with` and `finally`. While it trains,
`StopSignals` takes its place: a signal is a request that the loop reads between two steps.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType

STOP_SIGNALS = tuple(n for n in signal.Signals if n.name in ("SIGINT", "SIGTERM", "SIGHUP"))


@contextlib.contextmanager
def signal_handler(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> Iterator[None]:
    """Install `handler` for STOP_SIGNALS until the end of the block.

    A SIGHUP that is ignored, as under nohup, stays ignored.
    """
    caught = [n for n in STOP_SIGNALS if n.name != "SIGHUP" or signal.getsignal(n) != signal.SIG_IGN]
    previous = {number: signal.signal(number, handler) for number in caught}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextlib.contextmanager
def block_signals() -> Iterator[None]:
    """Delay STOP_SIGNALS until the end of the block, for this thread and for processes that it forks."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class RaiseSignal:
    """The handler of a whole script: it raises, so that every `with` and `finally` runs."""

    pending: int | None = None  # the newest signal: Python drops an exception that is raised in a destructor

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        self.pending = number
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


class StopSignals:
    """Turns STOP_SIGNALS into a request that a loop reads; a second signal ends the process at once.

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
        self.received: int | None = None  # the first signal
        self._notice, self._announce, self._exit_callback = notice, announce, exit_callback
        self._installed = contextlib.ExitStack()

    def __enter__(self) -> StopSignals:
        before = signal.getsignal(signal.SIGTERM)
        self._installed.enter_context(signal_handler(self._handle))
        if isinstance(before, RaiseSignal) and before.pending is not None:
            self._installed.close()
            raise SystemExit(128 + before.pending)
        return self

    def __exit__(self, *_: object) -> None:
        self._installed.close()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            with contextlib.suppress(Exception):
                self._exit_callback()
            os._exit(128 + number)
        self.received = number
        with contextlib.suppress(OSError):  # the standard error may be closed
            self._announce(f"{self._notice()}; once more to leave at once")
