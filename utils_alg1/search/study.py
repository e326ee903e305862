"""The Optuna study of a search, and its trials, each of them a process of train.py.

searches/NAME/
    study.db      the study, an SQLite database (unless --storage names another one)
    trials/       NUMBER.log: what the train.py of a trial printed
    results.csv   best.yaml   history.png   importance.png   slice.png   search.log

A trial whose process was killed stays marked as running. Once its heartbeat has stopped, Optuna marks it as
failed and queues it again with its user attributes, so that its run is resumed. An interrupted search queues
what it has begun likewise. Failed trials do not count; a trial that cannot be trained is told as pruned.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from utils_alg1.base.errors import CANNOT_TRAIN, DISK_FAILED, DONE, Alg1Error, first_line
from utils_alg1.base.files import make_folder, read_json_object
from utils_alg1.console.signals import STOP_SIGNALS, StopSignals
from utils_alg1.run_directory import RUN_ID, RunFolder, checkpoint_paths, in_use, list_runs
from utils_alg1.search.gpus import Gpus
from utils_alg1.search.results import describe_trial, finished_trials, rounded
from utils_alg1.search.space import Plan, changed_settings, grid_values, suggest
from utils_alg1.tracking.metrics_file import read_rows
from utils_alg1.training.launcher import without_place
from utils_alg1.utils_output import Console

if TYPE_CHECKING:
    import optuna
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial

TRAIN_SCRIPT = Path(__file__).resolve().parents[2] / "train.py"
POLL_SECONDS = 1.0  # interval at which the metrics of a trial are checked
REACTION_SECONDS = 0.1  # until the end of a trial, or a signal, is noticed
HEARTBEAT_SECONDS = 5
GRACE_SECONDS = 15  # without a heartbeat until a trial is queued again
STARTUP_TRIALS = 5  # completed trials before the first one is pruned
WARMUP_FRACTION = 0.25  # fraction of the steps of a run before it can be pruned
CREATION_SECONDS = 2  # for another process to store the plan of a study that it has just created
MEASURE = "export_val_loss"  # of eval/final.json: what trials are compared by
OLD_MEASURE = "best_val_loss"  # that of a study whose plan names none
ALIKE_FAILURES = 5  # trials that end in the same words, until that is certainly not due to their values
STOPPED = [128 + number for number in STOP_SIGNALS]  # exit codes of a train.py that saved on a signal
MAX_SIGNALS = 3  # that end a trial, until it counts as failed
TERMINATE_SECONDS = 120  # for train.py to save and leave, before it is killed
STORAGE_HINT = "check the disk; --storage names a database that SQLAlchemy knows, its driver installed"


class NotFinished(Exception):
    """Raised in a trial that has no place, or that the end of the search stops."""


def open_storage(url: str) -> RDBStorage:
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
                    f"the storage {url} cannot be used: {first_line(error)}", STORAGE_HINT
                ) from None
            time.sleep(0.5)  # another process creates the tables of the new database
    if is_sqlite:  # otherwise two workers may take the same trial out of the queue
        event.listen(
            storage.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE")
        )
    return storage


@contextlib.contextmanager
def storage_guard() -> Iterator[None]:
    """Turn a failure of the database into an Alg1Error (exit code 4)."""
    import optuna

    hook = threading.excepthook
    threading.excepthook = lambda _: None  # where a heartbeat fails, the next access of this thread does too
    try:
        yield
    except (optuna.exceptions.StorageInternalError, AssertionError) as error:
        # Optuna raises AssertionError where it could not store how a trial has ended.
        cause = error.__context__ if isinstance(error, AssertionError) else error
        if cause is None:
            raise
        reason = first_line(cause.__cause__ or cause)
        raise Alg1Error(f"the storage failed: {reason}", "fix that and start again", DISK_FAILED) from error
    finally:
        threading.excepthook = hook


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
    if is_grid:  # its points are numbered, so every process has the same seed
        study.sampler = optuna.samplers.GridSampler({n: grid_values(d) for n, d in plan.space.items()}, 0)
    else:
        samplers = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
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


@dataclass
class Search:
    """Runs the trials of a study in threads; other processes may do the same."""

    storage: RDBStorage
    study: optuna.Study
    plan: Plan
    folder: Path
    n_trials: int  # in total, in all processes and earlier starts
    flags: list[str]  # further flags of every train.py
    gpus: Gpus
    console: Console
    failure: Exception | None = None  # ends the search
    children: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.signals = StopSignals(lambda: "stopping: the trials save and leave", exit_callback=self.kill)

    def run(self, n_workers: int) -> int | None:
        """Run trials until all have finished, and return the signal that ended this early, if one did."""
        import optuna

        awaited: set[int] = set()  # the running trials of other processes, by number
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
            self.study.optimize(self.objective, n_jobs=n_workers, callbacks=ended, catch=(NotFinished,))
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
                self.storage.record_heartbeat(trial._trial_id)
        time.sleep(POLL_SECONDS)

    def trial_ended(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        """Print a trial, or queue it again if it has begun; stop if all places are taken."""
        import optuna

        if trial.state.name == "FAIL":
            # One without values never began, and would stand in the queue before those that did. But a point
            # of a grid is not proposed a second time.
            if trial.params or "grid_id" in trial.system_attrs:
                optuna.storages.RetryHeartbeatStaleTrialCallback()(study, trial)
        else:
            self.console.say(describe_trial(study, trial))
        if self.stopping or self.n_taken() >= self.n_trials:
            study.stop()

    def objective(self, trial: optuna.Trial) -> float:
        """Run a trial and return the validation loss of its export. An error ends the search.

        Raises:
            TrialPruned: it was ended early, or cannot be trained.
            NotFinished: another process took the last place, the search is to end, or a signal ended
                train.py.
        """
        if self.stopping or self.n_taken(before=trial.number) >= self.n_trials:
            raise NotFinished
        try:
            self.plan.check_again()
            return self.run_trial(trial)
        except (Alg1Error, OSError) as error:
            self.failure = self.failure or error
            raise NotFinished from error

    def run_trial(self, trial: optuna.Trial) -> float:
        """See `objective`. Raises Alg1Error or OSError too, if the disk failed."""
        parameters = rounded({name: suggest(trial, name, d) for name, d in self.plan.space.items()})
        if reason := self.plan.invalid_reason(parameters):
            give_up(trial, "refused", reason)
        log = self.folder / "trials" / f"{trial.number}.log"
        code, pruned = self.train(trial, parameters, log)
        if code == DONE:
            trial.set_user_attr("state", "complete")  # raises if another process took the trial for dead
            return read_json_object(RunFolder(Path(trial.user_attrs["run"])).final_path)[MEASURE]
        if code == DISK_FAILED:
            message = f"trial {trial.number}: {failure_reason(log, code)}"
            raise Alg1Error(message, "fix that and start again", DISK_FAILED)
        if self.stopping:
            raise NotFinished
        if pruned:
            give_up(trial, "pruned", None)
        if code < 0 or code in STOPPED:
            n_signals = trial.user_attrs.get("signals", 0) + 1
            trial.set_user_attr("signals", n_signals)  # stays with the trial when it is queued again
            if n_signals < MAX_SIGNALS:
                raise NotFinished
        reason = failure_reason(log, code)
        if 0 < code != CANNOT_TRAIN and fails_everywhere(finished_trials(self.study), parameters, reason):
            raise Alg1Error(
                f"trials with other values of everything that is searched end alike: {reason}",
                f"{log} has what this one printed; fix that and start again",
            )
        give_up(trial, "failed", reason)

    def train(self, trial: optuna.Trial, parameters: dict[str, Any], log: Path) -> tuple[int, bool]:
        """Run train.py and report its losses; return its exit code and whether it was pruned.

        A trial that was queued again resumes its run, even a finished one.
        """
        run = self.earlier_run(trial)
        while run and in_use(run) and not self.stopping:  # by the train.py of a search that was killed
            time.sleep(POLL_SECONDS)
        if run and checkpoint_paths(RunFolder(run).checkpoint_dir):
            arguments = ["--resume", str(run)]
        else:
            tag = f"--run-tag={self.study.study_name}-{trial.number}"
            arguments = [*self.plan.arguments(parameters), tag]
        command = [sys.executable, str(TRAIN_SCRIPT), *arguments, *self.flags]
        reports, pruned = self.reports(trial, log), False
        with self.gpus.one(trial.number) as variables, self.start(command, log, variables) as child:
            try:
                while not pruned and self.goes_on(child):
                    # The defaults are not pruned: the gain over them is told at the end.
                    new = next(reports, False)
                    pruned = new and "defaults" not in trial.user_attrs and trial.should_prune()
            finally:
                child.terminate()  # lets it save and leave; does nothing to one that has ended
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(TERMINATE_SECONDS)
                child.kill()
        next(reports, False)
        return child.returncode, pruned

    def start(self, command: list[str], log: Path, variables: dict[str, str]) -> subprocess.Popen[bytes]:
        """Start the process of a trial, in a session of its own: Ctrl-C reaches search.py only.

        Args:
            variables: added to its environment.
        """
        # A second signal, which kills the children, must not come while one of them is not known yet.
        with log.open("wb") as output, self.signals.delayed():
            if self.stopping:
                raise NotFinished
            environment = without_place(os.environ) | variables
            child = subprocess.Popen(
                command, stdout=output, stderr=output, start_new_session=True, env=environment
            )
            self.children.append(child)
        return child

    def goes_on(self, child: subprocess.Popen[bytes]) -> bool:
        """Wait for POLL_SECONDS; return False at once when the child has ended, or the search is to end."""
        end = time.monotonic() + POLL_SECONDS
        while (running := child.poll() is None and not self.stopping) and time.monotonic() < end:
            time.sleep(min(REACTION_SECONDS, POLL_SECONDS))
        return running

    def earlier_run(self, trial: optuna.Trial) -> Path | None:
        """Return the run of a trial that was queued again; None if it had none."""
        import optuna

        if "run" in trial.user_attrs:
            return Path(trial.user_attrs["run"])
        # Its search was killed before train.py had told the run. A run of an older study is not meant.
        trials = self.study.get_trials(deepcopy=False)
        numbers = optuna.storages.RetryHeartbeatStaleTrialCallback.retry_history(trials[trial.number])
        begun = {f"{self.study.study_name}-{n}": trials[n].datetime_start for n in numbers}
        for run in reversed(list_runs(self.plan.fixed["runs_dir"])):
            named = RUN_ID.fullmatch(run.name)
            start = named and begun.get(named[3])
            if start and run.stat().st_mtime >= start.timestamp():
                return run
        return None

    def reports(self, trial: optuna.Trial, log: Path) -> Iterator[bool]:
        """Report the new validation losses to Optuna whenever asked; yield whether there were any."""
        while not (begun := re.search(rb"^run +(.+)\n", log.read_bytes(), re.MULTILINE)):
            yield False
        run = RunFolder(Path(self.plan.fixed["runs_dir"], begun[1].decode().strip()))
        trial.set_user_attr("run", str(run.path))
        # A run that ends before its first checkpoint removes its directory.
        with contextlib.suppress(FileNotFoundError), run.metrics_path.open("rb") as file:
            while True:
                rows = [row for row in read_rows(file) if "loss/val" in row]
                for row in rows:
                    trial.report(row["loss/val"], int(row["step"]))
                yield bool(rows)


def give_up(trial: optuna.Trial, state: str, reason: str | None) -> NoReturn:
    """End a trial as pruned: samplers learn from it, as they would not from a failed one."""
    import optuna

    trial.set_user_attr("state", state)
    trial.set_user_attr("reason", reason)
    raise optuna.TrialPruned


def fails_everywhere(trials: list[FrozenTrial], parameters: dict[str, Any], reason: str) -> bool:
    """Return whether a trial certainly does not fail because of its values.

    So it is if ALIKE_FAILURES trials have ended in the same words, although each parameter that can vary had
    at least two values among them, and no trial of the study has come to a loss.
    """
    if any(trial.intermediate_values for trial in trials):
        return False
    alike = [trial for trial in trials if trial.user_attrs.get("reason") == reason]
    if len(alike) + 1 < ALIKE_FAILURES:
        return False
    return all(
        domain.single() or len({parameters[name], *(trial.params[name] for trial in alike)}) > 1
        for name, domain in alike[0].distributions.items()
    )


def failure_reason(log: Path, code: int) -> str:
    """Return why train.py failed: the last error line of its output, or else the last line."""
    text = log.read_text(encoding="utf-8", errors="replace")
    if code < 0:
        return f"ended by signal {-code} ({signal.strsignal(-code)})"
    lines = re.findall("^error: (.+)", text, re.MULTILINE) or text.splitlines()
    return lines[-1].strip()[:300] if lines else f"exit code {code}"
