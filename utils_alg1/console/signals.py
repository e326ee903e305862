"""Signals that ask a program to stop: Ctrl-C, SIGTERM, and SIGHUP of a terminal that is closed.

A script installs `raise_on_signals`: a signal ends it through every `with` and `finally`. While it trains,
`StopSignals` takes their place: a signal is a request that the loop reads between two steps.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], None]

# Windows has no SIGHUP.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


@contextlib.contextmanager
def signal_handler(handler: Handler | signal.Handlers) -> Iterator[dict[int, Any]]:
    """Install `handler` for STOP_SIGNALS, and yield the handlers before, which are restored at the end.

    A SIGHUP that is ignored, as under nohup, stays ignored.
    """
    hangup = getattr(signal, "SIGHUP", None)
    caught = [n for n in STOP_SIGNALS if n != hangup or signal.getsignal(n) != signal.SIG_IGN]
    previous = {number: signal.signal(number, handler) for number in caught}
    try:
        yield previous
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


class _RaiseOnSignal:
    """Raises KeyboardInterrupt for SIGINT, SystemExit for the others.

    Attributes:
        pending: the newest signal. Its exception is lost if it is raised within a destructor, for example.
    """

    def __init__(self) -> None:
        self.pending: int | None = None

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        self.pending = number
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def raise_on_signals() -> contextlib.AbstractContextManager:
    """The context of a whole script: STOP_SIGNALS raise, so that every `with` and `finally` runs."""
    return signal_handler(_RaiseOnSignal())


def write_stderr(text: bytes) -> None:
    """Write to the standard error, past Python's own buffer."""
    os.write(2, text)


class StopSignals:
    """Turns STOP_SIGNALS into a request that a loop reads; a second signal ends the process at once.

    What is on disk stays valid either way, since every file is written atomically. The previous handlers
    are restored at the end of the `with` block.

    Args:
        notice: returns the line to print at the first signal: what will happen now.
        announce: prints it. It must not use print(): the handler may interrupt a print() that holds its lock.
        exit_callback: called before a second signal ends the process.

    Attributes:
        received: the first signal, or None.

    Raises:
        SystemExit: on entry, when a signal came earlier and its exception was lost.
    """

    def __init__(
        self,
        notice: Callable[[], str] = lambda: "stopping after this step",
        announce: Callable[[bytes], object] = write_stderr,
        exit_callback: Callable[[], object] | None = None,
    ) -> None:
        self.received: int | None = None
        self._notice, self._announce, self._exit_callback = notice, announce, exit_callback
        self._installed = contextlib.ExitStack()

    def __enter__(self) -> StopSignals:
        with contextlib.ExitStack() as stack:
            previous = stack.enter_context(signal_handler(self._handle))
            for handler in previous.values():
                if isinstance(handler, _RaiseOnSignal) and handler.pending is not None:
                    raise SystemExit(128 + handler.pending)
            self._installed = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._installed.close()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            if self._exit_callback is not None:
                with contextlib.suppress(Exception):
                    self._exit_callback()
            os._exit(128 + number)
        self.received = number
        with contextlib.suppress(OSError):  # the standard error may be closed
            self._announce(f"\n{self._notice()}; once more to leave at once\n".encode())
