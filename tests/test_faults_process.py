"""Signals, full disks and crowds: the run survives them all."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import faults
import pytest
from conftest import PROJECT

from utils_alg1.base.threads import ENOUGH

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
        assert "continue with: python train.py --resume " in output
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


def signals_of_two_kinds(
    reference: faults.Reference, first: int, second: int, index: int, folder: Path
) -> None:
    """A logout, or a notebook's stop button, sends another kind at once: both are one request."""

    def interrupt(_name, real, arguments, options):
        os.kill(os.getpid(), first)
        os.kill(os.getpid(), second)
        return real(*arguments, **options) or ()

    code = faults.train_in_child(faults.ARGUMENTS, partial(faults.at_file_call, index, interrupt))
    output = (folder / "output.txt").read_text()
    assert code in (128 + first, 128 + second, 0), output  # both are pending: Python takes the lower number
    if code:
        assert "continue with: python train.py --resume " in output and "left at once" not in output
        reference.resume_and_check(folder)
    else:  # it came in the very last checkpoint: the run was done
        reference.check(folder)
    assert not list(folder.glob("runs/**/*.tmp"))


def test_a_second_signal_of_another_kind_in_the_middle_of_a_save(reference, tmp_path, campaign):
    kinds = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    cases = {
        f"{first.name}, then {second.name} at file call {index}": partial(
            signals_of_two_kinds, reference, first, second, index
        )
        for first, second in itertools.permutations(kinds, 2)
        for index in range(1, 44, 11)
    }
    chosen = faults.sample(cases, campaign.whole, 6)
    faults.run_cases(tmp_path, chosen)
    campaign.count("second signal of another kind", len(chosen))


# --- few threads ----------------------------------------------------------------------------------------


# On a busy machine.
SLOW = "did not close within 20 seconds; a resume sends the missing curves, and so does: python compare.py "


def with_few_threads(
    reference: faults.Reference, n: int, of: tuple[str, ...], is_told: bool, folder: Path
) -> None:
    def limit() -> None:
        """Let so many threads be alive, and no process be forked beyond; root is not held to a real limit."""
        if is_told:
            resource.setrlimit(resource.RLIMIT_NPROC, (n, n))
        real_start, real_fork = threading.Thread.start, os.fork

        def start(thread: threading.Thread) -> None:
            if "threads" in of and threading.active_count() >= n:
                raise RuntimeError("can't start new thread")
            real_start(thread)

        def fork() -> int:
            if "forks" in of and threading.active_count() >= n:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            return real_fork()

        threading.Thread.start = start  # type: ignore[method-assign]
        os.fork = fork

    arguments = [word for word in faults.ARGUMENTS if word != "--no-tensorboard"]
    code = faults.train_in_child(arguments, limit)
    output = (folder / "output.txt").read_text()
    assert code == 0, output
    reference.check(folder)
    assert "Traceback" not in output
    where = f"ulimit -u: {n}" if is_told else "of the system or its container"
    reason = f"the limit on threads and processes is reached ({where})\n"
    warnings = [line for line in output.splitlines(keepends=True) if line.startswith("warning: ")]
    assert all(line.endswith(f": {reason}") or SLOW in line for line in warnings), warnings
    # Told of a limit, a tracker is only started where there is room for what it may need.
    if n == 1 or (is_told and "threads" in of and n < ENOUGH):
        assert "warning: TensorBoard is switched off, training continues: the limit" in output
    if n == 1 and "threads" in of:
        assert "warning: the training waits while a checkpoint is written: the limit" in output
    if n >= ENOUGH:
        is_off = n == ENOUGH and is_told and "threads" in of  # one of them is the main thread
        assert any(line.endswith(reason) for line in warnings) == is_off


def test_few_threads(reference, tmp_path, campaign):
    cases = {
        f"{n} {' and '.join(of)}, {'told' if is_told else 'not told'}": partial(
            with_few_threads, reference, n, of, is_told
        )
        for n in (1, 2, 3, 4, ENOUGH, 2 * ENOUGH)
        for of in (("threads",), ("forks",), ("threads", "forks"))
        for is_told in (True, False)
    }
    chosen = faults.sample(cases, campaign.whole, 8)
    faults.run_cases(tmp_path, chosen)
    campaign.count("few threads", len(chosen))


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
