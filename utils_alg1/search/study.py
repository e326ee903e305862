"""The study of a hyperparameter search, stored in a folder.

searches/NAME/
    journal.log   all trials, shared by all workers (unless --storage names another file or a database)
    trials/       NUMBER.log: the output of the trial's train.py; NUMBER.lock: locked while the trial runs
    results.csv   results.md   history.png   importance.png   slice.png   search.log
    best/         the best parameters as a preset for train.py --config

The lock of a trial is held by its worker and by its process. A trial that is marked as running while its
lock is free was therefore killed, on whichever machine; it is replaced by a new trial that resumes its run,
and is not counted any more. Counting and claiming trials is protected by a lock of the study, so that two
workers never claim the last trial.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from parameters import specs
from utils_alg1.base.errors import Alg1Error, disk_error, first_line
from utils_alg1.base.files import make_folder, write_atomically
from utils_alg1.base.problems import shown
from utils_alg1.run_directory import LOCK_NAME
from utils_alg1.search.space import CHANGEABLE_PARAMETERS, Plan, grid_points, round_float

if TYPE_CHECKING:
    import optuna

STARTUP_TRIALS = 5  # completed trials before the first one is pruned
WARMUP_FRACTION = 0.25  # fraction of the steps of a run before it can be pruned
STORAGE_HINT = "name a new file, or a database URL (sqlite:///a.db)"


# --- the study on disk --------------------------------------------------------------------------------


class JournalLock:
    """A lock for appending to the journal; acquiring it removes an incomplete last line of a killed process.

    Optuna's own lock files outlast a killed process; this lock is released when its process ends.
    """

    def __init__(self, path: Path):
        self._path = path
        self._lock = FileLock(f"{path}.lock")

    def acquire(self) -> bool:
        self._lock.acquire()
        with self._path.open("r+b") as file:
            whole = file.seek(0, os.SEEK_END)
            while whole and file.seek(whole - 1) >= 0 and file.read(1) != b"\n":
                whole -= 1
            file.truncate(whole)
        return True

    def release(self) -> None:
        self._lock.release()


def open_storage(location: str) -> Any:
    """Open an Optuna storage: a database for a URL, a journal for a path.

    Raises:
        Alg1Error: the storage cannot be opened.
    """
    import optuna
    from optuna.storages.journal import JournalFileBackend

    try:
        if "://" in location:
            return optuna.storages.RDBStorage(location)
        path = Path(location).absolute()
        if not may_be_journal(path):
            raise Alg1Error(f"--storage {location}: not the journal of a search", STORAGE_HINT)
        make_folder(path.parent)
        lock: Any = JournalLock(path)
        return optuna.storages.JournalStorage(JournalFileBackend(str(path), lock_obj=lock))
    except Alg1Error:
        raise
    except Exception as error:  # depends on the database driver
        raise Alg1Error(
            f"--storage {location}: cannot be used: {first_line(error)}",
            STORAGE_HINT,
        ) from None


def may_be_journal(path: Path) -> bool:
    """Return whether a path is new or a journal. Any other file would be damaged by using it as one."""
    if not path.is_file():
        return not path.exists()
    prefix = b'{"op_code":'
    with path.open("rb") as file:
        return prefix.startswith(file.read(len(prefix)))


def try_lock(path: Path) -> int | None:
    """Lock a trial and return the file descriptor that holds the lock; None if it is already locked.

    FileLock is not used, because a child process has to inherit the lock to keep it if its parent is killed.
    """
    import fcntl

    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise disk_error(f"lock {path}", error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


@dataclass
class ClaimedTrial:
    """A trial that this process runs.

    Attributes:
        trial: Optuna's object.
        parameters: the values of the searched parameters.
        lock: the file descriptor that holds the lock of the trial.
    """

    trial: optuna.Trial
    parameters: dict[str, Any]
    lock: int


def without_replaced(trials: list[optuna.trial.FrozenTrial]) -> list[optuna.trial.FrozenTrial]:
    """Return the trials that were not replaced by another one."""
    replaced = {trial.user_attrs.get("replaces") for trial in trials}
    return [trial for trial in trials if trial.number not in replaced]


@dataclass
class Settings:
    """How a search is run. Unlike the plan, the settings may differ each time a study is continued."""

    name: str
    folder: Path
    storage: str | None
    trials: int
    sampler: str
    seed: int
    prune: bool


class Study:
    """An Optuna study in a folder shared by all workers; an existing study is continued.

    Attributes:
        plan: the search space and the fixed parameters.
        settings: how the search is run.
        folder: the folder of the study.
        n_trials: the number of trials in total, at most that of the grid points.
        optuna: Optuna's object.

    Raises:
        Alg1Error: the study was started with another plan or in another folder, or cannot be opened.
    """

    def __init__(self, plan: Plan, settings: Settings):
        import optuna

        self.plan, self.settings = plan, settings
        self.folder = settings.folder
        self.n_trials = settings.trials
        self._grid: list[dict[str, Any]] = []
        if settings.sampler == "grid":
            self._grid = grid_points(plan.space, settings.seed)
            self.n_trials = min(self.n_trials, len(self._grid))
        # Opened first, so that no folder is created if it fails.
        storage = open_storage(settings.storage) if settings.storage else None
        make_folder(self.folder / "trials")
        storage = storage or open_storage(str(self.folder / "journal.log"))
        with self._exclusive():
            self.optuna = optuna.create_study(
                storage=storage,
                study_name=settings.name,
                direction="minimize",
                load_if_exists=True,
                pruner=self._pruner(),
            )
            self._check_folder()
            self._check_plan()
            if plan.defaults and not self._grid and not self.optuna.trials:
                self._enqueue(plan.defaults, {"defaults": True})
            if "plan" not in self.optuna.user_attrs:
                self.optuna.set_user_attr("plan", plan.as_json())

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Hold the lock of the study."""
        try:
            with FileLock(self.folder / LOCK_NAME):
                yield
        except OSError as error:
            raise disk_error(f"use {self.folder}", error) from error

    def _pruner(self) -> optuna.pruners.BasePruner:
        import optuna

        if not self.settings.prune:
            return optuna.pruners.NopPruner()
        steps = int(WARMUP_FRACTION * self.plan.fixed.get("max_iters", 0))
        return optuna.pruners.MedianPruner(n_startup_trials=STARTUP_TRIALS, n_warmup_steps=max(1, steps))

    def _sampler(self, n_trials: int) -> optuna.samplers.BaseSampler:
        """Return a sampler seeded for one trial; with one seed for all, each worker would sample the same."""
        import optuna

        seed = (self.settings.seed + n_trials) % 2**32
        if self.settings.sampler == "tpe":
            return optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        return optuna.samplers.RandomSampler(seed=seed)

    def _check_folder(self) -> None:
        """Refuse to continue a study of a database in another folder: the locks are in its own folder."""
        path = self.folder / "study.id"
        if not path.exists():
            write_atomically(path, uuid.uuid4().hex.encode())
        own, other = path.read_text(), self.optuna.user_attrs.get("folder")
        if other not in (None, own):
            raise Alg1Error(
                f"the study {self.settings.name} of --storage belongs to another folder than {self.folder}",
                "run in the folder where it was begun (machines share it), or name another --study",
            )
        self.optuna.set_user_attr("folder", own)

    def _check_plan(self) -> None:
        """Refuse to continue a study with another plan."""
        new, old = self.plan.as_json(), self.optuna.user_attrs.get("plan")
        if old is None:
            return
        known = {name: spec.default for name, spec in specs().items()}  # the study may lack newer parameters
        before, after = known | old, known | new
        changes = [
            f"{name}: {shown(before[name])} -> {shown(after.get(name))}"
            for name in before
            if before[name] != after.get(name) and name not in CHANGEABLE_PARAMETERS
        ]
        if changes:
            raise Alg1Error(
                f"the study {self.settings.name} has begun with other settings: {', '.join(changes)}",
                f"name another --study, or remove {self.folder} to forget that one",
            )

    def _enqueue(self, parameters: dict[str, Any], attributes: dict[str, Any]) -> None:
        self.optuna.enqueue_trial(parameters, user_attrs={**attributes, "parameters": parameters})

    def trials(self) -> list[optuna.trial.FrozenTrial]:
        """Return all trials except the replaced ones."""
        return without_replaced(self.optuna.get_trials(deepcopy=False))

    def finished(self) -> list[optuna.trial.FrozenTrial]:
        """Return all trials that have ended, except the replaced ones."""
        return [trial for trial in self.trials() if trial.state.is_finished()]

    def has_running_trial(self) -> bool:
        """Return whether any worker, of this process or another, is running a trial."""
        return any(trial.state.name == "RUNNING" for trial in self.trials())

    def claim_trial(self) -> ClaimedTrial | None:
        """Claim the next trial; return None if all trials have been claimed.

        Raises:
            Alg1Error: a process of a removed study still runs under the number of the trial.
        """
        with self._exclusive():
            self._replace_dead_trials()
            trials = self.trials()
            waiting = [trial for trial in trials if trial.state.name == "WAITING"]
            if len(trials) - len(waiting) >= self.n_trials:
                return None
            if self._grid and not waiting and not self._enqueue_from_grid():
                return None
            self.optuna.sampler = self._sampler(len(trials))
            trial = self.optuna.ask()
            lock = try_lock(self.trial_file(trial.number, "lock"))
            if lock is None:
                raise Alg1Error(
                    f"trial {trial.number} of an earlier search in {self.folder} still runs",
                    "wait for it, or end it",
                )
            parameters = {name: domain.suggest(trial, name) for name, domain in self.plan.space.items()}
            return ClaimedTrial(trial, parameters, lock)

    def trial_file(self, number: int, kind: str) -> Path:
        """Return the path of the log ("log") or the lock file ("lock") of a trial."""
        return self.folder / "trials" / f"{number}.{kind}"

    def _enqueue_from_grid(self) -> bool:
        """Enqueue the next grid point that has not been tried; return False if there is none."""
        tried = [parameters_of(trial) for trial in self.optuna.get_trials(deepcopy=False)]
        for point in self._grid:
            if point not in tried:
                self._enqueue(point, {})
                return True
        return False

    def _replace_dead_trials(self) -> None:
        """Mark each running trial whose lock is free as failed, and enqueue one that resumes its run.

        If this process is killed between any two of these steps, the next worker completes them.
        """
        import optuna

        trials = self.optuna.get_trials(deepcopy=False)
        replaced = {trial.user_attrs.get("replaces") for trial in trials}
        for trial in trials:
            if trial.state.name != "RUNNING":
                continue
            lock = try_lock(self.trial_file(trial.number, "lock"))
            if lock is None:
                continue
            try:
                if trial.number not in replaced:
                    kept: dict[str, Any] = {"replaces": trial.number}
                    kept |= {n: trial.user_attrs[n] for n in ("defaults", "tag") if n in trial.user_attrs}
                    self._enqueue(parameters_of(trial), kept)
                self.optuna.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            finally:
                os.close(lock)


def parameters_of(trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
    """Return the searched parameters of a trial, also of one that is only enqueued."""
    sampled = {name: round_float(value) for name, value in trial.params.items()}
    return {**trial.user_attrs.get("parameters", {}), **sampled}


# --- results of a trial -------------------------------------------------------------------------------


def state_of(trial: optuna.trial.FrozenTrial) -> str:
    """Return the state of a trial: complete, pruned, refused, failed or running."""
    states = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
    return "refused" if trial.user_attrs.get("refused") else states.get(trial.state.name, "running")


def lowest_loss(trial: optuna.trial.FrozenTrial) -> float | None:
    """Return the result of a complete trial or the lowest loss reported by another; None without any."""
    if trial.state.name == "COMPLETE":
        return trial.value
    return min(trial.intermediate_values.values(), default=None)


def format_loss_of(trial: optuna.trial.FrozenTrial) -> str:
    """Format the lowest loss of a trial; "-" without any."""
    loss = lowest_loss(trial)
    return "-" if loss is None else f"{loss:.4f}"


def best_of(trials: list[optuna.trial.FrozenTrial]) -> optuna.trial.FrozenTrial | None:
    """Return the complete trial with the lowest loss; None if there is no complete trial."""
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    return min(complete, key=lambda trial: (trial.value, trial.number), default=None)


def format_parameters(parameters: dict[str, Any]) -> str:
    """Format parameters on one line: n_layer=4 learning_rate=0.001."""
    return " ".join(f"{name}={format_value(value)}" for name, value in parameters.items())


def format_value(value: Any) -> str:
    """Format the value of a parameter, a float with three significant digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
