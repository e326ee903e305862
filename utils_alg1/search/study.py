"""The study of a hyperparameter search on disk.

searches/NAME/
    journal.log   every trial, for all workers to read and write (unless --storage names another place)
    trials/       NUMBER.log: what the trial's train.py printed; NUMBER.lock: held while the trial lives
    results.csv   results.md   history.png   importance.png   slice.png   search.log
    best/         the best parameters as a preset for train.py --config

A trial's lock is held by the worker and by the trial's process. So a trial that is marked as running while
its lock is free is dead, wherever it ran, and gets a replacement that goes on with its run. A replaced trial
does not count. Trials are counted and asked for under one lock: no two workers ask for the last one.
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
from utils_alg1.search.space import MAY_VARY, Plan, grid_points, tidy

if TYPE_CHECKING:
    import optuna

STARTUP_TRIALS = 5  # completed ones before any is pruned
WARMUP_SHARE = 0.25  # of a run's steps, before which it is not pruned


# --- the study on disk --------------------------------------------------------------------------------


class JournalLock:
    """Lets one process at a time append to the journal, and drops the half line that a killed one left.

    Optuna's own locks are files that outlive the process that made them; this one ends with its process.
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


STORAGE_HINT = "name a new file, or a database URL (sqlite:///a.db)"


def open_storage(where: str) -> Any:
    """Optuna's storage: a database for a URL, a journal for a path.

    Raises:
        Alg1Error: it cannot be opened.
    """
    import optuna
    from optuna.storages.journal import JournalFileBackend

    try:
        if "://" in where:
            return optuna.storages.RDBStorage(where)
        path = Path(where).absolute()
        if not may_be_journal(path):
            raise Alg1Error(f"--storage {where}: not the journal of a search", STORAGE_HINT)
        make_folder(path.parent)
        lock: Any = JournalLock(path)
        return optuna.storages.JournalStorage(JournalFileBackend(str(path), lock_obj=lock))
    except Alg1Error:
        raise
    except Exception as error:  # each database has errors of its own
        raise Alg1Error(
            f"--storage {where}: cannot be used: {first_line(error)}",
            STORAGE_HINT,
        ) from None


def may_be_journal(path: Path) -> bool:
    """Whether Optuna may take a file for its journal: it appends to any, and we cut off a half line."""
    if not path.is_file():
        return not path.exists()
    begin = b'{"op_code":'
    with path.open("rb") as file:
        return begin.startswith(file.read(len(begin)))


def take_lock(path: Path) -> int | None:
    """A file descriptor that holds a trial's lock; None where another one does.

    Not a FileLock: a child that inherits this descriptor keeps the lock when its parent is killed.
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
class Taken:
    """A trial in this worker's hands: its values, and the descriptor that holds its lock."""

    trial: optuna.Trial
    drawn: dict[str, Any]
    lock: int


def not_replaced(trials: list[optuna.trial.FrozenTrial]) -> list[optuna.trial.FrozenTrial]:
    """The trials without those that another one has replaced."""
    replaced = {trial.user_attrs.get("replaces") for trial in trials}
    return [trial for trial in trials if trial.number not in replaced]


@dataclass
class Settings:
    """How a search is run; unlike the plan, each start may choose anew."""

    name: str
    folder: Path
    storage: str | None
    trials: int
    sampler: str
    seed: int
    prune: bool


class Study:
    """An Optuna study in a folder that every worker shares.

    Raises:
        Alg1Error: it has begun with another plan or in another folder, or cannot be opened.
    """

    def __init__(self, plan: Plan, settings: Settings):
        import optuna

        self.plan, self.settings = plan, settings
        self.folder = settings.folder
        self.wanted = settings.trials
        self._grid: list[dict[str, Any]] = []
        if settings.sampler == "grid":
            self._grid = grid_points(plan.space, settings.seed)
            self.wanted = min(self.wanted, len(self._grid))
        storage = open_storage(settings.storage) if settings.storage else None  # before any folder is made
        make_folder(self.folder / "trials")
        storage = storage or open_storage(str(self.folder / "journal.log"))
        with self._alone():
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
                self.optuna.set_user_attr("plan", plan.describe())

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        try:
            with FileLock(self.folder / LOCK_NAME):
                yield
        except OSError as error:
            raise disk_error(f"use {self.folder}", error) from error

    def _pruner(self) -> optuna.pruners.BasePruner:
        import optuna

        if not self.settings.prune:
            return optuna.pruners.NopPruner()
        steps = int(WARMUP_SHARE * self.plan.fixed.get("max_iters", 0))
        return optuna.pruners.MedianPruner(n_startup_trials=STARTUP_TRIALS, n_warmup_steps=max(1, steps))

    def _sampler(self, n_trials: int) -> optuna.samplers.BaseSampler:
        """A sampler for the next trial: one stream of draws in every process would repeat its values."""
        import optuna

        seed = (self.settings.seed + n_trials) % 2**32
        if self.settings.sampler == "tpe":
            return optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        return optuna.samplers.RandomSampler(seed=seed)

    def _check_folder(self) -> None:
        """A study is one folder, since its locks are there: refuse a database's study from another one."""
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
        new, old = self.plan.describe(), self.optuna.user_attrs.get("plan")
        if old is None:
            return
        known = {name: spec.default for name, spec in specs().items()}  # a parameter may be new since then
        before, after = known | old, known | new
        changes = [
            f"{name}: {shown(before[name])} -> {shown(after.get(name))}"
            for name in before
            if before[name] != after.get(name) and name not in MAY_VARY
        ]
        if changes:
            raise Alg1Error(
                f"the study {self.settings.name} has begun with other settings: {', '.join(changes)}",
                f"name another --study, or remove {self.folder} to forget that one",
            )

    def _enqueue(self, parameters: dict[str, Any], attributes: dict[str, Any]) -> None:
        self.optuna.enqueue_trial(parameters, user_attrs={**attributes, "parameters": parameters})

    def trials(self) -> list[optuna.trial.FrozenTrial]:
        """Every trial that counts."""
        return not_replaced(self.optuna.get_trials(deepcopy=False))

    def finished(self) -> list[optuna.trial.FrozenTrial]:
        """Every trial that counts and has ended."""
        return [trial for trial in self.trials() if trial.state.is_finished()]

    def someone_is_running(self) -> bool:
        """Whether a worker, of this process or another, is at a trial."""
        return any(trial.state.name == "RUNNING" for trial in self.trials())

    def take_trial(self) -> Taken | None:
        """The next trial; None when all are taken."""
        with self._alone():
            self._replace_the_dead()
            trials = self.trials()
            waiting = [trial for trial in trials if trial.state.name == "WAITING"]
            if len(trials) - len(waiting) >= self.wanted:
                return None
            if self._grid and not waiting and not self._enqueue_from_grid():
                return None
            self.optuna.sampler = self._sampler(len(trials))
            trial = self.optuna.ask()
            lock = take_lock(self.trial_file(trial.number, "lock"))
            if lock is None:
                raise Alg1Error(
                    f"trial {trial.number} of an earlier search in {self.folder} still runs",
                    "wait for it, or end it",
                )
            return Taken(trial, {n: domain.suggest(trial, n) for n, domain in self.plan.space.items()}, lock)

    def trial_file(self, number: int, kind: str) -> Path:
        return self.folder / "trials" / f"{number}.{kind}"

    def _enqueue_from_grid(self) -> bool:
        """Queue the next point that no trial has; False when there is none."""
        tried = [parameters_of(trial) for trial in self.optuna.get_trials(deepcopy=False)]
        for point in self._grid:
            if point not in tried:
                self._enqueue(point, {})
                return True
        return False

    def _replace_the_dead(self) -> None:
        """End each running trial whose lock is free, and queue one that goes on with its run.

        Killed between any two of these lines, the next worker does what is left.
        """
        import optuna

        everyone = self.optuna.get_trials(deepcopy=False)
        replaced = {trial.user_attrs.get("replaces") for trial in everyone}
        for trial in everyone:
            if trial.state.name != "RUNNING":
                continue
            lock = take_lock(self.trial_file(trial.number, "lock"))
            if lock is None:
                continue
            try:
                if trial.number not in replaced:
                    known = trial.user_attrs
                    kept: dict[str, Any] = {n: known[n] for n in ("defaults", "tag") if n in known}
                    self._enqueue(parameters_of(trial), {**kept, "replaces": trial.number})
                self.optuna.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            finally:
                os.close(lock)


def parameters_of(trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
    """The searched parameters of a trial, also of one that has only been queued."""
    drawn = {name: tidy(value) for name, value in trial.params.items()}
    return {**trial.user_attrs.get("parameters", {}), **drawn}


# --- what is said of a trial --------------------------------------------------------------------------


def state_of(trial: optuna.trial.FrozenTrial) -> str:
    """A word for how a trial ended."""
    words = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
    return "refused" if trial.user_attrs.get("refused") else words.get(trial.state.name, "running")


def loss_reached(trial: optuna.trial.FrozenTrial) -> float | None:
    """The result of a complete trial, and the lowest loss on the way of another; None where there is none."""
    if trial.state.name == "COMPLETE":
        return trial.value
    return min(trial.intermediate_values.values(), default=None)


def loss_of(trial: optuna.trial.FrozenTrial) -> str:
    """The loss as a table shows it."""
    loss = loss_reached(trial)
    return "-" if loss is None else f"{loss:.4f}"


def best_of(trials: list[optuna.trial.FrozenTrial]) -> optuna.trial.FrozenTrial | None:
    """The complete trial with the lowest loss."""
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    return min(complete, key=lambda trial: (trial.value, trial.number), default=None)


def in_words(parameters: dict[str, Any]) -> str:
    """Parameters as a line shows them."""
    return " ".join(f"{name}={short(value)}" for name, value in parameters.items())


def short(value: Any) -> str:
    """A value as a table shows it."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
