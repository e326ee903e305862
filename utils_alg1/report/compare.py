"""Runs side by side: what each run directory says of itself, their order, and what stands in the table.

Reads only, and takes what it finds: a run that is being written, was interrupted or is damaged has fewer
values and a word for its state. Nothing here needs torch.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from parameters import build_parts, part_problems, specs
from utils_alg1.base.errors import Alg1Error
from utils_alg1.base.files import read_json_object
from utils_alg1.base.problems import names_in, nearest
from utils_alg1.base.text import bits_per_character, number, one_line, perplexity
from utils_alg1.console import table
from utils_alg1.console.table import Column
from utils_alg1.network.tensor_file import read_metadata
from utils_alg1.run_directory import RUN_ID, RunFolder, checkpoint_paths, in_use
from utils_alg1.tracking.metrics_file import EACH_STEP, read_outline
from utils_alg1.utils_config_loader import RESUMED

Row = dict[str, Any]  # by the names of RESULTS and of parameters; what is not known is None

RESULTS = (
    "run",
    "tag",
    "state",
    "resumed",
    "best",
    "step",
    "best_val_loss",
    "best_step",
    "val_loss",
    "train_loss",
    "best_perplexity",
    "best_bits_per_character",
    "tokens",
    "tokens_per_second",
    "seconds",
    "n_parameters",
    "text",
    "text_sha256",
)
FROM_FINAL = {  # the names of eval/final.json
    "step": "steps",
    "best_val_loss": "best_val_loss",
    "best_step": "best_step",
    "val_loss": "val_loss",
    "train_loss": "train_loss",
    "best_perplexity": "best_perplexity",
    "best_bits_per_character": "best_bits_per_character",
    "tokens": "tokens",
    "tokens_per_second": "tokens_per_second_overall",
    "seconds": "seconds_in_loop",
    "n_parameters": "n_parameters",  # older runs do not say it
}
COUNTS = ("step", "best_step", "tokens", "n_parameters")  # whole numbers
HEADINGS = {  # of columns that are not called as the value is
    "best_val_loss": "best val loss",
    "val_loss": "val loss",
    "n_parameters": "parameters",
    "tokens_per_second": "tok/s",
}
FALLING = ("run", "best", "tokens_per_second")  # sorted from the newest, the best and the highest
MAIN = ("n_layer", "n_head", "n_embd", "block_size", "batch_size", "learning_rate")
LONGEST_CELL = 40  # characters; the run's name is never cut for this
LONGEST_NUMBER = 15  # characters of a result; a longer one is shown with an exponent


# --- one run ------------------------------------------------------------------------------------------


def read_run(path: Path) -> Row:
    """What a run directory says of itself.

    `state` is "running" while a process holds it, else "damaged" where a record cannot be used, "done" where
    the results are those of the newest step, and "unfinished". The seconds of a run without results are those
    until its newest checkpoint: nothing else notes the time before the end.
    """
    match = RUN_ID.fullmatch(path.name)
    row: Row = dict.fromkeys((*RESULTS, *specs()))
    row |= {"run": path.name, "tag": (match and match[3]) or "", "resumed": False, "best": False}
    run = RunFolder(path)
    recorded = read_record(run.record_path, row)
    measured = read_measured(run.metrics_path, row)
    final = read_final(run.final_path) if run.final_path.exists() else {}
    # A finished run that goes on has newer metrics than results.
    finished = False
    if final:
        finished = final["step"] >= (row["step"] or 0)
    if final and finished:
        row |= {name: value for name, value in final.items() if value is not None}
    else:
        row["seconds"] = seconds_until_checkpoint(run.checkpoint_dir)
    if in_use(path):
        row["state"] = "running"
    elif not recorded or not measured or final is None:
        row["state"] = "damaged"
    else:
        row["state"] = "done" if finished else "unfinished"
    return row


def read_record(path: Path, row: Row) -> bool:
    """Take the parameters and the text from meta/full_config.json; False where something in it is wrong.

    Wrong is, too, what train.py would have refused: a width of -1, say. Such values are left out.
    """
    try:
        record = read_json_object(path)
        given = {name: value for name, value in record["parameters"].items() if name in specs()}
        parts = build_parts(given)
        problems = part_problems(parts, {})
        row |= {name: value for name, value in given.items() if name not in names_in(problems)}
        row["resumed"] = RESUMED in record["origins"].values()
        corpus = record["corpus"]
        text, sha256, vocab_size = corpus["path"], corpus["sha256"], count(corpus["vocab_size"])
        if problems or not isinstance(text, str) or not isinstance(sha256, str):
            return False
        row["text"], row["text_sha256"] = Path(text).name, sha256
        row["n_parameters"] = replace(parts["model"], vocab_size=vocab_size).n_parameters
    except (Alg1Error, KeyError, TypeError, AttributeError, ValueError):
        return False
    return True


def read_final(path: Path) -> Row | None:
    """The results of eval/final.json; None where they are not those of a run."""
    try:
        final = read_json_object(path)
        found: Row = {}
        for name, key in FROM_FINAL.items():
            value = final.get(key)
            read = count if name in COUNTS else quantity
            found[name] = None if value is None else read(value)
    except (Alg1Error, ValueError):
        return None
    needed = (found["step"], found["best_val_loss"], found["val_loss"])
    return None if None in needed else found


def read_measured(path: Path, row: Row) -> bool:
    """Take evaluations, speed and newest step from logs/metrics.jsonl; False where it is damaged."""
    try:
        for values in read_outline(path):
            take_values(values, row)
    except (OSError, ValueError, KeyError):
        return False
    return True


def take_values(values: dict[str, Any], row: Row) -> None:
    """Make a row of metrics.jsonl the newest of the run, and its evaluation the best where it is.

    Raises:
        KeyError, ValueError: no run has written it.
    """
    step = row["step"] = count(values["step"]) + (EACH_STEP in values)  # such a row comes before its update
    if "tokens_per_second" in values:
        row["tokens_per_second"] = quantity(values["tokens_per_second"])
    if "loss/val" not in values:
        return
    loss, train_loss = quantity(values["loss/val"]), quantity(values["loss/train"])
    row["val_loss"], row["train_loss"] = loss, train_loss
    if loss is not None and (row["best_val_loss"] is None or loss < row["best_val_loss"]):
        row["best_val_loss"], row["best_step"] = loss, step
        row["best_perplexity"] = perplexity(loss)
        row["best_bits_per_character"] = bits_per_character(loss)


def quantity(value: Any) -> float | None:
    """A number that is not negative; None for NaN and the infinite, which a run that diverges writes.

    Raises:
        ValueError: it is anything else.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
        raise ValueError(f"{value!r} is no quantity")
    return value if value <= sys.float_info.max else None


def count(value: Any) -> int:
    """A whole number that is not negative.

    Raises:
        ValueError: it is anything else, or more than 64 bits hold.
    """
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{value!r} is no count")
    return value


def seconds_until_checkpoint(folder: Path) -> float | None:
    """What a run has spent in the loop until the newest of its checkpoints; None where none tells."""
    try:
        return quantity(read_metadata(checkpoint_paths(folder)[-1])["progress"]["seconds"])
    except (Alg1Error, IndexError, KeyError, TypeError, ValueError):
        return None


# --- all runs -----------------------------------------------------------------------------------------


def mark_best(rows: Iterable[Row]) -> None:
    """Mark the lowest validation loss of each text: losses on different texts cannot be compared."""
    lowest: dict[str, float] = {}
    fit = [row for row in rows if row["state"] != "damaged" and row["text_sha256"]]
    fit = [row for row in fit if row["best_val_loss"] is not None]
    for row in fit:
        lowest[row["text_sha256"]] = min(row["best_val_loss"], lowest.get(row["text_sha256"], math.inf))
    for row in fit:
        row["best"] = row["best_val_loss"] == lowest[row["text_sha256"]]


def find_column(text: str) -> str:
    """The name of a value of every row, for that name or the heading of its column.

    Raises:
        Alg1Error: there is none; the nearest is named.
    """
    known = {name: name for name in (*RESULTS, *specs())}
    known |= {heading.replace(" ", "_"): name for name, heading in HEADINGS.items()}
    key = text.strip().lower().replace(" ", "_")
    if key not in known:
        raise Alg1Error(
            f"--sort {text}: no such column{nearest(key, known)}",
            f"{', '.join(RESULTS)}, or any parameter of train.py",
        )
    return known[key]


def sort_rows(rows: list[Row], key: str, reverse: bool) -> list[Row]:
    """The rows by one value, the best first (see FALLING); those without it come last either way.

    Rows with the same value stay in the order they have.
    """

    def order(row: Row) -> tuple[int, Any]:
        value = row[key]
        return (0, value) if isinstance(value, (int, float)) else (1, run_order(str(value)))

    with_value = [row for row in rows if row[key] is not None]
    with_value.sort(key=order, reverse=(key in FALLING) != reverse)
    return with_value + [row for row in rows if row[key] is None]


def run_order(name: str) -> tuple[str, int, str]:
    """A run's name as it sorts: run 1000 of a day comes after run 999. Other text sorts as it is."""
    match = RUN_ID.fullmatch(name)
    return (match[1], int(match[2]), name) if match else (name, 0, "")


# --- the table ----------------------------------------------------------------------------------------


def columns_of(rows: list[Row]) -> list[Column]:
    """The main results and parameters, and what else shaped the training and is not the same in all."""
    differing = [
        name
        for name, spec in specs().items()
        if not spec.limits.may_change and len({cell(row[name]) for row in rows if row[name] is not None}) > 1
    ]
    names = [*MAIN, *(name for name in differing if name not in MAIN)]

    def column(heading: str, rank: int, show: Callable[[Row], str], to_the_right: bool = True) -> Column:
        return Column(heading, [show(row) for row in rows], rank, to_the_right)

    columns = [
        column("run", 0, lambda row: one_line(row["run"]), to_the_right=False),
        column("state", 2, state_cell, to_the_right=False),
        column("step", 4, step_cell),
        column(HEADINGS["best_val_loss"], 0, best_cell),
        column(HEADINGS["val_loss"], 5, lambda row: number(row["val_loss"])),
    ]
    if len({row["text_sha256"] for row in rows if row["text_sha256"]}) > 1:
        columns.append(column("text", 1, lambda row: cell(row["text"]), to_the_right=False))
    for name in names:
        cells = [cell(row[name]) for row in rows]
        columns.append(Column(name, cells, 3 if name in differing else 9, to_the_right=True))
    columns += [
        column(HEADINGS["n_parameters"], 8, lambda row: whole(row["n_parameters"])),
        column(HEADINGS["tokens_per_second"], 7, lambda row: whole(row["tokens_per_second"])),
        column("seconds", 6, lambda row: whole(row["seconds"])),
    ]
    return columns


def cell(value: Any) -> str:
    """A parameter as a cell shows it: on one line, not too long, "-" where there is none."""
    if value is None or value == "":
        return "-"
    text = f"{value:.6g}" if isinstance(value, float) else one_line(str(value))
    return text if len(text) <= LONGEST_CELL else text[: LONGEST_CELL - 1] + "…"


def whole(value: float | None) -> str:
    """A result without what stands behind its point."""
    text = "-" if value is None else f"{value:,.0f}"
    return text if len(text) <= LONGEST_NUMBER else number(value)


def state_cell(row: Row) -> str:
    return row["state"] + (", resumed" if row["resumed"] else "")


def step_cell(row: Row) -> str:
    done = row["state"] == "done" or row["max_iters"] is None or row["step"] is None
    step = cell(row["step"])
    return step if done else f"{step} of {cell(row['max_iters'])}"


def best_cell(row: Row) -> str:
    return ("* " if row["best"] else "") + number(row["best_val_loss"])


def format_table(rows: list[Row], width: int | None = None) -> list[str]:
    """The table as lines, none wider than `width` columns of a terminal; None does not limit them."""
    lines, left_out = table.format_columns(columns_of(rows), width)
    if texts := {row["text_sha256"] for row in rows if row["best"]}:
        lines.append("* the lowest" + (" on its text" if len(texts) > 1 else " of these runs"))
    if left_out:
        lines.append(f"no room for: {', '.join(left_out)}")
    return [table.cut(line, width) for line in lines]


def to_json(rows: list[Row]) -> str:
    """All values of all rows as a list of objects."""
    return json.dumps(rows, indent=2, ensure_ascii=False, default=str)


def to_csv(rows: list[Row]) -> str:
    """All values of all rows, under a line of names; what is not known is empty."""
    return table.to_csv([*RESULTS, *specs()], rows).rstrip("\n")
