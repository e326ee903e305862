"""What a run leaves for people: the records in meta/ and the results in eval/."""

from __future__ import annotations

import dataclasses
import datetime
import io
import math
import shlex
import time
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from errors import CANNOT_TRAIN, Alg1Error, first_line
from files import write_atomically, write_json
from model import BigramLanguageModel
from observations import Image
from parameters import Parameters, specs
from utils import Tokenizer
from utils_aim.instructions import FOLDER as AIM_FOLDER
from utils_aim.instructions import instructions as aim_instructions
from utils_alg1.utils_charts import Point, drawable
from utils_alg1.utils_config_loader import RESUMED
from utils_alg1.utils_metrics import read_metrics
from utils_alg1.utils_observations import attention_pictures, draw_texts
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
ATTENTION_LENGTH = 64  # characters that the attention picture is about; of more each would be a pixel
MOST_SHOWN = 12  # layers in it, and heads; of more, so many evenly spaced ones
TILE, GAP, MARGIN = 160, 16, 40  # pixels: a side of a head's square at most, and what is around it
LETTER = 8  # pixels that a letter of its title takes, nearly always
GROUND, INK = "#111318", "#c9ccd3"  # of the attention picture: readable on a light page and on a dark one
PICTURE_DPI = 100
NOTES = "# {run_id}\n\nWhat I tried, and what I saw:\n\n"


def write_records(
    run: Run, params: Parameters, config_files: list[Path], corpus: Corpus, runtime: Runtime
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


def draw_loss_curve(metrics_path: Path, picture: Path, title: str) -> None:
    """Draw the losses of a metrics file as a PNG: every step, and the evaluations.

    Raises:
        ImportError: matplotlib is not installed.
        Alg1Error: there is no evaluation in the file, or the file system refused (exit code 4).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves: dict[str, dict[str, Any]] = {
        "loss/train_step": {"label": "train, each step", "color": "0.8", "linewidth": 0.8},
        "loss/train": {"label": "train", "color": "tab:blue"},
        "loss/val": {"label": "val", "color": "tab:orange"},
    }
    points: dict[str, list[Point]] = {key: [] for key in curves}
    for row in read_metrics(metrics_path):
        for key in points.keys() & row.keys():
            points[key].append((row["step"], drawable(row[key])))
    if not points["loss/val"]:
        raise Alg1Error(f"{metrics_path}: no evaluation in it")
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, style in curves.items():
        alone = len(points[key]) == 1  # a line of one point would not be seen
        steps, losses = [x for x, _ in points[key]], [y for _, y in points[key]]
        axes.plot(steps, losses, marker="o" if alone else "", **style)
    axes.set_title(title, loc="left", fontsize=10, parse_math=False)  # the end of a wide tag may be cut off
    axes.set(xlabel="step", ylabel="loss (nats per character)")
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a tag may have letters that the font lacks
        figure.savefig(buffer, format="png")
    write_atomically(picture, buffer.getvalue())


def try_loss_curve(run: Run, console: Console) -> None:
    """Draw eval/loss.png; a picture that cannot be drawn costs one line."""
    picture = run.eval_dir / "loss.png"
    try:
        picture.unlink(missing_ok=True)  # one from before a resume shows other losses
        draw_loss_curve(run.metrics_path, picture, run.run_id)
    except Exception as error:  # matplotlib fails in many ways, and the run is done
        console.warn(f"no loss curve was drawn: {first_line(error)}")


def draw_attention(pictures: list[Image], title: str) -> bytes:
    """The attention weights of all layers and heads as one PNG: a row for each layer, a column for each head.

    In each square a row is a character that attends, and a column one that it attends to. As in the
    trackers' pictures the brightness is the root of the weight.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = evenly_spaced(1 + max(int(picture.context["layer"]) for picture in pictures))
    heads = evenly_spaced(1 + max(int(picture.context["head"]) for picture in pictures))
    n_characters = len(pictures[0].weights)
    side = n_characters * max(1, TILE // n_characters)
    size = MARGIN + len(heads) * (side + GAP), 2 * MARGIN + len(layers) * (side + GAP)
    figure = Figure(figsize=(size[0] / PICTURE_DPI, size[1] / PICTURE_DPI), dpi=PICTURE_DPI, facecolor=GROUND)
    FigureCanvasAgg(figure)

    def write(x: float, y: float, text: str, **style: Any) -> None:
        """`x` and `y` in pixels from the top left corner."""
        place = x / size[0], 1 - y / size[1]
        figure.text(*place, text, color=INK, fontsize=9, va="center", parse_math=False, **style)

    room = (size[0] - 2 * GAP) // LETTER
    write(GAP, MARGIN / 2, title if len(title) <= room else f"{title[: room - 1]}…")
    for picture in pictures:
        layer, head = int(picture.context["layer"]), int(picture.context["head"])
        if layer in layers and head in heads:
            colours = colormaps["magma"](square(picture, side), bytes=True)
            left, top = place_of(layers.index(layer), heads.index(head), side)
            figure.figimage(colours, left, size[1] - top - side, origin="upper")
    for i, head in enumerate(heads):
        write(place_of(0, i, side)[0] + side / 2, 1.5 * MARGIN, f"head {head}", ha="center")
    for i, layer in enumerate(layers):
        write(MARGIN / 2, place_of(i, 0, side)[1] + side / 2, f"layer {layer}", ha="center", rotation=90)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a tag may have letters that the font lacks
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def square(picture: Image, side: int) -> np.ndarray:
    """The picture's pixels, (side, side) uint8; `side` is a whole number of times that of the weights."""
    grey, n_weights = picture.pixels(), len(picture.weights)
    factor = len(grey) // n_weights
    one_each = grey[::factor, ::factor]
    return one_each.repeat(side // n_weights, axis=0).repeat(side // n_weights, axis=1)


def place_of(row: int, column: int, side: int) -> tuple[int, int]:
    """The left and the top of a square in the attention picture, in pixels."""
    return MARGIN + column * (side + GAP), 2 * MARGIN + row * (side + GAP)


def evenly_spaced(n: int) -> list[int]:
    """The numbers below `n`; of more than MOST_SHOWN, so many with the first and the last among them."""
    return sorted({round(i) for i in np.linspace(0, n - 1, min(n, MOST_SHOWN))})


def try_attention_picture(run: Run, trainer: Trainer, console: Console) -> str | None:
    """Draw eval/attention.png of the exported weights; returns the text that the model has read for it.

    A picture that cannot be drawn costs one line and gives None.
    """
    picture = run.eval_dir / "attention.png"
    try:
        picture.unlink(missing_ok=True)  # as above
        idx = trainer.validation_batch()[:1, :ATTENTION_LENGTH]
        pictures = attention_pictures(trainer.model, idx)
        write_atomically(picture, draw_attention(pictures, run.run_id))
        assert trainer.model.vocabulary is not None
        return Tokenizer(trainer.model.vocabulary).decode(idx[0].tolist())
    except Exception as error:  # matplotlib again
        console.warn(f"no attention picture was drawn: {first_line(error)}")
        return None


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
