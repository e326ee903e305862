"""Sends everything that a run logs to `logs/metrics.jsonl`, TensorBoard and Aim.

`logs/metrics.jsonl` is written at once. TensorBoard and Aim each run in a process of their own, so that a
tracker that is slow, raises, hangs or crashes costs one warning and never the run.

To add a tracker, write a subclass of `Tracker` (utils_alg1/base/summaries.py lists what it is given), and
in `start_trackers` add it to `background` as `BackgroundTracker(name, create, warn, flushed_step)`. The
function `create(warn)` returns the tracker. It is called in the new process, so it has to be picklable,
such as a `partial`. After a resume, rows of the metrics file from `flushed_step` on are logged again. An
on/off switch is a field in parameters.py, such as `aim`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from parameters import Parameters, specs
from utils_aim.logger import AimLogger
from utils_aim.tracker import AimTracker
from utils_alg1.base.errors import Alg1Error
from utils_alg1.base.files import write_atomically
from utils_alg1.base.summaries import Kind, Tracker
from utils_alg1.run_directory import RunDirectory, RunFolder
from utils_alg1.tracking.background import BackgroundTracker, close_all, flush_all
from utils_alg1.tracking.metrics_file import MetricsFile, read_metrics
from utils_tensorboard.logger import MetricLogger
from utils_tensorboard.writer import TensorBoardWriter

AIM_HASH_NAME = "aim.txt"  # in meta/
# Parameters that are compared between runs, although a resumed run may change them.
ALSO_COMPARED = ("max_iters", "grad_accum_steps", "data_path")


class Trackers:
    """The trackers of a run.

    Attributes:
        metrics_file: the run's own record, which gets everything first.
        background: the other trackers by name.
    """

    def __init__(self, metrics_file: Tracker, background: dict[str, BackgroundTracker]):
        self.metrics_file = metrics_file
        self.background = background

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log(self, kind: Kind, payload: Any, step: int) -> None:
        """Log data of a step to all trackers (see `Tracker.log`)."""
        self.metrics_file.log(kind, payload, step)
        for tracker in self.background.values():
            tracker.log(kind, payload, step)

    def flush(self, step: int) -> None:
        """Make everything logged before `step` durable.

        Waits for a slow tracker only briefly; until its flush is done, later calls do not wait for it at all.
        """
        self.metrics_file.flush()
        flush_all([t for t in self.background.values() if t.started and t.flush_done], step)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, so that a resumed run continues the same curves."""
        return {
            name: {"run": tracker.identity, "synced": tracker.flushed_step}
            for name, tracker in self.background.items()
        }

    @property
    def working(self) -> list[str]:
        """The names of the background trackers that have not failed."""
        return [name for name, tracker in self.background.items() if tracker.working]

    def close(self) -> None:
        """Close all trackers."""
        try:
            self.metrics_file.close()
        finally:
            close_all(self.background.values())


def start_trackers(
    run: RunDirectory,
    params: Parameters,
    hparams: dict[str, Any],
    metadata: dict[str, Any],
    warn: Callable[[str], None],
    state: dict[str, Any] | None = None,
) -> Trackers:
    """Start the trackers that the parameters ask for.

    Args:
        run: the run, whose metrics file is already cut back if it was resumed.
        hparams: all parameters, which the trackers show beside the curves.
        metadata: code version, environment and so on, which Aim keeps too.
        warn: called once for each tracker that fails.
        state: `Trackers.state` in the checkpoint of a resumed run. The rows of the metrics file that a
            tracker had not flushed by then are sent again.
    """
    metrics_file = MetricsFile(run.metrics_path)
    background: dict[str, BackgroundTracker] = {}
    if params.train.aim:
        known = (state or {}).get("aim", {})
        old_hash = known.get("run")
        flushed_step = known.get("synced", 0) if old_hash else 0
        run_hash = old_hash or _read_aim_hash(run.meta_dir / AIM_HASH_NAME)
        run_dir, rows = run.path.absolute(), run.metrics_path
        create_aim = partial(open_aim, run_dir, rows, run_hash, old_hash, flushed_step, hparams, metadata)
        background["aim"] = BackgroundTracker("Aim", create_aim, warn, flushed_step, run_hash)
    if params.tensorboard.tensorboard:
        flushed_step = (state or {}).get("tensorboard", {}).get("synced", 0)
        purge_step = None if state is None else flushed_step
        values = comparable_hparams(hparams)
        create_tensorboard = partial(open_tensorboard, run.path.name, run.tensorboard_dir, purge_step, values)
        background["tensorboard"] = BackgroundTracker("TensorBoard", create_tensorboard, warn, flushed_step)
    for tracker in background.values():
        tracker.start()
    with contextlib.ExitStack() as on_failure:
        trackers = on_failure.enter_context(Trackers(metrics_file, background))
        for tracker in background.values():
            _log_rows(run.metrics_path, tracker, range(tracker.flushed_step, sys.maxsize))
        on_failure.pop_all()
    return trackers


def open_aim(
    run_dir: Path,
    metrics_path: Path,
    run_hash: str | None,
    checkpoint_hash: str | None,
    flushed_step: int,
    hparams: dict[str, Any],
    metadata: dict[str, Any],
    warn: Callable[[str], None],
) -> AimLogger:
    """Open the run in Aim.

    The run named `checkpoint_hash` in Aim has the rows before `flushed_step`. If it is gone, a new one is
    created there and these rows are logged again.
    """
    aim = AimTracker(run_dir.name, run_dir, run_hash=run_hash, warn=warn)
    _write_aim_hash(RunFolder(run_dir).meta_dir / AIM_HASH_NAME, aim.run_hash)
    logger = AimLogger(aim, hparams, metadata)
    if aim.run_hash != checkpoint_hash:
        _log_rows(metrics_path, logger, range(flushed_step))
    return logger


def open_tensorboard(
    run_name: str,
    log_dir: Path,
    purge_step: int | None,
    hparams: dict[str, Any],
    warn: Callable[[str], None],
) -> MetricLogger:
    """Open TensorBoard's event file; after a resume, points of `purge_step` and later ones are hidden."""
    logger = MetricLogger(TensorBoardWriter(log_dir, purge_step, warn))
    logger.log_hyperparameters(run_name, hparams)
    return logger


def comparable_hparams(hparams: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters that affect the training, without intervals and paths, for a table of runs."""
    known = specs()
    return {
        name: value for name, value in hparams.items() if name in ALSO_COMPARED or not known[name].may_change
    }


def _read_aim_hash(path: Path) -> str | None:
    """Read the run's hash in Aim, for a run that was opened there after its last checkpoint."""
    with contextlib.suppress(OSError, ValueError):
        return path.read_text().strip() or None
    return None


def _write_aim_hash(path: Path, run_hash: str | None) -> None:
    if run_hash is not None:
        with contextlib.suppress(Alg1Error):  # a checkpoint keeps it too
            write_atomically(path, f"{run_hash}\n".encode())


def _log_rows(metrics_path: Path, tracker: Tracker, steps: range) -> None:
    """Log the rows of the metrics file of those steps."""
    for row in read_metrics(metrics_path):
        step = int(row.pop("step"))
        if step in steps:
            tracker.log("scalars", row, step)
