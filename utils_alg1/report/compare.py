"""Comparison of runs: reads run directories, sorts them and formats them as a table.

Runs are only read. A run that is in progress, was interrupted or is damaged has fewer values and the
corresponding state. This module does not import torch.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from parameters import build_parts, part_problems, specs
from utils_alg1.base.errors import Alg1Error
from utils_alg1.base.files import read_json_object
from utils_alg1.base.problems import nearest, raise_problems
from utils_alg1.base.text import bits_per_character, format_number, perplexity
from utils_alg1.console.table import format_table
from utils_alg1.network.tensor_file import read_metadata
from utils_alg1.run_directory import RUN_ID, RunFolder, checkpoint_paths, in_use
from utils_alg1.tracking.metrics_file import EACH_STEP, read_metrics
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
FINAL_KEYS: dict[str, tuple[str, type]] = {  # result -> key in eval/final.json, int for a count
    "step": ("steps", int),
    "best_val_loss": ("best_val_loss", float),
    "best_step": ("best_step", int),
    "val_loss": ("val_loss", float),
    "train_loss": ("train_loss", float),
    "tokens": ("tokens", int),
    "tokens_per_second": ("tokens_per_second_overall", float),
    "seconds": ("seconds_in_loop", float),
}
HEADINGS = {  # result -> heading of its column, where they differ
    "best_val_loss": "best val loss",
    "val_loss": "val loss",
    "n_parameters": "parameters",
    "tokens_per_second": "tok/s",
}
TEXT_COLUMNS = ("run", "state", "text")  # aligned to the left
DESCENDING = ("best", "tokens_per_second")  # sorted from the largest value by default
MAIN_PARAMETERS = ("n_layer", "n_head", "n_embd", "block_size", "batch_size", "learning_rate")
MAX_CELL_LENGTH = 40  # characters of a parameter or a text


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
    row["state"] = "unfinished"
    damaged = False
    for read in (read_record, read_evaluations, read_final):
        try:
            read(RunFolder(path), row)
        except (Alg1Error, OSError, AttributeError, KeyError, TypeError, ValueError):
            damaged = True
    if row["state"] == "unfinished":
        with contextlib.suppress(Alg1Error, IndexError, KeyError, TypeError, ValueError):
            newest = checkpoint_paths(RunFolder(path).checkpoint_dir)[-1]
            row["seconds"] = check(read_metadata(newest)["progress"]["seconds"])
    if row["best_val_loss"] is not None:
        row["best_perplexity"] = perplexity(row["best_val_loss"])
        row["best_bits_per_character"] = bits_per_character(row["best_val_loss"])
    if damaged:
        row["state"] = "damaged"
    if in_use(path):
        row["state"] = "running"
    return row


# The three readers add values to a row; they raise ValueError or the like if the file is damaged.


def read_record(run: RunFolder, row: Row) -> None:
    """Read the parameters and the text in meta/full_config.json.

    Parameter values that train.py would refuse, such as a negative width, are damage.
    """
    record = read_json_object(run.record_path)
    given = {name: value for name, value in record["parameters"].items() if name in specs()}
    parts = build_parts(given)
    raise_problems(part_problems(parts, {}))
    row |= given
    row["resumed"] = RESUMED in record["origins"].values()
    corpus = record["corpus"]
    if not isinstance(corpus["sha256"], str):
        raise ValueError("the digest of the text is no string")
    row["text"], row["text_sha256"] = Path(corpus["path"]).name, corpus["sha256"]
    model = replace(parts["model"], vocab_size=check(corpus["vocab_size"], int))
    row["n_parameters"] = model.n_parameters


def read_evaluations(run: RunFolder, row: Row) -> None:
    """Read the newest step, the speed and the evaluations in logs/metrics.jsonl."""
    n_rows = 0
    for values in read_metrics(run.metrics_path):
        n_rows += 1
        # A training loss is logged before the update of its step, everything else after it.
        row["step"] = check(values["step"], int) + (EACH_STEP in values)
        if "tokens_per_second" in values:
            row["tokens_per_second"] = check(values["tokens_per_second"])
        if "loss/val" in values:
            loss = row["val_loss"] = check(values["loss/val"])
            row["train_loss"] = check(values["loss/train"])
            if loss is not None and (row["best_val_loss"] is None or loss < row["best_val_loss"]):
                row["best_val_loss"], row["best_step"] = loss, row["step"]
    if run.metrics_path.exists() and run.metrics_path.read_bytes().count(b"\n") > n_rows:
        raise ValueError("a row is damaged")  # not the last one, which may still be being written


def read_final(run: RunFolder, row: Row) -> None:
    """Read the results in eval/final.json, unless the metrics are newer: the run was resumed."""
    if not run.final_path.exists():
        return
    final = read_json_object(run.final_path)
    found = {name: (final.get(key), kind) for name, (key, kind) in FINAL_KEYS.items()}
    values = {name: check(value, kind) for name, (value, kind) in found.items() if value is not None}
    if None in map(values.get, ("step", "best_val_loss", "val_loss")):
        raise ValueError("a result is missing")
    if values["step"] >= (row["step"] or 0):
        row |= values | {"state": "done"}


def check(value: Any, kind: type = float) -> Any:
    """Check that a value is a non-negative number, or with `kind` int a count of at most 63 bits.

    NaN and infinity, as of a diverged run, become None.

    Raises:
        ValueError: it is anything else.
    """
    if type(value) not in (int, kind) or value < 0 or (kind is int and value >= 2**63):
        raise ValueError(f"{value!r} is not a non-negative {kind.__name__}")
    return value if value <= sys.float_info.max else None


# --- all runs -----------------------------------------------------------------------------------------


def mark_best(rows: Iterable[Row]) -> None:
    """Mark the lowest validation loss on each text; losses on different texts are not comparable."""
    by_text: dict[str, list[Row]] = {}
    for row in rows:
        if row["state"] != "damaged" and row["text_sha256"] and row["best_val_loss"] is not None:
            by_text.setdefault(row["text_sha256"], []).append(row)
    for group in by_text.values():
        lowest = min(row["best_val_loss"] for row in group)
        for row in group:
            row["best"] = row["best_val_loss"] == lowest


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
    """Sort rows, which come with the newest run first, by one value.

    The order is ascending unless the value is in DESCENDING; `reverse` inverts it. The sort is stable. Rows
    without the value come last in both orders.
    """
    if key == "run":
        return rows[::-1] if reverse else rows
    known = [row for row in rows if row[key] is not None]
    known.sort(key=lambda row: row[key], reverse=(key in DESCENDING) != reverse)
    return known + [row for row in rows if row[key] is None]


# --- the table ----------------------------------------------------------------------------------------


def format_rows(rows: list[Row], width: int | None = None) -> list[str]:
    """Format rows as the lines of a table; the last one explains the mark of the best run.

    The columns are the results, the main parameters and all other parameters that differ between the runs,
    but not those that a resumed run may change, since they do not affect the training steps. What tells the
    runs apart stands first: it stays longest in a narrow terminal.
    """
    texts = {row["text_sha256"] for row in rows if row["text_sha256"]}
    differing = [
        name
        for name, spec in specs().items()
        if not spec.limits.may_change and len({row[name] for row in rows if row[name] is not None}) > 1
    ]
    names = ["run", "best_val_loss", *["text"] * (len(texts) > 1), "state", *differing, "step", "val_loss"]
    names += ["seconds", "tokens_per_second", "n_parameters"]
    names += [name for name in MAIN_PARAMETERS if name not in differing]
    headings = [HEADINGS.get(name, name) for name in names]
    cells = [[format_cell(row, name) for name in names] for row in rows]
    lines = format_table(headings, cells, width, right=set(headings).difference(TEXT_COLUMNS))
    if best := {row["text_sha256"] for row in rows if row["best"]}:
        lines.append("* the lowest" + (" on its text" if len(best) > 1 else " of these runs"))
    return lines


def format_cell(row: Row, name: str) -> str:
    """Format one value of a run; "-" if it is unknown."""
    value = row[name]
    if value is None or value == "":
        return "-"
    if name in ("best_val_loss", "val_loss"):
        return "* " * (name == "best_val_loss" and row["best"]) + format_number(value)
    if name in ("seconds", "tokens_per_second", "n_parameters"):
        return f"{value:,.0f}" if value < 1e12 else f"{value:.3g}"
    if name == "state":
        return value + ", resumed" * row["resumed"]
    if name == "step" and row["state"] != "done" and row["max_iters"] is not None:
        return f"{value} of {row['max_iters']}"
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if name == "run" or len(text) <= MAX_CELL_LENGTH else text[: MAX_CELL_LENGTH - 1] + "…"
