"""The workers of a search and the trials they run, each as a process of train.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from parameters import specs
from utils_alg1.base.errors import CANNOT_TRAIN, DISK_FAILED, DONE, Alg1Error, disk_error, first_line
from utils_alg1.base.files import read_json_object
from utils_alg1.run_directory import LOCK_NAME, RUN_ID, RunFolder, checkpoint_paths, list_runs
from utils_alg1.search.study import ClaimedTrial, Study, best_of, format_loss_of, format_parameters, state_of
from utils_alg1.tracking.metrics_file import new_metrics
from utils_alg1.utils_output import Console

TRAIN_SCRIPT = Path(__file__).resolve().parents[2] / "train.py"
POLL_SECONDS = 0.2  # interval at which the process and the metrics of a trial are checked
TERMINATE_SECONDS = 120.0  # time that a process has to save and exit before it is killed
MAX_INITIAL_FAILURES = 3  # a search ends if this many trials all fail for the same reason


@dataclass
class Outcome:
    """The result of a trial.

    Attributes:
        state: "COMPLETE", "PRUNED" or "FAIL", as Optuna names the states.
        loss: the best validation loss of a complete trial.
        reason: why the trial failed or was refused.
        exit_code: the exit code of its process.
    """

    state: str
    loss: float | None = None
    reason: str = ""
    exit_code: int = DONE


@dataclass
class Search:
    """The workers of this process; other processes may work on the same study.

    Attributes:
        study: the study.
        console: where each finished trial is printed.
        threads: the number of CPU threads of each trial; None leaves it to the parameters.
        stop: set to end the search.
    """

    study: Study
    console: Console
    threads: int | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    _tell_lock: threading.Lock = field(default_factory=threading.Lock)

    def work(self) -> None:
        """Run trials until all trials of the study have ended, in whichever process, or `stop` is set.

        Raises:
            Alg1Error: every trial fails for the same reason, or the storage failed.
        """
        import optuna

        try:
            while not self.stop.is_set():
                claimed = self.study.claim_trial()
                if claimed:
                    self._run_trial(claimed)
                elif self.study.has_running_trial():  # if it dies, it must be replaced
                    self.stop.wait(POLL_SECONDS)
                else:
                    return
        except optuna.exceptions.StorageInternalError as error:
            raise Alg1Error(
                f"the storage failed: {first_line(error)}", "fix that and start again", DISK_FAILED
            ) from error

    def _run_trial(self, claimed: ClaimedTrial) -> None:
        try:
            refusal = self.study.plan.invalid_reason(claimed.parameters)
            if refusal:
                claimed.trial.set_user_attr("refused", True)
                outcome: Outcome | None = Outcome("PRUNED", reason=refusal)
            else:
                outcome = TrialRun(self.study, claimed, self.threads, self.stop).run()
            if outcome:  # None: stopped, to be resumed when the search is continued
                self._record(claimed, outcome)
        finally:
            os.close(claimed.lock)

    def _record(self, claimed: ClaimedTrial, outcome: Outcome) -> None:
        """Store the outcome of a trial in the study and print it."""
        import optuna

        if outcome.reason:
            claimed.trial.set_user_attr("reason", outcome.reason)
        with self._tell_lock:
            state = optuna.trial.TrialState[outcome.state]
            trial = self.study.optuna.tell(claimed.trial, outcome.loss, state, skip_if_finished=True)
            finished = self.study.finished()
            best = best_of(finished)
            line = f"trial {trial.number:3d}  {state_of(trial):8}  {format_loss_of(trial):>8}"
            line += f"  {format_parameters(claimed.parameters)}"
            line += f"  ({outcome.reason})" if outcome.reason else ""
            self.console.say(line + ("  best" if best and best.number == trial.number else ""))
        reasons = {trial.user_attrs.get("reason") for trial in finished}
        all_failed = all(trial.state.name == "FAIL" for trial in finished)
        if all_failed and len(finished) >= MAX_INITIAL_FAILURES and len(reasons) == 1:
            raise Alg1Error(
                f"the first {len(finished)} trials have all failed: {outcome.reason}",
                f"their output is in {self.study.folder / 'trials'}; fix that and start again",
                outcome.exit_code if outcome.exit_code > 0 else CANNOT_TRAIN,
            )


class TrialRun:
    """Runs a trial as a process of train.py; a trial that replaces a dead one resumes its run.

    Args:
        study: the study of the trial.
        claimed: the trial.
        threads: the number of CPU threads; None leaves it to the parameters.
        stop: set to end the process early.
    """

    def __init__(self, study: Study, claimed: ClaimedTrial, threads: int | None, stop: threading.Event):
        self._study, self._claimed, self._stop = study, claimed, stop
        self._trial = claimed.trial
        self._threads = [] if threads is None else [f"--threads={threads}"]
        self._log = study.trial_file(claimed.trial.number, "log")
        self._run: Path | None = None
        self._metrics_offset = 0  # bytes of metrics.jsonl that have been read
        self._reported_step = -1  # last step whose loss was reported to Optuna

    def run(self) -> Outcome | None:
        """Run the trial; return its outcome, or None if `stop` ended it."""
        arguments = self._arguments()
        if arguments is None:
            return self._result()
        with self._start(arguments) as child:
            pruned = self._monitor(child)
            code = self._terminate(child) if pruned or self._stop.is_set() else child.wait()
        if code == DONE:
            return self._result()
        if self._stop.is_set():
            return None
        self._report_losses()
        if pruned and code in (128 + signal.SIGTERM, -signal.SIGTERM):
            return Outcome("PRUNED")
        return Outcome("FAIL", None, self._failure_reason(code), code)

    def _arguments(self) -> list[str] | None:
        """Return the arguments of train.py; None if the run of the dead trial is already finished."""
        plan = self._study.plan
        self._find_run()
        if self._run:
            self._wait_until_free(self._run)
            if RunFolder(self._run).final_path.exists():
                return None
            if checkpoint_paths(RunFolder(self._run).checkpoint_dir):
                return ["--resume", str(self._run), *self._threads]
        self._run = None
        tag = f"{self._study.settings.name}-{self._trial.number}"
        earlier = [run.name for run in runs_with_tag(plan.fixed["runs_dir"], tag)]
        self._trial.set_user_attr("tag", {"words": tag, "not": earlier})
        options = plan.trial_options(self._claimed.parameters)
        config = [] if options.config is None else [f"--config={options.config}"]
        flags = [to_flag(name, value) for name, value in options.values.items()]
        return [*config, *flags, f"--run-tag={tag}", *self._threads]

    def _start(self, arguments: list[str]) -> subprocess.Popen[bytes]:
        """Start the process in a session of its own, so that Ctrl-C only reaches search.py."""
        command = [sys.executable, str(TRAIN_SCRIPT), *arguments, "--quiet"]
        try:
            with self._log.open("wb") as log:
                return subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=[self._claimed.lock],
                )
        except OSError as error:
            raise disk_error(f"start trial {self._trial.number}", error) from error

    def _monitor(self, child: subprocess.Popen[bytes]) -> bool:
        """Wait until the process ends, `stop` is set or the trial should be pruned; True in the last case."""
        is_baseline = "defaults" in self._trial.user_attrs  # its result is compared with the best one
        while child.poll() is None and not self._stop.is_set():
            if self._report_losses() and not is_baseline and self._trial.should_prune():
                return True
            self._stop.wait(POLL_SECONDS)
        return False

    def _report_losses(self) -> bool:
        """Report new validation losses of the run to Optuna; return whether there were any."""
        self._find_run()
        if self._run is None:
            return False
        metrics_path = RunFolder(self._run).metrics_path
        rows, self._metrics_offset = new_metrics(metrics_path, self._metrics_offset)
        reported = False
        for row in rows:
            if "loss/val" in row and row["step"] > self._reported_step:
                self._reported_step = int(row["step"])
                self._trial.report(row["loss/val"], self._reported_step)
                reported = True
        return reported

    def _find_run(self) -> None:
        """Find the run by its tag among the runs that did not exist before the trial."""
        tag = self._trial.user_attrs.get("tag") if self._run is None else None
        if tag:
            runs = runs_with_tag(self._study.plan.fixed["runs_dir"], tag["words"])
            new = [run for run in runs if run.name not in tag["not"]]
            self._run = new[-1] if new else None
            if self._run:
                self._trial.set_user_attr("run", str(self._run))

    def _wait_until_free(self, run: Path) -> None:
        """Wait for a process that is still running without its worker and without the lock of the trial."""
        lock = FileLock(run / LOCK_NAME, timeout=0)
        while not self._stop.is_set():
            try:
                with lock:
                    return
            except Timeout:
                self._stop.wait(POLL_SECONDS)
            except OSError as error:
                raise disk_error(f"lock {run}", error) from error

    def _terminate(self, child: subprocess.Popen[bytes]) -> int:
        """Let the process save a checkpoint and exit; return its exit code."""
        child.terminate()
        try:
            return child.wait(TERMINATE_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            return child.wait()

    def _result(self) -> Outcome:
        """Return the result of the finished run."""
        self._report_losses()
        if self._run is None:
            return Outcome("FAIL", None, f"its run is not in {self._study.plan.fixed['runs_dir']}")
        try:
            loss = read_json_object(RunFolder(self._run).final_path)["best_val_loss"]
        except (Alg1Error, KeyError) as error:
            return Outcome("FAIL", None, f"no result: {first_line(error)}")
        return Outcome("COMPLETE", loss)

    def _failure_reason(self, code: int) -> str:
        """Return why the process failed: the last error line of its output, or else the last line."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
        lines = [line.strip() for line in lines if line.strip()]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        if code < 0:
            return f"killed by signal {-code}"
        return (errors or lines or [f"exit code {code}"])[-1][:300]


def runs_with_tag(runs_dir: str | Path, tag: str) -> list[Path]:
    """Return the runs with a tag, oldest first."""
    matches = ((RUN_ID.fullmatch(run.name), run) for run in list_runs(runs_dir))
    return [run for match, run in matches if match and match[3] == tag]


def to_flag(name: str, value: Any) -> str:
    """Return a parameter as a flag of train.py: --flag=value, or --flag and --no-flag for a boolean."""
    flag = specs()[name].flag
    if isinstance(value, bool):
        return flag if value else flag.replace("--", "--no-", 1)
    return f"{flag}={value}"


def run_workers(search: Search, n_workers: int, stop_requested: Callable[[], bool]) -> None:
    """Run workers in threads until all trials have ended, `stop_requested` returns True or a worker fails.

    Raises:
        Alg1Error: see Search.work.
    """
    from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

    with ThreadPoolExecutor(n_workers) as pool:
        futures = running = {pool.submit(search.work) for _ in range(n_workers)}
        try:
            while running:
                done, running = wait(running, timeout=POLL_SECONDS, return_when=FIRST_EXCEPTION)
                if stop_requested() or any(future.exception() for future in done):
                    search.stop.set()
        finally:
            search.stop.set()  # also after an exception, so that no worker keeps running
    for future in futures:
        future.result()
