"""Signals, full disks and crowds: the run survives them all."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import faults
import pytest
from conftest import PROJECT

# --- signals ------------------------------------------------------------------------------------------


def signal_in_a_save(
    reference: faults.Reference, number: int, second: bool, index: int, folder: Path
) -> None:
    def interrupt(_name, real, arguments, options):
        os.kill(os.getpid(), number)
        if second:
            os.kill(os.getpid(), number)
        return real(*arguments, **options) or ()

    code = faults.train_in_child(faults.ARGUMENTS, partial(faults.at_file_call, index, interrupt))
    output = (folder / "output.txt").read_text()
    assert code in (128 + number, 0), output
    if code and not second:
        assert "go on with: python train.py --resume " in output
        assert not list(folder.glob("runs/**/*.tmp"))
    if code:
        reference.resume_and_check(folder)
    else:  # it came in the very last checkpoint: the run was done
        reference.check(folder)


def test_a_first_and_a_second_signal_in_the_middle_of_a_save(reference, tmp_path, campaign):
    cases = {
        f"{number.name} {'twice' if second else 'once'} at file call {index}": partial(
            signal_in_a_save, reference, number, second, index
        )
        for number in (signal.SIGINT, signal.SIGTERM)
        for second in (False, True)
        for index in range(0, 44, 4)
    }
    chosen = faults.sample(cases, campaign.whole, 8)
    faults.run_cases(tmp_path, chosen)
    campaign.count("SIGINT or SIGTERM, once or twice, in the middle of a save", len(chosen))


# --- full disks ---------------------------------------------------------------------------------------


def limit_file_size(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does at start: then write() fails with EFBIG
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def under_a_file_size_limit(reference: faults.Reference, size: int, folder: Path) -> None:
    code = faults.train_in_child(faults.ARGUMENTS, partial(limit_file_size, size))
    output = (folder / "output.txt").read_text(errors="replace")
    assert code in (0, 4), output
    assert "Traceback" not in output
    assert not list(folder.glob("runs/**/*.tmp"))
    if code == 0:
        reference.check(folder)
    elif list(folder.glob("runs/2*")):
        reference.resume_and_check(folder)


def test_a_file_size_limit_of_any_size(reference, tmp_path, campaign):
    largest = max(path.stat().st_size for path in reference.folder.rglob("*") if path.is_file())
    count = 40
    cases = {
        f"{size} bytes": partial(under_a_file_size_limit, reference, size)
        for size in (round(largest * 1.1 * i / count) for i in range(count))
    }
    chosen = faults.sample(cases, campaign.whole, 6)
    faults.run_cases(tmp_path, chosen)
    campaign.count("file-size limit (RLIMIT_FSIZE), then resumed without it", len(chosen))


def on_a_small_disk(reference: faults.Reference, kilobytes: int, folder: Path) -> None:
    runs = folder / "runs"
    runs.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(runs)]
    subprocess.run(mount, check=True, capture_output=True)
    try:
        code = faults.train_in_child(faults.ARGUMENTS)
        output = (folder / "output.txt").read_text(errors="replace")
        assert code in (0, 4), output
        assert "Traceback" not in output
        subprocess.run(["mount", "-o", "remount,size=64m", str(runs)], check=True, capture_output=True)
        if code == 0:
            reference.check(folder)
        elif list(runs.glob("2*")):
            reference.resume_and_check(folder)
    finally:
        subprocess.run(["umount", str(runs)], check=True, capture_output=True)


@pytest.fixture
def can_mount(tmp_path):
    probe = tmp_path / "probe"
    probe.mkdir()
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("only root may mount a small disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(probe)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    subprocess.run(["umount", str(probe)], check=True)


def test_a_disk_that_becomes_full(reference, tmp_path, campaign, can_mount):
    sizes = range(20, 420, 20)
    cases = {f"{size} KiB": partial(on_a_small_disk, reference, size) for size in sizes}
    chosen = faults.sample(cases, campaign.whole, 4)
    faults.run_cases(tmp_path, chosen)
    campaign.count("full disk (a small tmpfs), then resumed on a larger one", len(chosen))


# --- crowds -------------------------------------------------------------------------------------------


def test_eight_processes_on_one_run(reference, tmp_path, campaign):
    def crowd(folder: Path) -> None:
        arguments = [*faults.ARGUMENTS, "--max-iters", "3"]
        assert faults.train_in_child(arguments) == 0
        resume = ["--resume", "latest", "--max-iters", str(faults.LAST_STEP)]
        pids = [faults.start_train(resume) for _ in range(8)]
        codes = sorted(faults.wait(pid) for pid in pids)
        # One has the run; the others were refused, unless they came when it had been freed again.
        assert codes[0] == 0 and set(codes) <= {0, 2}, codes
        refusals = (folder / "output.txt").read_text().count("is in use by another process")
        assert refusals == codes.count(2)
        assert faults.tensors(faults.checkpoints(folder)[-1]) == reference.last

    rounds = 6 if campaign.whole else 1
    faults.run_cases(tmp_path, {f"round {i}": crowd for i in range(rounds)})
    campaign.count("eight processes resume one run", 8 * rounds)


def test_eight_new_runs_take_eight_numbers(reference, tmp_path, campaign):
    def crowd(folder: Path) -> None:
        pids = [faults.start_train(faults.ARGUMENTS) for _ in range(8)]
        assert [faults.wait(pid) for pid in pids] == [0] * 8
        names = sorted(path.name[-3:] for path in (folder / "runs").iterdir() if path.is_dir())
        assert names == [f"{i:03d}" for i in range(1, 9)]
        for path in (folder / "runs").glob("*/artifacts/checkpoints/step_000000012.safetensors"):
            assert faults.tensors(path) == reference.last

    faults.run_cases(tmp_path, {"round": crowd})
    campaign.count("eight processes start a run", 8)


# --- real processes -----------------------------------------------------------------------------------


def test_real_processes_killed_and_resumed(reference, tmp_path, campaign):
    rounds = 4 if campaign.whole else 1
    for i in range(rounds):
        folder = faults.new_folder(tmp_path, f"real-{i}")
        command = [sys.executable, str(PROJECT / "train.py")]
        first = subprocess.Popen(
            [*command, *faults.ARGUMENTS], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert first.stdout is not None
        for line in first.stdout:
            if line.startswith(f"step {4 * (i % 3):6d}".encode()):
                first.kill()
        first.wait()
        assert first.returncode == -signal.SIGKILL
        reference.resume_in_process(folder, command)
    campaign.count("a real python train.py process killed, and another one resumed", rounds)
