"""Sends everything that a run logs to `logs/metrics.jsonl`, TensorBoard and Aim.

`logs/metrics.jsonl` is written at once. TensorBoard and Aim each run in a process of their own, which reads
the scalars there, so that a tracker that is slow, raises, hangs or crashes costs one warning and never the
run.

To add a tracker, write a subclass of `Tracker` (utils_alg1/base/summaries.py lists what it is given), and
add a `BackgroundTracker` to `background` in `start_trackers`; CONTRIBUTING.md shows one. An on/off switch is
a field in parameters.py, such as `aim`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from parameters import MAIN_PARAMETERS, Parameters, specs
from utils_aim.tracker import AimTracker
from utils_alg1.base.errors import Alg1Error
from utils_alg1.base.files import make_folder
from utils_alg1.base.summaries import Kind, Tracker
from utils_alg1.run_directory import RunDirectory, RunFolder, sanitise_tag
from utils_alg1.tracking.aim_record import (
    REPOSITORY,
    AimRecord,
    find_repo,
    original_of,
    read_record,
    write_record,
)
from utils_alg1.tracking.background import BackgroundTracker
from utils_alg1.tracking.closing import close_all, flush_all
from utils_alg1.tracking.metrics_file import MetricsFile
from utils_alg1.tracking.samples_file import SamplesFile
from utils_tensorboard.event_file import has_events
from utils_tensorboard.logger import MetricLogger
from utils_tensorboard.writer import TensorBoardWriter

# Parameters that are compared between runs, although a resumed run may change them.
ALSO_COMPARED = ("max_iters", "grad_accum_steps", "data_path")


class Trackers:
    """The trackers of a run: its own record, from which the others, by name, read the scalars.

    Args:
        samples_file: gets the texts too.

    Attributes:
        patient: whether `close` waits for a tracker that has many rows still to read.
    """

    def __init__(
        self,
        metrics_file: Tracker,
        background: dict[str, BackgroundTracker],
        samples_file: Tracker | None = None,
    ):
        self.metrics_file, self.background = metrics_file, background
        self.samples_file = samples_file or Tracker()
        self.patient = False

    def log(self, kind: Kind, payload: Any, step: int) -> None:
        """Log data of a step to all trackers (see `Tracker.log`)."""
        if kind == "scalars":
            self.metrics_file.log(kind, payload, step)
        else:
            self.samples_file.log(kind, payload, step)
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

    def keeps(self, kind: Kind) -> bool:
        """Return whether data of this kind is kept anywhere."""
        return kind in ("scalars", "texts") or bool(self.working_names)

    @property
    def working_names(self) -> list[str]:
        """The names of the background trackers that have not failed."""
        return [name for name, tracker in self.background.items() if tracker.working]

    def close(self) -> None:
        try:
            self.metrics_file.close()
        finally:
            close_all(self.background.values(), self.patient)


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
        state: `Trackers.state` in the checkpoint of a resumed run. A tracker is given the rows of the metrics
            file that it had not flushed by then.
    """
    aim_state, tensorboard_state = ((state or {}).get(name, {}) for name in ("aim", "tensorboard"))
    background: dict[str, BackgroundTracker] = {}
    with contextlib.closing(
        Trackers(MetricsFile(run.metrics_path), background, SamplesFile(run.samples_path))
    ) as trackers:
        start = partial(BackgroundTracker, warn=warn, metrics_path=run.metrics_path)
        try:
            if params.train.aim:
                run_hash, flushed_step = aim_state.get("run"), aim_state.get("synced", 0)
                create_aim = partial(open_aim, run.path.absolute(), run_hash, flushed_step, hparams, metadata)
                background["aim"] = start("Aim", create_aim, flushed_step=flushed_step, run_hash=run_hash)
            if params.tensorboard.tensorboard:
                flushed_step = tensorboard_state.get("synced", 0)
                if not has_events(run.tensorboard_dir):  # they were deleted
                    with contextlib.suppress(Alg1Error):  # opening it is what fails then, which is a warning
                        make_folder(run.tensorboard_dir)
                    flushed_step = 0
                purge_step = None if state is None else flushed_step
                create = partial(open_tensorboard, run.path.absolute(), purge_step, hparams)
                background["tensorboard"] = start("TensorBoard", create, flushed_step=flushed_step)
        finally:  # `close` needs them started
            for tracker in background.values():
                tracker.start()
        yield trackers


def open_aim(
    run_dir: Path,
    checkpoint_hash: str | None,
    flushed_step: int,
    hparams: dict[str, Any],
    metadata: dict[str, Any],
    warn: Callable[[str], None],
) -> AimTracker:
    """Open the run in Aim, in the repository that it has (see aim_record.py).

    The run named `checkpoint_hash` in Aim has the rows before `flushed_step`; another one is given all. That
    of meta/aim.txt is newer: it may have been begun after the last checkpoint. If it is gone from Aim, or
    this directory is a copy of one that keeps it, a new one is begun.
    """
    run = RunFolder(run_dir)
    record = read_record(run)
    repo = find_repo(run, record)
    original = original_of(run, record, repo)
    run_hash = None if original else record.run_hash or checkpoint_hash
    tag = sanitise_tag(hparams.get("run_tag") or "")
    aim = AimTracker(run.run_id, run_dir, repo, run_hash, warn, tag)
    aim.track_config(hparams)
    for key, value in metadata.items():
        aim.track_metadata(key, value)
    if aim.run_hash is not None:
        aim.first_step = flushed_step if aim.run_hash == checkpoint_hash else 0
        aim.remark = _remark(aim, record, repo, original, flushed_step)
        write_record(run, aim.run_hash, repo)
    return aim


def _remark(aim: AimTracker, record: AimRecord, repo: Path, original: Path | None, flushed_step: int) -> str:
    """Return what is not as usual about where a run continues in Aim."""
    again = "all of its steps are sent, in the background"
    if original is not None:
        return (
            f"Aim: this run is a copy of {original}, which keeps its run in Aim; a new one is begun: {again}"
        )
    if record.run_hash is not None and aim.run_hash != record.run_hash:
        return f"Aim no longer has this run; a new one is begun: {again}"
    if aim.first_step < flushed_step:
        return f"Aim lacks a part of this run: {again}"
    if repo != Path.cwd():
        return f"Aim: this run continues in {repo / REPOSITORY}"
    return ""


def open_tensorboard(
    run_dir: Path, purge_step: int | None, hparams: dict[str, Any], warn: Callable[[str], None]
) -> MetricLogger:
    """Open TensorBoard's event file; after a resume, points of `purge_step` and later ones are hidden."""
    run = RunFolder(run_dir)
    writer = TensorBoardWriter(run.tensorboard_dir, purge_step, warn, must_exist=True)
    # The table of runs has the parameters that affect the training, without intervals and paths.
    known = specs()
    compared = [n for n in hparams if n in ALSO_COMPARED or not known[n].may_change]
    logger = MetricLogger(writer)
    logger.describe_run(run.run_id, {name: hparams[name] for name in compared}, MAIN_PARAMETERS)
    logger.first_step = purge_step or 0
    return logger
