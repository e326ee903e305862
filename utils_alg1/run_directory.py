"""Run directories: their names, their files, their lock.

runs/YYYY-MM-DD_NNN_tag/
    meta/        full_config.json  git.txt  env.txt  notes.md  configs/ (copies)
    logs/        metrics.jsonl  train.log  tensorboard/
    artifacts/   checkpoints/  export/model.safetensors  export/config.json
    eval/        final.json  samples.txt  loss.png  attention.png  report.html
"""

from __future__ import annotations

import os
import re
import shutil
import time
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from parameters import specs
from utils_alg1.base.errors import Alg1Error, disk_error

if TYPE_CHECKING:
    from filelock import FileLock  # imported when it is needed: it takes longer than all of --help

RUN_ID = re.compile(r"(\d{4}-\d{2}-\d{2})_(\d{3,})(?:_(.*))?")
CHECKPOINT_NAME = re.compile(r"step_(\d{9,})\.safetensors")
MAX_TAG_LENGTH = 60  # characters
MAX_TAG_BYTES = 200  # a file name has at most 255 bytes
LOCK_NAME = ".lock"
LOCK_TIMEOUT = 1.0  # seconds: `in_use` takes the lock of a run for an instant


@dataclass
class RunFolder:
    """A run directory: the paths of its files."""

    path: Path

    @property
    def run_id(self) -> str:
        return self.path.name

    @property
    def meta_dir(self) -> Path:
        return self.path / "meta"

    @property
    def record_path(self) -> Path:
        return self.meta_dir / "full_config.json"

    @property
    def log_path(self) -> Path:
        return self.path / "logs" / "train.log"

    @property
    def metrics_path(self) -> Path:
        return self.path / "logs" / "metrics.jsonl"

    @property
    def tensorboard_dir(self) -> Path:
        return self.path / "logs" / "tensorboard"

    @property
    def checkpoint_dir(self) -> Path:
        return self.path / "artifacts" / "checkpoints"

    @property
    def export_path(self) -> Path:
        return self.path / "artifacts" / "export" / "model.safetensors"

    @property
    def eval_dir(self) -> Path:
        return self.path / "eval"

    @property
    def final_path(self) -> Path:
        return self.eval_dir / "final.json"

    @property
    def report_path(self) -> Path:
        return self.eval_dir / "report.html"


@dataclass
class RunDirectory(RunFolder):
    """A run directory that this process holds the lock of until the `with` block ends.

    Attributes:
        lock: the lock.
        is_new: remove the directory at the end, unless `keep` is called.
        opened: the time.monotonic() at which this process took it.
    """

    lock: FileLock
    is_new: bool = False
    opened: float = field(default_factory=time.monotonic)

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_new:
            shutil.rmtree(self.path, ignore_errors=True)
        self.lock.release()

    def keep(self) -> None:
        """Keep the directory: from now on it holds something of value."""
        self.is_new = False


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the file of the checkpoint of a step."""
    return folder / f"step_{step:09d}.safetensors"


def checkpoint_paths(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first; files with other names are left out."""
    return sorted(
        (path for path in folder.glob("step_*") if CHECKPOINT_NAME.fullmatch(path.name)), key=checkpoint_step
    )


def checkpoint_step(path: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(path.stem.removeprefix("step_"))


def sanitise_tag(tag: str) -> str:
    """Reduce a tag to letters, digits, `-`, `_` and `.`, so that it can be part of a directory's name."""
    text = unicodedata.normalize("NFC", tag)
    text = re.sub(r"[^\w.-]+", "-", text).strip(".-_")[:MAX_TAG_LENGTH]
    while len(text.encode("utf-8", "replace")) > MAX_TAG_BYTES:
        text = text[:-1]
    return text.strip(".-_")


def list_runs(runs_dir: str | Path) -> list[Path]:
    """Return the run directories in a folder, oldest first."""
    try:
        paths = list(Path(runs_dir).iterdir())
    except (OSError, ValueError):  # ValueError: the name has a null character
        return []
    runs = [(match, path) for path in paths if (match := RUN_ID.fullmatch(path.name))]
    runs = [(match, path) for match, path in runs if path.is_dir()]
    return [path for match, path in sorted(runs, key=lambda r: (r[0][1], int(r[0][2]), r[1].name))]


NO_RUN_HINT = "start one: python train.py, or name another --runs-dir"


def find_run(runs_dir: str | Path, name: str = "latest") -> Path:
    """Return the directory of a run, named by `latest`, a run id or a path.

    Raises:
        Alg1Error: there is none.
    """
    runs = list_runs(runs_dir)
    if name == "latest":
        if not runs:
            raise Alg1Error(f"there is no run in {runs_dir}{no_folder(runs_dir)}", NO_RUN_HINT)
        return runs[-1]
    for run in runs:
        if run.name == name or (run.name.startswith(f"{name}_") and RUN_ID.fullmatch(name)):
            return run  # the tag may be left out: no two runs of a day have the same number
    path = Path(name)
    if path.is_dir() and (path / "artifacts").is_dir():
        return path
    if path.is_file():
        hint = "weights are named with inference.py --model, or train.py --init-from"
        raise Alg1Error(f"{name}: this is a file, not a run", hint)
    hint = f"the latest is {runs[-1].name}" if runs else NO_RUN_HINT
    raise Alg1Error(f"{name}: no such run in {runs_dir}, and no run directory", hint)


def no_folder(runs_dir: str | Path) -> str:
    """Return the end of a message about missing runs if their folder does not exist, else "".

    The default folder is created by the first run, so its absence is not worth a word.
    """
    if os.path.isdir(runs_dir) or str(runs_dir) == specs()["runs_dir"].default:
        return ""
    return ": it is a file" if os.path.exists(runs_dir) else ": no such folder"


def lock_run(path: Path) -> RunDirectory:
    """Lock a run directory for this process; wait for the lock up to LOCK_TIMEOUT.

    Raises:
        Alg1Error: another process holds it (exit code 2), or the file system refused (exit code 4).
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path / LOCK_NAME, timeout=LOCK_TIMEOUT)
    try:
        lock.acquire()
    except Timeout:
        raise Alg1Error(f"{path} is in use by another process", "wait for it, or start a new run") from None
    except OSError as error:
        raise disk_error(f"lock {path}", error) from error
    return RunDirectory(path, lock)


def in_use(path: Path) -> bool:
    """Return whether a process holds the run. A free lock is taken for an instant to find out."""
    from filelock import FileLock, Timeout

    lock = path / LOCK_NAME
    try:
        if lock.exists():
            with FileLock(lock, timeout=0):
                return False
    except Timeout:
        return True
    except OSError:  # no permission, or a read-only file system: it cannot be known
        pass
    return False
