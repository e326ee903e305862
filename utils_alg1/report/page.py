"""eval/: the pictures of a finished run, and report.html, a page that needs no other file and no network.

The page is templates/report.html with report.css and report.js, which draws the charts, inside it. So is the
model, unless it is large (see playground.py).
"""

from __future__ import annotations

import base64
import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from parameters import specs
from utils import Tokenizer
from utils_alg1.base.files import read_json_object, write_atomically, write_or_warn
from utils_alg1.base.scripts import command
from utils_alg1.base.text import character_symbol, shell_quote, text_name
from utils_alg1.network.weights import read_weights
from utils_alg1.report import pictures, playground
from utils_alg1.report.baselines import NAMES, in_view
from utils_alg1.report.rendering import render
from utils_alg1.run_directory import RunDirectory, RunFolder
from utils_alg1.tracking.metrics_file import Point, read_curves
from utils_alg1.tracking.observer import attention_weights
from utils_alg1.tracking.samples_file import read_samples
from utils_alg1.utils_output import Console
from utils_alg1.utils_run_manager import NOTES, read_lines

if TYPE_CHECKING:
    from utils_alg1.training.trainer import Trainer

MAX_POINTS = 800  # points of a curve; a page has fewer pixels
MAX_EVALUATIONS = 200  # rows of the table of evaluations
ATTENTION_LENGTH = 32  # characters of context; with more, few squares would fit on a screen
MAX_STAGES = 6  # samples of the training that are shown
HELD_OUT_LENGTH = 1000  # characters


def write_report(run: RunDirectory, trainer: Trainer, samples: list[str], console: Console) -> None:
    """Write loss.png, attention.png and report.html; a file that cannot be written costs one warning."""
    idx = trainer.validation_batch()[:1, :ATTENTION_LENGTH]
    attention_path = run.eval_dir / "attention.png"
    assert trainer.model.vocabulary is not None
    text = Tokenizer(trainer.model.vocabulary).decode(idx[0].tolist())
    held_out = np.asarray(trainer.data[1][:HELD_OUT_LENGTH])

    def write_loss(path: Path) -> None:
        final, record = read_json_object(run.final_path), read_json_object(run.record_path)
        steps = [step for step, *_ in resumes(record, final["steps"])]
        pictures.draw_loss_curve(run.metrics_path, path, run.run_id, baselines(final), steps)

    def write_attention(path: Path) -> None:
        weights = attention_weights(trainer.model, idx)
        write_atomically(path, pictures.draw_attention(weights, run.run_id, text))

    def write_page(path: Path) -> None:
        page = build_page(run.path, samples, text if attention_path.exists() else None, held_out)
        write_atomically(path, page.encode("utf-8"))

    write_or_warn(run.eval_dir / "loss.png", write_loss, console.warn)
    write_or_warn(attention_path, write_attention, console.warn)
    write_or_warn(run.report_path, write_page, console.warn)


def build_page(
    run_dir: Path, samples: list[str], attention_text: str | None, held_out: np.ndarray | None = None
) -> str:
    """Build the page from the directory of a finished run.

    Args:
        attention_text: the text shown in eval/attention.png; None if there is no such picture.
        held_out: the tokens of a text that is shown with the loss of each character.

    Raises what comes of a file that is missing or damaged: Alg1Error, OSError, KeyError or
    jinja2.UndefinedError.
    """
    run = RunFolder(run_dir)
    weights = read_weights(run.export_path)
    tokenizer = Tokenizer(weights.vocabulary or [])
    final, record = read_json_object(run.final_path), read_json_object(run.record_path)
    curves = read_curves(run.metrics_path)
    val = curves.get("loss/val", [])
    stride = math.ceil(len(val) / MAX_EVALUATIONS) or 1
    first = (len(val) - 1) % stride  # of those shown, so that the last evaluation is among them
    curves["best"] = [point for point in val if point[0] == final["best_step"]]
    parameters = parameter_rows(record)
    is_small = weights.config.n_parameters <= playground.LARGEST_IN_REPORT
    has_playground = is_small and record["parameters"].get("playground", True)
    picture = b"" if attention_text is None else (run.eval_dir / "attention.png").read_bytes()
    return render(
        "report.html",
        playground.STYLE if has_playground else ("report.css",),
        ("elements.js", "report.js", *(["playground.js"] if has_playground else [])),
        name=run_dir.name,
        generator="ALG1",
        final=final,
        record=record,
        text_name=text_name(record["corpus"]["path"]),
        samples=samples,
        stages=stages(run, dict(val)),
        prompt=character_symbol(tokenizer.default_prompt),
        notes=notes(run),
        attention_text=attention_text,
        attention_width=pictures.displayed_width(picture),
        attention_picture=base64.b64encode(picture).decode("ascii"),
        parameters=parameters,
        changed=[row for row in parameters if row[0] not in specs() or row[1] != row[2]],
        evaluations=val[first::stride],
        n_evaluations=len(val),
        train=dict(curves.get("loss/train", [])),
        rates=dict(curves.get("learning_rate", [])),
        git=read_lines(run.meta_dir / "git.txt"),
        environment=read_lines(run.meta_dir / "env.txt"),
        curves={name: downsample(points) for name, points in curves.items()},
        baselines=baselines(final),
        references=list(in_view(baselines(final), curves).items()),
        marks=resumes(record, final["steps"]),
        opening="" if held_out is None else playground.opening(tokenizer.decode(held_out.tolist())),
        held_out=None if held_out is None else playground.surprise(weights, held_out),
        page_command=f"{command('inference.py')} --run {shell_quote(str(run_dir))} --page playground.html",
        **(playground.playground_values(weights) if has_playground else {"playground": None}),
    )


def parameter_rows(record: dict[str, Any]) -> list[tuple[str, Any, Any, str]]:
    """Return the name, value, default and origin of each parameter of a run."""
    return [
        (name, value, specs()[name].default if name in specs() else "", record["origins"].get(name, ""))
        for name, value in record["parameters"].items()
    ]


def baselines(final: dict[str, Any]) -> dict[str, float]:
    """Return the losses of the guesses that only count, by name."""
    return {name: final[f"{name}_loss"] for name in NAMES}


def resumes(record: dict[str, Any], steps: int) -> list[tuple[int, str, str]]:
    """Return where a run of so many steps was resumed: the step, its label in a chart, and a text on it.

    At the last step no training was resumed: the results were written again, or by --finish.
    """
    commands: dict[int, list[str]] = {}
    for part in record.get("parts", [])[1:]:
        if part["step"] < steps:
            commands.setdefault(part["step"], []).append(part["command"])
    return [(step, "resumed", f"resumed at step {step}: {'; '.join(c)}") for step, c in commands.items()]


def stages(run: RunFolder, losses: dict[float, float]) -> list[tuple[int, float | None, str]]:
    """Return samples that were drawn while the run trained: step, val loss there (or None) and text."""
    drawn = read_samples(run.samples_path)
    shown = [drawn[i] for i in pictures.evenly_spaced(len(drawn), MAX_STAGES)]
    return [(step, losses.get(step), text) for step, text in shown]


def notes(run: RunFolder) -> str:
    """Return what a person wrote into meta/notes.md; nothing where it is as the run began it."""
    path = run.meta_dir / "notes.md"
    text = path.read_text("utf-8", errors="replace").strip() if path.is_file() else ""
    heading, _, rest = text.partition("\n")
    is_template = heading.startswith("# ") and rest.strip() == NOTES.partition("\n")[2].strip()
    return "" if is_template else text


def downsample(points: list[Point]) -> list[Point]:
    """Reduce a curve to MAX_POINTS points: the minimum and the maximum of each interval, so peaks remain."""
    if len(points) <= MAX_POINTS:
        return points
    n_intervals = MAX_POINTS // 2
    bounds = [round(i * len(points) / n_intervals) for i in range(n_intervals + 1)]
    kept: list[Point] = []
    for begin, end in itertools.pairwise(bounds):
        interval = points[begin:end]
        kept += sorted({min(interval, key=lambda p: p[1]), max(interval, key=lambda p: p[1])})
    return kept
