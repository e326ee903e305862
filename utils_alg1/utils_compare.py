"""Runs side by side: what each run directory says of itself, and a table of it.

Reads only, and takes what it finds: a run that is being written, was interrupted or is damaged has fewer
values and a word for its state. Nothing here needs torch.
"""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from errors import Alg1Error
from files import read_json_object, read_metadata
from parameters import build_parts, part_problems, specs
from problems import names_in, nearest
from utils_alg1.utils_config_loader import RESUMED
from utils_alg1.utils_run_manager import LOCK_NAME, RUN_ID, checkpoint_dir
from utils_alg1.utils_text import number, one_line, perplexity

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
SPACE = "  "  # between columns


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
    recorded = read_record(path / "meta" / "full_config.json", row)
    measured = read_metrics_file(path / "logs" / "metrics.jsonl", row)
    final_path = path / "eval" / "final.json"
    final = read_final(final_path) if final_path.exists() else {}
    # A finished run that goes on has newer metrics than results.
    finished = False
    if final:
        finished = final["step"] >= (row["step"] or 0)
    if final and finished:
        row |= {name: value for name, value in final.items() if value is not None}
    else:
        row["seconds"] = seconds_until_checkpoint(checkpoint_dir(path))
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


def read_metrics_file(path: Path, row: Row) -> bool:
    """Take the evaluations, the speed and the newest step from logs/metrics.jsonl.

    A line that ends without a line's end is still being written. False for a file that is damaged before it;
    of the rows of single steps, by far the most, only both ends are looked at.
    """
    newest = b""
    try:
        with path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                if not (line.startswith(b"{") and line.endswith(b"}\n")):
                    return False
                newest = line
                if b'"loss/val"' in line or b'"tokens_per_second"' in line:
                    take_values(json.loads(line), row)
        row["step"] = count(json.loads(newest)["step"]) if newest else None
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, RecursionError):
        return False
    return True


def take_values(values: dict[str, Any], row: Row) -> None:
    """Make a row of metrics.jsonl the newest of the run, and its evaluation the best where it is.

    Raises:
        KeyError, ValueError: no run has written it.
    """
    step = count(values["step"])
    if "tokens_per_second" in values:
        row["tokens_per_second"] = quantity(values["tokens_per_second"])
    if "loss/val" not in values:
        return
    loss, train_loss = quantity(values["loss/val"]), quantity(values["loss/train"])
    row["val_loss"], row["train_loss"] = loss, train_loss
    if loss is not None and (row["best_val_loss"] is None or loss < row["best_val_loss"]):
        row["best_val_loss"], row["best_step"] = loss, step
        row["best_perplexity"] = perplexity(loss)
        row["best_bits_per_character"] = loss / math.log(2)


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
    checkpoints = sorted(folder.glob("step_*.safetensors"), key=lambda path: (len(path.name), path.name))
    try:
        return quantity(read_metadata(checkpoints[-1])["progress"]["seconds"])
    except (Alg1Error, IndexError, KeyError, TypeError, ValueError):
        return None


def in_use(path: Path) -> bool:
    """Whether a process holds the run. The lock is taken for an instant where it is free (see `lock_run`)."""
    lock = path / LOCK_NAME
    try:
        if lock.exists():
            with FileLock(lock, timeout=0):
                return False
    except Timeout:
        return True
    except OSError:  # a folder of somebody else's, or read-only: nobody here can tell
        pass
    return False


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
    key = text.strip().replace(" ", "_")
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


@dataclass
class Column:
    """A column of the table.

    Attributes:
        rank: those with the highest are left out first where the terminal is narrow; 0 never is.
        cell: the text of a row's value.
    """

    heading: str
    rank: int
    cell: Callable[[Row], str]
    to_the_right: bool = True


def columns_of(rows: list[Row]) -> list[Column]:
    """The main results and parameters, and what else shaped the training and is not the same in all."""
    differing = [
        name
        for name, spec in specs().items()
        if not spec.limits.may_change and len({cell(row[name]) for row in rows if row[name] is not None}) > 1
    ]
    names = [*MAIN, *(name for name in differing if name not in MAIN)]
    columns = [
        Column("run", 0, lambda row: one_line(row["run"]), to_the_right=False),
        Column("state", 2, state_cell, to_the_right=False),
        Column("step", 4, step_cell),
        Column(HEADINGS["best_val_loss"], 0, best_cell),
        Column(HEADINGS["val_loss"], 5, lambda row: number(row["val_loss"])),
    ]
    if len({row["text_sha256"] for row in rows if row["text_sha256"]}) > 1:
        columns.append(Column("text", 1, lambda row: cell(row["text"]), to_the_right=False))
    columns += [parameter_column(name, 3 if name in differing else 9) for name in names]
    columns += [
        Column(HEADINGS["n_parameters"], 8, lambda row: whole(row["n_parameters"])),
        Column(HEADINGS["tokens_per_second"], 7, lambda row: whole(row["tokens_per_second"])),
        Column("seconds", 6, lambda row: whole(row["seconds"])),
    ]
    return columns


def parameter_column(name: str, rank: int) -> Column:
    return Column(name, rank, lambda row: cell(row[name]))


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
    from rich.cells import cell_len, set_cell_size

    columns = columns_of(rows)
    cells = {id(c): [c.heading, *(c.cell(row) for row in rows)] for c in columns}
    widths = {id(c): max(cell_len(text) for text in cells[id(c)]) for c in columns}
    left_out = []

    def total() -> int:
        return sum(widths[id(c)] for c in columns) + len(SPACE) * (len(columns) - 1)

    while width is not None and total() > width and any(c.rank for c in columns):
        least = max(reversed(columns), key=lambda c: c.rank)
        columns.remove(least)
        left_out.append(least.heading)
    if width is not None and total() > width:  # even the run's name does not fit
        widths[id(columns[0])] = max(1, widths[id(columns[0])] - (total() - width))

    def fit(text: str, column: Column) -> str:
        size = widths[id(column)]
        if cell_len(text) > size:
            return set_cell_size(text, size - 1) + "…"
        return " " * (size - cell_len(text)) + text if column.to_the_right else set_cell_size(text, size)

    lines = [
        SPACE.join(fit(cells[id(column)][i], column) for column in columns).rstrip()
        for i in range(len(rows) + 1)
    ]
    if texts := {row["text_sha256"] for row in rows if row["best"]}:
        lines.append("* the lowest" + (" on its text" if len(texts) > 1 else " of these runs"))
    if left_out:
        lines.append(f"no room for: {', '.join(reversed(left_out))}")
    return [
        line if width is None or cell_len(line) <= width else set_cell_size(line, width).rstrip()
        for line in lines
    ]


def to_json(rows: list[Row]) -> str:
    """All values of all rows as a list of objects."""
    return json.dumps(rows, indent=2, ensure_ascii=False, default=str)


def to_csv(rows: list[Row]) -> str:
    """All values of all rows, under a line of names; what is not known is empty."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*RESULTS, *specs()], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().rstrip("\n")
