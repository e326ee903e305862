"""The trials of a search, each a run of train.py in a process of its own, and the workers that start them."""

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
from utils_alg1.search.study import Study, Taken, best_of, in_words, loss_of, state_of
from utils_alg1.tracking.metrics_file import new_metrics
from utils_alg1.utils_output import Console

TRAIN_SCRIPT = Path(__file__).resolve().parent.parent / "train.py"
POLL = 0.2  # seconds between looks at a trial's process and metrics
PATIENCE = 120.0  # seconds that a trial's process may take to save and leave
HOPELESS_AFTER = 3  # trials that all fail for one reason


@dataclass
class Outcome:
    """How a trial ended: "COMPLETE" with a loss, or "PRUNED" or "FAIL" with a reason.

    Attributes:
        exit_code: of the trial's process.
    """

    state: str
    loss: float | None = None
    reason: str = ""
    exit_code: int = DONE


@dataclass
class Search:
    """The workers of this process, at a study that others may work at too."""

    study: Study
    console: Console
    threads: int | None = None  # of each trial's process; None leaves that to the parameters
    stop: threading.Event = field(default_factory=threading.Event)
    _telling: threading.Lock = field(default_factory=threading.Lock)

    def work(self) -> None:
        """Ask, run, tell; until every trial has ended, wherever it runs, or `stop` is set.

        Raises:
            Alg1Error: no trial can succeed, or the storage failed.
        """
        import optuna

        try:
            while not self.stop.is_set():
                taken = self.study.take_trial()
                if taken:
                    self._run_taken(taken)
                elif self.study.someone_is_running():
                    self.stop.wait(POLL)
                else:
                    return
        except optuna.exceptions.StorageInternalError as error:
            raise Alg1Error(
                f"the storage failed: {first_line(error)}", "mend that and start again", DISK_FAILED
            ) from error

    def _run_taken(self, taken: Taken) -> None:
        try:
            refusal = self.study.plan.refusal(taken.drawn)
            if refusal:
                taken.trial.set_user_attr("refused", True)
                outcome: Outcome | None = Outcome("PRUNED", reason=refusal)
            else:
                outcome = TrialRun(self.study, taken, self.threads, self.stop).finish()
            if outcome:  # else it was stopped, and waits for the next start
                self._tell(taken, outcome)
        finally:
            os.close(taken.lock)

    def _tell(self, taken: Taken, outcome: Outcome) -> None:
        import optuna

        if outcome.reason:
            taken.trial.set_user_attr("reason", outcome.reason)
        with self._telling:
            state = optuna.trial.TrialState[outcome.state]
            told = self.study.optuna.tell(taken.trial, outcome.loss, state, skip_if_finished=True)
            finished = self.study.finished()
            best = best_of(finished)
            line = f"trial {told.number:3d}  {state_of(told):8}  {loss_of(told):>8}  {in_words(taken.drawn)}"
            line += f"  ({outcome.reason})" if outcome.reason else ""
            self.console.say(line + ("  best" if best and best.number == told.number else ""))
        reasons = {trial.user_attrs.get("reason") for trial in finished}
        failed = all(trial.state.name == "FAIL" for trial in finished)
        if failed and len(finished) >= HOPELESS_AFTER and len(reasons) == 1:
            raise Alg1Error(
                f"the first {len(finished)} trials have all failed: {outcome.reason}",
                f"their output is in {self.study.folder / 'trials'}; mend that and start again",
                outcome.exit_code if outcome.exit_code > 0 else CANNOT_TRAIN,
            )


class TrialRun:
    """A trial as a process of train.py, from its start, or from where a dead worker left it, to its end."""

    def __init__(self, study: Study, taken: Taken, threads: int | None, stop: threading.Event):
        self._study, self._taken, self._stop = study, taken, stop
        self._trial = taken.trial
        self._threads = [] if threads is None else [f"--threads={threads}"]
        self._log = study.trial_file(taken.trial.number, "log")
        self._run: Path | None = None
        self._read, self._reported = 0, -1  # bytes of the metrics, and the last step told to Optuna

    def finish(self) -> Outcome | None:
        """Run it to its end; None when `stop` came first."""
        command = self._command()
        if command is None:
            return self._result()
        with self._start(command) as child:
            pruned = self._follow(child)
            code = self._end(child) if pruned or self._stop.is_set() else child.wait()
        if code == DONE:
            return self._result()
        if self._stop.is_set():
            return None
        self._report()
        if pruned and code in (128 + signal.SIGTERM, -signal.SIGTERM):
            return Outcome("PRUNED")
        return Outcome("FAIL", None, self._last_words(code), code)

    def _command(self) -> list[str] | None:
        """The words to start the process with; None when a dead worker's run is already finished."""
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
        earlier = [run.name for run in runs_tagged(plan.fixed["runs_dir"], tag)]
        self._trial.set_user_attr("tag", {"words": tag, "not": earlier})
        config = [] if plan.given.config is None else [f"--config={plan.given.config}"]
        values = plan.options(self._taken.drawn).values
        words = [flag_word(name, value) for name, value in values.items()]
        return [*config, *words, f"--run-tag={tag}", *self._threads]

    def _start(self, words: list[str]) -> subprocess.Popen[bytes]:
        """Start the process in a session of its own, so that Ctrl-C reaches search.py alone."""
        command = [sys.executable, str(TRAIN_SCRIPT), *words, "--quiet"]
        try:
            with self._log.open("wb") as log:
                return subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=[self._taken.lock],
                )
        except OSError as error:
            raise disk_error(f"start trial {self._trial.number}", error) from error

    def _follow(self, child: subprocess.Popen[bytes]) -> bool:
        """Watch the process until it ends, or `stop` is set, or the trial is hopeless: then True."""
        compared_with = "defaults" in self._trial.user_attrs  # what is gained is counted from its result
        while child.poll() is None and not self._stop.is_set():
            if self._report() and not compared_with and self._trial.should_prune():
                return True
            self._stop.wait(POLL)
        return False

    def _report(self) -> bool:
        """Tell Optuna what the run has newly evaluated; whether there was anything."""
        self._find_run()
        if self._run is None:
            return False
        rows, self._read = new_metrics(RunFolder(self._run).metrics_path, self._read)
        news = False
        for row in rows:
            if "loss/val" in row and row["step"] > self._reported:
                self._reported = int(row["step"])
                self._trial.report(row["loss/val"], self._reported)
                news = True
        return news

    def _find_run(self) -> None:
        """Look for the run by its tag, among those that were not there before the trial."""
        tag = self._trial.user_attrs.get("tag") if self._run is None else None
        if tag:
            runs = runs_tagged(self._study.plan.fixed["runs_dir"], tag["words"])
            new = [run for run in runs if run.name not in tag["not"]]
            self._run = new[-1] if new else None
            if self._run:
                self._trial.set_user_attr("run", str(self._run))

    def _wait_until_free(self, run: Path) -> None:
        """Wait for a process that has outlived its worker, where it could not keep the trial's lock."""
        lock = FileLock(run / LOCK_NAME, timeout=0)
        while not self._stop.is_set():
            try:
                with lock:
                    return
            except Timeout:
                self._stop.wait(POLL)
            except OSError as error:
                raise disk_error(f"lock {run}", error) from error

    def _end(self, child: subprocess.Popen[bytes]) -> int:
        """Let the process save and leave."""
        child.terminate()
        try:
            return child.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            child.kill()
            return child.wait()

    def _result(self) -> Outcome:
        """What the finished run has reached."""
        self._report()
        if self._run is None:
            return Outcome("FAIL", None, f"its run is not in {self._study.plan.fixed['runs_dir']}")
        try:
            loss = read_json_object(RunFolder(self._run).final_path)["best_val_loss"]
        except (Alg1Error, KeyError) as error:
            return Outcome("FAIL", None, f"no result: {first_line(error)}")
        return Outcome("COMPLETE", loss)

    def _last_words(self, code: int) -> str:
        """Why the process failed: its error line, or else the last one."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
        spoken = [line.strip() for line in lines if line.strip()]
        errors = [line.removeprefix("error: ") for line in spoken if line.startswith("error: ")]
        if code < 0:
            return f"killed by signal {-code}"
        return (errors or spoken or [f"exit code {code}"])[-1][:300]


def runs_tagged(runs_dir: str | Path, tag: str) -> list[Path]:
    """The runs whose name ends with a tag, oldest first."""
    found = ((RUN_ID.fullmatch(run.name), run) for run in list_runs(runs_dir))
    return [run for match, run in found if match and match[3] == tag]


def flag_word(name: str, value: Any) -> str:
    """A parameter as one word of train.py's command line."""
    flag = specs()[name].flag
    if isinstance(value, bool):
        return flag if value else flag.replace("--", "--no-", 1)
    return f"{flag}={value}"


def run_workers(search: Search, n_workers: int, asked_to_stop: Callable[[], bool]) -> None:
    """Let workers share the trials out among themselves; the first failure of one stops all.

    Raises:
        Alg1Error: see Search.work.
    """
    from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

    with ThreadPoolExecutor(n_workers) as pool:
        futures = running = {pool.submit(search.work) for _ in range(n_workers)}
        try:
            while running:
                done, running = wait(running, timeout=POLL, return_when=FIRST_EXCEPTION)
                if asked_to_stop() or any(future.exception() for future in done):
                    search.stop.set()
        finally:
            search.stop.set()  # whatever ended the waiting: no worker stays behind
    for future in futures:
        future.result()
