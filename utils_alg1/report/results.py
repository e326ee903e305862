"""The results of a run in eval/, and its exported weights."""

from __future__ import annotations

import datetime
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parameters import Parameters
from utils_alg1.base.errors import Alg1Error
from utils_alg1.base.files import check_target, write_atomically, write_json
from utils_alg1.base.text import bits_per_character, perplexity
from utils_alg1.network.tensor_file import read_metadata
from utils_alg1.network.weights import FORMAT
from utils_alg1.report.baselines import count_baselines
from utils_alg1.run_directory import RunDirectory, RunFolder
from utils_alg1.tracking.observer import draw_texts
from utils_alg1.training.checkpoint import read_checkpoint
from utils_alg1.utils_output import Console

if TYPE_CHECKING:
    from utils_alg1.training.checkpoint import CheckpointStore
    from utils_alg1.training.evaluation import Measurement
    from utils_alg1.training.trainer import Trainer

N_SAMPLES = 3
SAMPLE_LENGTH = 400  # characters


def write_results(
    run: RunDirectory, trainer: Trainer, exported: dict[str, Any], measured: Measurement
) -> list[str]:
    """Write eval/final.json, with losses in nats per character, and eval/samples.txt; return the samples.

    `export_val_loss` is the mean over `export_val_characters` of the val part, which has `val_characters` in
    whole sequences. So are those of a uniform, a unigram and a bigram guess (see baselines.py), by the counts
    of `counted_characters` of the train part, which has `train_characters`. The other losses are those of
    evaluations. `seconds_in_loop` includes the training before each resume; `wall_seconds` is the lifetime of
    this process without its imports.
    """
    progress, evaluation = trainer.progress, trainer.progress.evaluation
    assert evaluation is not None and progress.best_val is not None  # training ends with an evaluation
    last, best = evaluation.val_loss, progress.best_val
    tokens = trainer.tokens_per_step * progress.step
    vocabulary = trainer.model.vocabulary
    assert vocabulary is not None
    counted = count_baselines(*trainer.data, len(vocabulary), trainer.block_size)
    final = {
        "run_id": run.run_id,
        "finished_at": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "n_parameters": trainer.model.config.n_parameters,
        "steps": progress.step,
        "train_loss": evaluation.train_loss,
        "val_loss": last,
        "perplexity": perplexity(last),
        "bits_per_character": bits_per_character(last),
        "best_val_loss": best,
        "best_step": progress.best_step,
        "best_perplexity": perplexity(best),
        "best_bits_per_character": bits_per_character(best),
        "export_val_loss": measured.loss,
        "export_perplexity": perplexity(measured.loss),
        "export_bits_per_character": bits_per_character(measured.loss),
        "export_val_characters": measured.characters,
        "val_characters": measured.available,
        "uniform_loss": counted.uniform,
        "unigram_loss": counted.unigram,
        "bigram_loss": counted.bigram,
        "counted_characters": counted.counted,
        "train_characters": len(trainer.data[0]) - 1,
        "tokens": tokens,
        "seconds_in_loop": round(progress.seconds, 3),
        "wall_seconds": round(time.monotonic() - run.opened, 3),
        "tokens_per_second_overall": round(tokens / progress.seconds, 1) if progress.seconds else None,
        "export": exported,
    }
    write_json(run.final_path, final)
    samples = draw_texts(trainer.model, trainer.config.seed, N_SAMPLES, SAMPLE_LENGTH)
    text = "\n\n".join(f"--- sample {i + 1}\n{sample}" for i, sample in enumerate(samples)) + "\n"
    write_atomically(run.eval_dir / "samples.txt", text.encode("utf-8", "surrogatepass"))
    return samples


def check_output(output: str | None) -> None:
    """Check before training that --output can be written and that this overwrites nothing but an export.

    Raises:
        Alg1Error: it cannot (exit code 4 if the file system refuses), or it is in a run directory.
    """
    if output is None:
        return
    if any(RunFolder(folder).record_path.is_file() for folder in Path(output).absolute().resolve().parents):
        hint = "name another file: an export would take its place"
        raise Alg1Error(f"--output {output}: this is in the directory of a run", hint)

    def is_export(path: Path) -> bool:
        return read_metadata(path).get("format") == FORMAT  # which even a damaged export has

    check_target("--output", output, "an export", is_export)


def export_weights(
    trainer: Trainer, store: CheckpointStore, run: RunDirectory, params: Parameters, console: Console
) -> dict[str, Any]:
    """Write the best or the last weights to artifacts/export/, where inference.py finds them.

    Afterwards the model of the trainer holds the exported weights. Return which they are: their kind ("best"
    or "last") and step.
    """
    model, progress, evaluation = trainer.model, trainer.progress, trainer.progress.evaluation
    assert evaluation is not None  # training ends with an evaluation
    exported: dict[str, Any] = {"weights": "last", "step": progress.step}
    val_loss: float | None = evaluation.val_loss
    if params.train.export == "best":
        try:
            if progress.best_step is not None and progress.best_step != progress.step:
                read_checkpoint(store.path(progress.best_step)).load_model(model)
            exported, val_loss = {"weights": "best", "step": progress.best_step}, progress.best_val
        except Alg1Error as error:
            console.warn(f"{error.message}; exporting the last weights instead of the best")
    # The val loss in the file is that of the evaluation at this step: what is measured later is not in it.
    model.provenance = {"run_id": run.run_id, **exported, "val_loss": val_loss}
    model.save_safetensors(run.export_path)
    write_json(run.export_path.with_name("config.json"), model.config.stored())
    return exported


def copy_export(run: RunDirectory, output: str | None) -> None:
    """Copy the exported weights to --output. If that fails, the run itself is complete."""
    if output is None:
        return
    try:
        write_atomically(output, run.export_path.read_bytes())
    except Alg1Error as error:
        raise Alg1Error(error.message, f"the same file is {run.export_path}", error.exit_code) from error
