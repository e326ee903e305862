"""The GPUs that the trials of a search share."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class Gpus:
    """The CUDA devices that this process sees, if they are to be shared: each trial gets one of them.

    Args:
        device: that of the trials. One that names the CPU or a single GPU is that of all trials; None: it is
            searched.

    Attributes:
        names: as CUDA_VISIBLE_DEVICES names them; [] if trials do not share several.
    """

    def __init__(self, device: str | None):
        from utils_alg1.training.devices import visible_gpus

        names = visible_gpus() if device in ("auto", "cuda") else []
        self.names = names if len(names) > 1 else []
        self._trials = dict.fromkeys(self.names, 0)
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def assign(self, trial_number: int) -> Iterator[dict[str, str]]:
        """Give a trial the GPU that the fewest trials use: yield the variables of its environment.

        Of several with as few it is decided by the number of the trial, so that the trials of two processes,
        which know nothing of each other's, are likely to be on different ones.
        """
        if not self.names:
            yield {}
            return
        with self._lock:
            first = trial_number % len(self.names)
            gpu = min(self.names[first:] + self.names[:first], key=self._trials.__getitem__)
            self._trials[gpu] += 1
        try:
            yield {"CUDA_VISIBLE_DEVICES": gpu}
        finally:
            with self._lock:
                self._trials[gpu] -= 1
