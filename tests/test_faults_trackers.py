"""Trackers after trouble: clocks that are behind, deleted runs, copied runs; nothing is lost or doubled."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
import types
from functools import partial
from pathlib import Path

import faults

from utils_alg1.base.summaries import Tracker

WITH_TENSORBOARD = [flag for flag in faults.ARGUMENTS if flag != "--no-tensorboard"]
WITH_AIM = [flag for flag in faults.ARGUMENTS if flag != "--no-aim"]


def at_step(step: int, action) -> None:
    """In this process, call `action` before the update of a step."""
    from utils_alg1.training.trainer import Trainer

    optimizer_step = Trainer.optimizer_step

    def act(trainer) -> None:
        if trainer.step == step:
            action()
        optimizer_step(trainer)

    Trainer.optimizer_step = act  # type: ignore[method-assign]


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def losses(run_dir: Path) -> list[tuple[int, float]]:
    rows = faults.metrics(run_dir)
    return [(int(row["step"]), row["loss/train_step"]) for row in rows if "loss/train_step" in row]


# --- a clock that is behind ---------------------------------------------------------------------------


def put_clock_back(seconds: float) -> None:
    from utils_tensorboard import event_file

    event_file.time = types.SimpleNamespace(time=lambda: time.time() - seconds)  # type: ignore[assignment]


def resume_under_an_earlier_clock(
    reference: faults.Reference, step: int, seconds: float, folder: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert faults.train_in_child(WITH_TENSORBOARD, partial(at_step, step, interrupt)) == 130
    assert faults.train_in_child(["--resume", "latest"], partial(put_clock_back, seconds)) == 0
    reference.check(folder)
    run_dir = faults.only_run(folder)
    events = EventAccumulator(str(run_dir / "logs/tensorboard"), size_guidance={"scalars": 0}).Reload()
    shown = [(e.step, e.value) for e in events.Scalars("Loss/train_step")]
    assert [step for step, _ in shown] == list(range(faults.LAST_STEP))
    assert all(abs(a[1] - b[1]) < 1e-6 for a, b in zip(shown, losses(run_dir), strict=True))


def test_resumed_under_a_clock_that_is_behind(reference, tmp_path, campaign):
    cases = {
        f"stopped at step {step}, {seconds} s behind": partial(
            resume_under_an_earlier_clock, reference, step, seconds
        )
        for step in range(1, 11, 3)
        for seconds in (1, 60, 86_400, 10**9)
    }
    chosen = faults.sample(cases, campaign.whole, 2)
    faults.run_cases(tmp_path, chosen)
    campaign.count("resumed under a clock that is behind: TensorBoard shows each step once", len(chosen))


# --- a run that is deleted while it trains ------------------------------------------------------------


def delete_at(step: int, folder: Path) -> None:
    code = faults.train_in_child(
        WITH_TENSORBOARD, lambda: at_step(step, lambda: shutil.rmtree(faults.only_run(Path())))
    )
    output = (folder / "output.txt").read_text()
    assert code == 4, output
    assert "Traceback" not in output
    assert [path for path in (folder / "runs").iterdir() if path.is_dir()] == []


def test_a_run_that_is_deleted_while_it_trains_stays_deleted(reference, tmp_path, campaign):
    cases = {f"at step {step}": partial(delete_at, step) for step in range(faults.LAST_STEP)}
    chosen = faults.sample(cases, campaign.whole, 3)
    faults.run_cases(tmp_path, chosen)
    campaign.count("a run deleted while it trains: exit code 4, and its folder is not made anew", len(chosen))


# --- a run that is copied -----------------------------------------------------------------------------


class FileAim(Tracker):
    """An AimTracker whose runs are files of lines: step, name, value."""

    def __init__(self, run_name, run_dir, repo, run_hash, warn, tag):
        folder = repo / ".aim"
        folder.mkdir(exist_ok=True)
        self.run_hash = (
            run_hash if run_hash and (folder / run_hash).exists() else f"{random.getrandbits(64):x}"
        )
        self._file = (folder / self.run_hash).open("a")

    def track_config(self, config): ...
    def track_metadata(self, key, value): ...

    def log(self, kind, payload, step):
        if kind == "scalars" and "loss/train_step" in payload:
            self._file.write(f"{step} {payload['loss/train_step']}\n")

    def flush(self):
        self._file.flush()

    def close(self):
        self._file.close()


def put_file_aim() -> None:
    from utils_alg1.tracking import trackers

    trackers.AimTracker = FileAim  # type: ignore[misc, assignment]


def points(path: Path) -> list[tuple[int, float]]:
    """The last point of each step, as Aim keeps them."""
    found = dict(line.split() for line in path.read_text().splitlines())
    return sorted((int(step), float(loss)) for step, loss in found.items())


def resume_run_and_copy(step: int, folder: Path) -> None:
    def prepare() -> None:
        put_file_aim()
        at_step(step, interrupt)

    assert faults.train_in_child(WITH_AIM, prepare) == 130
    run_dir = faults.only_run(folder)
    copy = run_dir.with_name(f"{run_dir.name}-copy")
    shutil.copytree(run_dir, copy)
    for path in (copy, run_dir):
        assert faults.train_in_child(["--resume", str(path)], put_file_aim) == 0
    assert len(list((folder / ".aim").iterdir())) == 2  # one each
    for path in (folder / ".aim").iterdir():
        assert points(path) == losses(run_dir) == losses(copy)


def test_a_copied_run_has_a_run_of_its_own_in_aim(reference, tmp_path, campaign):
    steps = range(1, faults.LAST_STEP - 1)
    cases = {f"stopped at step {step}": partial(resume_run_and_copy, step) for step in steps}
    chosen = faults.sample(cases, campaign.whole, 2)
    faults.run_cases(tmp_path, chosen)
    campaign.count("a run and its copy resumed: each step once in a run of its own in Aim", len(chosen))
