"""The trials of a study, each of them a process of train.py.

A trial whose process was killed stays marked as running. Once its heartbeat has stopped, Optuna marks it as
failed and queues it again with its user attributes, so that its run is resumed. An interrupted search queues
what it has begun likewise. Failed trials do not count; a trial that cannot be trained is told as pruned.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from utils_alg1.base.errors import CANNOT_TRAIN, DISK_FAILED, DONE, Alg1Error
from utils_alg1.base.files import read_json_object
from utils_alg1.console.signals import STOP_SIGNALS, StopSignals
from utils_alg1.run_directory import RUN_ID, RunFolder, checkpoint_paths, in_use, list_runs
from utils_alg1.search.gpus import Gpus
from utils_alg1.search.results import describe_trial, finished_trials, rounded
from utils_alg1.search.space import Plan, suggest
from utils_alg1.search.study import MEASURE, queue_points
from utils_alg1.tracking.metrics_file import read_rows
from utils_alg1.training.launcher import environment_of_child
from utils_alg1.utils_output import Console

if TYPE_CHECKING:
    import optuna
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial

TRAIN_SCRIPT = Path(__file__).resolve().parents[2] / "train.py"
POLL_SECONDS = 1.0  # interval at which the metrics of a trial are checked
REACTION_SECONDS = 0.1  # until the end of a trial, or a signal, is noticed
ALIKE_FAILURES = 5  # trials that end in the same words, until that is certainly not due to their values
STOPPED = [128 + number for number in STOP_SIGNALS]  # exit codes of a train.py that saved on a signal
MAX_SIGNALS = 3  # that end a trial, until it counts as failed
TERMINATE_SECONDS = 120  # for train.py to save and leave, before it is killed


class NotFinished(Exception):
    """Raised in a trial that has no place or no point, or that the end of the search stops."""


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
    points: list[dict[str, Any]] = field(default_factory=list)  # of a grid; without them values are sampled
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
                queue_points(self.study, self.plan.space, self.points, self.n_trials)
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
                run = f" ({trial.user_attrs['run']})" if "run" in trial.user_attrs else ""
                what = f"waiting for trial {trial.number}{run}, which another process began"
                self.console.say(f"{what}; if that process is gone, its trial is taken over")
                # Without any heartbeat, as if killed at its very start, it would never be found.
                self.storage.record_heartbeat(trial._trial_id)
        time.sleep(POLL_SECONDS)

    def trial_ended(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        """Print a trial, or queue it again if it has begun; stop if all places are taken."""
        import optuna

        if trial.state.name == "FAIL":
            # One without values never began, and would stand in the queue before those that did.
            if trial.params and not self.is_repeated(trial):
                optuna.storages.RetryHeartbeatStaleTrialCallback()(study, trial)
        else:
            self.console.say(describe_trial(study, trial))
        is_exhausted = self.points and not trial.params  # the queue of points was empty: see `run`
        if self.stopping or is_exhausted or self.n_taken() >= self.n_trials:
            study.stop()

    def is_repeated(self, trial: optuna.Trial | FrozenTrial) -> bool:
        """Return whether a trial of a grid has no point of its own: two processes may have queued it."""
        earlier = self.study.get_trials(deepcopy=False)[: trial.number]
        return bool(self.points) and (
            not trial.params or any(t.params == trial.params for t in earlier if t.state.name != "FAIL")
        )

    def objective(self, trial: optuna.Trial) -> float:
        """Run a trial and return the validation loss of its export. An error ends the search.

        Raises:
            TrialPruned: it was ended early, or cannot be trained.
            NotFinished: another process took the last place, the search is to end, or a signal ended
                train.py.
        """
        if self.stopping or self.n_taken(before=trial.number) >= self.n_trials:
            raise NotFinished
        if self.is_repeated(trial):
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
        self.wait_for_run(trial, run)
        if run and checkpoint_paths(RunFolder(run).checkpoint_dir):
            arguments = ["--resume", str(run)]
        else:
            tag = f"--run-tag={self.study.study_name}-{trial.number}"
            arguments = [*self.plan.arguments(parameters), tag]
        command = [sys.executable, str(TRAIN_SCRIPT), *arguments, *self.flags]
        reports, pruned = self.reports(trial, log), False
        with self.gpus.assign(trial.number) as variables, self.start(command, log, variables) as child:
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

    def wait_for_run(self, trial: optuna.Trial, run: Path | None) -> None:
        """Wait until the train.py of a search that was killed has left the run of a trial."""
        if run and in_use(run):
            self.console.say(f"trial {trial.number} continues {run}, which still trains: waiting for it")
        while run and in_use(run) and not self.stopping:
            time.sleep(POLL_SECONDS)

    def start(self, command: list[str], log: Path, variables: dict[str, str]) -> subprocess.Popen[bytes]:
        """Start the process of a trial, in a session of its own: Ctrl-C reaches search.py only.

        Args:
            variables: added to its environment.
        """
        # A second signal, which kills the children, must not come while one of them is not known yet.
        with log.open("wb") as output, self.signals.delayed():
            if self.stopping:
                raise NotFinished
            environment = environment_of_child(os.environ) | variables
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
