"""Run directories: their names, their files, their lock.

runs/YYYY-MM-DD_NNN_tag/
    meta/        full_config.json  git.txt  env.txt  notes.md  aim.txt  configs/ (copies)
    logs/        metrics.jsonl  samples.jsonl  train.log  tensorboard/
    artifacts/   checkpoints/  export/model.safetensors  export/config.json
    eval/        final.json  samples.txt  loss.png  attention.png  report.html
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import shutil
import time
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING

from utils_alg1.base.errors import BAD_INPUT, Alg1Error
from utils_alg1.base.files import read_json_object
from utils_alg1.base.locks import take_lock
from utils_alg1.base.scripts import command

if TYPE_CHECKING:
    from collections.abc import Callable

    from filelock import FileLock

RUN_ID = re.compile(r"(\d{4}-\d{2}-\d{2})_(\d{3,})(?:_(.*))?")
CHECKPOINT_NAME = re.compile(r"step_(\d{9,})\.safetensors")
MAX_TAG_LENGTH = 60  # characters
MAX_TAG_BYTES = 200  # a file name has at most 255 bytes
LOCK_NAME = ".lock"
LOCK_TIMEOUT = 1.0  # seconds: `in_use` takes the lock of a run for an instant
NO_RUN_HINT = f"start one: {command('train.py')}, or name another --runs-dir"
WHOLE_NAME_HINT = "give the whole name of one of them"
NO_WEIGHTS_HINT = f"train one: {command('train.py')}, or name a --model"
NO_LOCKS_HINT = "name a --runs-dir on another file system, such as a local disk; runs may be copied there"


class RunFolder:
    """A run directory: the paths of its files."""

    def __init__(self, path: Path):
        self.path = path
        self.run_id = path.name
        self.meta_dir = path / "meta"
        self.record_path = path / "meta" / "full_config.json"
        self.log_path = path / "logs" / "train.log"
        self.metrics_path = path / "logs" / "metrics.jsonl"
        self.samples_path = path / "logs" / "samples.jsonl"
        self.tensorboard_dir = path / "logs" / "tensorboard"
        self.checkpoint_dir = path / "artifacts" / "checkpoints"
        self.export_path = path / "artifacts" / "export" / "model.safetensors"
        self.eval_dir = path / "eval"
        self.final_path = path / "eval" / "final.json"
        self.report_path = path / "eval" / "report.html"


class RunDirectory(RunFolder):
    """A run directory that this process holds the lock of until the `with` block ends.

    Attributes:
        is_new: remove the directory at the end: it holds nothing of value yet.
        opened: the time.monotonic() at which this process took it.
    """

    def __init__(self, path: Path, lock: FileLock):
        super().__init__(path)
        self.lock = lock
        self.is_new = False
        self.opened = time.monotonic()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_new:
            shutil.rmtree(self.path, ignore_errors=True)
        self.lock.release()


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the file of the checkpoint of a step."""
    return folder / f"step_{step:09d}.safetensors"


def checkpoint_paths(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first; files with other names are left out."""
    paths = [path for path in folder.glob("step_*") if CHECKPOINT_NAME.fullmatch(path.name)]
    return sorted(paths, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(path.stem.removeprefix("step_"))


def is_done(run: RunFolder) -> bool:
    """Return whether a run has the results of its newest checkpoint, so that nothing was interrupted."""
    with contextlib.suppress(Alg1Error, LookupError, TypeError):
        newest = checkpoint_paths(run.checkpoint_dir)[-1]
        return bool(read_json_object(run.final_path)["steps"] >= checkpoint_step(newest))
    return False


def sanitise_tag(tag: str) -> str:
    """Reduce a tag to letters, digits, `-`, `_` and `.`, so that it can be part of a directory's name."""
    text = unicodedata.normalize("NFC", tag)
    text = re.sub(r"[^\w.-]+", "-", text).strip(".-_")[:MAX_TAG_LENGTH]
    return text.encode()[:MAX_TAG_BYTES].decode(errors="ignore").strip(".-_")


def list_runs(runs_dir: str | Path) -> list[Path]:
    """Return the run directories in a folder, those that were renamed too, in the order of their starts."""
    try:
        paths = list(Path(runs_dir).iterdir())
    except (OSError, ValueError):  # ValueError: the name has a null character
        return []
    return sorted(filter(is_run, paths), key=_order)


def is_run(path: Path) -> bool:
    """Return whether a path is a run directory: by its name or, if it was renamed, by what is in it."""
    return path.is_dir() and bool(RUN_ID.fullmatch(path.name) or RunFolder(path).record_path.is_file())


def recorded_start(run: RunFolder) -> str | None:
    """Return the time at which a run started, with its zone (ISO 8601); None if it has no record of it."""
    with contextlib.suppress(Alg1Error, ValueError):
        started = read_json_object(run.record_path).get("started")
        if isinstance(started, str) and datetime.datetime.fromisoformat(started).tzinfo:
            return started
    return None


def _order(path: Path) -> tuple[float, int, str]:
    """Return what runs are sorted by: their starts. Older versions recorded no more than the local date."""
    named = RUN_ID.fullmatch(path.name)
    number = int(named[2]) if named else 0
    for time_or_date in (recorded_start(RunFolder(path)), named and named[1]):
        with contextlib.suppress(ValueError, OverflowError):  # no such date
            if time_or_date:
                return datetime.datetime.fromisoformat(time_or_date).timestamp(), number, path.name
    with contextlib.suppress(OSError):
        return path.stat().st_mtime, number, path.name
    return 0.0, number, path.name


def existing_runs(runs_dir: str | Path) -> list[Path]:
    """Return what `list_runs` does; raises Alg1Error if there is no run."""
    runs = list_runs(runs_dir)
    if not runs:
        reason = "" if os.path.isdir(runs_dir) else ": no such folder"
        raise Alg1Error(f"there is no run in {runs_dir}{reason}", NO_RUN_HINT)
    return runs


def find_run(runs_dir: str | Path, name: str = "latest") -> Path:
    """Return the directory of a run.

    Args:
        name: `latest`, the run's name in `runs_dir`, which may lack the tag, or its path. A name with a
            separator is a path only.

    Raises:
        Alg1Error: there is none, or several runs have this number.
    """
    if name == "latest":
        return existing_runs(runs_dir)[-1]
    runs = list_runs(runs_dir)
    named = [run for run in runs if run.name == name]
    if not named and RUN_ID.fullmatch(name):
        named = [run for run in runs if run.name.startswith(f"{name}_")]
    if len(named) > 1:  # no two runs of a day get the same number, but a run may have been copied
        names = ", ".join(run.name for run in named)
        raise Alg1Error(f"{name}: {len(named)} runs in {runs_dir} have this number: {names}", WHOLE_NAME_HINT)
    is_path = os.sep in name or name in (os.curdir, os.pardir)
    places = [Path(name)] if is_path else [Path(runs_dir, name), Path(name)]
    for path in (*named, *places):
        if path in named or (path / "artifacts").is_dir():
            return path
    if os.path.isfile(name):
        hint = "weights are named with inference.py --model, or train.py --init-from"
        raise Alg1Error(f"{name}: this is a file, not a run", hint)
    hint = f"the latest is {runs[-1].name}" if runs else NO_RUN_HINT
    missing = "no such run directory" if is_path else f"no such run in {runs_dir}, and no run directory"
    raise Alg1Error(f"{name}: {missing}", hint)


def find_interrupted(runs_dir: str | Path, say: Callable[[str], None]) -> Path:
    """Return the newest run with a checkpoint that was interrupted, or else the newest that has one.

    Where others have started since, or it is done, say so. Raises Alg1Error if there is no run.
    """
    runs = existing_runs(runs_dir)
    saved = [run for run in runs if checkpoint_paths(RunFolder(run).checkpoint_dir)] or runs
    for run in reversed(saved):
        if not is_done(RunFolder(run)) and not in_use(run):
            if run != saved[-1]:
                state = "is done" if is_done(RunFolder(saved[-1])) else "is in use by another process"
                say(f"continuing {run}, the newest that was interrupted: {saved[-1].name} {state}")
            return run
    if is_done(RunFolder(saved[-1])):
        say(f"no run was interrupted; the latest, {saved[-1].name}, is done")
    return saved[-1]


def find_weights(runs_dir: str, name: str | None = None) -> Path:
    """Return the file to sample a run from: its export, or its newest checkpoint if it has no export yet.

    Args:
        name: a run id or a run directory; None and "latest" mean the latest run that has weights.

    Raises:
        Alg1Error: there is no such run, or nothing to sample from.
    """
    newest = name in (None, "latest")
    runs = existing_runs(runs_dir)[::-1] if newest else [find_run(runs_dir, str(name))]
    for run_dir in runs:
        if path := weights_of(run_dir):
            return path
    nothing = f"no run in {runs_dir} has any weights yet" if newest else f"{name} has no weights yet"
    raise Alg1Error(nothing, NO_WEIGHTS_HINT)


def weights_of(run_dir: Path) -> Path | None:
    """Return a run's export, or its newest checkpoint if it has no export, or None if it has neither."""
    run = RunFolder(run_dir)
    candidates = [run.export_path, *checkpoint_paths(run.checkpoint_dir)[::-1]]
    return next((path for path in candidates if path.is_file()), None)


def refuse_run(path: Path) -> None:
    """Raise Alg1Error if a path that should be a file of weights is a run."""
    if path.is_dir() and (weights := weights_of(path)):
        hint = f"name {weights}, or the run with --run (inference.py) or --resume (train.py)"
        raise Alg1Error(f"{path}: this is a run, not a file of weights", hint)


def lock_run(path: Path, timeout: float = LOCK_TIMEOUT) -> RunDirectory:
    """Lock a run directory for this process; wait for the lock so many seconds.

    Raises Alg1Error with exit code 2 if another process holds it, and 4 if the file system refuses.
    """
    in_use = Alg1Error(f"{path} is in use by another process", "wait for it, or end it")
    return RunDirectory(path, take_lock(path / LOCK_NAME, timeout, in_use, NO_LOCKS_HINT))


def in_use(path: Path) -> bool:
    """Return whether a process holds the run. A free lock is taken for an instant to find out."""
    try:
        if os.path.exists(path / LOCK_NAME):
            lock_run(path, timeout=0).lock.release()
    except Alg1Error as error:
        return error.exit_code == BAD_INPUT  # not where the file system is read-only or has no locks
    return False
