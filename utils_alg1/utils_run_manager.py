"""Run directories: their names, what lies where in them, their lock, and what is recorded about their origin.

runs/YYYY-MM-DD_NNN_tag/
    meta/        full_config.json  git.txt  env.txt  notes.md  configs/ (copies)
    logs/        metrics.jsonl  train.log  tensorboard/
    artifacts/   checkpoints/  export/model.safetensors  export/config.json
    eval/        final.json  samples.txt  loss.png  attention.png  report.html
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from errors import Alg1Error, disk_error
from files import write_atomically
from parameters import specs
from utils_alg1.utils_config_loader import CONFIG_DIR, CONFIG_FILES

RUN_ID = re.compile(r"(\d{4}-\d{2}-\d{2})_(\d{3,})(?:_(.*))?")
TAG_LENGTH = 60  # characters
TAG_BYTES = 200  # a file name has at most 255 bytes
CHECKPOINT_NAME = re.compile(r"step_(\d{9,})\.safetensors")
LOCK_NAME = ".lock"
SUBDIRECTORIES = (
    "meta",
    "logs/tensorboard",
    "artifacts/checkpoints",
    "artifacts/export",
    "eval",
)
LOCK_PATIENCE = 1.0  # seconds; whoever looks whether a run is in use has its lock for an instant
UNKNOWN = "unknown"  # where there is no git, or no repository


@dataclass
class RunFolder:
    """Any run directory: what lies where in it."""

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
class Run(RunFolder):
    """A run directory that this process holds until the `with` block ends.

    Attributes:
        begun: whether there is anything in it worth keeping; if not, it is removed at the end.
        opened: when this process took it, on the clock time.monotonic.
    """

    lock: FileLock
    begun: bool = True
    opened: float = field(default_factory=time.monotonic)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.begun:
            shutil.rmtree(self.path, ignore_errors=True)
        self.lock.release()


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:09d}.safetensors"


def checkpoint_paths(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first; a copy under another name is none."""
    return sorted(
        (path for path in folder.glob("step_*") if CHECKPOINT_NAME.fullmatch(path.name)), key=checkpoint_step
    )


def checkpoint_step(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.stem.removeprefix("step_"))


# --- names --------------------------------------------------------------------------------------------


def sanitise_tag(tag: str) -> str:
    """A tag as part of a directory's name: letters, digits, `-`, `_` and `.`, and never a way out."""
    text = unicodedata.normalize("NFC", tag)
    text = re.sub(r"[^\w.-]+", "-", text).strip(".-_")[:TAG_LENGTH]
    while len(text.encode("utf-8", "replace")) > TAG_BYTES:
        text = text[:-1]
    return text.strip(".-_")


def list_runs(runs_dir: str | Path) -> list[Path]:
    """The run directories, oldest first."""
    try:
        paths = list(Path(runs_dir).iterdir())
    except (OSError, ValueError):  # ValueError: not even a name of a folder
        return []
    runs = [(match, path) for path in paths if (match := RUN_ID.fullmatch(path.name))]
    runs = [(match, path) for match, path in runs if path.is_dir()]
    return [path for match, path in sorted(runs, key=lambda r: (r[0][1], int(r[0][2]), r[1].name))]


NO_RUN_HINT = "start one: python train.py, or name another --runs-dir"


def find_run(runs_dir: str | Path, name: str = "latest") -> Path:
    """The directory of a run: `latest`, a run id, or a path.

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
            return run  # a number is enough: no two runs of a day have the same
    path = Path(name)
    if path.is_dir() and (path / "artifacts").is_dir():
        return path
    if path.is_file():
        hint = "weights are named with inference.py --model, or train.py --init-from"
        raise Alg1Error(f"{name}: this is a file, not a run", hint)
    hint = f"the latest is {runs[-1].name}" if runs else NO_RUN_HINT
    raise Alg1Error(f"{name}: no such run in {runs_dir}, and no run directory", hint)


def no_folder(runs_dir: str | Path) -> str:
    """The end of a message about missing runs: that their folder is none; "" where it is one, or is the
    default, which the first run makes."""
    if os.path.isdir(runs_dir) or str(runs_dir) == specs()["runs_dir"].default:
        return ""
    return ": it is a file" if os.path.exists(runs_dir) else ": no such folder"


class RunIDGenerator:
    """Names new runs `YYYY-MM-DD_NNN_tag`; NNN counts the runs of a day in `runs_dir`."""

    def __init__(self, runs_dir: str | Path = "runs"):
        self.runs_dir = Path(runs_dir)

    def generate(self, tag: str = "", date: datetime.date | None = None) -> str:
        """The next free run id of today, or of `date`."""
        day = (date or datetime.date.today()).isoformat()
        tag = sanitise_tag(tag)
        run_id = f"{day}_{self.get_next_counter(day):03d}"
        return f"{run_id}_{tag}" if tag else run_id

    def get_next_counter(self, date: str) -> int:
        """One more than the highest counter of `date` (YYYY-MM-DD)."""
        matches = (RUN_ID.fullmatch(path.name) for path in list_runs(self.runs_dir))
        return 1 + max((int(m[2]) for m in matches if m and m[1] == date), default=0)


# --- directories --------------------------------------------------------------------------------------


class RunDirectoryCreator:
    """Makes run directories in `runs_dir`."""

    def __init__(self, runs_dir: str | Path = "runs"):
        self.runs_dir = Path(runs_dir)

    def create(self, run_id: str) -> Path:
        """Make the directory of a new run, with its sub-directories.

        Raises:
            FileExistsError: there is one of that name.
            Alg1Error: the file system refused (exit code 4), or `runs_dir` is not a folder.
        """
        run_dir = self.runs_dir / run_id
        if run_dir.parent != self.runs_dir:
            raise Alg1Error(f"{run_id!r} is not the name of a run", "leave out what makes it a path")
        make_folder(self.runs_dir)
        try:
            run_dir.mkdir()
        except FileExistsError:
            raise
        except OSError as error:
            raise disk_error(f"create {run_dir}", error) from error
        with _removed_on_failure(run_dir):
            self.create_subdirectories(run_dir)
        return run_dir

    def create_subdirectories(self, run_dir: str | Path) -> None:
        """Make meta, logs, artifacts and eval in a run directory.

        Raises:
            Alg1Error: the file system refused (exit code 4).
        """
        for name in SUBDIRECTORIES:
            make_folder(Path(run_dir) / name)


@contextlib.contextmanager
def _removed_on_failure(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise


def make_folder(path: Path) -> None:
    """Make a folder and its parents.

    Raises:
        Alg1Error: a file is in the way (exit code 2), or the file system refused (exit code 4).
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTDIR):
            raise Alg1Error(f"{path}: a file is in the way of this folder", "name another") from None
        raise disk_error(f"create {path}", error) from error


def create_run(runs_dir: str | Path, tag: str = "") -> Run:
    """Name and make the directory of a new run and take its lock.

    A lock on the folder makes two runs that start together take two numbers.

    Raises:
        Alg1Error: see RunDirectoryCreator.create.
    """
    runs_dir = Path(runs_dir)
    make_folder(runs_dir)
    try:
        (runs_dir / LOCK_NAME).touch()  # where it cannot be made, FileLock would go on trying
        with FileLock(runs_dir / LOCK_NAME, timeout=60):
            run_id = RunIDGenerator(runs_dir).generate(tag)
            path = RunDirectoryCreator(runs_dir).create(run_id)
            with _removed_on_failure(path):
                run = lock_run(path)
            run.begun = False
            return run
    except Timeout:
        raise Alg1Error(
            f"{runs_dir / LOCK_NAME} was not free for a minute", "end the process that holds it"
        ) from None
    except OSError as error:
        raise disk_error(f"create a run in {runs_dir}", error) from error


def lock_run(path: Path) -> Run:
    """Take a run directory for this process, LOCK_PATIENCE later where it is not free at once.

    Raises:
        Alg1Error: another process has it (exit code 2), or the file system refused (exit code 4).
    """
    lock = FileLock(path / LOCK_NAME, timeout=LOCK_PATIENCE)
    try:
        lock.acquire()
    except Timeout:
        raise Alg1Error(f"{path} is in use by another process", "wait for it, or start a new run") from None
    except OSError as error:
        raise disk_error(f"lock {path}", error) from error
    return Run(path, lock)


def in_use(path: Path) -> bool:
    """Whether a process holds the run. The lock is taken for an instant where it is free (see `lock_run`)."""
    lock = path / LOCK_NAME
    try:
        if lock.exists():
            with FileLock(lock, timeout=0):
                return False
    except Timeout:
        return True
    except OSError:  # a folder of somebody else's, or read-only: nobody here can tell
        pass
    return False


# --- where it came from -------------------------------------------------------------------------------


class MetadataCapture:
    """Records the state of the code and of the machine. Nothing here raises for lack of git."""

    @staticmethod
    def _git(*arguments: str) -> str | None:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            folder = Path(__file__).resolve().parent
            result = subprocess.run(
                ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10
            )
            if result.returncode == 0:
                return result.stdout.strip()
        return None

    @classmethod
    def get_git_commit(cls) -> str:
        """The commit of this program's checkout, or "unknown"."""
        return cls._git("rev-parse", "HEAD") or UNKNOWN

    @classmethod
    def get_git_branch(cls) -> str:
        """The branch of it, or "unknown"."""
        return cls._git("rev-parse", "--abbrev-ref", "HEAD") or UNKNOWN

    @classmethod
    def get_git_dirty(cls) -> str:
        """Whether there are uncommitted changes: "yes", "no" or "unknown"."""
        status = cls._git("status", "--porcelain")
        return UNKNOWN if status is None else "yes" if status else "no"

    @staticmethod
    def get_python_version() -> str:
        return platform.python_version()

    @classmethod
    def git_info(cls) -> dict[str, str]:
        return {
            "commit": cls.get_git_commit(),
            "branch": cls.get_git_branch(),
            "dirty": cls.get_git_dirty(),
        }

    @classmethod
    def env_info(cls) -> dict[str, str]:
        info = {
            "python": cls.get_python_version(),
            "platform": platform.platform(),
            "command": " ".join(sys.argv),
        }
        for package in ("torch", "safetensors", "numpy", "tensorboard", "aim"):
            try:
                info[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                info[package] = "not installed"
        return info

    @classmethod
    def capture_git_info(cls, path: str | Path) -> dict[str, str]:
        """Write commit, branch and dirty flag to a file, and return them."""
        return _write_lines(path, cls.git_info())

    @classmethod
    def capture_env_info(cls, path: str | Path) -> dict[str, str]:
        """Write the versions of Python, PyTorch and the rest to a file, and return them."""
        return _write_lines(path, cls.env_info())

    @staticmethod
    def copy_configs(config_dir: str | Path, meta_dir: str | Path) -> list[Path]:
        """Copy the configuration files of a folder to meta/configs, and return the copies."""
        paths = [Path(config_dir) / name for name in CONFIG_FILES]
        files = {path: path.read_bytes() for path in paths if path.is_file()}
        return copy_files(files, Path(meta_dir) / CONFIG_DIR)


def copy_files(files: Mapping[Path, bytes], folder: Path) -> list[Path]:
    """Write files, given as they were read, to a folder under their own names, and return the copies.

    A copy is never written over: a file of the same name with other bytes gets a number.
    """
    copies: list[Path] = []
    for path, data in files.items():
        make_folder(folder)
        copy = folder / path.name
        number = 2
        while copy.exists() and copy.read_bytes() != data:
            copy = folder / f"{path.stem}-{number}{path.suffix}"
            number += 1
        write_atomically(copy, data)
        copies.append(copy)
    return copies


def _write_lines(path: str | Path, values: dict[str, Any]) -> dict[str, Any]:
    text = "".join(f"{name}: {value}\n" for name, value in values.items())
    write_atomically(path, text.encode("utf-8", "backslashreplace"))
    return values
