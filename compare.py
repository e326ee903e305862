"""Compare runs: print a table of their parameters and results, the newest run first.

    python compare.py                                    every run in runs/
    python compare.py --sort best_val_loss               the best first; takes any heading or parameter
    python compare.py --tag search                       the runs with this word in their tag
    python compare.py --csv > runs.csv                   every value as CSV; --json for JSON

The lowest validation loss on each text is marked. A run that is still training, was interrupted or is damaged
is listed with the values that are known. Runs are only read.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys

from utils_alg1.base.errors import DONE, Alg1Error
from utils_alg1.console.command_line import Parser, add_runs_dir_flag, not_empty
from utils_alg1.console.messages import text_for_stream
from utils_alg1.console.script import run_script
from utils_alg1.console.table import to_csv
from utils_alg1.report.compare import Row, find_column, format_rows, mark_best, read_run, sort_rows
from utils_alg1.run_directory import NO_RUN_HINT, list_runs, no_folder
from utils_alg1.utils_config_loader import ConfigLoader


def parse_command_line(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line of compare.py.

    Raises:
        Alg1Error: unknown flags, or a --sort column that does not exist.
        SystemExit: after --help.
    """
    parser = Parser(
        prog="python compare.py",
        description="Compare runs: print a table of their parameters and results.",
    )
    add_runs_dir_flag(parser)
    column = "a heading such as tok/s or 'val loss', a value of --json or a parameter, the best first"
    parser.add_argument(
        "--sort", type=not_empty, default="run", metavar="NAME", help=f"sort by {column} (%(default)s)"
    )
    parser.add_argument("--reverse", action="store_true", help="reverse the order")
    parser.add_argument("--tag", metavar="TEXT", help="only the runs with this text in their tag")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print every value as JSON")
    output.add_argument("--csv", action="store_true", help="print every value as CSV")
    arguments = parser.parse_args(argv)
    arguments.sort = find_column(arguments.sort)
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse_command_line(argv)
    rows = read_runs(ConfigLoader.runs_dir(arguments.runs_dir), arguments.tag)
    rows = sort_rows(rows, arguments.sort, arguments.reverse)
    if arguments.json:
        text = json.dumps(rows, indent=2, ensure_ascii=False)
    elif arguments.csv:
        text = to_csv(rows[0], rows).removesuffix("\n")
    else:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        text = "\n".join(format_rows(rows, width))
    print(text_for_stream(sys.stdout, text))
    return DONE


def read_runs(runs_dir: str, tag: str | None) -> list[Row]:
    """Read the runs in a folder, or those with `tag` in their tag, the newest first, and mark the best.

    Raises:
        Alg1Error: there is no such run.
    """
    paths = list_runs(runs_dir)
    if not paths:
        raise Alg1Error(f"there is no run in {runs_dir}{no_folder(runs_dir)}", NO_RUN_HINT)
    rows = [read_run(path) for path in reversed(paths)]
    if tag is not None:
        rows = [row for row in rows if tag.casefold() in row["tag"].casefold()]
        if not rows:
            raise Alg1Error(
                f"none of the {len(paths)} runs in {runs_dir} has {tag!r} in its tag",
                "python compare.py without --tag lists them all",
            )
    mark_best(rows)
    return rows


if __name__ == "__main__":
    run_script(main)
