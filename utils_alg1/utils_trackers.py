"""Metrics -> the run's own file, TensorBoard and Aim.

The loop knows one object, `Trackers`, and tells it what happened. `logs/metrics.jsonl` is the truth and is
written at once; TensorBoard and Aim are copies, each fed by a thread of its own, so that a tracker that is
slow, raises, blocks or hangs costs one warning and never the run.

To add a tracker: write a class with the methods of `Tracker` and start it in `start_trackers`.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errors import Alg1Error, Guard, disk_error
from files import write_atomically
from observations import Embedding, Histogram, Image, model_histograms
from parameters import Parameters
from utils_aim.pictures import draw_embedding
from utils_aim.tracker import AimTracker
from utils_tensorboard.logger import MetricLogger
from utils_tensorboard.writer import TensorBoardWriter

if TYPE_CHECKING:
    from torch import nn

    from utils_alg1.utils_run_manager import Run

AIM_HASH_NAME = "aim.txt"  # in meta/
QUEUE_SIZE = 10_000  # calls a tracker may be behind
PATIENCE = 8.0  # seconds: how long a tracker may keep the run waiting before it is given up
FLUSH_PATIENCE = 1.0  # seconds a checkpoint waits; rows that are late by then are sent again after a resume


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


# --- the run's own file -------------------------------------------------------------------------------


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
            if "loss/train_step" not in values:  # what is rare can be read at once
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


# --- Aim ----------------------------------------------------------------------------------------------


# The name and the context that Aim's pages group by.
AIM_NAMES: dict[str, tuple[str, dict[str, str] | None]] = {
    "loss/train_step": ("loss", {"subset": "train_step"}),
    "loss/train": ("loss", {"subset": "train"}),
    "loss/val": ("loss", {"subset": "val"}),
    "learning_rate": ("learning_rate", None),
    "gradient_norm": ("gradient_norm", None),
    "tokens_per_second": ("tokens_per_second", None),
}


class AimMetrics(Tracker):
    """Tells an `AimTracker` under the names of AIM_NAMES."""

    def __init__(self, aim: AimTracker, hparams: dict[str, Any], metadata: dict[str, Any]):
        self.aim = aim
        aim.track_config(hparams)
        for key, value in metadata.items():
            aim.track_metadata(key, value)

    @property
    def enabled(self) -> bool:
        return self.aim.enabled

    @property
    def identity(self) -> str | None:
        return self.aim.run_hash

    def log_scalars(self, values: dict[str, float], step: int) -> None:
        for key, value in values.items():
            name, context = AIM_NAMES[key]
            self.aim.track_metric(name, value, step, context)

    def log_histograms(self, histograms: list[Histogram], step: int) -> None:
        for h in histograms:
            self.aim.track_distribution(h.name, (h.counts, h.edges), step, {"kind": h.kind})

    def log_images(self, images: list[Image], step: int) -> None:
        for image in images:
            self.aim.track_image(image.name, image.pixels(), step, image.context)

    def log_texts(self, texts: dict[str, str], step: int) -> None:
        for name, text in texts.items():
            self.aim.track_text(name, text, step)

    def log_embedding(self, embedding: Embedding, step: int) -> None:
        if self.enabled:  # drawing takes a while
            self.aim.track_image(embedding.name, draw_embedding(embedding), step)

    def close(self) -> None:
        self.aim.close()


# --- a thread for each copy ---------------------------------------------------------------------------


class TrackerThread(threading.Thread):
    """A thread that a tracker may hang in; `given_up` says that the process must leave without it."""

    given_up = False


class Background(Tracker):
    """Feeds one tracker from a thread of its own, in order.

    The tracker is also made there: importing and opening one takes seconds that training need not wait.

    Attributes:
        synced: points before this step have reached the tracker and were flushed.
        identity: what the tracker calls the run, once that is known.
    """

    def __init__(
        self,
        name: str,
        start: Callable[[], Any],
        warn: Callable[[str], None],
        synced: int = 0,
        identity: str | None = None,
    ):
        self.synced = synced
        self.identity = identity
        self._guard = Guard(name, warn)
        self._tracker: Any = None
        self._flush = threading.Event()
        self._flush.set()
        self._calls: queue.Queue[tuple[str, tuple, threading.Event]] = queue.Queue(QUEUE_SIZE)
        self._ended = threading.Event()
        self._thread = TrackerThread(target=self._work, args=(start,), name=name, daemon=True)
        self._thread.start()

    @property
    def working(self) -> bool:
        """Whether nothing has failed so far."""
        return self._guard.enabled and getattr(self._tracker, "enabled", True)

    @property
    def caught_up(self) -> bool:
        """Whether the last flush is done."""
        return self._flush.is_set()

    @property
    def started(self) -> bool:
        """Whether the tracker is open by now."""
        return self._tracker is not None

    @property
    def hung(self) -> bool:
        """Whether the tracker was given up while its thread was still in it."""
        return self._thread.given_up

    def _work(self, start: Callable[[], Any]) -> None:
        self._tracker = tracker = self._guard.attempt(start)
        self.identity = getattr(tracker, "identity", None) or self.identity
        method = ""
        while self._guard.enabled and method != "close":
            method, arguments, done = self._calls.get()
            self._guard.attempt(getattr(tracker, method), *arguments)
            done.set()
        if tracker is not None and method != "close":  # it failed, but holds locks and files
            with contextlib.suppress(Exception, SystemExit):
                tracker.close()
        with contextlib.suppress(queue.Empty):
            while True:  # nobody waits for what is not done any more
                self._calls.get_nowait()[2].set()
        self._ended.set()

    def _call(self, method: str, *arguments: Any) -> threading.Event:
        done = threading.Event()
        if not self._guard.enabled:
            done.set()
            return done
        try:
            self._calls.put((method, arguments, done), timeout=PATIENCE)
        except queue.Full:
            self._guard.fail(f"it took nothing for {PATIENCE:.0f} seconds")
            done.set()
        return done

    def log_scalars(self, values: dict[str, float], step: int) -> None:
        self._call("log_scalars", values, step)

    def log_histograms(self, histograms: list[Histogram], step: int) -> None:
        self._call("log_histograms", histograms, step)

    def log_images(self, images: list[Image], step: int) -> None:
        self._call("log_images", images, step)

    def log_texts(self, texts: dict[str, str], step: int) -> None:
        self._call("log_texts", texts, step)

    def log_embedding(self, embedding: Embedding, step: int) -> None:
        self._call("log_embedding", embedding, step)

    def start_flush(self) -> threading.Event:
        """Ask for a flush; the event is set when it is done."""
        self._flush = self._call("flush")
        return self._flush

    def flushed(self, step: int) -> None:
        """A flush after all points before `step` is done: the tracker has them, unless it failed."""
        if self.working:
            self.synced = step

    def start_close(self) -> threading.Event:
        """Ask for the end; the event is set when the tracker has let go."""
        self._call("close")
        return self._ended

    def give_up(self) -> None:
        """Stop waiting for a tracker that does not answer."""
        self._thread.given_up = True
        self._guard.fail(f"it did not close within {PATIENCE:.0f} seconds")


def _wait_for_all(events: list[threading.Event], seconds: float) -> list[bool]:
    """Wait for all together: which of them were set in time."""
    end = time.monotonic() + seconds
    return [event.wait(max(0.0, end - time.monotonic())) for event in events]


# --- what the loop knows ------------------------------------------------------------------------------


class Trackers:
    """Everything that wants to hear of a run: its own file of metrics, and the copies, which see more."""

    def __init__(self, local: Tracker, copies: dict[str, Background]):
        self.local = local
        self.copies = copies

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log_evaluation_metrics(self, train_loss: float, val_loss: float, lr: float, step: int) -> None:
        """The mean losses of an evaluation, in nats, and the learning rate."""
        self.log_scalars({"loss/train": train_loss, "loss/val": val_loss, "learning_rate": lr}, step)

    def log_scalars(self, values: dict[str, float], step: int) -> None:
        """Numbers by name: a row of the metrics file."""
        self.local.log_scalars(values, step)
        for copy in self.copies.values():
            copy.log_scalars(values, step)

    def log_model_histograms(self, model: nn.Module, step: int) -> None:
        """Parameter and gradient histograms, counted once for all copies."""
        if self.copies:
            self.log_histograms(list(model_histograms(model)), step)

    def log_histograms(self, histograms: list[Histogram], step: int) -> None:
        for copy in self.copies.values():
            copy.log_histograms(histograms, step)

    def log_images(self, images: list[Image], step: int) -> None:
        for copy in self.copies.values():
            copy.log_images(images, step)

    def log_texts(self, texts: dict[str, str], step: int) -> None:
        for copy in self.copies.values():
            copy.log_texts(texts, step)

    def log_embedding(self, embedding: Embedding, step: int) -> None:
        for copy in self.copies.values():
            copy.log_embedding(embedding, step)

    def flush(self, step: int) -> None:
        """Make everything before `step` durable.

        A copy that is late is not waited for long, and not again before it has caught up.
        """
        self.local.flush()
        copies = [copy for copy in self.copies.values() if copy.started and copy.caught_up]
        events = [copy.start_flush() for copy in copies]
        for copy, done in zip(copies, _wait_for_all(events, FLUSH_PATIENCE), strict=True):
            if done:
                copy.flushed(step)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, to continue the same curves after a resume."""
        return {name: {"run": copy.identity, "synced": copy.synced} for name, copy in self.copies.items()}

    @property
    def working(self) -> list[str]:
        """The names of the copies that have not failed."""
        return [name for name, copy in self.copies.items() if copy.working]

    def close(self) -> None:
        """Close all; a copy that does not answer within PATIENCE seconds is left behind."""
        try:
            self.local.close()
        finally:
            end = time.monotonic() + PATIENCE  # a full queue takes some of it
            copies = list(self.copies.values())
            events = [copy.start_close() for copy in copies]
            for copy, done in zip(copies, _wait_for_all(events, end - time.monotonic()), strict=True):
                if not done:
                    copy.give_up()

    @property
    def hung(self) -> bool:
        """Whether a thread is stuck in a tracker: the process must not wait for it."""
        return any(copy.hung for copy in self.copies.values())


def start_trackers(
    run: Run,
    params: Parameters,
    hparams: dict[str, Any],
    metadata: dict[str, Any],
    warn: Callable[[str], None],
    state: dict[str, Any] | None = None,
) -> Trackers:
    """Start what the parameters ask for.

    Args:
        run: whose metrics these are.
        hparams, metadata: what Aim keeps beside the curves.
        warn: told once for each tracker that fails.
        state: from the checkpoint that a resumed run goes on from. Its metrics file was cut already;
            whatever a copy had not got before that step is sent to it again.
    """
    resumed = state is not None
    state = state or {}
    copies: dict[str, Background] = {}
    if params.train.aim:
        known = state.get("aim", {})
        old_hash = known.get("run")
        aim_synced = known.get("synced", 0) if old_hash else 0
        run_hash = old_hash or _read_aim_hash(run)
        warn_aim = _once(warn)

        def start_aim() -> AimMetrics:
            aim = AimTracker(run.run_id, run.path.absolute(), run_hash=run_hash, warn=warn_aim)
            _write_aim_hash(run, aim.run_hash)
            metrics = AimMetrics(aim, hparams, metadata)
            if aim.run_hash != old_hash:  # Aim no longer has that run: this one is new
                _send_again(run.metrics_path, metrics, range(aim_synced))
            return metrics

        copies["aim"] = Background("Aim", start_aim, warn_aim, aim_synced, run_hash)
    if params.tensorboard.tensorboard:
        tensorboard_synced = state.get("tensorboard", {}).get("synced", 0)
        purge_step = tensorboard_synced if resumed else None
        warn_tensorboard = _once(warn)

        def start_tensorboard() -> MetricLogger:
            return MetricLogger(TensorBoardWriter(run.tensorboard_dir, purge_step, warn_tensorboard))

        copies["tensorboard"] = Background(
            "TensorBoard", start_tensorboard, warn_tensorboard, tensorboard_synced
        )
    for copy in copies.values():
        _send_again(run.metrics_path, copy, range(copy.synced, sys.maxsize))
    return Trackers(MetricsFile(run.metrics_path), copies)


def _once(warn: Callable[[str], None]) -> Callable[[str], None]:
    """`warn` for the first text; a tracker that fails in two ways is still one warning."""
    left = [warn]
    return lambda text: left.pop()(text) if left else None


def _read_aim_hash(run: Run) -> str | None:
    """What Aim calls the run, where it was opened after the last checkpoint."""
    with contextlib.suppress(OSError, ValueError):
        return (run.meta_dir / AIM_HASH_NAME).read_text().strip() or None
    return None


def _write_aim_hash(run: Run, run_hash: str | None) -> None:
    if run_hash is not None:
        with contextlib.suppress(Alg1Error):  # a checkpoint keeps it too
            write_atomically(run.meta_dir / AIM_HASH_NAME, f"{run_hash}\n".encode())


def _send_again(metrics_path: Path, tracker: Tracker, steps: range) -> None:
    """Tell a tracker those rows of the metrics file: a kill can have come before its last flush."""
    for row in read_metrics(metrics_path):
        step = int(row.pop("step"))
        if step in steps:
            tracker.log_scalars(row, step)
