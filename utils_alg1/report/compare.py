"""Comparison of runs: reads run directories, sorts them and formats them as a table, JSON or CSV.

Runs are only read. A run that is in progress, was interrupted or is damaged has fewer values and the
corresponding state. This module does not import torch.
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
from utils_alg1.base.text import bits_per_character, format_number, perplexity, single_line
from utils_alg1.console import table
from utils_alg1.console.table import Column
from utils_alg1.network.tensor_file import read_metadata
from utils_alg1.run_directory import RUN_ID, RunFolder, checkpoint_paths, in_use
from utils_alg1.tracking.metrics_file import EACH_STEP, read_outline
from utils_alg1.utils_config_loader import RESUMED

Row = dict[str, Any]  # the values of RESULTS and of all parameters by name; None if unknown

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
FINAL_KEYS = {  # result -> key in eval/final.json
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
    "n_parameters": "n_parameters",  # missing in old runs
}
INTEGER_RESULTS = ("step", "best_step", "tokens", "n_parameters")
HEADINGS = {  # result -> heading of its column, where they differ
    "best_val_loss": "best val loss",
    "val_loss": "val loss",
    "n_parameters": "parameters",
    "tokens_per_second": "tok/s",
}
DESCENDING = ("run", "best", "tokens_per_second")  # sorted from the largest value by default
MAIN_PARAMETERS = ("n_layer", "n_head", "n_embd", "block_size", "batch_size", "learning_rate")
MAX_CELL_LENGTH = 40  # characters of a parameter or a text
MAX_NUMBER_LENGTH = 15  # characters of a result; a longer one is written with an exponent


# --- one run ------------------------------------------------------------------------------------------


def read_run(path: Path) -> Row:
    """Read a run directory.

    The state is "running" if a process holds the lock of the run, else "damaged" if one of its files is
    invalid, "done" if the results are those of the newest step, or "unfinished". The training time of an
    unfinished run is that of its newest checkpoint.
    """
    match = RUN_ID.fullmatch(path.name)
    row: Row = dict.fromkeys((*RESULTS, *specs()))
    row |= {"run": path.name, "tag": (match and match[3]) or "", "resumed": False, "best": False}
    run = RunFolder(path)
    recorded = read_record(run.record_path, row)
    measured = read_evaluations(run.metrics_path, row)
    final = read_final(run.final_path) if run.final_path.exists() else {}
    # The metrics of a finished run that was resumed are newer than its results.
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
    """Copy the parameters and the text from meta/full_config.json to a row; return False if it is invalid.

    Parameter values that train.py would refuse, such as a negative width, are invalid too and not copied.
    """
    try:
        record = read_json_object(path)
        given = {name: value for name, value in record["parameters"].items() if name in specs()}
        parts = build_parts(given)
        problems = part_problems(parts, {})
        row |= {name: value for name, value in given.items() if name not in names_in(problems)}
        row["resumed"] = RESUMED in record["origins"].values()
        corpus = record["corpus"]
        text, sha256, vocab_size = corpus["path"], corpus["sha256"], parse_count(corpus["vocab_size"])
        if problems or not isinstance(text, str) or not isinstance(sha256, str):
            return False
        row["text"], row["text_sha256"] = Path(text).name, sha256
        row["n_parameters"] = replace(parts["model"], vocab_size=vocab_size).n_parameters
    except (Alg1Error, KeyError, TypeError, AttributeError, ValueError):
        return False
    return True


def read_final(path: Path) -> Row | None:
    """Read the results in eval/final.json; None if the file is invalid."""
    try:
        final = read_json_object(path)
        results: Row = {}
        for name, key in FINAL_KEYS.items():
            value = final.get(key)
            parse = parse_count if name in INTEGER_RESULTS else parse_number
            results[name] = None if value is None else parse(value)
    except (Alg1Error, ValueError):
        return None
    required = (results["step"], results["best_val_loss"], results["val_loss"])
    return None if None in required else results


def read_evaluations(path: Path, row: Row) -> bool:
    """Copy evaluations, speed and newest step from logs/metrics.jsonl to a row; False if it is damaged."""
    try:
        for values in read_outline(path):
            update_row(row, values)
    except (OSError, ValueError, KeyError):
        return False
    return True


def update_row(row: Row, values: dict[str, Any]) -> None:
    """Update the row of a run with the next line of its metrics.jsonl.

    Raises:
        KeyError: a value is missing.
        ValueError: a value is invalid.
    """
    # A training loss is logged before the update of its step, everything else after it.
    step = row["step"] = parse_count(values["step"]) + (EACH_STEP in values)
    if "tokens_per_second" in values:
        row["tokens_per_second"] = parse_number(values["tokens_per_second"])
    if "loss/val" not in values:
        return
    loss, train_loss = parse_number(values["loss/val"]), parse_number(values["loss/train"])
    row["val_loss"], row["train_loss"] = loss, train_loss
    if loss is not None and (row["best_val_loss"] is None or loss < row["best_val_loss"]):
        row["best_val_loss"], row["best_step"] = loss, step
        row["best_perplexity"] = perplexity(loss)
        row["best_bits_per_character"] = bits_per_character(loss)


def parse_number(value: Any) -> float | None:
    """Check that a value is a non-negative number; NaN and infinity, as of a diverged run, become None.

    Raises:
        ValueError: it is anything else.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
        raise ValueError(f"{value!r} is not a non-negative number")
    return value if value <= sys.float_info.max else None


def parse_count(value: Any) -> int:
    """Check that a value is a non-negative integer of at most 63 bits.

    Raises:
        ValueError: it is anything else.
    """
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{value!r} is not a non-negative integer")
    return value


def seconds_until_checkpoint(folder: Path) -> float | None:
    """Return the training time until the newest checkpoint; None if there is no valid checkpoint."""
    try:
        return parse_number(read_metadata(checkpoint_paths(folder)[-1])["progress"]["seconds"])
    except (Alg1Error, IndexError, KeyError, TypeError, ValueError):
        return None


# --- all runs -----------------------------------------------------------------------------------------


def mark_best(rows: Iterable[Row]) -> None:
    """Mark the lowest validation loss on each text; losses on different texts are not comparable."""
    lowest: dict[str, float] = {}
    comparable = [row for row in rows if row["state"] != "damaged" and row["text_sha256"]]
    comparable = [row for row in comparable if row["best_val_loss"] is not None]
    for row in comparable:
        lowest[row["text_sha256"]] = min(row["best_val_loss"], lowest.get(row["text_sha256"], math.inf))
    for row in comparable:
        row["best"] = row["best_val_loss"] == lowest[row["text_sha256"]]


def find_column(text: str) -> str:
    """Return the name of the value that --sort names, by this name or by the heading of its column.

    Raises:
        Alg1Error: there is no such value; the message suggests the nearest.
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
    """Sort rows by one value: ascending unless the value is in DESCENDING; `reverse` inverts the order.

    The sort is stable. Rows without the value come last in both orders.
    """

    def order(row: Row) -> tuple[int, Any]:
        value = row[key]
        return (0, value) if isinstance(value, (int, float)) else (1, run_order(str(value)))

    with_value = [row for row in rows if row[key] is not None]
    with_value.sort(key=order, reverse=(key in DESCENDING) != reverse)
    return with_value + [row for row in rows if row[key] is None]


def run_order(name: str) -> tuple[str, int, str]:
    """Return the sort key of a run's name, in which run 1000 of a day follows run 999; also of other text."""
    match = RUN_ID.fullmatch(name)
    return (match[1], int(match[2]), name) if match else (name, 0, "")


# --- the table ----------------------------------------------------------------------------------------


def columns_of(rows: list[Row]) -> list[Column]:
    """Return the columns: the main results and parameters, and all other parameters that differ between runs.

    The exception are parameters that a resumed run may change, since they do not affect the training steps.
    """
    differing = [
        name
        for name, spec in specs().items()
        if not spec.limits.may_change and len({cell(row[name]) for row in rows if row[name] is not None}) > 1
    ]
    names = [*MAIN_PARAMETERS, *(name for name in differing if name not in MAIN_PARAMETERS)]

    def column(
        heading: str, rank: int, format_cell: Callable[[Row], str], align_right: bool = True
    ) -> Column:
        return Column(heading, [format_cell(row) for row in rows], rank, align_right)

    columns = [
        column("run", 0, lambda row: single_line(row["run"]), align_right=False),
        column("state", 2, state_cell, align_right=False),
        column("step", 4, step_cell),
        column(HEADINGS["best_val_loss"], 0, best_cell),
        column(HEADINGS["val_loss"], 5, lambda row: format_number(row["val_loss"])),
    ]
    if len({row["text_sha256"] for row in rows if row["text_sha256"]}) > 1:
        columns.append(column("text", 1, lambda row: cell(row["text"]), align_right=False))
    for name in names:
        cells = [cell(row[name]) for row in rows]
        columns.append(Column(name, cells, 3 if name in differing else 9, align_right=True))
    columns += [
        column(HEADINGS["n_parameters"], 8, lambda row: format_rounded(row["n_parameters"])),
        column(HEADINGS["tokens_per_second"], 7, lambda row: format_rounded(row["tokens_per_second"])),
        column("seconds", 6, lambda row: format_rounded(row["seconds"])),
    ]
    return columns


def cell(value: Any) -> str:
    """Format a parameter or a text for a cell; "-" if there is none."""
    if value is None or value == "":
        return "-"
    text = f"{value:.6g}" if isinstance(value, float) else single_line(str(value))
    return text if len(text) <= MAX_CELL_LENGTH else text[: MAX_CELL_LENGTH - 1] + "…"


def format_rounded(value: float | None) -> str:
    """Format a result as a whole number, or with an exponent if that is too long."""
    text = "-" if value is None else f"{value:,.0f}"
    return text if len(text) <= MAX_NUMBER_LENGTH else format_number(value)


def state_cell(row: Row) -> str:
    return row["state"] + (", resumed" if row["resumed"] else "")


def step_cell(row: Row) -> str:
    done = row["state"] == "done" or row["max_iters"] is None or row["step"] is None
    step = cell(row["step"])
    return step if done else f"{step} of {cell(row['max_iters'])}"


def best_cell(row: Row) -> str:
    return ("* " if row["best"] else "") + format_number(row["best_val_loss"])


def format_table(rows: list[Row], width: int | None = None) -> list[str]:
    """Format rows as a table.

    Args:
        rows: the runs from top to bottom.
        width: the maximum width of a line in terminal columns; None is unlimited.

    Returns:
        The lines; the last ones explain the mark of the best run and name the columns that do not fit.
    """
    lines, dropped = table.format_columns(columns_of(rows), width)
    if texts := {row["text_sha256"] for row in rows if row["best"]}:
        lines.append("* the lowest" + (" on its text" if len(texts) > 1 else " of these runs"))
    if dropped:
        lines.append(f"no room for: {', '.join(dropped)}")
    return [table.truncate(line, width) for line in lines]


def to_json(rows: list[Row]) -> str:
    """Format all values of all rows as a JSON list of objects."""
    return json.dumps(rows, indent=2, ensure_ascii=False, default=str)


def to_csv(rows: list[Row]) -> str:
    """Format all values of all rows as CSV; unknown values are empty."""
    return table.to_csv([*RESULTS, *specs()], rows).rstrip("\n")
