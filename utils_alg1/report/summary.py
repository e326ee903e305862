"""The lines that a run prints at its start and at its end, and the commands that continue it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parameters import Parameters, specs
from utils_aim.instructions import instructions as aim_instructions
from utils_alg1.base.errors import CANNOT_TRAIN, DISK_FAILED, Alg1Error
from utils_alg1.base.scripts import command
from utils_alg1.base.text import format_count, format_duration, format_loss, format_number, shell_quote
from utils_alg1.run_directory import RunDirectory, checkpoint_step
from utils_alg1.tracking.aim_record import REPOSITORY, find_repo
from utils_alg1.training.distributed import Distributed, launch_command
from utils_alg1.training.resume import BEGINS_ANEW, new_run_command
from utils_alg1.training.schedule import same_learning_rates
from utils_alg1.utils_config_loader import RESUMED
from utils_alg1.utils_output import LabelledLines, ShellCommand
from utils_tensorboard.instructions import instructions as tensorboard_instructions

if TYPE_CHECKING:
    from utils_alg1.data.corpus import Corpus
    from utils_alg1.training.evaluation import Measurement
    from utils_alg1.training.progress import Progress
    from utils_alg1.training.trainer import Trainer

# In nats, a perplexity 5 % above the best. The val loss of the reference model, once it has levelled off,
# scatters by 0.03 from evaluation to evaluation.
OVERFITTING_MARGIN = 0.05


def _aim_repo(run: RunDirectory) -> str:
    """Return the folder of the run's Aim repository, if it is not the current one."""
    repo = find_repo(run)
    return "" if repo == Path.cwd() else str(repo)


def describe_start(run: RunDirectory, params: Parameters, corpus: Corpus, trainer: Trainer) -> LabelledLines:
    """Return the lines printed at the start of a run: device, model, text, steps, folder and parameters."""
    model, train, runtime = params.model, params.train, trainer.runtime
    device = f"{runtime.device}, {runtime.arithmetic.dtype}, {format_count(runtime.threads, 'thread')}"
    if runtime.arithmetic.compiled:
        device += ", compiled"
    if runtime.dist.world_size > 1:
        device += f", in each of {runtime.dist.world_size} processes"
    folder = f"{run.path}: meta/, logs/, artifacts/, eval/"
    if train.output:
        folder += f"; the export also to {train.output}"
    if train.aim:
        folder += f"; Aim's copy in {Path(_aim_repo(run), REPOSITORY)}"
    lines = {
        "run": run.run_id,
        "device": device,
        "model": f"{format_count(trainer.model.config.n_parameters, 'parameter')}: n_embd {model.n_embd},"
        f" n_head {model.n_head}, n_layer {model.n_layer}, block_size {model.block_size}",
        "text": f"{corpus.text.describe()}, vocabulary of {corpus.tokenizer.vocab_size}",
        "val": f"{corpus.held_out.describe()}; all of the text is for training" if corpus.held_out else "",
        "steps": describe_steps(params, trainer),
        "folder": folder,
    }
    lines["changed"] = describe_changes(params)
    return {label: line for label, line in lines.items() if line}


def describe_steps(params: Parameters, trainer: Trainer) -> str:
    """Return the steps that are ahead and the size of each, or why there are none: all taken, or --finish."""
    step, max_iters, length = trainer.step, params.train.max_iters, params.model.block_size
    if 0 < step >= max_iters:
        return f"all {max_iters} are taken; the results are written again"
    if trainer.ends_here:
        return f"{step} of {max_iters}; --finish takes no more"
    size = f"{trainer.tokens_per_step // length} x {format_count(length, 'character')}"
    return f"{step} to {max_iters}, of {size}" if step else f"{max_iters} of {size}"


def describe_changes(params: Parameters) -> str:
    """Return the parameters that differ from their defaults, grouped by where the value came from."""
    groups: dict[str, list[str]] = {"": []}  # the command line first
    for name, value in params.changed().items():
        origin = params.origins[name]
        shown = "as before" if origin == RESUMED else origin
        source = "" if origin == specs()[name].flag else f" ({shown})"
        groups.setdefault(source, []).append(f"{name}={value}")
    return "; ".join(", ".join(values) + source for source, values in groups.items() if values)


def describe_end(
    run: RunDirectory,
    params: Parameters,
    progress: Progress,
    exported: dict[str, Any],
    measured: Measurement,
) -> LabelledLines:
    """Return the lines printed at the end of a run: its results and its files.

    `exported` is what `export_weights` returned, `measured` the loss of these weights.
    """
    evaluation = progress.evaluation
    assert evaluation is not None and progress.best_val is not None  # training ends with an evaluation
    copy = f"; also {params.train.output}" if params.train.output else ""
    lines = {
        "reached": f"step {progress.step}: train loss {format_number(evaluation.train_loss)},"
        f" val loss {format_number(evaluation.val_loss)}, in {format_duration(progress.seconds)}",
        "best": f"step {progress.best_step}: val loss {format_number(progress.best_val)}",
        "exported": f"{run.export_path} ({exported['weights']} weights, of step {exported['step']}){copy}",
        "measured": f"val loss {format_loss(measured.loss)} of the export, over {describe_part(measured)}",
    }
    if overfits(progress):
        lines["overfit"] = describe_overfitting(params, progress, exported)
    if run.report_path.exists():
        lines["report"] = str(run.report_path)
    return lines


def overfits(progress: Progress) -> bool:
    """Return whether the val loss has risen by more than it scatters, and the train loss has fallen."""
    last, best = progress.evaluation, progress.best_val
    assert last is not None and best is not None
    return last.val_loss - best >= OVERFITTING_MARGIN and last.train_loss <= best


def describe_overfitting(params: Parameters, progress: Progress, exported: dict[str, Any]) -> str:
    """Return how far the val loss has risen, which weights are exported, and what to try."""
    last, best = progress.evaluation, progress.best_val
    assert last is not None and best is not None
    rise = format_number(last.val_loss - best)
    if exported["weights"] == "best":
        weights = f"the export has the weights of step {exported['step']}"
    else:
        weights = "the export has the last weights; --export best keeps the better ones"
    dropout = f"more --dropout than {params.model.dropout:g}" if params.model.dropout else "--dropout 0.2"
    ways = [dropout, *([] if params.train.patience else ["--patience 5"]), "fewer steps", "a longer text"]
    return (
        f"val loss has risen by {rise} since step {progress.best_step}: {weights}."
        f" In a new run, try {', '.join(ways[:-1])} or {ways[-1]}"
    )


def next_commands(
    run: RunDirectory,
    params: Parameters,
    progress: Progress,
    trackers: Collection[str],
    dist: Distributed,
) -> LabelledLines:
    """Return the lines printed last: what to type next. `trackers` are those that recorded the run."""
    lines: dict[str, str | ShellCommand] = {
        "sample": ShellCommand(f"{command('inference.py')} --run {shell_quote(str(run.path))}")
    }
    if "tensorboard" in trackers:
        curves = tensorboard_instructions(str(run.path.parent), params.tensorboard.port)
        lines["curves"] = ShellCommand(*curves)
    if "aim" in trackers:
        lines["aim"] = ShellCommand(*aim_instructions(_aim_repo(run)))
    if not overfits(progress):  # or further steps would make it worse
        lines |= longer_training(run, params, progress, dist)
    return lines


def describe_part(measured: Measurement) -> str:
    """Return how much of the val part a loss is the mean over."""
    if measured.characters == measured.available:
        return f"all of the val part: {format_count(measured.characters, 'character')}"
    return f"{measured.characters:,} of the val part's {measured.available:,} characters, spread evenly"


def untrained_warning(exported: dict[str, Any], progress: Progress, params: Parameters) -> str | None:
    """Return the warning for an export of the weights that a run began with; None for any other."""
    if exported["step"] > 0:
        return None
    if progress.step == 0:
        return "no step was taken: the exported weights are those that the run began with"
    return (
        "no evaluation was better than that of step 0: the exported weights are those from before the first"
        f" step, not trained by this run; try another --learning-rate than {params.train.learning_rate:g}, or"
        " more --max-iters"
    )


def changed_evaluations_warning(progress: Progress) -> str:
    """Return the warning for a resumed run whose evaluations read other sequences than before."""
    return (
        "the evaluations from here on read other sequences than those before: their losses do not compare"
        f" with the best so far, val loss {format_number(progress.best_val)} at step {progress.best_step}"
    )


def longer_training(
    run: RunDirectory, params: Parameters, progress: Progress, dist: Distributed
) -> dict[str, str | ShellCommand]:
    """Return the lines with the command that trains a finished run for longer."""
    steps = params.train.max_iters
    longer = dataclasses.replace(params.train, max_iters=2 * steps)
    if progress.step < steps and not progress.out_of_patience(params.train.patience):  # --finish ended it
        return {"continue": ShellCommand(resume_command(run, dist))}
    if progress.step < steps:
        return {"continue": ShellCommand(f"{resume_command(run, dist)} --patience 0")}
    if same_learning_rates(params.train, longer, steps):
        return {"continue": ShellCommand(f"{resume_command(run, dist)} --max-iters {longer.max_iters}")}
    # A longer schedule has other learning rates from the start, so it needs a new run.
    return {
        "longer": f"only as a new run from the exported weights ({BEGINS_ANEW}):",
        "continue": ShellCommand(new_run_command(run, dist, {"max_iters": steps})),
    }


def resume_notice(newest_step: int | None, run: RunDirectory, dist: Distributed) -> str:
    """Return what is printed when a second signal ends the process; without a checkpoint, step is None."""
    if newest_step is None:
        return "left at once: nothing had been saved"
    return f"left at once; continue from step {newest_step} with: {resume_command(run, dist)}"


def add_resume_hint(
    error: Alg1Error, newest_checkpoint: Path | None, run: RunDirectory, dist: Distributed
) -> Alg1Error:
    """Return an error that ended the training, with a hint on how to use the newest checkpoint if any."""
    if newest_checkpoint is None:
        return error
    hint = f"then continue: {resume_command(run, dist)}"
    if error.exit_code == CANNOT_TRAIN:  # its fix is a parameter value that a resumed run would refuse
        hint = f"its newest weights, for --init-from: {newest_checkpoint}"
        if checkpoint_step(newest_checkpoint):
            hint += f"; to export its best: {resume_command(run, dist)} --finish"
    hint = f"{error.hint}; {hint}" if error.hint else hint
    return Alg1Error(error.message, hint, error.exit_code)


def gone(run: RunDirectory, dist: Distributed) -> Alg1Error:
    """Return the error of a run whose directory is no longer there."""
    moved = f"if it was moved: {launch_command(dist)} --resume and its new path"
    hint = f"{moved}; if it was deleted, start a new run"
    return Alg1Error(f"{run.path}: this run was moved or deleted while it trained", hint, DISK_FAILED)


def resume_command(run: RunDirectory, dist: Distributed) -> str:
    """Return the command that resumes a run."""
    return f"{launch_command(dist)} --resume {shell_quote(str(run.path))}"
