"""What is left of a study whose file is damaged in places: all that can be read goes into a new file."""

from __future__ import annotations

import contextlib
import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils_alg1.base.errors import Alg1Error
from utils_alg1.base.files import make_folder
from utils_alg1.base.locks import NoLocks
from utils_alg1.search.storage import DAMAGED_HINT, known_failure, open_storage
from utils_alg1.utils_output import Console

if TYPE_CHECKING:
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial

MAX_UNREADABLE = 100  # trials in a row, after which the file is taken to have no more


def open_file(path: Path, name: str, console: Console) -> RDBStorage:
    """Open the SQLite file of a study, which holds no other; another file if some of it cannot be read.

    The damaged file is kept. A trial that cannot be read has failed, so that another one takes its place.

    Raises:
        Alg1Error: nothing of it can be read, or another program holds it.
    """
    url = f"sqlite:///{path}"
    make_folder(path.parent)
    try:
        storage = open_storage(url)
    except NoLocks:
        with contextlib.suppress(OSError):  # they hold something
            path.parent.rmdir()
            path.parent.parent.rmdir()
        raise
    try:
        study_id = storage.get_study_id_from_name(name)
    except KeyError:
        return storage  # it is new
    try:
        plan = storage.get_study_user_attrs(study_id).get("plan")
        if all(map(is_whole, storage.get_all_trials(study_id, deepcopy=False))):
            return storage
    except read_errors() as error:
        refuse_if_held(url, error)
        plan = read_plan(storage, study_id)
    trials = read_trials(storage, url)
    if not any(trials):
        raise Alg1Error(f"{path} is damaged: no trial of it can be read", DAMAGED_HINT)
    storage.remove_session()
    storage.engine.dispose()
    kept = replace_file(path, name, plan, trials)
    lost = [str(number) for number, trial in enumerate(trials) if trial is None]
    told = f"trial {', '.join(lost)} could not be read and is replaced" if lost else "no trial is lost"
    console.warn(f"{path} was damaged: {told}; the damaged file is {kept}")
    if plan is None:
        console.warn("the settings that the study began with are lost: they are taken to be those of now")
    return open_storage(url)


def read_errors() -> tuple[type[Exception], ...]:
    """Return what Optuna raises where it reads what it never wrote."""
    from optuna.exceptions import StorageInternalError

    return (StorageInternalError, ValueError, LookupError, TypeError, AttributeError)


def refuse_if_held(url: str, error: Exception) -> None:
    """Raise Alg1Error if a file cannot be read because another program holds it."""
    known = known_failure(url, error.__cause__ or error)
    if known and known.hint != DAMAGED_HINT:
        raise known from error


def is_whole(trial: FrozenTrial) -> bool:
    """Return whether a trial has what it must have."""
    return trial.state.name != "COMPLETE" or bool(trial.values)


def read_plan(storage: RDBStorage, study_id: int) -> dict[str, Any] | None:
    """Return the settings that a study began with; None if they cannot be read."""
    try:
        plan: dict[str, Any] | None = storage.get_study_user_attrs(study_id).get("plan")
    except read_errors():
        return None
    return plan


def read_trials(storage: RDBStorage, url: str) -> list[FrozenTrial | None]:
    """Read the trials one by one; None stands for one that cannot be read."""
    trials: list[FrozenTrial | None] = []
    n_unreadable = 0  # in a row
    for trial_id in itertools.count(1):
        try:
            trial = storage.get_trial(trial_id)
        except KeyError:  # there are no more
            break
        except read_errors() as error:
            refuse_if_held(url, error)
            trial = None
        trials.append(trial if trial and is_whole(trial) else None)
        n_unreadable = 0 if trials[-1] else n_unreadable + 1
        if n_unreadable == MAX_UNREADABLE:
            del trials[-MAX_UNREADABLE:]
            break
    return trials


def replace_file(
    path: Path, name: str, plan: dict[str, Any] | None, trials: list[FrozenTrial | None]
) -> Path:
    """Write trials to a new file in the place of a damaged one; return what the damaged one is named now."""
    import optuna
    from optuna.trial import TrialState, create_trial

    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    new.unlink(missing_ok=True)
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
    storage.remove_session()
    storage.engine.dispose()
    names = (path.with_name(f"{path.name}.damaged{number or ''}") for number in itertools.count())
    kept = next(name for name in names if not name.exists())
    os.rename(path, kept)
    os.rename(new, path)
    return kept
