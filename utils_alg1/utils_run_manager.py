"""Create runs: run ids, run directories, and the records of their origin in meta/."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from parameters import CONFIG_DIR, CONFIG_FILES, Parameters
from utils_alg1.base.errors import Alg1Error, disk_error
from utils_alg1.base.files import (
    decode,
    make_folder,
    read_bytes,
    read_json_object,
    write_atomically,
    write_json,
)
from utils_alg1.base.locks import NoLocks, take_lock
from utils_alg1.base.text import shell_join
from utils_alg1.data.corpus import Corpus
from utils_alg1.data.texts import Text
from utils_alg1.run_directory import (
    LOCK_NAME,
    NO_LOCKS_HINT,
    RUN_ID,
    RunDirectory,
    RunFolder,
    list_runs,
    lock_run,
    recorded_start,
    sanitise_tag,
)
from utils_alg1.utils_config_loader import RESUMED

SUBDIRECTORIES = ("meta", "logs/tensorboard", "artifacts/checkpoints", "artifacts/export", "eval")
PACKAGES = ("torch", "safetensors", "numpy", "tensorboard", "aim")  # whose versions are recorded
LOCK_SECONDS = 60  # to wait for other runs that are being created
UNKNOWN = "unknown"  # without git, or without a repository
NOTES = "# {run_id}\n\nWhat I tried, and what I saw:\n\n"


class RunIDGenerator:
    """Names new runs `YYYY-MM-DD_NNN_tag`; NNN counts the runs of a day in `runs_dir`."""

    def __init__(self, runs_dir: str | Path = "runs"):
        self.runs_dir = Path(runs_dir)

    def generate(self, tag: str = "", date: datetime.date | None = None) -> str:
        """Return the next free run id of today, or of `date`."""
        day = (date or datetime.date.today()).isoformat()
        tag = sanitise_tag(tag)
        run_id = f"{day}_{self.get_next_counter(day):03d}"
        return f"{run_id}_{tag}" if tag else run_id

    def get_next_counter(self, date: str) -> int:
        """Return one more than the highest counter of `date` (YYYY-MM-DD)."""
        names = [RUN_ID.fullmatch(path.name) for path in list_runs(self.runs_dir)]
        return max((int(name[2]) for name in names if name and name[1] == date), default=0) + 1


class RunDirectoryCreator:
    """Creates run directories in `runs_dir`."""

    def __init__(self, runs_dir: str | Path = "runs"):
        self.runs_dir = Path(runs_dir)

    def create(self, run_id: str) -> Path:
        """Create the directory of a new run, with its subdirectories; FileExistsError if it exists."""
        run_dir = self.runs_dir / run_id
        if run_dir.parent != self.runs_dir:
            raise Alg1Error(f"{run_id!r} is not the name of a run", "leave out what makes it a path")
        make_folder(self.runs_dir)
        run_dir.mkdir()
        with _removed_on_failure(run_dir):
            self.create_subdirectories(run_dir)
        return run_dir

    def create_subdirectories(self, run_dir: str | Path) -> None:
        """Create meta, logs, artifacts and eval in a run directory, unless they exist."""
        for name in SUBDIRECTORIES:
            make_folder(Path(run_dir) / name)


@contextlib.contextmanager
def _removed_on_failure(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise


def create_run(runs_dir: str | Path, tag: str = "") -> RunDirectory:
    """Create the directory of a new run and lock it.

    Two runs that start at the same time get different numbers: `runs_dir` is locked meanwhile.
    """
    runs_dir = Path(runs_dir)
    path, is_new_folder = runs_dir / LOCK_NAME, not runs_dir.exists()
    in_use = Alg1Error(f"{path} was not free for a minute", "end the process that holds it")
    make_folder(runs_dir)
    try:
        path.touch()  # where that fails with ENOENT, as in /proc, FileLock would try again for a minute
        with take_lock(path, LOCK_SECONDS, in_use, NO_LOCKS_HINT):
            run_dir = RunDirectoryCreator(runs_dir).create(RunIDGenerator(runs_dir).generate(tag))
            with _removed_on_failure(run_dir):
                run = lock_run(run_dir)
        run.is_new = True
        return run
    except NoLocks:
        path.unlink()
        if is_new_folder:
            runs_dir.rmdir()
        raise
    except OSError as error:
        raise disk_error(f"create a run in {runs_dir}", error) from error


class MetadataCapture:
    """Records the state of the code and of the machine. Without git, its values are "unknown"."""

    @staticmethod
    def _git(*arguments: str) -> str | None:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            folder = Path(__file__).resolve().parent
            command = ["git", *arguments]
            result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10)
            if result.returncode == 0:
                return result.stdout.strip()
        return None

    @classmethod
    def get_git_commit(cls) -> str:
        """Return the commit of this program's checkout, or "unknown"."""
        return cls._git("rev-parse", "HEAD") or UNKNOWN

    @classmethod
    def get_git_branch(cls) -> str:
        """Return its branch, or "unknown"."""
        return cls._git("rev-parse", "--abbrev-ref", "HEAD") or UNKNOWN

    @staticmethod
    def get_python_version() -> str:
        return platform.python_version()

    @classmethod
    def capture_git_info(cls, path: str | Path, heading: str = "") -> dict[str, str]:
        """Add commit, branch and whether there are uncommitted changes to a file, and return them."""
        status = cls._git("status", "--porcelain")
        dirty = UNKNOWN if status is None else "yes" if status else "no"
        values = {"commit": cls.get_git_commit(), "branch": cls.get_git_branch(), "dirty": dirty}
        return _add_lines(path, values, heading)

    @classmethod
    def capture_env_info(cls, path: str | Path, heading: str = "") -> dict[str, str]:
        """Add the command and the versions of Python, PyTorch and the rest to a file, and return them."""
        info = {"python": cls.get_python_version(), "platform": platform.platform()}
        info["command"] = shell_join(sys.argv)
        for package in PACKAGES:
            try:
                info[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                info[package] = "not installed"
        return _add_lines(path, info, heading)

    @staticmethod
    def copy_configs(config_dir: str | Path, meta_dir: str | Path) -> None:
        """Copy the configuration files of a folder to meta/configs."""
        paths = [Path(config_dir) / name for name in CONFIG_FILES.values()]
        files = {path: path.read_bytes() for path in paths if path.is_file()}
        copy_files(files, Path(meta_dir) / CONFIG_DIR)


def copy_files(files: Mapping[Path, bytes], folder: Path) -> None:
    """Write files (path -> bytes) to a folder under their own names.

    A copy is never overwritten: a file of the same name with other bytes gets a number.
    """
    for path, data in files.items():
        make_folder(folder)
        copy, numbers = folder / path.name, itertools.count(2)
        while copy.exists() and copy.read_bytes() != data:
            copy = folder / f"{path.stem}-{next(numbers)}{path.suffix}"
        write_atomically(copy, data)


def _add_lines(path: str | Path, values: dict[str, str], heading: str) -> dict[str, str]:
    """Write `name: value` lines to a file and return them; below the heading if it has lines already."""
    is_later = heading and Path(path).exists()
    before = Path(path).read_bytes() + f"\n# {heading}\n".encode() if is_later else b""
    text = "".join(f"{name}: {value}\n" for name, value in values.items())
    write_atomically(path, before + text.encode("utf-8", "backslashreplace"))
    return values


def read_lines(path: Path) -> dict[str, str]:
    """Read a file of `name: value` lines, the last one of each name; {} if it cannot be read."""
    try:
        pairs = (line.partition(": ") for line in decode(read_bytes(path), path).splitlines())
    except Alg1Error:
        return {}
    return {name: value for name, separator, value in pairs if separator}


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat()


def _describe_text(text: Text) -> dict[str, Any]:
    return {
        "path": text.name,
        "files": len(text.files.paths),
        "sha256": text.sha256,
        "characters": text.n_characters,
    }


def _earlier_record(run: RunFolder) -> dict[str, Any]:
    """Return the record of a run that is resumed, with the list of its parts; {} if there is none."""
    try:
        record = read_json_object(run.record_path)
    except Alg1Error:
        return {}
    if not isinstance(record.get("parts"), list):  # of an earlier version, which kept the last command only
        command = read_lines(run.meta_dir / "env.txt").get("command", UNKNOWN)
        first = {"step": 0, "started": recorded_start(run), "command": command}
        record["parts"] = [first | {"runtime": record.get("runtime", {})}]
    return record


def kept_origins(params: Parameters, run: RunFolder, saved: Mapping[str, str]) -> dict[str, str]:
    """Return where each value came from; for one that a resumed run keeps, where it came from at first.

    `saved` are the origins in its checkpoint. In those of earlier versions there are none: the record of the
    run then tells the origins of the values that are still the same.
    """
    record = _earlier_record(run)
    values, recorded = record.get("parameters"), record.get("origins")
    if not saved and isinstance(values, dict) and isinstance(recorded, dict):
        now = params.flat()
        saved = {name: origin for name, origin in recorded.items() if values.get(name) == now.get(name)}
    origins = params.origins.items()
    return {name: saved.get(name, RESUMED) if origin == RESUMED else origin for name, origin in origins}


def write_records(
    run: RunFolder,
    params: Parameters,
    origins: Mapping[str, str],
    config_files: Mapping[Path, bytes],
    corpus: Corpus,
    runtime: dict[str, Any],
    step: int = 0,
) -> dict[str, Any]:
    """Fill meta/, also with copies of `config_files` (path -> bytes); return the origin for the trackers.

    `origins` tells where each parameter came from.
    `step` is the one that this part of the run begins at. What is there of the parts before is kept.
    """
    now, earlier = _now(), _earlier_record(run)
    heading = f"resumed at step {step}, {now}"
    git = MetadataCapture.capture_git_info(run.meta_dir / "git.txt", heading)
    environment = MetadataCapture.capture_env_info(run.meta_dir / "env.txt", heading)
    part = {"step": step, "started": now, "command": environment["command"], "runtime": runtime}
    parts = [*earlier.get("parts", []), part]
    copy_files(config_files, run.meta_dir / "configs")
    notes = run.meta_dir / "notes.md"
    if not notes.exists():
        write_atomically(notes, NOTES.format(run_id=run.run_id).encode())
    text = _describe_text(corpus.text) | {"vocab_size": corpus.tokenizer.vocab_size}
    if corpus.held_out is not None:
        text["held_out"] = _describe_text(corpus.held_out)
    started = recorded_start(run) if run.record_path.exists() else now
    record: dict[str, Any] = {"parameters": params.flat(), "origins": origins, "corpus": text}
    record |= {"runtime": runtime, "parts": parts}
    # None: it was started by a version that did not record it.
    write_json(run.record_path, record | ({} if started is None else {"started": started}))
    return {"git": git, "environment": environment, "corpus": text, "runtime": runtime, "parts": parts}
