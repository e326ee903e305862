"""The Optuna study of a search.

searches/NAME/
    study.db      the study, an SQLite database (unless --storage names another one)
    trials/       NUMBER.log: what the train.py of a trial printed
    results.csv   best.yaml   history.png   importance.png   slice.png   search.log
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils_alg1.base.errors import Alg1Error, first_line
from utils_alg1.base.files import make_folder
from utils_alg1.search.space import Plan, changed_settings
from utils_alg1.utils_output import Console

if TYPE_CHECKING:
    import optuna
    from optuna.storages import RDBStorage

STARTUP_TRIALS = 5  # completed trials before the first one is pruned
WARMUP_FRACTION = 0.25  # fraction of the steps of a run before it can be pruned
CREATION_SECONDS = 2  # for another process to store the plan of a study that it has just created
MEASURE = "export_val_loss"  # of eval/final.json: what trials are compared by
OLD_MEASURE = "best_val_loss"  # that of a study whose plan names none


def open_study(
    storage: RDBStorage, plan: Plan, folder: Path, arguments: argparse.Namespace, console: Console
) -> optuna.Study:
    """Create or load the study of a folder, defaults first. Raises Alg1Error if it has another plan."""
    import optuna

    is_grid, seed = arguments.sampler == "grid", arguments.sampler_seed
    lasting = plan.lasting() | {"grid": is_grid, "measure": MEASURE}
    try:
        study = optuna.create_study(storage=storage, study_name=folder.name)
    except optuna.exceptions.DuplicatedStudyError:
        study = optuna.load_study(storage=storage, study_name=folder.name)
        seed = None  # with the seed of the first process, this one would propose the same values
        if "plan" not in study.user_attrs:  # another process creates the study now, or was killed then
            time.sleep(CREATION_SECONDS)
    if "plan" not in study.user_attrs:
        if not is_grid and not study.get_trials(deepcopy=False):
            queue_defaults(study, plan, console)
        study.set_user_attr("plan", lasting)  # last: it tells that the study is complete
    if changes := changed_settings({"measure": OLD_MEASURE} | study.user_attrs["plan"], lasting):
        hint = "name another --study" if arguments.storage else f"name another --study, or remove {folder}"
        raise Alg1Error(f"the study {folder.name} has begun with other settings: {changes}", hint)
    random = optuna.samplers.RandomSampler
    samplers = {"tpe": optuna.samplers.TPESampler, "random": random, "grid": random}  # a grid is queued
    study.sampler = samplers[arguments.sampler](seed=seed)
    warmup_steps = max(1, int(WARMUP_FRACTION * plan.fixed.get("max_iters", 0)))
    pruner = optuna.pruners.MedianPruner(STARTUP_TRIALS, warmup_steps)
    study.pruner = pruner if arguments.prune else optuna.pruners.NopPruner()
    make_folder(folder / "trials")
    return study


def queue_defaults(study: optuna.Study, plan: Plan, console: Console) -> None:
    """Make the defaults the next trial of a study, unless they are outside the space."""
    from optuna.trial import TrialState, create_trial

    state, mark = TrialState.WAITING, {"defaults": True}
    try:
        trial = create_trial(state=state, params=plan.defaults, distributions=plan.space, user_attrs=mark)
        study.add_trial(trial)
    except ValueError as error:
        console.say(f"the defaults are not tried, they are outside the space: {first_line(error)}")


def queue_points(
    study: optuna.Study, space: dict[str, Any], points: list[dict[str, Any]], n_trials: int
) -> None:
    """Queue points of a grid that no trial has, until there are `n_trials` trials. Failed ones do not count.

    A trial is taken out of the queue by one worker only, unlike a point that two samplers choose at once.
    """
    from optuna.trial import TrialState, create_trial

    taken = [trial for trial in study.get_trials(deepcopy=False) if trial.state != TrialState.FAIL]
    known = {as_key(trial.params) for trial in taken}
    free = [point for point in points if as_key(point) not in known]
    for point in free[: max(0, n_trials - len(taken))]:
        study.add_trial(create_trial(state=TrialState.WAITING, params=point, distributions=space))


def as_key(parameters: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Return the values of a trial as something that can be in a set."""
    return tuple(sorted(parameters.items()))
