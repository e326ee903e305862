"""Compare runs: print a table of their parameters and results, the newest run first.

    python compare.py                                    every run in runs/
    python compare.py --sort export_val_loss             the best first; takes any heading or parameter
    python compare.py --tag search                       the runs with this word in their tag
    python compare.py --csv > runs.csv                   every value as CSV; --json for JSON
    python compare.py latest --send-to aim               give Aim the curves that it lacks; or tensorboard

The lowest validation loss on each val part of a text is marked: that of the export on all of it. Of a run
without it, unfinished or of an earlier version, the lowest loss of an evaluation is shown, and marked so.
A damaged run is listed with the values that are known. Runs are only read, unless --send-to is given.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

from parameters import MAIN_PARAMETERS, Parameters, specs
from utils_alg1.base.errors import DONE, Alg1Error
from utils_alg1.base.files import read_json_object
from utils_alg1.base.problems import nearest, raise_problems, shown
from utils_alg1.base.scripts import command
from utils_alg1.base.text import EVALUATION_NOTE, bits_per_character, format_number, perplexity, text_name
from utils_alg1.console.command_line import Parser, add_runs_dir_flag
from utils_alg1.console.messages import print_error, text_for_stream
from utils_alg1.console.script import run_script
from utils_alg1.console.table import format_table, to_csv
from utils_alg1.network.tensor_file import read_metadata
from utils_alg1.run_directory import RUN_ID, RunFolder, checkpoint_paths, existing_runs, find_run, in_use
from utils_alg1.tracking.metrics_file import EACH_STEP, read_metrics
from utils_alg1.utils_config_loader import RESUMED, ConfigLoader

Row = dict[str, Any]  # a run: the values of RESULTS and of all parameters by name; None if unknown

FINAL_KEYS = {  # result -> key in eval/final.json
    "step": "steps",
    "best_val_loss": "best_val_loss",
    "best_step": "best_step",
    "val_loss": "val_loss",
    "train_loss": "train_loss",
    "tokens": "tokens",
    "tokens_per_second": "tokens_per_second_overall",
    "seconds": "seconds_in_loop",
}
DERIVED = (
    "best_perplexity",
    "best_bits_per_character",
    "n_parameters",
    "text",
    "text_sha256",
    "val_text",
    "val_sha256",
)
RANKED = "export_val_loss"  # ranks the runs; results of earlier versions do not have it
RESULTS = ("run", "tag", "state", "resumed", "best", RANKED, *FINAL_KEYS, *DERIVED)
HEADINGS = {"tokens_per_second": "tok/s", "n_parameters": "parameters"}  # the others are the names
TEXT_COLUMNS = ("run", "state", "text", "val_text")  # aligned to the left
MAX_CELL_LENGTH = 40  # characters of a parameter or a text


def parse_command_line(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; raises Alg1Error for unknown flags and an unknown column of --sort."""
    description = "Compare runs: print a table of their parameters and results."
    parser = Parser(prog=command("compare.py"), description=description)
    runs = "only these runs: their names, paths, or latest (default: all)"
    parser.add_argument("runs", nargs="*", metavar="RUN", help=runs)
    add_runs_dir_flag(parser)
    column = "sort by a heading such as tok/s, a value of --json or a parameter, the best first (%(default)s)"
    parser.add_argument("--sort", type=find_column, default="run", metavar="NAME", help=column)
    parser.add_argument("--reverse", action="store_true", help="reverse the order")
    parser.add_argument("--tag", metavar="TEXT", help="only the runs with this text in their tag")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print every value as JSON")
    output.add_argument("--csv", action="store_true", help="print every value as CSV")
    send_to = "send the curves of the runs to a tracker that was off, or has lost them"
    output.add_argument("--send-to", choices=("aim", "tensorboard"), help=send_to)
    arguments = parser.parse_args(argv)
    if arguments.send_to and (arguments.sort != "run" or arguments.reverse):
        flag = "--reverse" if arguments.sort == "run" else "--sort"
        parser.error(f"{flag}: not allowed with --send-to", "it orders the table, and --send-to prints none")
    if files := [name for name in arguments.runs if name.endswith((".csv", ".json"))]:
        hint = f"the table is printed; to keep it in a file: {command('compare.py')} --csv > {files[0]}"
        parser.error(f"belongs to no flag: {shown(files[0])}", hint)
    return arguments


def find_column(text: str) -> str:
    """Return the name of the value that --sort names; raises Alg1Error with the nearest if there is none."""
    aliases = {heading: name for name, heading in HEADINGS.items()}
    key = text.strip().lower().replace(" ", "_")
    name = aliases.get(key, key)
    if name not in (*RESULTS, *specs()):
        suggestion = nearest(key, [*RESULTS, *specs(), *aliases])
        known = f"{', '.join(RESULTS)}, or any parameter of train.py"
        raise Alg1Error(f"--sort {text}: no such column{suggestion}", known)
    return name


def main(argv: list[str] | None = None) -> int:
    arguments = parse_command_line(argv)
    runs_dir, tag = arguments.runs_dir or ConfigLoader().runs_dir, arguments.tag
    named = dict.fromkeys(find_run(runs_dir, name) for name in arguments.runs)
    found = {path: read_run(path) for path in named or reversed(existing_runs(runs_dir))}
    if tag is not None:
        found = {path: row for path, row in found.items() if tag.casefold() in row["tag"].casefold()}
        if not found:
            raise Alg1Error(f"no run in {runs_dir} has {tag!r} in its tag", "--tag left out lists them all")
    if arguments.send_to:
        return send_runs(list(found), arguments.send_to)
    rows = list(found.values())
    mark_best(rows)
    rows = sort_rows(rows, arguments.sort, arguments.reverse)
    if arguments.json:
        text = json.dumps(rows, indent=2, ensure_ascii=False)
    elif arguments.csv:
        text = to_csv(rows[0], rows).removesuffix("\n")
    else:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        text = "\n".join(format_rows(rows, width, arguments.sort))
    print(text_for_stream(sys.stdout, text))
    return DONE


def send_runs(paths: list[Path], tracker: str) -> int:
    """Send the curves of runs to a tracker; of several, those that cannot be sent are left out, and told."""
    from utils_alg1.tracking.sending import send

    code = DONE
    for path in paths:
        try:
            print(send(path, tracker), flush=True)
        except Alg1Error as error:
            if len(paths) == 1:
                raise
            print_error(error)
            code = error.exit_code
    return code


def read_run(path: Path) -> Row:
    """Read a run directory.

    The state is "running" if a process holds the lock of the run, else "damaged" if one of its files is
    invalid, "done" if the results are those of the newest step, or "unfinished". The training time of an
    unfinished run is that of its newest checkpoint.
    """
    row: Row = dict.fromkeys((*RESULTS, *specs()))
    named = RUN_ID.fullmatch(path.name)  # not if it was renamed
    row |= {"run": path.name, "tag": named[3] or "" if named else "", "resumed": False, "best": False}
    row["state"] = "unfinished"
    damaged = False
    for read in (read_evaluations, read_record, read_final):
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
    if in_use(path):
        row["state"] = "running"
    elif damaged:
        row["state"] = "damaged"
    return row


def read_record(run: RunFolder, row: Row) -> None:
    """Add the parameters and the text of a run, and whether a resume has taken steps (of those in the row).

    Values that train.py would refuse are damage.
    """
    record = read_json_object(run.record_path)
    corpus = record["corpus"]
    given = {name: value for name, value in record["parameters"].items() if name in specs()}
    sized = Parameters.from_values(given | {"vocab_size": check(corpus["vocab_size"])}, {})
    raise_problems(Parameters.from_values(given, {}).problems() + sized.problems())
    row |= given | {"n_parameters": sized.model.n_parameters}
    # A resume that took no step wrote the results again. Earlier versions kept no parts of a run.
    took_steps = any(part["step"] < (row["step"] or 0) for part in record.get("parts", [])[1:])
    row["resumed"] = took_steps or RESUMED in record["origins"].values()
    row["text"], row["text_sha256"] = text_name(corpus["path"]), str(corpus["sha256"])
    if held_out := corpus.get("held_out"):
        row["val_text"], row["val_sha256"] = text_name(held_out["path"]), str(held_out["sha256"])


def read_evaluations(run: RunFolder, row: Row) -> None:
    """Add the newest step, the speed and the evaluations of a run; a damaged row raises ValueError."""
    for values in read_metrics(run.metrics_path, strict=True):
        # A training loss is logged before the update of its step, everything else after it.
        row["step"] = check(values["step"]) + (EACH_STEP in values)
        if "tokens_per_second" in values:
            row["tokens_per_second"] = check(values["tokens_per_second"])
        if "tokens" in values:
            row["tokens"] = check(values["tokens"])
        if "loss/val" in values:
            loss = check(values["loss/val"])
            row["train_loss"] = check(values["loss/train"])
            row["val_loss"] = loss
            if loss is not None and (row["best_val_loss"] is None or loss < row["best_val_loss"]):
                row["best_val_loss"], row["best_step"] = loss, row["step"]


def read_final(run: RunFolder, row: Row) -> None:
    """Add the results of a run that is done. If the metrics are newer, it was resumed and is not done."""
    if run.final_path.exists():
        final = read_json_object(run.final_path)
        values = {name: check(final[key]) for name, key in FINAL_KEYS.items() if final[key] is not None}
        if RANKED in final:
            values[RANKED] = check(final[RANKED])
        if values["step"] >= (row["step"] or 0):
            row |= values | {"state": "done"}


def check(value: Any) -> Any:
    """Return a number, None for NaN and infinity, as of a diverged run; raises ValueError for all else."""
    if type(value) not in (int, float) or value < 0:
        raise ValueError(f"{value!r} is not a non-negative number")
    return value if value <= sys.float_info.max else None


def rank(row: Row) -> tuple[bool, float] | None:
    """Return what ranks a run: whether its loss is only that of an evaluation, and the loss; None without."""
    loss = row["best_val_loss"] if row[RANKED] is None else row[RANKED]
    return None if loss is None else (row[RANKED] is None, loss)


def val_part(row: Row) -> tuple[str, str | float | None]:
    """Return what tells the val part of a run: the text, and the held-out text or the fraction."""
    return row["text_sha256"], row["val_sha256"] or row["val_split"]


def mark_best(rows: list[Row]) -> None:
    """Mark the best on each val part; losses on different ones are not comparable.

    An evaluation reads little of it, so its loss may be low by luck: none is marked beside that of an export.
    """
    lowest: dict[tuple[str, str | float | None], tuple[bool, float]] = {}
    for row in rows:
        if row["state"] != "damaged" and row["text_sha256"] and (found := rank(row)):
            lowest[val_part(row)] = min(found, lowest.get(val_part(row), found))
    for row in rows:
        row["best"] = row["state"] != "damaged" and rank(row) == lowest.get(val_part(row), ())


def sort_rows(rows: list[Row], key: str, reverse: bool) -> list[Row]:
    """Sort rows, which come with the newest run first, by one value, the best first or in ascending order.

    Rows without the value come last, in the reverse order too.
    """
    if key == "run":
        return rows[::-1] if reverse else rows

    def value(row: Row) -> Any:
        return rank(row) if key == RANKED else row[key]

    known = [row for row in rows if value(row) is not None]
    known.sort(key=value, reverse=(key in ("best", "tokens_per_second")) != reverse)
    return known + [row for row in rows if value(row) is None]


def format_rows(rows: list[Row], width: int | None = None, sorted_by: str = "run") -> list[str]:
    """Format rows as the lines of a table for so many terminal columns; None is unlimited.

    The columns are the results, what the rows are sorted by, the main parameters and all other parameters
    that differ between the runs, but not those that a resumed run may change, since they do not affect the
    training steps. What tells the runs apart stands first: it stays longest in a narrow terminal.
    """
    n_texts = len({row["text_sha256"] for row in rows if row["text_sha256"]})
    differing = [
        name
        for name, spec in specs().items()
        if not spec.may_change and len({row[name] for row in rows if row[name] is not None}) > 1
    ]
    names = ["run", RANKED, "text", "val_text", "state", *differing, "step", "best_val_loss", "val_loss"]
    names += ["seconds", "tokens_per_second", "n_parameters"]
    if n_texts < 2:
        names.remove("text")
    if len({row["val_sha256"] for row in rows if row["text_sha256"]}) < 2:
        names.remove("val_text")
    names += [name for name in MAIN_PARAMETERS if name not in differing]
    if sorted_by not in (*names[:2], "best"):  # the marks tell the best
        names = [name for name in names if name != sorted_by]
        names.insert(2, sorted_by)
    headings = [HEADINGS.get(name, name) for name in names]
    cells = [[format_cell(row, name) for name in names] for row in rows]
    lines = format_table(headings, cells, width, right=set(headings).difference(TEXT_COLUMNS))
    notes = []
    if any(row["best"] for row in rows):
        n_parts = len({val_part(row) for row in rows if row["text_sha256"]})
        where = "on its text" if n_texts > 1 else "on its val part" if n_parts > 1 else "of these runs"
        notes.append(f"* the lowest {where}")
    if any((rank(row) or (False,))[0] for row in rows):
        notes.append(EVALUATION_NOTE)
    return lines + [line for note in notes for line in textwrap.wrap(note, width or len(note))]


def format_cell(row: Row, name: str) -> str:
    """Format one value of a run; "-" if it is unknown."""
    value = row[name]
    if name == RANKED and (ranked := rank(row)):
        is_evaluation, loss = ranked
        return "* " * row["best"] + "~ " * is_evaluation + format_number(loss)
    if value is None or value == "":
        return "-"
    if name in ("best_val_loss", "val_loss"):
        return format_number(value)
    if name in ("seconds", "tokens", "tokens_per_second", "n_parameters"):
        return f"{value:,.0f}" if value < 1e12 else f"{value:.3g}"
    if name == "state":
        return f"{value}, resumed" if row["resumed"] else value
    if name == "step" and row["max_iters"] not in (None, value):
        return f"{value} of {row['max_iters']}"
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if name == "run" or len(text) <= MAX_CELL_LENGTH else text[: MAX_CELL_LENGTH - 1] + "…"


if __name__ == "__main__":
    run_script(main)
