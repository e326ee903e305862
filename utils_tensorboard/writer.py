"""The life of a TensorBoard event file."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from errors import Guard


class TensorBoardWriter:
    """Opens, feeds and closes a `SummaryWriter`. No failure of it reaches the caller.

    Args:
        log_dir: folder of the event files.
        purge_step: when a run is resumed, hide the points of this step and later ones.
        warn: told once, when TensorBoard fails or is not installed.
    """

    def __init__(
        self,
        log_dir: str | Path,
        purge_step: int | None = None,
        warn: Callable[[str], None] = warnings.warn,
    ):
        self._guard = Guard("TensorBoard", warn)
        self._writer = self._guard.attempt(self._open, Path(log_dir), purge_step)

    @staticmethod
    def _open(log_dir: Path, purge_step: int | None) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        # Event files are read in the order of their names, which start with whole seconds: a file of this
        # second could sort after ours, and its points would then outlive the purge.
        log_dir.mkdir(parents=True, exist_ok=True)
        while any(log_dir.glob(f"events.out.tfevents.{int(time.time())}.*")):
            time.sleep(0.02)
        return SummaryWriter(str(log_dir), purge_step=purge_step)

    @property
    def enabled(self) -> bool:
        """Whether points are still being written."""
        return self._guard.enabled and self._writer is not None

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Write one point of a curve."""
        if self.enabled:
            self._guard.attempt(self._writer.add_scalar, tag, value, step)

    def add_histogram(self, tag: str, counts: Any, edges: Any, step: int) -> None:
        """Write a histogram that is already counted: n counts between n + 1 edges."""
        if self.enabled:
            self._guard.attempt(self._add_histogram, tag, counts, edges, step)

    def _add_histogram(self, tag: str, counts: Any, edges: Any, step: int) -> None:
        import numpy as np

        middles = (edges[:-1] + edges[1:]) / 2
        self._writer.add_histogram_raw(
            tag,
            min=float(edges[0]),
            max=float(edges[-1]),
            num=int(counts.sum()),
            sum=float(np.dot(counts, middles)),
            sum_squares=float(np.dot(counts, middles**2)),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )

    def flush(self) -> None:
        """Hand everything written so far to the operating system."""
        if self.enabled:
            self._guard.attempt(self._writer.flush)

    def close(self) -> None:
        """Flush and close; what is written after that is dropped."""
        writer, self._writer = self._writer, None
        if writer is not None:
            self._guard.attempt(writer.close)
