"""What is left of a study whose file is damaged in places: all that can be read goes into a new file."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils_alg1.base.errors import Alg1Error
from utils_alg1.base.files import make_folder, sync_folder
from utils_alg1.base.locks import NoLocks, take_lock
from utils_alg1.search.storage import (
    BUSY_SECONDS,
    DAMAGED_HINT,
    LOCKED_HINT,
    NO_LOCKS_HINT,
    known_failure,
    open_storage,
)
from utils_alg1.utils_output import Console

if TYPE_CHECKING:
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial

LOCK_NAME = ".lock"  # in the folder of a study: held while its file is repaired


def open_file(path: Path, name: str, console: Console) -> RDBStorage:
    """Open the SQLite file of a study; another file in its place if some of it cannot be read.

    The damaged file is kept. A trial that cannot be read has failed, so that another one takes its place.

    Raises:
        Alg1Error: nothing of it can be read, it has lost its study, or another program holds it.
    """
    make_folder(path.parent)
    is_old = path.exists()
    try:
        storage = open_storage(f"sqlite:///{path}")
    except NoLocks:
        with contextlib.suppress(OSError):  # they hold something
            path.parent.rmdir()
            path.parent.parent.rmdir()
        raise
    try:
        study_id = storage.get_study_id_from_name(name)
    except KeyError:
        if is_old and has_begun(storage, path.parent):
            raise Alg1Error(f"{path} is damaged: it has trials, and no study {name}", DAMAGED_HINT) from None
        return storage  # it is new
    if is_readable(storage, study_id):
        return storage
    close(storage)
    held = Alg1Error(f"{path} is held by another program", LOCKED_HINT)
    with take_lock(path.with_name(LOCK_NAME), BUSY_SECONDS, held, NO_LOCKS_HINT):
        repair(path, name, console)
    return open_storage(f"sqlite:///{path}")


def has_begun(storage: RDBStorage, folder: Path) -> bool:
    """Return whether there are trials: in the folder of a study, or in its file without belonging to one."""
    return any(folder.glob("trials/*.log")) or bool(
        select(storage, "SELECT trial_id FROM trials WHERE study_id NOT IN (SELECT study_id FROM studies)")
    )


def select(storage: RDBStorage, query: str) -> list[int]:
    """Return the first column of what a query finds."""
    import sqlalchemy

    with storage.engine.connect() as connection:
        return [row[0] for row in connection.execute(sqlalchemy.text(query))]


def close(storage: RDBStorage) -> None:
    """Close the file."""
    storage.remove_session()
    storage.engine.dispose()


def is_readable(storage: RDBStorage, study_id: int) -> bool:
    """Return whether all of a study can be read. Raises Alg1Error if another program holds the file."""
    try:
        storage.get_study_user_attrs(study_id)
        return all(map(has_its_loss, storage.get_all_trials(study_id, deepcopy=False)))
    except read_errors() as error:
        refuse_if_held(str(storage.engine.url), error)
        return False


def repair(path: Path, name: str, console: Console) -> None:
    """Replace a damaged file, unless another process has done so meanwhile. The caller holds the lock."""
    storage = open_storage(f"sqlite:///{path}")
    study_id = storage.get_study_id_from_name(name)
    try:
        if is_readable(storage, study_id):
            return
        plan, trials = read_plan(storage, study_id), read_trials(storage, study_id)
    finally:
        close(storage)
    if not any(trials):
        raise Alg1Error(f"{path} is damaged: no trial of it can be read", DAMAGED_HINT)
    kept = replace_file(path, name, plan, trials)
    lost = [str(number) for number, trial in enumerate(trials) if trial is None]
    told = f"trial {', '.join(lost)} could not be read and is replaced" if lost else "no trial is lost"
    console.warn(f"{path} was damaged: {told}; the damaged file is {kept}")
    if plan is None:
        console.warn("the settings that the study began with are lost: they are taken to be those of now")


def read_errors() -> tuple[type[Exception], ...]:
    """Return what Optuna raises where it reads what it never wrote."""
    from optuna.exceptions import StorageInternalError

    return (StorageInternalError, ValueError, LookupError, TypeError, AttributeError)


def refuse_if_held(url: str, error: Exception) -> None:
    """Raise Alg1Error if a file cannot be read because another program holds it."""
    known = known_failure(url, error.__cause__ or error)
    if known and known.hint != DAMAGED_HINT:
        raise known from error


def has_its_loss(trial: FrozenTrial) -> bool:
    """Return whether a trial has a loss if it is complete."""
    return trial.state.name != "COMPLETE" or bool(trial.values)


def read_plan(storage: RDBStorage, study_id: int) -> dict[str, Any] | None:
    """Return the settings that a study began with; None if they cannot be read."""
    try:
        plan: dict[str, Any] | None = storage.get_study_user_attrs(study_id).get("plan")
    except read_errors():
        return None
    return plan


def read_trials(storage: RDBStorage, study_id: int) -> list[FrozenTrial | None]:
    """Read the trials of a study one by one; None stands for one that cannot be read."""
    import sqlalchemy

    # From an index of the table, so that a damaged row or page costs its own trials only.
    query = f"SELECT trial_id FROM trials WHERE study_id = {study_id} ORDER BY trial_id"
    try:
        trial_ids = select(storage, query)
    except sqlalchemy.exc.DatabaseError as error:
        raise known_failure(str(storage.engine.url), error.orig or error) or error from None
    trials: list[FrozenTrial | None] = []
    for trial_id in trial_ids:
        try:
            trial = storage.get_trial(trial_id)
        except read_errors() as error:
            refuse_if_held(str(storage.engine.url), error)
            trials.append(None)
        else:
            trials.append(trial if has_its_loss(trial) else None)
    return trials


def replace_file(
    path: Path, name: str, plan: dict[str, Any] | None, trials: list[FrozenTrial | None]
) -> Path:
    """Write trials to a new file in the place of a damaged one; return what the damaged one is named now."""
    import optuna
    from optuna.trial import TrialState, create_trial

    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)  # left by a process that was killed
    storage = open_storage(f"sqlite:///{new}")
    study = optuna.create_study(storage=storage, study_name=name)
    for trial in trials:
        if trial is None:
            trial = create_trial(state=TrialState.FAIL, user_attrs={"state": "damaged"})
        elif trial.state == TrialState.RUNNING:  # its heartbeats are left behind
            trial.state = TrialState.WAITING
        study.add_trial(trial)
    if plan is not None:
        study.set_user_attr("plan", plan)
    close(storage)
    names = (path.with_name(f"{path.name}.damaged{number or ''}") for number in itertools.count())
    kept = next(name for name in names if not name.exists())
    shutil.copyfile(path, kept)
    for written in (kept, new):
        with written.open("rb") as file:
            os.fsync(file.fileno())
    os.replace(new, path)  # there is a file at `path` all the time
    sync_folder(path.parent)
    return kept
