"""Search for better hyperparameters: many short runs of train.py, compared by their validation loss.

    python search.py                                     20 trials of configs/search.yaml
    python search.py --max-iters 500 --data book.txt     flags of train.py apply to every trial
    python search.py --space my.yaml --trials 50         another space (the study is named after the file)
    python search.py --workers 2                         two trials at a time; or start the command twice
    python search.py --sampler grid                      every combination; random samples at random
    python search.py --storage postgresql://...          a database for several machines, in place of
                                                         searches/NAME/study.db

The same command continues the search, however it ended. Every trial is an ordinary run. Tables, plots and the
best parameters are written to searches/NAME/. Afterwards:

    python train.py --config searches/search/best.yaml

Requires Optuna: pip install -e '.[search]'
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

from utils_alg1.base.errors import DONE, Alg1Error
from utils_alg1.base.scripts import command
from utils_alg1.base.text import shell_join
from utils_alg1.console.command_line import (
    Options,
    Parser,
    add_config_flag,
    add_parameter_flags,
    database_url,
    not_empty,
    number,
    path_name,
    split_parameters,
)
from utils_alg1.console.script import run_script
from utils_alg1.training.launcher import refuse_torchrun
from utils_alg1.utils_output import Console

SEARCHES_DIR = Path("searches")
MAX_NAME_LENGTH = 40  # characters of the name of a study, which begins the tags of its runs


def parse_command_line(argv: list[str] | None = None) -> tuple[argparse.Namespace, Options]:
    """Parse the flags of the search, and those of train.py for every trial, which are checked later.

    Raises:
        Alg1Error: unknown flags, or values out of range.
        SystemExit: after --help.
    """
    from utils_alg1.run_directory import sanitise_tag

    parser = Parser(
        prog=command("search.py"),
        usage="%(prog)s [--flag VALUE ...]",
        description="Search for better hyperparameters: many short runs, compared by their val loss.",
        epilog="The flags below `search` are those of train.py and apply to every trial.",
    )
    group = parser.add_argument_group("search")
    space = "file of the search space (%(default)s)"
    group.add_argument("--space", type=path_name, default="configs/search.yaml", metavar="PATH", help=space)
    study = "name of the study and of its folder in searches/ (default: that of the space file)"
    group.add_argument("--study", type=not_empty, metavar="NAME", help=study)
    trials = "number of trials, including those of earlier starts (%(default)s)"
    group.add_argument("--trials", type=number(int, minimum=1), default=20, metavar="N", help=trials)
    workers = "number of trials at a time (%(default)s)"
    group.add_argument("--workers", type=number(int, minimum=1), default=1, metavar="N", help=workers)
    sampler = "how values are chosen; tpe is Bayesian (%(default)s)"
    group.add_argument("--sampler", choices=("tpe", "random", "grid"), default="tpe", help=sampler)
    seed = "seed of the sampler (%(default)s); a search of one worker without a break repeats itself"
    group.add_argument("--sampler-seed", type=number(int, minimum=0), default=0, metavar="N", help=seed)
    no_prune = "run every trial to its end instead of stopping unpromising ones early"
    group.add_argument("--no-prune", dest="prune", action="store_false", help=no_prune)
    storage = "URL of a database (default: study.db in the folder of the study)"
    group.add_argument("--storage", type=database_url, metavar="URL", help=storage)
    add_config_flag(group)
    add_parameter_flags(parser)
    values, flags = split_parameters(parser.parse_args(argv))
    options = Options(values, config=flags.pop("config"))
    arguments = argparse.Namespace(**flags)
    arguments.study = arguments.study or Path(arguments.space).stem
    if sanitise_tag(arguments.study) != arguments.study or not 0 < len(arguments.study) <= MAX_NAME_LENGTH:
        expected = f"letters, digits, - _ and . within, at most {MAX_NAME_LENGTH}"
        parser.error(f"--study {arguments.study!r}: must be a name of {expected}")
    return arguments, options


def main(argv: list[str] | None = None) -> int:
    # 1. Command line and search space, checked before anything is created.
    arguments, options = parse_command_line(argv)
    refuse_torchrun("search.py", "start it alone; --workers 2 runs two trials at a time")
    require_optuna()
    from utils_alg1.search.gpus import Gpus
    from utils_alg1.search.results import finished_trials, write_results
    from utils_alg1.search.salvage import open_file
    from utils_alg1.search.space import grid_points, make_plan, read_space
    from utils_alg1.search.storage import FILE_NAME, open_storage, storage_guard
    from utils_alg1.search.study import open_study
    from utils_alg1.search.trials import Search

    is_grid = arguments.sampler == "grid"
    plan = make_plan(read_space(arguments.space, is_grid), options)
    n_trials, folder = arguments.trials, SEARCHES_DIR / arguments.study
    points = grid_points(plan.space) if is_grid else []
    if is_grid:
        n_trials = min(n_trials, len(points))

    database = folder / FILE_NAME
    with Console() as console, storage_guard(arguments.storage or str(database)):
        # 2. The study: a new one, or an existing one that is continued.
        if arguments.storage:
            storage = open_storage(arguments.storage)
        else:
            storage = open_file(database, folder.name, console)
        study = open_study(storage, plan, folder, arguments, console)
        console.log_to(folder / "search.log")
        n_finished = len(finished_trials(study))
        trials = f"{n_trials}" + (f", {n_finished} of them finished" if n_finished else "")
        gpus = Gpus(plan.fixed.get("device"))
        how = f"{arguments.sampler}, {arguments.workers} at a time"
        how += f", each on one of {len(gpus.names)} GPUs" if gpus.names else ""
        space = f"{arguments.space}: {', '.join(plan.space)}"
        console.block({"study": str(folder), "space": space, "text": plan.text, "trials": trials, "how": how})

        # 3. The trials, until all have ended or a signal arrives.
        threads = threads_per_trial(plan.fixed.get("threads"), arguments.workers)
        if threads:
            plan.options.values.pop("threads", None)  # --threads 0, which these take the place of
        search = Search(storage, study, plan, folder, n_trials, threads, gpus, console, points)
        stopped = search.run(arguments.workers)
        n_finished = len(finished_trials(study))
        if stopped and n_finished < n_trials:
            again = f"{command('search.py')} {shell_join(sys.argv[1:] if argv is None else argv)}".strip()
            console.say(f"stopped after {n_finished} of {n_trials} trials; continue with: {again}")
            return 128 + stopped

        # 4. Tables, pictures and the best parameters.
        write_results(study, plan, folder, console)
        return DONE


def require_optuna() -> None:
    """Raise Alg1Error if Optuna is not installed; otherwise turn off its messages."""
    try:
        import optuna
    except ImportError:
        message = "search.py needs Optuna, which is not installed"
        raise Alg1Error(message, "source .venv/bin/activate, or pip install -e '.[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)  # the heartbeat


def threads_per_trial(threads: int | None, n_workers: int) -> list[str]:
    """Return the flag that divides the CPU cores among several workers, unless --threads is given."""
    if n_workers == 1 or threads != 0:
        return []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [f"--threads={max(1, cores // n_workers)}"]


if __name__ == "__main__":
    run_script(main)
