"""What a run says of itself on the console, at its start and at its end."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from parameters import Parameters, specs
from utils_aim.instructions import FOLDER as AIM_FOLDER
from utils_aim.instructions import instructions as aim_instructions
from utils_alg1.utils_config_loader import RESUMED
from utils_alg1.utils_next_commands import longer_command, name_of
from utils_alg1.utils_output import Block, ShellCommand
from utils_alg1.utils_processes import Processes
from utils_alg1.utils_run_manager import Run
from utils_alg1.utils_text import counted, duration, loss_in_words, number
from utils_tensorboard.instructions import instructions as tensorboard_instructions

if TYPE_CHECKING:
    from data import Corpus
    from utils_alg1.utils_training import Progress, Trainer


def describe_start(run: Run, params: Parameters, corpus: Corpus, trainer: Trainer, step: int) -> Block:
    """The block of lines that a run begins with."""
    model, train, runtime = params.model, params.train, trainer.runtime
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
    if runtime.processes.world_size > 1:
        lines["device"] += f", in each of {runtime.processes.world_size} processes"
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
    run: Run,
    params: Parameters,
    progress: Progress,
    exported: dict[str, Any],
    shown_in: Collection[str],
    processes: Processes,
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
    lines["continue"] = ShellCommand(longer_command(run, params, progress, processes))
    return lines
