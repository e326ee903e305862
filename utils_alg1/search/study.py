"""The Optuna study of a search, and its trials, each of them a process of train.py.

searches/NAME/
    study.db      the study, an SQLite database (unless --storage names another one)
    trials/       NUMBER.log: what the train.py of a trial printed
    results.csv   best.yaml   history.png   importance.png   slice.png   search.log

A trial whose process was killed stays marked as running. Once its heartbeat has stopped, Optuna marks it as
failed and queues it again with its user attributes, so that its run is resumed. An interrupted search queues
its trials in the same way. Failed trials do not count; a trial that cannot be trained is told as pruned.
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from utils_alg1.base.errors import DISK_FAILED, DONE, Alg1Error, first_line
from utils_alg1.base.files import make_folder, read_json_object
from utils_alg1.base.problems import shown
from utils_alg1.console.signals import StopSignals
from utils_alg1.run_directory import RunFolder, checkpoint_paths, in_use
from utils_alg1.search.results import describe_trial, rounded
from utils_alg1.search.space import Plan, grid_values, suggest
from utils_alg1.tracking.metrics_file import read_metrics
from utils_alg1.utils_output import Console

if TYPE_CHECKING:
    import optuna

TRAIN_SCRIPT = Path(__file__).resolve().parents[2] / "train.py"
POLL_SECONDS = 1.0  # interval at which the process and the metrics of a trial are checked
HEARTBEAT_SECONDS = 5
GRACE_SECONDS = 15  # without a heartbeat until a trial is queued again
STARTUP_TRIALS = 5  # completed trials before the first one is pruned
WARMUP_FRACTION = 0.25  # fraction of the steps of a run before it can be pruned
STORAGE_HINT = "name a database that SQLAlchemy knows, its driver installed: sqlite:///a.db, postgresql://..."


class PutBack(Exception):
    """Raised in a trial that is to be queued again."""


def open_storage(url: str) -> optuna.storages.RDBStorage:
    """Open a database, with heartbeats. Raises Alg1Error if that fails."""
    import optuna
    from sqlalchemy import event
    from sqlalchemy.exc import DBAPIError

    is_sqlite = url.startswith("sqlite")
    for attempts_left in (2, 1, 0):
        try:
            storage = optuna.storages.RDBStorage(
                url,
                {"connect_args": {"timeout": 60, "isolation_level": None}} if is_sqlite else None,
                heartbeat_interval=HEARTBEAT_SECONDS,
                grace_period=GRACE_SECONDS,
                heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(),
            )
            break
        except Exception as error:  # depends on the database driver
            if not attempts_left or not isinstance(error, DBAPIError):
                raise Alg1Error(
                    f"--storage {url}: cannot be used: {first_line(error)}", STORAGE_HINT
                ) from None
            time.sleep(0.5)  # another process creates the tables of the new database
    if is_sqlite:  # otherwise two workers may take the same trial out of the queue
        event.listen(
            storage.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE")
        )
    return storage


def open_study(plan: Plan, folder: Path, options: argparse.Namespace, console: Console) -> optuna.Study:
    """Create the study with the name of the folder, whose first trial is the defaults, or load it.

    Raises:
        Alg1Error: the storage cannot be opened, or the study was begun with another plan.
    """
    import optuna

    if options.storage is None:
        make_folder(folder)
    storage = open_storage(options.storage or f"sqlite:///{folder / 'study.db'}")
    is_grid, seed = options.sampler == "grid", options.sampler_seed
    lasting = plan.lasting() | {"grid": is_grid}
    try:
        study = optuna.create_study(storage=storage, study_name=folder.name)
        study.set_user_attr("plan", lasting)
        if not is_grid:
            queue_defaults(study, plan, console)
    except optuna.exceptions.DuplicatedStudyError:
        study = optuna.load_study(storage=storage, study_name=folder.name)
        seed = None  # with the seed of the first process, this one would propose the same values
    begun = study.user_attrs.get("plan", lasting)
    changed = [name for name in begun if begun[name] != lasting.get(name)]
    if changed:
        changes = ", ".join(f"{n}: {shown(begun[n])} -> {shown(lasting.get(n))}" for n in changed)
        hint = "name another --study" if options.storage else f"name another --study, or remove {folder}"
        raise Alg1Error(f"the study {folder.name} has begun with other settings: {changes}", hint)
    if is_grid:  # its points are numbered, so every process has the same seed
        study.sampler = optuna.samplers.GridSampler({n: grid_values(d) for n, d in plan.space.items()}, 0)
    else:
        samplers = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
        study.sampler = samplers[options.sampler](seed=seed)
    warmup_steps = max(1, int(WARMUP_FRACTION * plan.fixed.get("max_iters", 0)))
    pruner = optuna.pruners.MedianPruner(STARTUP_TRIALS, warmup_steps)
    study.pruner = pruner if options.prune else optuna.pruners.NopPruner()
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
        console.say(f"the defaults are not tried: {first_line(error)}")


@dataclass
class Search:
    """Runs the trials of a study in threads; other processes may do the same."""

    study: optuna.Study
    plan: Plan
    folder: Path
    n_trials: int  # in total, in all processes and earlier starts
    flags: list[str]  # further flags of every train.py
    console: Console
    failure: Exception | None = None  # ends the search
    children: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.signals = StopSignals(lambda: "stopping: the trials save and leave", exit_callback=self.kill)

    def run(self, n_workers: int) -> int | None:
        """Run trials until all have finished, and return the signal that ended this early, if one did.

        Raises:
            Alg1Error: the storage or the disk failed (exit code 4).
        """
        import optuna

        awaited: set[int] = set()  # the running trials of other processes, by number
        try:
            with self.signals:
                while not self.stopping:
                    optuna.storages.fail_stale_trials(self.study)
                    free = self.n_trials - self.n_taken()
                    running = self.study.get_trials(False, (optuna.trial.TrialState.RUNNING,))
                    if free > 0:
                        self.optimize(min(n_workers, free))
                    elif running:
                        self.wait_for(running, awaited)
                    else:
                        break
        except optuna.exceptions.StorageInternalError as error:
            message = f"the storage failed: {first_line(error.__cause__ or error)}"
            raise Alg1Error(message, "fix that and start again", DISK_FAILED) from error
        if self.failure:
            raise self.failure
        return self.signals.received

    @property
    def stopping(self) -> bool:
        return self.failure is not None or self.signals.received is not None

    def kill(self) -> None:
        """Kill every train.py of this process."""
        for child in self.children:
            child.kill()  # does nothing to one that has ended

    def n_taken(self, before: float = math.inf) -> int:
        """Return how many trials have finished, or run and have a number below `before`."""
        states = [(trial.state.name, trial.number) for trial in self.study.get_trials(deepcopy=False)]
        finished = sum(state in ("COMPLETE", "PRUNED") for state, _ in states)
        return finished + sum(state == "RUNNING" and number < before for state, number in states)

    def optimize(self, n_workers: int) -> None:
        """Run trials until all places are taken."""
        ended = [self.trial_ended]
        try:
            self.study.optimize(self.objective, n_jobs=n_workers, callbacks=ended, catch=(PutBack,))
        except ValueError as error:  # the machine slept: another process took the trial for dead
            if "Cannot tell" not in str(error):
                raise

    def wait_for(self, running: list[optuna.trial.FrozenTrial], awaited: set[int]) -> None:
        """Wait a moment for the trials of other processes, each of which ends or is found to be dead."""
        for trial in running:
            if trial.number not in awaited:
                awaited.add(trial.number)
                self.console.say(f"waiting for trial {trial.number}, which another process began")
                # Without any heartbeat, as if killed at its very start, it would never be found.
                self.study._storage.record_heartbeat(trial._trial_id)  # type: ignore[attr-defined]
        time.sleep(POLL_SECONDS)

    def trial_ended(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        """Print a trial, or queue it again; stop if all places are taken."""
        import optuna

        if trial.state.name == "FAIL":
            optuna.storages.RetryHeartbeatStaleTrialCallback()(study, trial)
        else:
            self.console.say(describe_trial(study, trial))
        if self.stopping or self.n_taken() >= self.n_trials:
            study.stop()

    def objective(self, trial: optuna.Trial) -> float:
        """Run a trial and return its best validation loss.

        Raises:
            TrialPruned: it was ended early, or cannot be trained.
            PutBack: another process took the last place, or the search is to end.
        """
        if self.stopping or self.n_taken(before=trial.number) >= self.n_trials:
            raise PutBack
        parameters = rounded({name: suggest(trial, name, d) for name, d in self.plan.space.items()})
        if reason := self.plan.invalid_reason(parameters):
            give_up(trial, "refused", reason)
        log = self.folder / "trials" / f"{trial.number}.log"
        try:
            code, pruned = self.train(trial, parameters, log)
            if code == DONE:
                trial.set_user_attr("state", "complete")  # raises if another process took the trial for dead
                return read_json_object(RunFolder(Path(trial.user_attrs["run"])).final_path)["best_val_loss"]
            reason = failure_reason(log, code)
            if code == DISK_FAILED:
                raise Alg1Error(f"trial {trial.number}: {reason}", "fix that and start again", DISK_FAILED)
        except (Alg1Error, OSError) as error:
            self.failure = self.failure or error
        if self.stopping:
            raise PutBack
        give_up(trial, "pruned" if pruned else "failed", None if pruned else reason)

    def train(self, trial: optuna.Trial, parameters: dict[str, Any], log: Path) -> tuple[int, bool]:
        """Run train.py and report its losses; return its exit code and whether it was pruned.

        A trial that was queued again resumes its run, even a finished one.
        """
        run = trial.user_attrs.get("run")
        while run and in_use(Path(run)) and not self.stopping:  # by the train.py of a search that was killed
            time.sleep(POLL_SECONDS)
        if run and checkpoint_paths(RunFolder(Path(run)).checkpoint_dir):
            arguments = ["--resume", run]
        else:
            tag = f"--run-tag={self.study.study_name}-{trial.number}"
            arguments = [*self.plan.arguments(parameters), tag]
        command = [sys.executable, str(TRAIN_SCRIPT), *arguments, *self.flags]
        step, pruned = -1, False
        with (
            log.open("wb") as output,
            # In a session of its own: Ctrl-C reaches search.py only.
            subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True) as child,
        ):
            self.children.append(child)
            try:
                while child.poll() is None and not pruned and not self.stopping:
                    time.sleep(POLL_SECONDS)
                    before, step = step, self.report(trial, log, step)
                    # The defaults are not pruned: the gain over them is told at the end.
                    pruned = step > before and "defaults" not in trial.user_attrs and trial.should_prune()
            finally:
                child.terminate()  # lets it save and leave; does nothing to one that has ended
        self.report(trial, log, step)
        return child.returncode, pruned

    def report(self, trial: optuna.Trial, log: Path, after: int) -> int:
        """Report the validation losses past step `after` to Optuna; return the last reported step."""
        begun = re.search("^run +(.+)", log.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        if begun is None:
            return after
        run = RunFolder(Path(self.plan.fixed["runs_dir"], begun[1]))
        if trial.user_attrs.get("run") != str(run.path):
            trial.set_user_attr("run", str(run.path))
        for row in read_metrics(run.metrics_path):
            if "loss/val" in row and row["step"] > after:
                after = int(row["step"])
                trial.report(row["loss/val"], after)
        return after


def give_up(trial: optuna.Trial, state: str, reason: str | None) -> NoReturn:
    """End a trial as pruned: samplers learn from it, as they would not from a failed one."""
    import optuna

    trial.set_user_attr("state", state)
    trial.set_user_attr("reason", reason)
    raise optuna.TrialPruned


def failure_reason(log: Path, code: int) -> str:
    """Return why train.py failed: the last error line of its output, or else the last line."""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = re.findall("^error: (.+)", text, re.MULTILINE) or text.splitlines()
    return lines[-1].strip()[:300] if lines and code > 0 else f"exit code {code}"
