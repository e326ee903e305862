"""`logs/metrics.jsonl`, the run's own record of its metrics: writing, reading and cutting it back."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from utils_alg1.base.errors import disk_error
from utils_alg1.base.summaries import Kind, Tracker

Point = tuple[float, float]  # step, value

EACH_STEP = "loss/train_step"  # marks the row of a training step; other rows are much rarer
MAX_VALUE = 1e100  # of a curve: sums and quotients of such values stay finite
FLUSH_SECONDS = 0.5  # seconds for which the rows of steps may stay unwritten, so that others see them soon


class MetricsFile(Tracker):
    """Writes `logs/metrics.jsonl`: a JSON object per line for each set of scalars, and nothing else.

    Every method raises an Alg1Error if the file cannot be written (exit code 4).
    """

    def __init__(self, path: Path):
        self.path = path
        with disk_errors(path):
            self._file = path.open("a", encoding="utf-8")
        self._flush_time = 0.0

    def log(self, kind: Kind, payload: Any, step: int) -> None:
        if kind != "scalars":
            return
        with disk_errors(self.path):
            self._file.write(json.dumps({"step": step, **payload}) + "\n")
            # Rare rows are flushed, so that they can be read at once.
            if EACH_STEP not in payload or time.monotonic() > self._flush_time:
                self._file.flush()
                self._flush_time = time.monotonic() + FLUSH_SECONDS

    def flush(self) -> None:
        with disk_errors(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with disk_errors(self.path):
            self._file.close()


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise disk_error(f"write {path}", error) from error


def _parse_row(line: bytes) -> dict[str, float] | None:
    """Parse a row of a metrics file; None if it is damaged, as after a kill or a power cut."""
    try:
        row = json.loads(line.decode()) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def read_metrics(path: Path, strict: bool = False) -> Iterator[dict[str, float]]:
    """Yield the rows of a metrics file, up to the first damaged one; if `strict`, that raises ValueError."""
    if path.exists():
        with path.open("rb") as file:
            yield from read_rows(file, strict)


def read_rows(file: BinaryIO, strict: bool = False) -> Iterator[dict[str, float]]:
    """Yield the next rows of an open metrics file; see read_metrics. A damaged one is read again."""
    for line in file:
        if (row := _parse_row(line)) is None:
            if strict and line.endswith(b"\n"):  # otherwise it may still be being written
                raise ValueError(f"{file.name}: a row is damaged")
            file.seek(-len(line), os.SEEK_CUR)
            return
        yield row


class RowReader:
    """Reads a metrics file while it is written: each row from a step on, once.

    The row of an evaluation gets the lowest val loss so far too, also that of steps before: "best_val_loss".

    Attributes:
        step: the rows of earlier steps were read.
        left: the share of the file that was not read yet; 0.0 when there was no further row.
    """

    def __init__(self, path: Path, first_step: int):
        self.step, self.left = first_step, 0.0
        self._path = path
        self._file: BinaryIO | None = None
        self._best_val = math.inf

    def read(self, is_enough: Callable[[], bool]) -> Iterator[dict[str, float]]:
        """Yield the next rows, until there is none or `is_enough()`, which is asked after each."""
        if self._file is None:
            if not self._path.exists():
                return
            self._file = self._path.open("rb")
        first_step = self.step
        for row in read_rows(self._file):
            if row.get("loss/val", math.inf) < self._best_val:  # never of NaN
                self._best_val = row["loss/val"]
            if "loss/val" in row and self._best_val < math.inf:
                row["best_val_loss"] = self._best_val
            if row["step"] >= first_step:
                self.step = int(row["step"])
                yield row
            if is_enough():
                self.left = 1 - self._file.tell() / max(os.fstat(self._file.fileno()).st_size, 1)
                return
        self.left = 0.0


def read_curves(path: Path) -> dict[str, list[Point]]:
    """Read the curves of a metrics file, by the name of the metric, up to its first damaged row.

    Values that are not finite are left out, and so are those larger than any float32: no curve can show them.
    """
    curves: dict[str, list[Point]] = {}
    for row in read_metrics(path):
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)) and abs(value) <= MAX_VALUE:
                curves.setdefault(name, []).append((row["step"], value))
    return curves


def cut_metrics(path: Path, step: int, warn: Callable[[str], None]) -> None:
    """Cut a metrics file back with `cut_rows`, and warn if rows before `step` are lost that way."""
    kept_step = cut_rows(path, step)
    if kept_step < step - 1:
        warn(f"{path} is damaged: its rows of steps {kept_step + 1} to {step - 1} are lost")


def cut_rows(path: Path, step: int) -> int:
    """Remove the rows of `step` and later ones, which a run resumed at `step` writes again.

    A damaged row and everything after it are removed too. Return the step of the last row left (or -1).
    """
    keep, kept_step = 0, -1
    if path.exists():
        with disk_errors(path), path.open("r+b") as file:
            for line in file:
                row = _parse_row(line)
                if row is None or row["step"] >= step:
                    break
                keep, kept_step = keep + len(line), int(row["step"])
            file.truncate(keep)
            os.fsync(file.fileno())
    return kept_step
