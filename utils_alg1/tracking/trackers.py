"""Sends everything that a run logs to `logs/metrics.jsonl`, TensorBoard and Aim.

`logs/metrics.jsonl` is written at once. TensorBoard and Aim each run in a process of their own, so that a
tracker that is slow, raises, hangs or crashes costs one warning and never the run.

To add a tracker, write a subclass of `Tracker` (utils_alg1/base/summaries.py lists what it is given), and
add a `BackgroundTracker` to `background` in `start_trackers`; CONTRIBUTING.md shows one. An on/off switch is
a field in parameters.py, such as `aim`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from parameters import Parameters, specs
from utils_aim.tracker import AimTracker
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
    """The trackers of a run: its own record, which gets everything first, and the others by name."""

    def __init__(self, metrics_file: Tracker, background: dict[str, BackgroundTracker]):
        self.metrics_file, self.background = metrics_file, background

    def log(self, kind: Kind, payload: Any, step: int) -> None:
        """Log data of a step to all trackers (see `Tracker.log`)."""
        self.metrics_file.log(kind, payload, step)
        for tracker in self.background.values():
            tracker.log(kind, payload, step)

    def flush(self, step: int) -> None:
        """Make everything logged before `step` durable; a slow tracker is waited for only briefly."""
        self.metrics_file.flush()
        flush_all(self.background.values(), step)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, so that a resumed run continues the same curves."""
        return {
            name: {"run": tracker.run_hash, "synced": tracker.flushed_step}
            for name, tracker in self.background.items()
        }

    @property
    def working_names(self) -> list[str]:
        """The names of the background trackers that have not failed."""
        return [name for name, tracker in self.background.items() if tracker.working]

    def close(self) -> None:
        try:
            self.metrics_file.close()
        finally:
            close_all(self.background.values())


@contextlib.contextmanager
def start_trackers(
    run: RunDirectory,
    params: Parameters,
    hparams: dict[str, Any],
    metadata: dict[str, Any],
    warn: Callable[[str], None],
    state: dict[str, Any] | None = None,
) -> Iterator[Trackers]:
    """Start the trackers that the parameters ask for; they are closed at the end of the `with` block.

    Args:
        run: its metrics file is already cut back if it was resumed.
        hparams: all parameters, which the trackers show beside the curves.
        metadata: code version, environment and so on, which Aim keeps too.
        state: `Trackers.state` in the checkpoint of a resumed run. The rows of the metrics file that a
            tracker had not flushed by then are sent again.
    """
    background: dict[str, BackgroundTracker] = {}
    with contextlib.closing(Trackers(MetricsFile(run.metrics_path), background)) as trackers:
        try:
            if params.train.aim:
                known = (state or {}).get("aim", {})
                run_hash, flushed_step = known.get("run"), known.get("synced", 0)
                create_aim = partial(open_aim, run.path.absolute(), run_hash, flushed_step, hparams, metadata)
                background["aim"] = BackgroundTracker("Aim", create_aim, warn, flushed_step, run_hash)
            if params.tensorboard.tensorboard:
                flushed_step = (state or {}).get("tensorboard", {}).get("synced", 0)
                purge_step = None if state is None else flushed_step
                create = partial(open_tensorboard, run.path.absolute(), purge_step, hparams)
                background["tensorboard"] = BackgroundTracker("TensorBoard", create, warn, flushed_step)
        finally:  # `close` needs them started
            for tracker in background.values():
                tracker.start()
        for tracker in background.values():
            _log_rows(run.metrics_path, tracker, range(tracker.flushed_step, sys.maxsize))
        yield trackers


def open_aim(
    run_dir: Path,
    checkpoint_hash: str | None,
    flushed_step: int,
    hparams: dict[str, Any],
    metadata: dict[str, Any],
    warn: Callable[[str], None],
) -> AimTracker:
    """Open the run in Aim.

    The run named `checkpoint_hash` in Aim has the rows before `flushed_step`. If it is gone, a new one is
    created there and these rows are logged again. meta/aim.txt names a run opened after the last checkpoint.
    """
    run = RunFolder(run_dir)
    hash_path = run.meta_dir / AIM_HASH_NAME
    run_hash = checkpoint_hash or (hash_path.read_text().strip() if hash_path.exists() else None)
    aim = AimTracker(run.run_id, run_dir, run_hash=run_hash, warn=warn)
    aim.track_config(hparams)
    for key, value in metadata.items():
        aim.track_metadata(key, value)
    if aim.run_hash is not None and aim.run_hash != checkpoint_hash:
        write_atomically(hash_path, f"{aim.run_hash}\n".encode())
        _log_rows(run.metrics_path, aim, range(flushed_step))
    return aim


def open_tensorboard(
    run_dir: Path, purge_step: int | None, hparams: dict[str, Any], warn: Callable[[str], None]
) -> MetricLogger:
    """Open TensorBoard's event file; after a resume, points of `purge_step` and later ones are hidden."""
    run = RunFolder(run_dir)
    writer = TensorBoardWriter(run.tensorboard_dir, purge_step, warn, must_exist=True)
    # The table of runs has the parameters that affect the training, without intervals and paths.
    known = specs()
    compared = [n for n in hparams if n in ALSO_COMPARED or not known[n].may_change]
    writer.add_hparams(run.run_id, {name: hparams[name] for name in compared})
    return MetricLogger(writer)


def _log_rows(metrics_path: Path, tracker: Tracker | BackgroundTracker, steps: range) -> None:
    """Log the rows of the metrics file of those steps."""
    for row in read_metrics(metrics_path):
        step = int(row.pop("step"))
        if step in steps:
            tracker.log("scalars", row, step)
