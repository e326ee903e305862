"""What a run leaves for people: the records in meta/ and the results in eval/."""

from __future__ import annotations

import dataclasses
import datetime
import math
import shlex
import time
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errors import CANNOT_TRAIN, Alg1Error
from files import write_atomically, write_json
from model import BigramLanguageModel
from parameters import Parameters, specs
from utils_aim.instructions import FOLDER as AIM_FOLDER
from utils_aim.instructions import instructions as aim_instructions
from utils_alg1.utils_config_loader import RESUMED
from utils_alg1.utils_observations import draw_texts
from utils_alg1.utils_output import CommandLine, Console
from utils_alg1.utils_processes import Processes, launch_command
from utils_alg1.utils_run_manager import MetadataCapture, Run, copy_files
from utils_alg1.utils_text import counted, duration, loss_in_words, number, perplexity
from utils_alg1.utils_training import learning_rate
from utils_tensorboard.instructions import instructions as tensorboard_instructions

if TYPE_CHECKING:
    from data import Corpus
    from utils_alg1.utils_checkpoint import CheckpointStore
    from utils_alg1.utils_runtime import Runtime
    from utils_alg1.utils_training import Progress, Trainer

SAMPLES = 3
SAMPLE_LENGTH = 400  # characters
NOTES = "# {run_id}\n\nWhat I tried, and what I saw:\n\n"


def write_records(
    run: Run, params: Parameters, config_files: dict[Path, bytes], corpus: Corpus, runtime: Runtime
) -> dict[str, Any]:
    """Fill meta/, and return the origin of the run for the trackers.

    Raises:
        Alg1Error: the file system refused (exit code 4).
    """
    git = MetadataCapture.capture_git_info(run.meta_dir / "git.txt")
    environment = MetadataCapture.capture_env_info(run.meta_dir / "env.txt")
    copy_files(config_files, run.meta_dir / "configs")
    notes = run.meta_dir / "notes.md"
    if not notes.exists():
        write_atomically(notes, NOTES.format(run_id=run.run_id).encode())
    text = {
        "path": str(corpus.path),
        "sha256": corpus.sha256,
        "characters": len(corpus.tokens),
        "vocab_size": corpus.tokenizer.vocab_size,
    }
    machine = {
        "device": str(runtime.device),
        "dtype": str(runtime.dtype).removeprefix("torch."),
        "threads": runtime.threads,
    }
    write_json(
        run.meta_dir / "full_config.json",
        {
            "parameters": params.flat(),
            "origins": params.origins,
            "corpus": text,
            "runtime": machine,
        },
    )
    return {"git": git, "environment": environment, "corpus": text, "runtime": machine}


def write_results(
    run: Run, progress: Progress, trainer: Trainer, exported: dict[str, Any], samples: list[str]
) -> None:
    """Write eval/final.json and eval/samples.txt. Losses are in nats per character.

    `seconds_in_loop` counts every part of a resumed run, `wall_seconds` the whole process but its imports,
    and only the last one.

    Raises:
        Alg1Error: the file system refused (exit code 4).
    """
    evaluation = progress.evaluation
    assert evaluation is not None and progress.best_val is not None  # the loop ends with one
    tokens = trainer.tokens_per_step * progress.step
    final = {
        "run_id": run.run_id,
        "finished_at": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "n_parameters": sum(parameter.numel() for parameter in trainer.parameters),
        "steps": progress.step,
        "train_loss": evaluation.train_loss,
        "val_loss": evaluation.val_loss,
        "perplexity": perplexity(evaluation.val_loss),
        "bits_per_character": evaluation.val_loss / math.log(2),
        "best_val_loss": progress.best_val,
        "best_step": progress.best_step,
        "best_perplexity": perplexity(progress.best_val),
        "best_bits_per_character": progress.best_val / math.log(2),
        "tokens": tokens,
        "seconds_in_loop": round(progress.seconds, 3),
        "wall_seconds": round(time.monotonic() - run.opened, 3),
        "tokens_per_second_overall": round(tokens / progress.seconds, 1) if progress.seconds else None,
        "export": exported,
    }
    write_json(run.eval_dir / "final.json", final)
    text = "\n\n".join(f"--- sample {i + 1}\n{sample}" for i, sample in enumerate(samples)) + "\n"
    write_atomically(run.eval_dir / "samples.txt", text.encode("utf-8", "surrogatepass"))


def export_weights(
    trainer: Trainer,
    progress: Progress,
    store: CheckpointStore,
    run: Run,
    params: Parameters,
    console: Console,
) -> dict[str, Any]:
    """Write the best or the last weights where inference.py finds them; returns what they are."""
    model, evaluation = trainer.model, progress.evaluation
    assert evaluation is not None  # the loop ends with one
    exported: dict[str, Any] = {"weights": "last", "step": progress.step, "val_loss": evaluation.val_loss}
    if params.train.export == "best":
        try:
            if progress.best_step != progress.step:
                store.load_best(progress).load_model(model)
            best = {"weights": "best", "step": progress.best_step, "val_loss": progress.best_val}
            exported = best
        except Alg1Error as error:
            console.warn(f"{error.message}; exporting the last weights instead of the best")
    model.provenance = {"run_id": run.run_id, **exported}
    model.save_safetensors(run.export_path)
    write_json(run.export_path.with_name("config.json"), model.config.stored())
    if params.train.output:
        model.save_safetensors(params.train.output)
    return exported


def draw_samples(model: BigramLanguageModel, seed: int) -> list[str]:
    """A few continuations of the vocabulary's default prompt."""
    return draw_texts(model, seed, SAMPLES, SAMPLE_LENGTH)


def describe_end(
    run: Run,
    params: Parameters,
    progress: Progress,
    exported: dict[str, Any],
    shown_in: Collection[str],
    processes: Processes,
) -> dict[str, str]:
    """The block of lines that a run ends with: what was reached, where it lies, what to type next.

    `shown_in` names the trackers that have the run.
    """
    evaluation = progress.evaluation
    assert evaluation is not None and progress.best_val is not None  # the loop ends with one
    runs_dir = str(run.path.parent)
    lines = {
        "reached": f"step {progress.step}: train loss {number(evaluation.train_loss)},"
        f" val loss {number(evaluation.val_loss)}, in {duration(progress.seconds)}",
        "best": f"step {progress.best_step}: val loss {loss_in_words(progress.best_val)}",
        "exported": f"{run.export_path} ({exported['weights']} weights, of step {exported['step']})",
    }
    if (run.eval_dir / "report.html").exists():
        lines["report"] = str(run.eval_dir / "report.html")
    lines["sample"] = CommandLine(f"python inference.py --run {name_of(run)}")
    if "tensorboard" in shown_in:
        lines["curves"] = CommandLine(tensorboard_instructions(runs_dir, params.tensorboard.port))
    if "aim" in shown_in:
        lines["compare"] = CommandLine(aim_instructions())
    lines["train on"] = CommandLine(longer_command(run, params, progress, processes))
    return lines


def longer_command(run: Run, params: Parameters, progress: Progress, processes: Processes) -> str:
    """What to type to train longer than a run that is done."""
    steps, longer = (
        params.train.max_iters,
        dataclasses.replace(params.train, max_iters=2 * params.train.max_iters),
    )
    if progress.step < steps:  # it had lost its patience
        return f"{resume_command(run, processes)} --patience 0"
    moved = params.train.lr_schedule != "constant"
    if moved and any(learning_rate(params.train, s) != learning_rate(longer, s) for s in range(steps)):
        # The schedule is at its end, and a longer one would have begun otherwise: a run of its own.
        return f"{launch_command(processes)} --init-from {shlex.quote(str(run.export_path))}"
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
    return Alg1Error(error.message, f"{error.hint or 'mend that'}; {way_on}", error.exit_code)


def resume_command(run: Run, processes: Processes) -> str:
    """What to type to continue a run."""
    return f"{launch_command(processes)} --resume {name_of(run)}"


def name_of(run: Run) -> str:
    """A run as a command line names it."""
    in_default_folder = run.path.parent == Path(specs()["runs_dir"].default)
    return run.run_id if in_default_folder else shlex.quote(str(run.path))


def describe_start(
    run: Run, params: Parameters, corpus: Corpus, trainer: Trainer, step: int
) -> dict[str, str]:
    """The block of lines that a run begins with."""
    model, train, runtime = params.model, params.train, trainer.runtime
    n_parameters = sum(parameter.numel() for parameter in trainer.parameters)
    dtype = str(runtime.dtype).removeprefix("torch.")
    sequences = trainer.tokens_per_step // model.block_size
    steps = f"{step} to {train.max_iters}," if step else f"{train.max_iters}"
    lines = {
        "run": run.run_id,
        "device": f"{runtime.device}, {dtype}, {counted(runtime.threads, 'thread')}",
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
