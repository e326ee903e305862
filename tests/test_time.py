"""The clock of a run: checkpoints by it, a limit of seconds, and pauses, which do not count."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from pathlib import Path

import faults
import pytest
from conftest import QUIET_TRACKERS, TINY

from utils_alg1.base.running_time import RunningTime
from utils_alg1.run_directory import checkpoint_step
from utils_alg1.training import progress as progress_module
from utils_alg1.training.checkpoint import CheckpointStore
from utils_alg1.training.trainer import Trainer

FLAGS = ["--data", "text.txt", *TINY, *QUIET_TRACKERS, "--max-iters", 12, "--eval-interval", 12]


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test advances: each training step takes clock.step_seconds."""

    class SetClock:
        seconds, step_seconds = 1000.0, 10.0

        def __call__(self) -> float:
            return self.seconds

    set_clock, optimizer_step = SetClock(), Trainer.optimizer_step

    def step(trainer: Trainer) -> None:
        optimizer_step(trainer)
        set_clock.seconds += set_clock.step_seconds

    monkeypatch.setattr(progress_module, "running_time", set_clock)
    monkeypatch.setattr(Trainer, "optimizer_step", step)
    return set_clock


@pytest.fixture
def saved(monkeypatch) -> list[int]:
    """The steps of the checkpoints."""
    steps, save = [], CheckpointStore.save

    def note(store, trainer, about):
        steps.append(trainer.step)
        save(store, trainer, about)

    monkeypatch.setattr(CheckpointStore, "save", note)
    return steps


def ended(folder: Path) -> tuple:
    return faults.tensors(faults.checkpoints(folder)[-1]), faults.metrics(faults.only_run(folder))


# --- checkpoint_minutes ---


@pytest.mark.parametrize(
    "minutes, interval, steps",
    [
        (0, 0, [0, 12]),
        (5, 0, [0, 3, 6, 9, 12]),  # of 100 seconds each
        (5, 4, [0, 3, 4, 7, 8, 11, 12]),  # each checkpoint starts the minutes anew
        (1, 0, [*range(13)]),
        (60, 5, [0, 5, 10, 12]),
    ],
)
def test_a_checkpoint_is_never_older_than_the_minutes(
    minutes, interval, steps, clock, saved, train, text_file
):
    clock.step_seconds = 100
    flags = ["--checkpoint-minutes", minutes, "--checkpoint-interval", interval]
    assert train(*FLAGS, *flags).code == 0
    assert saved == steps


def test_checkpoints_by_the_clock_change_no_byte(train, workdir, text_file):
    ends = []
    for minutes in (0, 1e-9):
        folder = workdir / str(minutes)
        assert train(*FLAGS, "--runs-dir", folder / "runs", "--checkpoint-minutes", minutes).code == 0
        ends.append(ended(folder))
    assert ends[0] == ends[1]


# --- max_seconds ---


def test_a_run_saves_and_ends_when_its_seconds_are_over_and_a_resume_has_as_many_again(
    clock, train, workdir, text_file
):
    assert train(*FLAGS).code == 0
    whole = ended(workdir)
    shutil.rmtree(workdir / "runs")
    result = train(*FLAGS, "--max-seconds", 45)
    assert result.code == 128 + signal.SIGTERM
    run = f"runs/{faults.only_run(workdir).name}"
    line = "stopped at step {} after 45 seconds (max_seconds); continue with: python train.py --resume " + run
    assert line.format(5) in result.out
    result = train("--resume", "latest")
    assert (result.code, line.format(10) in result.out) == (143, True)
    assert re.search(r"^changed .* max_seconds=45.0, .*\(as before\)$", result.out, re.M)
    result = train("--resume", "latest", "--max-seconds", 0)
    assert (result.code, "max_seconds)" in result.out) == (0, False)
    assert ended(workdir) == whole


def test_a_run_that_is_done_in_time_is_done(clock, train, text_file):
    assert train(*FLAGS, "--max-seconds", 120).code == 0  # as many as it takes


# --- pauses ---


def test_seconds_in_which_the_process_is_stopped_do_not_count(workdir):
    def work() -> int:
        clock = RunningTime()
        with clock.watch():
            began = clock()
            for _ in range(20):
                end = time.process_time() + 0.02
                while time.process_time() < end:
                    pass
                clock()
            Path("ready").touch()
            signal.pause()  # continued, by which it goes on
            before, clock_before = time.perf_counter() - began, clock()
            Path("told").write_text(f"{before} {clock_before - began}")
        return 0

    pid = faults.start_child(work)
    while not Path("ready").exists():
        time.sleep(0.01)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(1.5)
    os.kill(pid, signal.SIGCONT)
    assert faults.wait(pid) == 0
    wall, counted = map(float, Path("told").read_text().split())
    assert wall - counted >= 1.4


# --- a notebook's stop button ---


def test_a_notebooks_stop_button_costs_no_more_than_the_minutes_and_is_told(reference, workdir, text_file):
    """On steps of a second; those in the middle of one are killed before they can save."""

    def slow_steps() -> None:
        forward_backward = Trainer.forward_backward

        def slow(trainer: Trainer) -> float:
            time.sleep(1)
            return forward_backward(trainer)

        Trainer.forward_backward = slow

    words = ["--eval-interval", "12", "--checkpoint-interval", "0", "--checkpoint-minutes", "0.025"]
    pid = faults.start_train([*faults.ARGUMENTS, *words], slow_steps)
    end = time.monotonic() + faults.TIMEOUT
    while not any(checkpoint_step(path) >= 2 for path in faults.checkpoints(workdir)):
        assert time.monotonic() < end, Path("output.txt").read_text()
        time.sleep(0.05)
    time.sleep(0.3)
    for number, seconds in (("SIGINT", 0.2), ("SIGHUP", 0.1), ("SIGCONT", 0.1), ("SIGINT", 0.5)):
        os.kill(pid, getattr(signal, number))
        time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    assert faults.wait(pid) == 130  # the second SIGINT, before the SIGKILL
    saved = checkpoint_step(faults.checkpoints(workdir)[-1])
    assert faults.metrics(faults.only_run(workdir))[-1]["step"] - saved <= 2  # a second each
    name = faults.only_run(workdir).name
    told = f"left at once; continue from step {saved} with: python train.py --resume runs/{name}\n"
    assert told in Path("output.txt").read_text()
    assert faults.train_in_child(["--resume", "latest", "--eval-interval", "4"]) == 0
    assert f"steps    {saved} to 12, of" in Path("output.txt").read_text()
    assert faults.tensors(faults.checkpoints(workdir)[-1]) == reference.last
