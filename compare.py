"""Compare runs: a table of what each was and what came of it, the newest first.

    python compare.py                                    every run in runs/
    python compare.py --sort best_val_loss               the best first; any heading or parameter will do
    python compare.py --tag search                       the runs with this word in their tag
    python compare.py --csv > runs.csv                   every value, for a spreadsheet; --json for a program

The lowest validation loss on a text is marked. A run that is running, was interrupted or is damaged is
listed with what is known of it. Nothing is changed.
"""

from __future__ import annotations

import argparse
import shutil
import sys

from utils_alg1.base.errors import DONE, Alg1Error
from utils_alg1.base.problems import raise_problems
from utils_alg1.base.settings import A_WORD, Limits
from utils_alg1.console.command_line import Flag, Parser, add_runs_dir_flag
from utils_alg1.console.messages import shown_on
from utils_alg1.console.script import run_script
from utils_alg1.utils_config_loader import ConfigLoader


def parse_command_line(argv: list[str] | None = None) -> argparse.Namespace:
    """Read compare.py's command line.

    Raises:
        Alg1Error: unknown flags, or a column that there is not.
        SystemExit: after --help.
    """
    from utils_alg1.report.compare import find_column

    parser = Parser(
        prog="python compare.py",
        description="Compare runs: a table of what each was and what came of it.",
        allow_abbrev=False,
    )
    add_runs_dir_flag(parser)
    column = "a heading such as tok/s or 'val loss', a value of --json or a parameter, the best first"
    parser.add_argument("--sort", action=Flag, default="run", metavar="NAME", limits=Limits(column))
    parser.add_argument("--reverse", action="store_true", help="the other way round")
    tag = Limits("only the runs with this text in their tag", may_be_empty=True, stands_for=(A_WORD,))
    parser.add_argument("--tag", action=Flag, limits=tag)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="every value as JSON")
    form.add_argument("--csv", action="store_true", help="every value as CSV")
    arguments, problems = parser.parse_with_suggestions(argv)
    raise_problems(problems, f"{parser.prog} --help lists every flag")
    arguments.sort = find_column(arguments.sort)
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse_command_line(argv)

    from utils_alg1.report import compare as compare_module
    from utils_alg1.run_directory import NO_RUN_HINT, list_runs, no_folder

    runs_dir = ConfigLoader.runs_dir(arguments.runs_dir)
    paths = list_runs(runs_dir)
    if not paths:
        raise Alg1Error(f"there is no run in {runs_dir}{no_folder(runs_dir)}", NO_RUN_HINT)
    rows = [compare_module.read_run(path) for path in paths]
    if arguments.tag is not None:
        rows = [row for row in rows if arguments.tag.casefold() in row["tag"].casefold()]
        if not rows:
            raise Alg1Error(
                f"none of the {len(paths)} runs in {runs_dir} has {arguments.tag!r} in its tag",
                "python compare.py without --tag lists them all",
            )
    compare_module.mark_best(rows)
    rows = compare_module.sort_rows(
        compare_module.sort_rows(rows, "run", False), arguments.sort, arguments.reverse
    )
    if arguments.json:
        text = compare_module.to_json(rows)
    elif arguments.csv:
        text = compare_module.to_csv(rows)
    else:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        text = "\n".join(compare_module.format_table(rows, width))
    print(shown_on(sys.stdout, text))
    return DONE


if __name__ == "__main__":
    run_script(main)
