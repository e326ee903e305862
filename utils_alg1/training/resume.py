"""Read what a run resumes or starts from: runs, exports, weights of other programs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from model import BigramLanguageModel
from parameters import ModelConfig, Parameters, coerce_all, specs
from utils import Tokenizer, show_characters
from utils_alg1.base.errors import Alg1Error
from utils_alg1.base.files import read_json_object, remove_temporary_files
from utils_alg1.base.problems import shown
from utils_alg1.base.settings import field_names
from utils_alg1.base.text import format_count, shell_join, shell_quote
from utils_alg1.network.weights import read_weights
from utils_alg1.run_directory import (
    CHECKPOINT_NAME,
    RunDirectory,
    RunFolder,
    checkpoint_path,
    find_interrupted,
    find_run,
    lock_run,
    refuse_run,
    weights_of,
)
from utils_alg1.training.checkpoint import Checkpoint, newest_checkpoint, read_checkpoint
from utils_alg1.training.distributed import Distributed, launch_command
from utils_alg1.training.progress import Progress
from utils_alg1.training.schedule import same_learning_rates
from utils_alg1.utils_output import Console
from utils_alg1.utils_run_manager import RunDirectoryCreator

BEGINS_ANEW = "optimizer, schedule and steps start again"  # in a run that starts from weights


def reopen_run(runs_dir: str, name: str, console: Console) -> tuple[RunDirectory, Checkpoint]:
    """Lock the run that --resume names, and read its newest valid checkpoint.

    `latest` is the newest run that was interrupted (see `find_interrupted`). `name` may also be the path of a
    checkpoint file, from which the run then continues.

    Raises:
        Alg1Error: no such run, in use, or no checkpoint that can be read.
    """
    file = Path(name)
    from_file = bool(CHECKPOINT_NAME.fullmatch(file.name)) and file.is_file()
    if from_file:
        folders = file.absolute().parents
        if len(folders) < 3 or file.absolute().parent != RunFolder(folders[2]).checkpoint_dir:
            raise Alg1Error(
                f"{file}: this checkpoint is not in a run directory",
                f"to start a new run from its weights: --init-from {shell_quote(name)}",
            )
        path = folders[2]
    else:
        path = find_interrupted(runs_dir, console.say) if name == "latest" else find_run(runs_dir, name)
    run = lock_run(path)
    try:
        # Some may have been deleted by hand.
        RunDirectoryCreator(run.path.parent).create_subdirectories(run.path)
        for folder in (run.checkpoint_dir, run.export_path.parent, run.meta_dir, run.eval_dir):
            remove_temporary_files(folder)  # left by a killed process
        checkpoint = read_checkpoint(file) if from_file else newest_checkpoint(run.path, console.warn)
        forget_missing_best(checkpoint)
        return run, checkpoint
    except BaseException:
        run.lock.release()
        raise


def forget_missing_best(checkpoint: Checkpoint) -> None:
    """If the best checkpoint is missing, it cannot be exported: search for the best anew."""
    old = checkpoint.progress
    if old.best_step is None or checkpoint_path(checkpoint.path.parent, old.best_step).exists():
        return
    progress = Progress(old.step, seconds=old.seconds)
    if old.evaluation is not None and old.evaluated:
        progress.add(old.evaluation)
    checkpoint.metadata["progress"] = dataclasses.asdict(progress)


def check_sizes(path: str, config: ModelConfig, sizes: Mapping[str, Any]) -> None:
    """Check that the model of --init-from has the sizes that were asked for.

    Args:
        path: of the model.
        sizes: the parameters that its weights depend on, by name.

    Raises:
        Alg1Error: naming what differs.
    """
    for name, value in sizes.items():
        asked = getattr(config, name)
        if asked != value:
            raise Alg1Error(f"{path}: its {name} is {value}, not {asked}", f"leave {name} out")


def initial_vocabulary(
    initial: BigramLanguageModel, path: str, text: Tokenizer, new_characters: str
) -> tuple[list[str], str]:
    """Return the vocabulary of a run that starts from a model, and a note on it, which may be empty.

    It is the model's, which may have more characters than the text, and the new ones where they are added.

    Args:
        path: of the model.
        text: the tokenizer of the characters of the text.
        new_characters: "add" those that the model lacks, or "refuse" them.

    Raises:
        Alg1Error: naming the characters that are refused.
    """
    if initial.vocabulary is None:  # weights of another program
        if initial.config.vocab_size != text.vocab_size:
            raise Alg1Error(
                f"{path}: it does not hold its vocabulary, and is for {initial.config.vocab_size} characters;"
                f" the text has {text.vocab_size}",
                "use the text that it was trained on",
            )
        note = f"{path}: it does not hold its vocabulary, and is taken to have the characters of the text"
        return text.vocabulary, note
    model, note = Tokenizer(initial.vocabulary), ""
    new = model.unseen("".join(text.vocabulary))
    if new and new_characters == "refuse":
        raise Alg1Error(
            f"{path}: characters of the text are not in the model's vocabulary: {show_characters(new)}",
            "--new-characters add gives them weights of their own; or leave them out of the text",
        )
    if new:
        note = (
            f"{path}: its vocabulary grows by {format_count(len(new), 'character')}: {show_characters(new)}"
        )
    elif text.vocab_size < model.vocab_size:
        note = f"{path}: its vocabulary of {model.vocab_size} is kept; the text has {text.vocab_size} of them"
    return sorted([*model.vocabulary, *new]), note


def check_resumable(
    checkpoint: Checkpoint, params: Parameters, corpus_sha256: str, dist: Distributed
) -> None:
    """Check that a run can continue with these parameters, these texts and these processes.

    Raises:
        Alg1Error: listing every changed parameter (old -> new) that affected the steps already
            taken or the run's name.
    """
    # What a run from before a parameter existed does not name is at its default.
    old = Parameters.from_values(coerce_all(checkpoint.metadata["parameters"])[0], {})
    old_train, train, step = old.train, params.train, checkpoint.progress.step
    before, now = (with_choices(values.flat(), checkpoint) for values in (old, params))
    given = {name: value for name, value in now.items() if value not in (before[name], None)}
    may_change = {name for name, spec in specs().items() if spec.may_change and name != "run_tag"}
    fixed = [name for name in specs() if before[name] != now[name] and name not in may_change]
    changed = [f"{name}: {shown(before[name])} -> {shown(now[name])}" for name in fixed]
    changed += micro_batches_changed(
        old_train.grad_accum_steps, checkpoint.metadata["world_size"], train.grad_accum_steps, dist.world_size
    )
    if step > train.max_iters:
        raise Alg1Error(
            f"the run is at step {step} already, past max_iters = {train.max_iters}",
            f"use --max-iters {step} or more",
        )
    if not changed and not same_learning_rates(old_train, train, step):
        changed.append(
            f"max_iters: {old_train.max_iters} -> {train.max_iters}"
            f" (it moves the {train.lr_schedule} schedule of the steps already taken)"
        )
    if changed:
        raise Alg1Error(
            f"the run cannot be resumed with other values: {'; '.join(changed)}",
            f"leave {'it' if len(changed) == 1 else 'them'} out, or {new_run(checkpoint, given, dist)}",
        )
    text, _, held_out = corpus_sha256.partition("+")
    old_text, _, old_held_out = checkpoint.metadata["corpus_sha256"].partition("+")
    if text != old_text:
        raise Alg1Error(
            f"{params.data.data_path}: this is not the text that the run was trained on",
            f"name that text with --data{recorded_text(checkpoint)}, or {new_run(checkpoint, given, dist)}",
        )
    if held_out != old_held_out:
        raise Alg1Error(
            f"val_data = {shown(params.data.val_data)}:"
            f" the run has {'another' if old_held_out else 'no'} held-out text",
            "name that text with --val-data" if old_held_out else "leave val_data out",
        )


def with_choices(values: Mapping[str, Any], checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the values of the parameters, with what the run has chosen where one leaves it the choice.

    So `--dtype bfloat16` is no change of a run whose `auto` came to that.
    """
    metadata = checkpoint.metadata
    choices = {
        "dtype": ("auto", metadata["arithmetic"].get("dtype", "auto")),
        "vocab_size": (None, len(metadata["vocabulary"])),
    }
    open_ = {name: choice for name, (free, choice) in choices.items() if values[name] == free}
    return {**values, **open_}


def recorded_text(checkpoint: Checkpoint) -> str:
    """Return where the text of a run was, for a hint; nothing if that is not known."""
    with contextlib.suppress(Alg1Error, KeyError, TypeError):
        corpus = read_json_object(RunFolder(checkpoint.path.parents[2]).record_path)["corpus"]
        return f" (it was {corpus['path']})"
    return ""


def new_run(checkpoint: Checkpoint, given: Mapping[str, Any], dist: Distributed) -> str:
    """Return a hint with the command of a new run with other values, from the weights if they still fit."""
    run = RunFolder(checkpoint.path.parents[2])
    if any(map(shapes_weights, given)):
        return f"train another model: {new_run_command(run, dist, given, with_weights=False)}"
    return f"start a new run from its weights ({BEGINS_ANEW}): {new_run_command(run, dist, given)}"


def new_run_command(
    run: RunFolder, dist: Distributed, given: Mapping[str, Any] | None = None, with_weights: bool = True
) -> str:
    """Return the command of a new run with the parameters of a run but for those given, and its weights."""
    words = ["--config", str(run.record_path)]
    if with_weights:
        words += ["--init-from", str(weights_of(run.path) or run.export_path)]
    words += [specs()[name].word(value) for name, value in (given or {}).items()]
    return f"{launch_command(dist)} {shell_join(words)}"


def shapes_weights(name: str) -> bool:
    """Return whether a parameter is a size or an option of the model that its weights are made for."""
    return name in field_names(ModelConfig) and name not in ("dropout", "vocab_size", "zero_init")


def micro_batches_changed(old_steps: int, old_world_size: int, steps: int, world_size: int) -> list[str]:
    """Describe a change of the number of micro-batches per step, over all processes; [] without a change."""
    before = old_steps * old_world_size
    if before == steps * world_size:
        return []
    if old_world_size == world_size:
        return [f"grad_accum_steps: {old_steps} -> {steps}"]
    fix = f" (--grad-accum-steps {before // world_size} keeps them)" if before % world_size == 0 else ""
    change = f"{old_steps} x {old_world_size} processes -> {steps} x {world_size}"
    return [f"micro-batches of a step: {change}{fix}"]


def load_model_file(path: Path, say: Callable[[str], None]) -> BigramLanguageModel:
    """Load a model from an export, a checkpoint, or any file in the lecture's layout; `say` shows a note.

    Raises:
        Alg1Error: the file is none of these, or damaged.
    """
    refuse_run(path)
    weights = read_weights(path)
    if weights.note:
        say(weights.note)
    return BigramLanguageModel().load(weights)
