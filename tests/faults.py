"""Run train.py in forked child processes, so that hundreds can be killed or made to fail at chosen points.

The parent imports torch and trains once; every child starts from there in milliseconds.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from conftest import TEXT, lasting_metrics, with_changes

ARGUMENTS = (
    "--data text.txt --n-embd 16 --n-head 2 --n-layer 1 --block-size 8 --batch-size 2 --dropout 0.1"
    " --max-iters 12 --eval-interval 4 --eval-iters 2 --checkpoint-interval 3 --keep-checkpoints 2"
    " --threads 1 --no-aim --no-tensorboard"
).split()
LAST_STEP = 12
FILE_CALLS = ("open", "write", "fsync", "close", "rename", "unlink")
WORKERS = max(1, 2 // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)))  # cases at a time
TIMEOUT = 60.0  # seconds for one case

Action = Callable[[str, Callable, tuple, dict], Any]


def start_child(work: Callable[[], int]) -> int:
    """Fork a child that exits with the return value of `work`, its output in output.txt; returns its pid."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(pid: int) -> int:
    """Wait for a child; returns its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def train_here(arguments: Sequence[str]) -> int:
    """Run train.py in this process; returns its exit code."""
    import train
    from utils_alg1.console.script import run_script

    try:
        run_script(lambda: train.main(with_changes(arguments)))
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 99


def leave_out_pictures() -> None:
    """In this process, end runs without pictures, page and long samples, which take most of the time."""
    from utils_alg1.report import page as page_module
    from utils_alg1.report import results as results_module

    page_module.write_report = lambda *_: None
    results_module.SAMPLE_LENGTH = 8


def start_train(arguments: Sequence[str], prepare: Callable[[], object] | None = None) -> int:
    """Start train.py in a child, in the current folder; `prepare` is called in the child first."""

    def work() -> int:
        leave_out_pictures()
        if prepare is not None:
            prepare()
        return train_here(arguments)

    return start_child(work)


def train_in_child(arguments: Sequence[str], prepare: Callable[[], object] | None = None) -> int:
    """Run train.py in a child; returns its exit code, or minus the signal that killed it."""
    return wait(start_train(arguments, prepare))


# --- cases, some at a time ----------------------------------------------------------------------------


def new_folder(parent: Path, name: str) -> Path:
    folder = parent / name
    folder.mkdir()
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    return folder


def run_cases(parent: Path, cases: Mapping[str, Callable[[Path], None]]) -> None:
    """Run each case in its own folder and process, WORKERS at a time; show the output of what failed."""
    waiting = list(cases.items())
    running: dict[int, tuple[str, Path, float]] = {}
    failures: list[str] = []
    while waiting or running:
        while waiting and len(running) < WORKERS:
            name, case = waiting.pop()
            folder = new_folder(parent, f"case-{len(waiting):04d}")
            running[_start_case(folder, case)] = (name, folder, time.monotonic())
        for pid in list(running):
            name, folder, began = running[pid]
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done and time.monotonic() - began > TIMEOUT:
                os.kill(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
                done = pid
            if done:
                del running[pid]
                if os.waitstatus_to_exitcode(status):
                    output = (folder / "output.txt").read_text(errors="replace")
                    failures.append(f"{name}:\n{output[-1500:]}")
        time.sleep(0.002)
    assert not failures, f"{len(failures)} of {len(cases)} cases failed:\n" + "\n".join(failures[:3])


def _start_case(folder: Path, case: Callable[[Path], None]) -> int:
    def work() -> int:
        case(folder)
        return 0

    with contextlib.chdir(folder):
        return start_child(work)


def copy_of(reference: Reference, folder: Path) -> Path:
    """Copy the uninterrupted run to `folder`; returns the run directory."""
    shutil.copytree(reference.folder / "runs", folder / "runs")
    return only_run(folder)


def sample(cases: dict[str, Any], whole: bool, size: int, seed: int = 0) -> dict[str, Any]:
    """Return all cases, or a seeded sample of them."""
    if whole or len(cases) <= size:
        return cases
    names = random.Random(seed).sample(sorted(cases), size)
    return {name: cases[name] for name in names}


# --- faults -------------------------------------------------------------------------------------------


def at_file_call(index: int, action: Action) -> None:
    """In this process, replace the index-th file-system call of the checkpoints by `action`."""
    _watch_file_calls(lambda number, *call: action(*call) if number == index else None)


def record_file_calls(path: Path) -> None:
    """In this process, record the names of the file-system calls of the checkpoints in a JSON file."""
    names: list[str] = []

    def note(_number: int, name: str, *_call: Any) -> None:
        names.append(name)
        path.write_text(json.dumps(names))

    _watch_file_calls(note)


def _watch_file_calls(watch: Callable[..., Any]) -> None:
    from utils_alg1.training.checkpoint import CheckpointStore

    count, inside, thread = 0, False, 0
    real_write = CheckpointStore._write

    def write(*arguments: Any, **options: Any) -> Any:
        nonlocal inside, thread
        inside, thread = True, threading.get_ident()
        try:
            return real_write(*arguments, **options)
        finally:
            inside = False

    def wrap(name: str) -> None:
        real = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count, inside
            if not inside or threading.get_ident() != thread:
                return real(*arguments, **options)
            number, count = count, count + 1
            inside = False  # what the watcher does itself is not watched
            try:
                result = watch(number, name, real, arguments, options)
            finally:
                inside = True
            return real(*arguments, **options) if result is None else result

        setattr(os, name, call)

    CheckpointStore._write = write  # type: ignore[method-assign]
    for name in FILE_CALLS:
        wrap(name)


def kill_me() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_before(name: str, real: Callable, arguments: tuple, options: dict) -> None:
    kill_me()


def kill_half_way(name: str, real: Callable, arguments: tuple, options: dict) -> None:
    """Write half of the bytes, then die; other calls have no half."""
    descriptor, data = arguments
    real(descriptor, data[: len(data) // 2])
    kill_me()


def kill_after(name: str, real: Callable, arguments: tuple, options: dict) -> None:
    try:
        real(*arguments, **options)
    finally:  # also where the call itself fails, as removing what is not there
        kill_me()


def raising(number: int) -> Action:
    """Return an action that fails with an operating system error."""

    def action(name: str, real: Callable, arguments: tuple, options: dict) -> None:
        if name == "close":  # the descriptor is gone even when close reports an error
            real(*arguments, **options)
        raise OSError(number, os.strerror(number))

    return action


def without_locks(number: int, replace: Callable[[object, str, object], object] = setattr) -> None:
    """In this process, let every lock of a file fail with an error, as on some network mounts."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    for name in ("flock", "lockf"):
        replace(fcntl, name, refuse)


# --- what must hold -----------------------------------------------------------------------------------


def only_run(folder: Path) -> Path:
    (run_dir,) = (path for path in (folder / "runs").iterdir() if path.is_dir())
    return run_dir


def checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "runs").glob("*/artifacts/checkpoints/step_*.safetensors"))


def tensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Return the verified tensors of a checkpoint or export: type, shape and bytes by name."""
    from utils_alg1.network.tensor_file import read_tensors

    return {
        name: (str(t.dtype), tuple(t.shape), t.numpy().tobytes()) for name, t in read_tensors(path)[0].items()
    }


def metrics(run_dir: Path) -> list[dict[str, float]]:
    lines = lasting_metrics(run_dir / "logs" / "metrics.jsonl").splitlines()
    return [json.loads(line) for line in lines]


class Reference:
    """The uninterrupted run with which interrupted ones are compared."""

    def __init__(self, folder: Path):
        self.folder = folder
        began = time.monotonic()
        with contextlib.chdir(folder):
            assert train_in_child(ARGUMENTS) == 0, (folder / "output.txt").read_text()
        self.seconds = time.monotonic() - began
        run_dir = only_run(folder)
        self.last = tensors(checkpoints(folder)[-1])
        self.export = tensors(run_dir / "artifacts" / "export" / "model.safetensors")
        self.metrics = metrics(run_dir)

    def check(self, folder: Path) -> None:
        """Check that the run in `folder` ended with the same weights, optimizer state, export and metrics."""
        run_dir = only_run(folder)
        last = checkpoints(folder)[-1]
        assert last.name == f"step_{LAST_STEP:09d}.safetensors"
        assert tensors(last) == self.last
        assert tensors(run_dir / "artifacts" / "export" / "model.safetensors") == self.export
        assert metrics(run_dir) == self.metrics
        assert not list(folder.glob("runs/**/*.tmp")), "half-written files were left"

    def resume_and_check(self, folder: Path, *arguments: str) -> None:
        """Check that what is left of a run resumes to the same end, and that its checkpoints are whole."""
        if not checkpoints(folder):
            assert train_in_child(["--resume", "latest"]) == 2
            return
        for path in checkpoints(folder):
            tensors(path)  # under its final name, every checkpoint is whole
        code = train_in_child(["--resume", "latest", *arguments])
        assert code == 0, f"the resumed run ended with {code}"
        self.check(folder)

    def resume_in_process(self, folder: Path, command: Sequence[str]) -> None:
        """Do as `resume_and_check`, in a process started by `command`."""
        if checkpoints(folder):
            resume = [*command, "--resume", "latest"]
        else:  # it was killed before its first checkpoint: the user starts it again
            shutil.rmtree(folder / "runs")
            resume = [*command, *ARGUMENTS]
        subprocess.run(resume, cwd=folder, check=True, capture_output=True)
        self.check(folder)
