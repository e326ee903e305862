"""Where a run is kept: file systems that lack something, and runs that were copied. Nothing is lost."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import stat
from functools import partial
from pathlib import Path

import faults
import pytest

from utils_alg1.base.files import NOT_SUPPORTED
from utils_alg1.base.locks import NO_LOCKS

LAST_FILE_CALL = 44  # of the checkpoints of a run, or more


def without_fsync_of_folders(number: int) -> None:
    """In this process, let fsync of a folder fail with an error, as in shared folders of virtual machines."""
    fsync = os.fsync

    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    os.fsync = refuse


def begin(folder: Path, index: int, *prepare: partial) -> None:
    """Train until a file call of a checkpoint, and die there; a run that makes fewer calls is done."""

    def prepare_all() -> None:
        for change in prepare:
            change()
        faults.at_file_call(index, faults.kill_before)

    assert faults.train_in_child(faults.ARGUMENTS, prepare_all) in (-signal.SIGKILL, 0)


def killed_without_fsync(reference: faults.Reference, number: int, index: int, folder: Path) -> None:
    no_fsync = partial(without_fsync_of_folders, number)
    begin(folder, index, no_fsync)
    if not faults.checkpoints(folder):
        reference.resume_and_check(folder)  # refused: there is nothing to resume from
        return
    assert faults.train_in_child(["--resume", "latest"], no_fsync) == 0
    reference.check(folder)
    output = (folder / "output.txt").read_text()
    assert output.count("warning: the file system cannot fsync folders") in (1, 2)  # one for each process


def test_killed_where_folders_cannot_be_fsynced(reference, tmp_path, campaign):
    cases = {
        f"{errno.errorcode[number]}, killed at file call {index}": partial(
            killed_without_fsync, reference, number, index
        )
        for number in sorted(set(NOT_SUPPORTED))
        for index in range(0, LAST_FILE_CALL, 2)
    }
    chosen = faults.sample(cases, campaign.whole, 4)
    faults.run_cases(tmp_path, chosen)
    campaign.count("no fsync of folders; killed, then resumed there", len(chosen))


def killed_and_without_locks(reference: faults.Reference, number: int, index: int, folder: Path) -> None:
    begin(folder, index)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/**/*")}
    (folder / "output.txt").write_text("")
    no_locks = partial(faults.without_locks, number)
    assert faults.train_in_child(["--resume", "latest"], no_locks) == 4
    assert faults.train_in_child([*faults.ARGUMENTS, "--runs-dir", "others"], no_locks) == 4
    said = (folder / "output.txt").read_text().splitlines()
    assert [line.partition(":")[0] for line in said] == ["error", "hint"] * 2, said
    assert all("its file system has no locks" in line for line in said[::2])
    assert {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/**/*")} == before
    assert not Path("others").exists()
    reference.resume_and_check(folder)


def test_killed_and_then_moved_to_where_no_file_can_be_locked(reference, tmp_path, campaign):
    cases = {
        f"{errno.errorcode[number]}, killed at file call {index}": partial(
            killed_and_without_locks, reference, number, index
        )
        for number in sorted(set(NO_LOCKS))
        for index in range(0, LAST_FILE_CALL, 4)
    }
    chosen = faults.sample(cases, campaign.whole, 4)
    faults.run_cases(tmp_path, chosen)
    campaign.count("no locks: refused in one line, then resumed with locks", len(chosen))


def killed_and_copied(reference: faults.Reference, index: int, folder: Path) -> None:
    begin(folder, index)
    if not faults.checkpoints(folder):
        reference.resume_and_check(folder)  # refused: there is nothing to resume from
        return
    run = faults.only_run(folder)
    copy = shutil.copytree(run, folder / "runs" / "copy")
    for name in (run.name, "copy"):
        assert faults.train_in_child(["--resume", name]) == 0
    other = folder / "other"
    (other / "runs").mkdir(parents=True)
    copy.rename(other / "runs" / "copy")
    for place in (folder, other):
        with contextlib.chdir(place):
            reference.check(place)


def test_killed_and_copied_and_both_resumed(reference, tmp_path, campaign):
    cases = {
        f"killed at file call {index}": partial(killed_and_copied, reference, index)
        for index in range(LAST_FILE_CALL)
    }
    chosen = faults.sample(cases, campaign.whole, 4)
    faults.run_cases(tmp_path, chosen)
    campaign.count("a killed run copied, and both resumed", len(chosen))


def test_the_stand_in_fails_for_folders_only(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", os.fsync)  # put back afterwards
    without_fsync_of_folders(errno.EINVAL)
    folder = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(OSError, match="Invalid argument"):
        os.fsync(folder)
    os.close(folder)
    with open(tmp_path / "file", "w") as file:
        os.fsync(file.fileno())
