"""What to type next: after a run that is done, that was stopped or that failed."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from errors import CANNOT_TRAIN, Alg1Error
from parameters import Parameters
from utils_alg1.utils_config_loader import ConfigLoader
from utils_alg1.utils_processes import Processes, launch_command
from utils_alg1.utils_run_manager import Run
from utils_alg1.utils_training import learning_rate

if TYPE_CHECKING:
    from utils_alg1.utils_checkpoint import CheckpointStore
    from utils_alg1.utils_training import Progress


def longer_command(run: Run, params: Parameters, progress: Progress, processes: Processes) -> str:
    """What to type to train longer than a run that is done."""
    steps = params.train.max_iters
    longer = dataclasses.replace(params.train, max_iters=2 * steps)
    if progress.step < steps:  # it had lost its patience
        return f"{resume_command(run, processes)} --patience 0"
    moved = params.train.lr_schedule != "constant"
    if moved and any(learning_rate(params.train, s) != learning_rate(longer, s) for s in range(steps)):
        # The schedule is at its end, and a longer one would have begun otherwise: another run as this one.
        files = {"--config": run.record_path, "--init-from": run.export_path}
        named = " ".join(f"{flag} {as_word(path)}" for flag, path in files.items())
        return f"{launch_command(processes)} {named}"
    return f"{resume_command(run, processes)} --max-iters {longer.max_iters}"


def last_words(store: CheckpointStore, run: Run, processes: Processes) -> bytes:
    """What a process says that leaves at once, without saving."""
    if store.newest_step is None:
        return b"\nleft at once: nothing had been saved\n"
    way_on = f"go on from step {store.newest_step} with: {resume_command(run, processes)}"
    return f"\nleft at once; {way_on}\n".encode(errors="replace")


def with_the_way_on(error: Alg1Error, store: CheckpointStore, run: Run, processes: Processes) -> Alg1Error:
    """The error, with what to do with the checkpoints that the run has."""
    if store.newest_step is None:
        return error
    way_on = f"then go on: {resume_command(run, processes)}"
    if error.exit_code == CANNOT_TRAIN:  # what helps there, a resumed run may not change
        way_on = f"its newest weights, for --init-from: {store.path(store.newest_step)}"
    hint = f"{error.hint}; {way_on}" if error.hint else way_on
    return Alg1Error(error.message, hint, error.exit_code)


def resume_command(run: Run, processes: Processes) -> str:
    """What to type to continue a run."""
    return f"{launch_command(processes)} --resume {name_of(run)}"


def name_of(run: Run) -> str:
    """A run as a command line names it: by its id alone where that will be found."""
    try:
        where_runs_are = Path(ConfigLoader.runs_dir(None))
    except Alg1Error:  # a file of settings that was spoilt meanwhile
        return as_word(run.path)
    return run.run_id if run.path.parent == where_runs_are else as_word(run.path)


def as_word(path: Path) -> str:
    """A path as a shell and our own flags take it."""
    return shlex.quote(f"./{path}" if str(path).startswith("-") else str(path))
