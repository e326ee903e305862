"""File systems without locks, as some network mounts are: one line says so, and nothing is called in use."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest
from conftest import QUIET_TRACKERS, TINY, runner
from faults import without_locks

from utils_alg1.base.errors import Alg1Error
from utils_alg1.base.locks import NO_LOCKS, NoLocks
from utils_alg1.run_directory import find_interrupted, in_use, list_runs, lock_run
from utils_alg1.utils_run_manager import create_run

HINT = "name a --runs-dir on another file system, such as a local disk; runs may be copied there"
TRAIN = ["--data", "text.txt", *TINY, *QUIET_TRACKERS]


@pytest.fixture(params=sorted(set(NO_LOCKS)), ids=errno.errorcode.get)
def reason(request, monkeypatch) -> str:
    """Why no file can be locked from now on."""
    without_locks(request.param, monkeypatch.setattr)
    return f"its file system has no locks ({os.strerror(request.param)})"


def test_a_new_run_says_so_and_leaves_nothing(text_file, train, reason):
    result = train(*TRAIN)
    assert (result.code, result.err) == (4, f"error: cannot lock runs: {reason}\nhint: {HINT}\n")
    assert not Path("runs").exists()
    Path("runs").mkdir()
    assert train(*TRAIN) == result
    assert os.listdir("runs") == []


def test_a_run_is_resumed_nowhere_and_called_running_nowhere(text_file, train, sample, capsys, monkeypatch):
    import compare

    assert train(*TRAIN).code == 0
    (run,) = list_runs("runs")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"}
    without_locks(errno.ENOLCK, monkeypatch.setattr)
    for name in ("latest", run.name):
        result = train("--resume", name, "--max-iters", 9)
        assert result.code == 4
        assert result.err == (
            f"error: cannot lock {run}: its file system has no locks (No locks available)\nhint: {HINT}\n"
        )
    assert not in_use(run)
    said: list[str] = []
    assert find_interrupted("runs", said.append) == run
    assert len(said) == 1 and "is done" in said[0]
    assert " done " in runner(compare.main, capsys)().out
    assert sample("--max-new-tokens", 1).code == 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"} == before


def test_a_lock_that_somebody_holds_is_no_missing_lock(workdir):
    with create_run("runs") as run:
        assert in_use(run.path)
        with pytest.raises(Alg1Error, match="is in use by another process") as caught:
            lock_run(run.path, timeout=0)
        assert not isinstance(caught.value, NoLocks)


def test_an_error_of_the_disk_is_no_missing_lock(workdir, monkeypatch):
    without_locks(errno.EIO, monkeypatch.setattr)
    with pytest.raises(Alg1Error) as caught:
        create_run("runs")
    assert caught.value.message == "cannot lock runs: Input/output error"
    assert (caught.value.exit_code, os.listdir("runs")) == (4, [".lock"])


def test_the_stand_in_refuses_what_the_kernel_grants(workdir, monkeypatch):
    with open("file", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        without_locks(errno.ENOLCK, monkeypatch.setattr)
        for function in (fcntl.flock, fcntl.lockf):
            with pytest.raises(OSError, match="No locks available"):
                function(file, fcntl.LOCK_EX)
