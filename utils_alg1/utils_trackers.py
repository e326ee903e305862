"""Metrics -> the run's own file, TensorBoard and Aim.

The loop knows one object, `Trackers`, and tells it what happened. `logs/metrics.jsonl` is the truth and is
written at once; TensorBoard and Aim are copies, each kept by a process of its own, so that a tracker that is
slow, raises, blocks, hangs or crashes costs one warning and never the run.

To add a tracker: write a class with the methods of `Tracker` and start it in `start_trackers`.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from errors import Alg1Error, Guard, disk_error
from files import write_atomically
from observations import Embedding, Histogram, Image, model_histograms
from parameters import Parameters, specs
from utils_aim.pictures import draw_embedding
from utils_aim.tracker import AimTracker
from utils_tensorboard.logger import MetricLogger
from utils_tensorboard.writer import TensorBoardWriter

if TYPE_CHECKING:
    from torch import nn

    from utils_alg1.utils_run_manager import Run

AIM_HASH_NAME = "aim.txt"  # in meta/
QUEUE_SIZE = 10_000  # calls a tracker may be behind
PARCEL = 500  # calls that are sent together at most, so that a slow tracker can be told from one that hangs
HANDOVER = 0.1  # seconds between two parcels
NICENESS = 10  # of a tracker's process: where there are fewer cores than work, the training comes first
PATIENCE = 20.0  # seconds a tracker may keep the run waiting; 8 were too few right after an installation
FLUSH_PATIENCE = 1.0  # seconds a checkpoint waits; rows that are late by then are sent again after a resume
TELLING = ("max_iters", "grad_accum_steps", "data_path")  # though a resumed run may change them


# A forked process has PyTorch imported already; elsewhere than on Linux forking is not safe.
START_METHOD = "fork" if sys.platform == "linux" else "spawn"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

Call = tuple[str, tuple]  # a method of Tracker, its arguments
CLOSE: Call = ("close", ())


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


# --- a process for each copy --------------------------------------------------------------------------


class Starter(Protocol):
    """Opens a tracker in its own process. It travels there, so it holds plain values only."""

    def __call__(self, warn: Callable[[str], None]) -> Any: ...


def run_tracker(connection: Connection, name: str, start: Starter) -> None:
    """All that the process of a tracker does."""
    for number in STOP_SIGNALS:  # they are for the parent, which sends what is left and then `close`
        signal.signal(number, signal.SIG_IGN)
    if hasattr(os, "nice"):  # not on Windows
        os.nice(NICENESS)
    for stream, descriptor in (("stdout", 1), ("stderr", 2)):  # without what the parent has buffered
        with contextlib.suppress(OSError):
            setattr(sys, stream, open(descriptor, "w", buffering=1, errors="replace", closefd=False))  # noqa: SIM115
    let_go_of_files(keep={1, 2, connection.fileno()})
    threading.Thread(target=_outlive, args=(os.getppid(), PATIENCE), daemon=True).start()
    serve(connection, name, start)
    os._exit(0)  # whatever threads and exit hooks the tracker has made are left behind


def let_go_of_files(keep: set[int]) -> None:
    """In a forked process: the parent's open files, the lock of its run among them, are its own.

    They become /dev/null instead of being closed, since Python may still close those numbers some day.
    """
    if sys.platform != "linux":  # nothing was inherited
        return
    try:
        descriptors = [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:
        descriptors = list(range(1024))
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in descriptors:
        with contextlib.suppress(OSError):  # not open
            if descriptor not in keep | {nowhere} and os.fstat(descriptor):
                os.dup2(nowhere, descriptor, inheritable=False)
    os.close(nowhere)


def _outlive(parent: int, patience: float) -> None:
    """In a thread of a tracker's process: leave when the parent is gone and the tracker does not close."""
    while os.getppid() == parent:
        time.sleep(1)
    time.sleep(patience)
    os._exit(1)


def serve(connection: Connection, name: str, start: Starter) -> None:
    """Open a tracker and do what is sent, in order, until `close`; a parent that is gone counts as that.

    The parent is told ("started", identity), ("flushed", None), ("closed", None), or ("failed", a line): the
    tracker is closed then, and nothing else is heard.
    """
    told: list[str] = []

    def tell(what: str, value: str | None = None) -> None:
        with contextlib.suppress(OSError):  # a parent that is gone
            connection.send((what, value))

    def warn(text: str) -> None:
        if not told:
            tell("failed", text)
        told.append(text)

    def receive() -> list[Call]:
        with contextlib.suppress(EOFError, OSError):
            return connection.recv()
        return [CLOSE]

    guard = Guard(name, warn)
    tracker = guard.attempt(start, warn)
    if tracker is not None:
        tell("started", getattr(tracker, "identity", None))
    calls: list[Call] = []
    while not told:
        calls = calls or receive()
        method, arguments = calls.pop(0)
        guard.attempt(getattr(tracker, method), *arguments)
        if not told and method == "flush":
            tell("flushed")
        if method == "close":
            if not told:
                tell("closed")
            return
    if tracker is not None:  # it holds locks and files
        with contextlib.suppress(Exception, SystemExit):
            tracker.close()


class Background(Tracker):
    """Feeds one tracker in a process of its own, in order.

    There it can neither hold up the loop, as a thread of this process would, nor hang or crash it. Its calls
    are sent some times a second, all that have come together.

    Attributes:
        synced: points before this step have reached the tracker and were flushed.
        identity: what the tracker calls the run, once that is known.
        started: whether the tracker is open by now.
    """

    def __init__(
        self,
        name: str,
        start: Starter,
        warn: Callable[[str], None],
        synced: int = 0,
        identity: str | None = None,
    ):
        self.synced = synced
        self.identity = identity
        self.started = False
        self._warn = _once(warn)
        self._guard = Guard(name, self._warn)
        self._calls: queue.Queue[Call] = queue.Queue(QUEUE_SIZE)
        self._urgent, self._flush, self._ended = (threading.Event() for _ in range(3))
        self._flush.set()
        self._connection: Any = None
        self._process: Any = None
        self._guard.attempt(self._fork, start)

    def _fork(self, start: Starter) -> None:
        context: Any = multiprocessing.get_context(START_METHOD)
        ours, theirs = context.Pipe()
        with theirs, _signals_wait(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking while PyTorch's threads sleep
            process = context.Process(target=run_tracker, args=(theirs, self._guard.name, start))
            # Else the standard streams are flushed first, which fails for good once their reader is gone.
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                process.start()
            atexit.register(process.kill)  # where an exception has kept `close` from being called
        self._connection, self._process = ours, process

    def attend(self) -> Background:
        """Begin to send and to listen; once all are forked, since a fork does not go well with threads."""
        if self._process is None:
            self._ended.set()
            return self
        for work in (self._send, self._listen):
            threading.Thread(target=work, name=self._guard.name, daemon=True).start()
        return self

    @property
    def working(self) -> bool:
        """Whether nothing has failed so far."""
        return self._guard.enabled

    @property
    def caught_up(self) -> bool:
        """Whether the last flush is done."""
        return self._flush.is_set()

    def _send(self) -> None:
        """In a thread: send what has come, up to `close`; after a failure only that."""
        method = ""
        while self.working and method != "close":
            if self._calls.qsize() < PARCEL:
                self._urgent.wait(HANDOVER)
                self._urgent.clear()
            calls = self._take(PARCEL)
            if calls:
                self._guard.attempt(self._deliver, calls)
                method = calls[-1][0]
        self._take(QUEUE_SIZE)  # who waits for a place in the queue need not
        if method != "close":
            self._deliver([CLOSE])

    def _take(self, most: int) -> list[Call]:
        calls: list[Call] = []
        with contextlib.suppress(queue.Empty):
            while len(calls) < most:
                calls.append(self._calls.get_nowait())
        return calls

    def _deliver(self, calls: list[Call]) -> None:
        with contextlib.suppress(OSError):  # `_listen` sees what has become of the process
            self._connection.send(calls)

    def _listen(self) -> None:
        """In a thread: hear what the process says, until it ends."""
        what = ""
        with contextlib.suppress(EOFError, OSError):
            while True:
                what, value = self._connection.recv()
                if what == "started":
                    self.identity, self.started = value or self.identity, True
                elif what == "failed":
                    self._guard.enabled = False
                    self._warn(value)
                if what in ("flushed", "failed"):
                    self._flush.set()
        self._process.join()
        if what != "closed":
            self._guard.fail(f"its process has ended ({self._process.exitcode})")
        atexit.unregister(self._process.kill)
        self._ended.set()
        self._flush.set()

    def _call(self, method: str, *arguments: Any) -> None:
        if self.working:
            try:
                self._calls.put((method, arguments), timeout=PATIENCE)
            except queue.Full:
                self._guard.fail(f"it took nothing for {PATIENCE:.0f} seconds")

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
        self._flush.clear()
        self._call("flush")
        self._urgent.set()
        if not self.working or self._ended.is_set():  # nobody will answer
            self._flush.set()
        return self._flush

    def flushed(self, step: int) -> None:
        """A flush after all points before `step` is done: the tracker has them, unless it failed."""
        if self.working:
            self.synced = step

    def start_close(self) -> threading.Event:
        """Ask for the end; the event is set when the tracker has let go."""
        self._call("close")
        self._urgent.set()
        return self._ended

    def give_up(self) -> None:
        """End the process of a tracker that does not answer."""
        self._guard.fail(f"it did not close within {PATIENCE:.0f} seconds")
        self._process.kill()
        self._ended.wait(PATIENCE)


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """SIGINT and SIGTERM wait meanwhile: a new process would take them for its own before it ignores them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _once(warn: Callable[[str], None]) -> Callable[[str], None]:
    """`warn` for the first text; what fails in two ways, or is found by two threads, is still one warning."""
    left = [warn]

    def warn_once(text: str) -> None:
        try:
            first = left.pop()
        except IndexError:
            return
        first(text)

    return warn_once


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
        """Close all; the process of a copy that does not answer within PATIENCE seconds is ended."""
        try:
            self.local.close()
        finally:
            end = time.monotonic() + PATIENCE  # a full queue takes some of it
            copies = list(self.copies.values())
            events = [copy.start_close() for copy in copies]
            for copy, done in zip(copies, _wait_for_all(events, end - time.monotonic()), strict=True):
                if not done:
                    copy.give_up()


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
        hparams: all parameters, which the copies keep beside the curves.
        metadata: where the run came from, which Aim keeps too.
        warn: told once for each tracker that fails.
        state: from the checkpoint that a resumed run goes on from. Its metrics file was cut already;
            whatever a copy had not got before that step is sent to it again.
    """
    resumed = state is not None
    state = state or {}
    local = MetricsFile(run.metrics_path)
    copies: dict[str, Background] = {}
    if params.train.aim:
        known = state.get("aim", {})
        old_hash = known.get("run")
        synced = known.get("synced", 0) if old_hash else 0
        run_hash = old_hash or _read_aim_hash(run.meta_dir / AIM_HASH_NAME)
        start_aim = StartAim(
            run.path.absolute(), run.metrics_path, run_hash, old_hash, synced, hparams, metadata
        )
        copies["aim"] = Background("Aim", start_aim, warn, synced, run_hash)
    if params.tensorboard.tensorboard:
        synced = state.get("tensorboard", {}).get("synced", 0)
        start_tensorboard = StartTensorBoard(
            run.path.name, run.tensorboard_dir, synced if resumed else None, telling(hparams)
        )
        copies["tensorboard"] = Background("TensorBoard", start_tensorboard, warn, synced)
    for copy in copies.values():
        copy.attend()
    with contextlib.ExitStack() as after_failure:
        trackers = after_failure.enter_context(Trackers(local, copies))
        for copy in copies.values():
            _send_again(run.metrics_path, copy, range(copy.synced, sys.maxsize))
        after_failure.pop_all()
    return trackers


@dataclass
class StartAim:
    """Opens the run in Aim; where Aim no longer has it, a new one gets the rows before `synced` too."""

    run_dir: Path
    metrics_path: Path
    run_hash: str | None
    checkpoint_hash: str | None
    synced: int
    hparams: dict[str, Any]
    metadata: dict[str, Any]

    def __call__(self, warn: Callable[[str], None]) -> AimMetrics:
        aim = AimTracker(self.run_dir.name, self.run_dir, run_hash=self.run_hash, warn=warn)
        _write_aim_hash(self.run_dir / "meta" / AIM_HASH_NAME, aim.run_hash)
        metrics = AimMetrics(aim, self.hparams, self.metadata)
        if aim.run_hash != self.checkpoint_hash:
            _send_again(self.metrics_path, metrics, range(self.synced))
        return metrics


@dataclass
class StartTensorBoard:
    """Opens TensorBoard's events; after a resume, what was written past `purge_step` is hidden."""

    run_name: str
    folder: Path
    purge_step: int | None
    hparams: dict[str, Any]

    def __call__(self, warn: Callable[[str], None]) -> MetricLogger:
        logger = MetricLogger(TensorBoardWriter(self.folder, self.purge_step, warn))
        logger.log_hyperparameters(self.run_name, self.hparams)
        return logger


def telling(hparams: dict[str, Any]) -> dict[str, Any]:
    """Those by which trainings are told apart: one of intervals and folders would hide them in a table."""
    known = specs()
    return {
        name: value for name, value in hparams.items() if name in TELLING or not known[name].limits.may_change
    }


def _read_aim_hash(path: Path) -> str | None:
    """What Aim calls the run, where it was opened after the last checkpoint."""
    with contextlib.suppress(OSError, ValueError):
        return path.read_text().strip() or None
    return None


def _write_aim_hash(path: Path, run_hash: str | None) -> None:
    if run_hash is not None:
        with contextlib.suppress(Alg1Error):  # a checkpoint keeps it too
            write_atomically(path, f"{run_hash}\n".encode())


def _send_again(metrics_path: Path, tracker: Tracker, steps: range) -> None:
    """Tell a tracker those rows of the metrics file: a kill can have come before its last flush."""
    for row in read_metrics(metrics_path):
        step = int(row.pop("step"))
        if step in steps:
            tracker.log_scalars(row, step)
