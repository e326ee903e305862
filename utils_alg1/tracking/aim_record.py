"""meta/aim.txt: which run in Aim, in which repository, a run directory has."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from utils_alg1.base.files import write_atomically
from utils_alg1.run_directory import RunFolder

RECORD_NAME = "aim.txt"  # in meta/
REPOSITORY = ".aim"
USUAL_REPO = os.path.join("..", "..")  # from runs/<run>


@dataclass(frozen=True)
class AimRecord:
    """What meta/aim.txt says. Older versions wrote the hash alone.

    Attributes:
        run_hash: Aim's name of the run.
        repo: the folder that holds `.aim`; also as it is reached from the run directory, in case both were
            moved or copied together.
        run_dir: where the run directory was then.
    """

    run_hash: str | None = None
    repo: str | None = None
    repo_from_run: str = USUAL_REPO
    run_dir: str | None = None


def read_record(run: RunFolder) -> AimRecord:
    """Return the record of a run; an empty one if there is none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        text = os.fsdecode((run.meta_dir / RECORD_NAME).read_bytes())
        pairs = [line.partition(": ")[::2] for line in text.splitlines()]
        values = {name: value for name, value in pairs if value}
        run_hash = values.get("hash") or (text.strip() if not values else None) or None
        return AimRecord(
            run_hash, values.get("repo"), values.get("repo_from_run", USUAL_REPO), values.get("run_dir")
        )
    return AimRecord()


def write_record(run: RunFolder, run_hash: str, repo: Path) -> None:
    """Record that the run directory has this run in Aim; raises Alg1Error if that cannot be written."""
    path = run.path.absolute()
    lines = {
        "hash": run_hash,
        "repo": str(repo.absolute()),
        "repo_from_run": os.path.relpath(repo, path),
        "run_dir": str(path),
    }
    text = "".join(f"{name}: {value}\n" for name, value in lines.items())
    write_atomically(run.meta_dir / RECORD_NAME, os.fsencode(text))


def find_repo(run: RunFolder, record: AimRecord | None = None) -> Path:
    """Return the folder whose `.aim` has the run: for a new run, or if none is left, the current one."""
    record = record or read_record(run)
    if record.run_hash is None:
        return Path.cwd()
    recorded = [Path(record.repo)] if record.repo else []
    for repo in (Path(os.path.normpath(run.path.absolute() / record.repo_from_run)), *recorded):
        if (repo / REPOSITORY).exists():
            return repo
    return recorded[0] if recorded and recorded[0].is_dir() else Path.cwd()


def original_of(run: RunFolder, record: AimRecord, repo: Path) -> Path | None:
    """Return the run directory that this one is a copy of, if that has the same run in `repo` still."""
    if record.run_dir is None or not os.path.isdir(record.run_dir):
        return None
    other = RunFolder(Path(record.run_dir))
    if os.path.samefile(other.path, run.path):
        return None
    others = read_record(other)
    same = others.run_hash == record.run_hash and find_repo(other, others) == repo
    return other.path if same else None
