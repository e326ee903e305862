"""A clock that stands still while the process is stopped: by Ctrl-Z, SIGSTOP, or a batch system.

(While a machine sleeps, Python's clocks stand still by themselves.)
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator


class RunningTime:
    """The seconds that this process has run.

    A process learns of a pause when it is continued (SIGCONT), but not how long it was. Since the reading
    before it, it ran as long as its CPU time tells, at the ratio of the two so far: the rest was the pause.
    """

    def __init__(self) -> None:
        self._first = self._last = self._clocks()
        self._stopped = 0.0  # seconds
        self._continued = False  # since the last reading

    def __call__(self) -> float:
        seconds, cpu_seconds = self._clocks()
        if self._continued:
            self._continued = False
            seconds, cpu_seconds = self._clocks()  # those before may be from before the pause
            self._stopped += max(0.0, seconds - self._last[0] - self._ran(cpu_seconds - self._last[1]))
        self._last = seconds, cpu_seconds
        return seconds - self._stopped

    def _ran(self, cpu_seconds: float) -> float:
        """Return how long the process took for so many seconds of the CPU."""
        cpu_before = self._last[1] - self._first[1]
        ran_before = self._last[0] - self._first[0] - self._stopped
        return cpu_seconds * (ran_before / cpu_before if cpu_before else 1.0)

    @staticmethod
    def _clocks() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Notice pauses in this block; only in the main thread."""
        previous = signal.signal(signal.SIGCONT, lambda *_: setattr(self, "_continued", True))
        try:
            yield
        finally:
            signal.signal(signal.SIGCONT, previous)


running_time = RunningTime()
