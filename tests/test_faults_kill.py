"""A run that is killed anywhere and resumed ends like one that never was."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import faults
import pytest


@pytest.fixture(scope="module")
def file_calls(reference, tmp_path_factory) -> list[str]:
    """The names of all file-system calls that the checkpoints of a run make."""
    folder = faults.new_folder(tmp_path_factory.mktemp("calls"), "run")
    record = partial(faults.record_file_calls, folder / "calls.json")
    with contextlib.chdir(folder):
        assert faults.train_in_child(faults.ARGUMENTS, record) == 0
    return json.loads((folder / "calls.json").read_text())


def kill_at(reference: faults.Reference, index: int, action: faults.Action, folder: Path) -> None:
    code = faults.train_in_child(faults.ARGUMENTS, partial(faults.at_file_call, index, action))
    assert code == -signal.SIGKILL
    reference.resume_and_check(folder)


def test_killed_at_any_file_call_of_a_checkpoint(reference, file_calls, tmp_path, campaign):
    assert {"open", "write", "fsync", "close", "rename", "unlink"} == set(file_calls)
    cases = {}
    for index, name in enumerate(file_calls):
        actions = [faults.kill_before, faults.kill_after]
        if name == "write":
            actions.append(faults.kill_half_way)
        for action in actions:
            cases[f"{action.__name__} {index} {name}"] = partial(kill_at, reference, index, action)
    chosen = faults.sample(cases, campaign.whole, 10)
    faults.run_cases(tmp_path, chosen)
    campaign.count("SIGKILL before, half-way through or after a file call of a checkpoint", len(chosen))


def kill_after_seconds(reference: faults.Reference, seconds: float, folder: Path) -> None:
    pid = faults.start_train(faults.ARGUMENTS)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    assert faults.wait(pid) in (-signal.SIGKILL, 0)
    if not list(folder.glob("runs/2*")):
        assert faults.train_in_child(["--resume", "latest"]) == 2
        return
    reference.resume_and_check(folder)


def test_killed_at_random_moments(reference, tmp_path, campaign):
    draw = random.Random(1337)
    moments = [draw.uniform(0, 1.1 * reference.seconds) for _ in range(200 if campaign.whole else 10)]
    cases = {
        f"killed after {seconds:.4f} s (case {i})": partial(kill_after_seconds, reference, seconds)
        for i, seconds in enumerate(moments)
    }
    faults.run_cases(tmp_path, cases)
    campaign.count("SIGKILL at a random moment of a run", len(cases))


def kill_again_and_again(reference: faults.Reference, seed: int, folder: Path) -> None:
    draw = random.Random(seed)
    arguments = faults.ARGUMENTS
    for _ in range(4):
        pid = faults.start_train(arguments)
        time.sleep(draw.uniform(0.3, 0.9) * reference.seconds)
        os.kill(pid, signal.SIGKILL)
        faults.wait(pid)
        if faults.checkpoints(folder):
            arguments = ["--resume", "latest"]
        elif list(folder.glob("runs/2*")):
            return  # killed before its first checkpoint: there is nothing to go on from
    reference.resume_and_check(folder)


def test_killed_again_while_it_resumes(reference, tmp_path, campaign):
    seeds = range(20 if campaign.whole else 3)
    faults.run_cases(
        tmp_path, {f"seed {seed}": partial(kill_again_and_again, reference, seed) for seed in seeds}
    )
    campaign.count("SIGKILL four times in a row, each time in the resumed run", len(seeds))


def fail_at(reference: faults.Reference, index: int, name: str, number: int, folder: Path) -> None:
    prepare = partial(faults.at_file_call, index, faults.raising(number))
    code = faults.train_in_child(faults.ARGUMENTS, prepare)
    output = (folder / "output.txt").read_text()
    if name == "unlink":
        # A temporary or superseded file that cannot be removed costs nothing but its space.
        assert code in (0, 4), output
    else:
        assert code == 4, output
        assert output.count("error: cannot write ") == 1
    assert "Traceback" not in output
    assert not list(folder.glob("runs/**/*.tmp"))
    if code == 0:
        reference.check(folder)
    else:
        reference.resume_and_check(folder)


def test_a_disk_error_at_any_file_call_of_a_checkpoint(reference, file_calls, tmp_path, campaign):
    cases = {
        f"{errno.errorcode[number]} at {index} {name}": partial(fail_at, reference, index, name, number)
        for number in (errno.ENOSPC, errno.EIO, errno.EROFS)
        for index, name in enumerate(file_calls)
    }
    chosen = faults.sample(cases, campaign.whole, 8)
    faults.run_cases(tmp_path, chosen)
    campaign.count("ENOSPC, EIO or EROFS from a file call of a checkpoint", len(chosen))
