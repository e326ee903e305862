"""Metrics -> the run's own file, TensorBoard and Aim.

The loop knows one object, `Trackers`, and tells it what happened. `logs/metrics.jsonl` is the truth and is
written at once; TensorBoard and Aim are copies, each kept by a process of its own, so that a tracker that is
slow, raises, blocks, hangs or crashes costs one warning and never the run.

To add a tracker: write a class with the methods of `Tracker` (utils_metrics) and start it in
`start_trackers`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parameters import Parameters, specs
from utils_aim.logger import AimLogger
from utils_aim.tracker import AimTracker
from utils_alg1.base.errors import Alg1Error
from utils_alg1.base.files import write_atomically
from utils_alg1.base.summaries import Embedding, Histogram, Image, model_histograms
from utils_alg1.run_directory import RunDirectory, RunFolder
from utils_alg1.tracking.background import Background, close_all, flush_all
from utils_alg1.tracking.metrics_file import MetricsFile, Tracker, read_metrics
from utils_tensorboard.logger import MetricLogger
from utils_tensorboard.writer import TensorBoardWriter

if TYPE_CHECKING:
    from torch import nn

AIM_HASH_NAME = "aim.txt"  # in meta/
SHAPING_TOO = ("max_iters", "grad_accum_steps", "data_path")  # though a resumed run may change them


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
        flush_all([copy for copy in self.copies.values() if copy.started and copy.caught_up], step)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, to continue the same curves after a resume."""
        return {name: {"run": copy.identity, "synced": copy.synced} for name, copy in self.copies.items()}

    @property
    def working(self) -> list[str]:
        """The names of the copies that have not failed."""
        return [name for name, copy in self.copies.items() if copy.working]

    def close(self) -> None:
        """Close all."""
        try:
            self.local.close()
        finally:
            close_all(self.copies.values())


def start_trackers(
    run: RunDirectory,
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
            run.path.name, run.tensorboard_dir, synced if resumed else None, distinguishing(hparams)
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

    def __call__(self, warn: Callable[[str], None]) -> AimLogger:
        aim = AimTracker(self.run_dir.name, self.run_dir, run_hash=self.run_hash, warn=warn)
        _write_aim_hash(RunFolder(self.run_dir).meta_dir / AIM_HASH_NAME, aim.run_hash)
        metrics = AimLogger(aim, self.hparams, self.metadata)
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


def distinguishing(hparams: dict[str, Any]) -> dict[str, Any]:
    """Those by which trainings are told apart: one of intervals and folders would hide them in a table."""
    known = specs()
    return {
        name: value
        for name, value in hparams.items()
        if name in SHAPING_TOO or not known[name].limits.may_change
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


def _send_again(metrics_path: Path, tracker: Tracker | AimLogger, steps: range) -> None:
    """Tell a tracker those rows of the metrics file: a kill can have come before its last flush."""
    for row in read_metrics(metrics_path):
        step = int(row.pop("step"))
        if step in steps:
            tracker.log_scalars(row, step)
