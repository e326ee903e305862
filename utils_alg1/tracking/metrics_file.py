"""What a tracker can be told, and the run's own file of it: `logs/metrics.jsonl`."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from utils_alg1.base.errors import disk_error

if TYPE_CHECKING:
    from utils_alg1.base.summaries import Embedding, Histogram, Image


Point = tuple[float, float]  # step, value

EACH_STEP = "loss/train_step"  # in the rows of single steps, by far the most


class Tracker:
    """What a tracker can be told; this one forgets everything. Steps count updates done before."""

    def log_scalars(self, values: dict[str, float], step: int) -> None:
        """Numbers by name, such as "loss/val"; together they are a row of the metrics file."""

    def log_histograms(self, histograms: list[Histogram], step: int) -> None:
        """Histograms of parameters, gradients or activations."""

    def log_images(self, images: list[Image], step: int) -> None:
        """Pictures."""

    def log_texts(self, texts: dict[str, str], step: int) -> None:
        """Texts by name."""

    def log_embedding(self, embedding: Embedding, step: int) -> None:
        """Vectors with their labels."""

    def flush(self) -> None:
        """Make what was told durable."""

    def close(self) -> None:
        """Flush and let go."""


class MetricsFile(Tracker):
    """`logs/metrics.jsonl`: a line of JSON for each set of scalars, in order, and nothing else.

    Raises:
        Alg1Error: the file system refused (exit code 4).
    """

    def __init__(self, path: Path):
        self.path = path
        with self._disk_errors():
            self._file = path.open("a", encoding="utf-8")

    def _disk_errors(self) -> contextlib.AbstractContextManager:
        return _as_disk_error(f"write {self.path}")

    def log_scalars(self, values: dict[str, float], step: int) -> None:
        with self._disk_errors():
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            if EACH_STEP not in values:  # what is rare can be read at once
                self._file.flush()

    def flush(self) -> None:
        with self._disk_errors():
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with self._disk_errors():
            self._file.close()


@contextlib.contextmanager
def _as_disk_error(action: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise disk_error(action, error) from error


def _parse_row(line: bytes) -> dict[str, float] | None:
    """A row of a metrics file; None for what a kill or a power cut has left of one."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def read_metrics(path: Path) -> Iterator[dict[str, float]]:
    """The rows of a metrics file, up to the first that is damaged."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            row = _parse_row(line)
            if row is None:
                return
            yield row


def read_outline(path: Path) -> Iterator[dict[str, float]]:
    """The rows of a metrics file but those of single steps, and last its newest row, whatever that is.

    Of the rows of single steps only both ends are looked at, which takes a fraction of the time of
    `read_metrics`. A last line without a line's end is still being written.

    Raises:
        ValueError: a row before that is damaged.
        OSError: the file system refused.
    """
    key = f'"{EACH_STEP}"'.encode()
    if not path.exists():
        return
    with path.open("rb") as file:
        newest: bytes | None = None
        for line in file:
            if not line.endswith(b"\n"):
                break
            if key not in line:
                yield _sound_row(line, path)
                newest = None
            elif line.startswith(b"{") and line.endswith(b"}\n"):
                newest = line
            else:
                raise ValueError(f"{path}: a damaged row")
        if newest:
            yield _sound_row(newest, path)


def _sound_row(line: bytes, path: Path) -> dict[str, float]:
    row = _parse_row(line)
    if row is None:
        raise ValueError(f"{path}: a damaged row")
    return row


@dataclass
class Curves:
    """What a metrics file holds, as finite points of (step, value)."""

    each_step: list[Point] = field(default_factory=list)
    train: list[Point] = field(default_factory=list)
    val: list[Point] = field(default_factory=list)
    learning_rate: list[Point] = field(default_factory=list)
    gradient_norm: list[Point] = field(default_factory=list)
    speed: list[Point] = field(default_factory=list)


def read_curves(path: Path) -> Curves:
    """The curves of a metrics file, up to its first damaged row."""
    curves = Curves()
    points = {
        EACH_STEP: curves.each_step,
        "loss/train": curves.train,
        "loss/val": curves.val,
        "learning_rate": curves.learning_rate,
        "gradient_norm": curves.gradient_norm,
        "tokens_per_second": curves.speed,
    }
    for row in read_metrics(path):
        for key in points.keys() & row.keys():
            value = row[key]
            if isinstance(value, (int, float)) and math.isfinite(value):
                points[key].append((row["step"], value))
    return curves


def new_metrics(path: Path, start: int) -> tuple[list[dict[str, float]], int]:
    """The whole rows of a metrics file that grows, from byte `start` on, and the byte where they end.

    A line that is still being written waits for the next call. Where a resumed run has cut the file back
    so that no row ends at `start` any more, all rows are new.
    """
    rows: list[dict[str, float]] = []
    if not path.exists():
        return rows, 0
    with path.open("rb") as file:
        file.seek(max(start - 1, 0))
        if start and file.read(1) != b"\n":
            start = 0
            file.seek(0)
        for line in file:
            row = _parse_row(line)
            if row is None:
                break
            rows.append(row)
            start += len(line)
    return rows, start


def cut_metrics(path: Path, step: int, warn: Callable[[str], None]) -> None:
    """Drop the rows of `step` and later ones: a run that goes on from there writes them again.

    A damaged row ends the file too; where rows before `step` are lost with it, that is a warning.

    Raises:
        Alg1Error: the file system refused (exit code 4).
    """
    keep, kept_step = 0, -1
    if path.exists():
        with _as_disk_error(f"cut {path} back to step {step}"), path.open("r+b") as file:
            for line in file:
                row = _parse_row(line)
                if row is None or row["step"] >= step:
                    break
                keep, kept_step = keep + len(line), int(row["step"])
            file.truncate(keep)
            os.fsync(file.fileno())
    if kept_step < step - 1:
        warn(f"{path} is damaged: its rows of steps {kept_step + 1} to {step - 1} are lost")
