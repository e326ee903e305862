"""Sends the curves of a run that is not training to a tracker that was off, or lost them.

What is sent is what a resume would send: the rows of `logs/metrics.jsonl`, through the same classes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from parameters import specs
from utils_aim.reading import last_steps as last_steps_in_aim
from utils_alg1.base.errors import Alg1Error
from utils_alg1.base.files import make_folder, read_json_object
from utils_alg1.base.scripts import command
from utils_alg1.base.summaries import Tracker
from utils_alg1.base.text import shell_quote
from utils_alg1.run_directory import RunDirectory, RunFolder, lock_run
from utils_alg1.tracking.aim_record import REPOSITORY, find_repo, original_of, read_record
from utils_alg1.tracking.metrics_file import RowReader, read_metrics
from utils_alg1.tracking.trackers import open_aim, open_tensorboard
from utils_alg1.utils_run_manager import read_lines
from utils_tensorboard.reading import last_steps as last_steps_in_events

NAMES = {"aim": "Aim", "tensorboard": "TensorBoard"}
NOTICE_SECONDS = 10.0


def send(path: Path, name: str) -> str:
    """Send the curves of a run directory to a tracker, a key of NAMES; return a line that says what was done.

    Each point is there once afterwards, however often it is sent: of a curve that the tracker has, only what
    follows its last point is written.

    Raises:
        Alg1Error: the run trains, its record or metrics are missing or damaged, or the tracker fails.
    """
    with lock_run(path) as run:
        hparams, metadata = _read_record(run)
        n_rows, last_step = _check_rows(run)
        last_steps = _last_steps(run, name)
        n_points = sum(len(values) for values, _ in _missing_rows(run, last_steps))
        if not n_points:
            return f"{run.run_id}: {NAMES[name]} has all of its curves, to step {last_step}"
        failures: list[str] = []
        if name == "aim":
            tracker: Tracker = open_aim(run.path.absolute(), None, 0, hparams, metadata, failures.append)
            where = f"Aim, {find_repo(run) / REPOSITORY}"
        else:
            make_folder(run.tensorboard_dir)
            tracker = open_tensorboard(run.path.absolute(), None, hparams, failures.append)
            where = f"TensorBoard, {run.tensorboard_dir}"
        try:
            _log_all(tracker, _missing_rows(run, last_steps), n_points, run.run_id, failures)
        finally:
            tracker.close()
    if failures:  # "Aim is switched off, training continues: ..."
        reason = failures[0].partition(": ")[2]
        raise Alg1Error(f"{run.run_id} was not sent to {where}: {reason}", "send it again after that")
    return f"{run.run_id}: sent {n_points:,} points of {n_rows:,} rows, to step {last_step}, to {where}"


def _last_steps(run: RunFolder, name: str) -> dict[str, int]:
    """Return the step of the last point of each curve that the run has in a tracker, a key of NAMES."""
    if name == "tensorboard":
        return last_steps_in_events(run.tensorboard_dir)
    record = read_record(run)
    repo = find_repo(run, record)
    if record.run_hash is None or original_of(run, record, repo):
        return {}
    return last_steps_in_aim(repo, record.run_hash)


def _read_record(run: RunDirectory) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what the trackers show beside the curves: parameters, and where the run came from."""
    record = read_json_object(run.record_path)
    try:
        values = {name: record["parameters"][name] for name in specs() if name in record["parameters"]}
        hparams = values | {"vocab_size": record["corpus"]["vocab_size"]}
    except (KeyError, TypeError) as error:
        message = f"{run.record_path} is not the record of a run"
        raise Alg1Error(message, "use another copy of the run") from error
    files = {"git": "git.txt", "environment": "env.txt"}
    metadata = {name: read_lines(run.meta_dir / file) for name, file in files.items()}
    return hparams, metadata | {key: record[key] for key in ("corpus", "runtime", "parts") if key in record}


def _check_rows(run: RunDirectory) -> tuple[int, int]:
    """Return the number of rows in the metrics file, and the step of the last one."""
    n_rows, step = 0, 0
    try:
        for row in read_metrics(run.metrics_path, strict=True):
            n_rows, step = n_rows + 1, int(row["step"])
    except ValueError as error:
        resume = f"{command('train.py')} --resume {shell_quote(str(run.path))}"
        hint = f"to cut it back to the newest checkpoint, and continue there: {resume}"
        raise Alg1Error(str(error), hint) from error
    if not n_rows:
        raise Alg1Error(f"{run.metrics_path} has no rows to send", "send a run that has trained")
    return n_rows, step


def _missing_rows(run: RunFolder, last_steps: Mapping[str, int]) -> Iterator[tuple[dict[str, float], int]]:
    """Yield the values and the step of each row, without those up to the last step of their curve."""
    for row in RowReader(run.metrics_path, 0).read(lambda: False):
        step = int(row.pop("step"))
        if values := {name: value for name, value in row.items() if step > last_steps.get(name, -1)}:
            yield values, step


def _log_all(
    tracker: Tracker,
    rows: Iterator[tuple[dict[str, float], int]],
    n_points: int,
    run_id: str,
    failures: list[str],
) -> None:
    """Log rows until there is a failure, and say on stderr how far it is."""
    n_sent, notice_time = 0, time.monotonic() + NOTICE_SECONDS
    for values, step in rows:
        if failures:
            return
        tracker.log("scalars", values, step)
        n_sent += len(values)
        if time.monotonic() >= notice_time:
            print(f"{run_id}: {n_sent / n_points:.0%} sent", file=sys.stderr)
            notice_time += NOTICE_SECONDS
