"""What a run says of itself on the console, at its start and at its end."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parameters import Parameters, specs
from utils_aim.instructions import FOLDER as AIM_FOLDER
from utils_aim.instructions import instructions as aim_instructions
from utils_alg1.base.errors import CANNOT_TRAIN, Alg1Error
from utils_alg1.base.text import counted, duration, loss_in_words, number
from utils_alg1.run_directory import RunDirectory
from utils_alg1.training.distributed import SingleProcess, launch_command
from utils_alg1.training.schedule import learning_rate
from utils_alg1.utils_config_loader import RESUMED, ConfigLoader
from utils_alg1.utils_output import Block, ShellCommand
from utils_tensorboard.instructions import instructions as tensorboard_instructions

if TYPE_CHECKING:
    from utils_alg1.data.corpus import Corpus
    from utils_alg1.training.checkpoint import CheckpointStore
    from utils_alg1.training.progress import Progress
    from utils_alg1.training.trainer import Trainer


def describe_start(run: RunDirectory, params: Parameters, corpus: Corpus, trainer: Trainer) -> Block:
    """The block of lines that a run begins with."""
    model, train, runtime, step = params.model, params.train, trainer.runtime, trainer.step
    n_parameters = trainer.model.config.n_parameters
    sequences = trainer.tokens_per_step // model.block_size
    steps = f"{step} to {train.max_iters}," if step else f"{train.max_iters}"
    lines = {
        "run": run.run_id,
        "device": f"{runtime.device}, {runtime.dtype_name}, {counted(runtime.threads, 'thread')}",
        "model": f"{counted(n_parameters, 'parameter')}: n_embd {model.n_embd}, n_head {model.n_head},"
        f" n_layer {model.n_layer}, block_size {model.block_size}",
        "text": f"{corpus.path}: {counted(len(corpus.tokens), 'character')},"
        f" vocabulary of {corpus.tokenizer.vocab_size}",
        "steps": f"{steps} of {sequences} x {counted(model.block_size, 'character')}",
        "folder": f"{run.path}: meta/, logs/, artifacts/, eval/",
    }
    if runtime.compile:
        lines["device"] += ", compiled"
    if runtime.dist.world_size > 1:
        lines["device"] += f", in each of {runtime.dist.world_size} processes"
    if train.output:
        lines["folder"] += f"; the export also to {train.output}"
    if train.aim:
        lines["folder"] += f"; Aim's copy in {AIM_FOLDER}"
    changed = describe_changes(params)
    if changed:
        lines["changed"] = changed
    return lines


def describe_changes(params: Parameters) -> str:
    """The values that are not the defaults, each group with where it came from."""
    groups: dict[str, list[str]] = {}
    for name, value in params.changed().items():
        origin = params.origins[name]
        words = {specs()[name].flag: "", RESUMED: "as before"}.get(origin, origin)
        groups.setdefault(words, []).append(f"{name}={value}")
    ordered = sorted(groups.items(), key=lambda group: group[0] != "")  # the command line first
    return "; ".join(", ".join(values) + (f" ({words})" if words else "") for words, values in ordered)


def describe_end(
    run: RunDirectory,
    params: Parameters,
    progress: Progress,
    exported: dict[str, Any],
    shown_in: Collection[str],
    dist: SingleProcess,
) -> Block:
    """The block of lines that a run ends with: what was reached, where it lies, what to type next.

    `shown_in` names the trackers that have the run.
    """
    evaluation = progress.evaluation
    assert evaluation is not None and progress.best_val is not None  # the loop ends with one
    runs_dir = str(run.path.parent)
    copy = f"; also {params.train.output}" if params.train.output else ""
    lines: dict[str, str | ShellCommand] = {
        "reached": f"step {progress.step}: train loss {number(evaluation.train_loss)},"
        f" val loss {number(evaluation.val_loss)}, in {duration(progress.seconds)}",
        "best": f"step {progress.best_step}: val loss {loss_in_words(progress.best_val)}",
        "exported": f"{run.export_path} ({exported['weights']} weights, of step {exported['step']}){copy}",
    }
    if run.report_path.exists():
        lines["report"] = str(run.report_path)
    lines["sample"] = ShellCommand(f"python inference.py --run {name_of(run)}")
    if "tensorboard" in shown_in:
        lines["curves"] = ShellCommand(*tensorboard_instructions(runs_dir, params.tensorboard.port))
    if "aim" in shown_in:
        lines["compare"] = ShellCommand(*aim_instructions())
    lines["continue"] = ShellCommand(longer_command(run, params, progress, dist))
    return lines


def longer_command(run: RunDirectory, params: Parameters, progress: Progress, dist: SingleProcess) -> str:
    """What to type to train longer than a run that is done."""
    steps = params.train.max_iters
    longer = dataclasses.replace(params.train, max_iters=2 * steps)
    if progress.step < steps:  # it had lost its patience
        return f"{resume_command(run, dist)} --patience 0"
    moved = params.train.lr_schedule != "constant"
    if moved and any(learning_rate(params.train, s) != learning_rate(longer, s) for s in range(steps)):
        # The schedule is at its end, and a longer one would have begun otherwise: another run as this one.
        files = {"--config": run.record_path, "--init-from": run.export_path}
        named = " ".join(f"{flag} {as_word(path)}" for flag, path in files.items())
        return f"{launch_command(dist)} {named}"
    return f"{resume_command(run, dist)} --max-iters {longer.max_iters}"


def last_words(store: CheckpointStore, run: RunDirectory, dist: SingleProcess) -> bytes:
    """What a process says that leaves at once, without saving."""
    if store.newest_step is None:
        return b"\nleft at once: nothing had been saved\n"
    way_on = f"go on from step {store.newest_step} with: {resume_command(run, dist)}"
    return f"\nleft at once; {way_on}\n".encode(errors="replace")


def with_the_way_on(
    error: Alg1Error, store: CheckpointStore, run: RunDirectory, dist: SingleProcess
) -> Alg1Error:
    """The error, with what to do with the checkpoints that the run has."""
    if store.newest_step is None:
        return error
    way_on = f"then go on: {resume_command(run, dist)}"
    if error.exit_code == CANNOT_TRAIN:  # what helps there, a resumed run may not change
        way_on = f"its newest weights, for --init-from: {store.path(store.newest_step)}"
    hint = f"{error.hint}; {way_on}" if error.hint else way_on
    return Alg1Error(error.message, hint, error.exit_code)


def resume_command(run: RunDirectory, dist: SingleProcess) -> str:
    """What to type to continue a run."""
    return f"{launch_command(dist)} --resume {name_of(run)}"


def name_of(run: RunDirectory) -> str:
    """A run as a command line names it: by its id alone where that will be found."""
    try:
        where_runs_are = Path(ConfigLoader.runs_dir(None))
    except Alg1Error:  # a file of settings that was spoilt meanwhile
        return as_word(run.path)
    return run.run_id if run.path.parent == where_runs_are else as_word(run.path)


def as_word(path: Path) -> str:
    """A path as a shell and our own flags take it."""
    return shlex.quote(f"./{path}" if str(path).startswith("-") else str(path))
