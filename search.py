"""Search for better hyperparameters: many short runs of train.py, compared by their validation loss.

    python search.py                                     20 trials of configs/search.yaml
    python search.py --max-iters 500 --data book.txt     train.py's flags, the same in every trial
    python search.py --space my.yaml --trials 50         another space (the study is named after the file)
    python search.py --workers 2                         two trials at a time; or start this on several
                                                         machines that share the folder
    python search.py --sampler grid                      every combination; random draws them blindly
    python search.py --storage sqlite:///search.db       a database instead of searches/NAME/journal.log

The same command again goes on where the last one ended, however it ended. Every trial is an ordinary run.
Tables, pictures and the best parameters lie in searches/NAME/. Afterwards:

    python train.py --config searches/search/best

Optuna is needed: pip install -e '.[search]'
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from utils_alg1.base.errors import DONE, Alg1Error
from utils_alg1.base.problems import Problem, raise_problems
from utils_alg1.base.settings import A_PATH, Limits
from utils_alg1.console.command_line import (
    Flag,
    Options,
    Parser,
    add_config_flag,
    add_parameter_flags,
    split_parameters,
)
from utils_alg1.console.script import run_script
from utils_alg1.utils_output import Console

if TYPE_CHECKING:
    from utils_alg1.search.space import Plan

SEARCHES_DIR = Path("searches")
LONGEST_NAME = 40  # characters of a study's name: it begins the tags of the runs


@dataclass
class SearchOptions:
    """The command line of search.py: what to search and how, and train.py's flags for every trial."""

    space: str
    study: str | None
    trials: int
    workers: int
    sampler: str
    sampler_seed: int
    prune: bool
    storage: str | None
    training: Options

    @property
    def name(self) -> str:
        return self.study or Path(self.space).stem


def parse_command_line(argv: list[str] | None = None) -> SearchOptions:
    """Read search.py's command line. The values of train.py's flags stay text: they are checked later.

    Raises:
        Alg1Error: unknown flags, or values out of range.
        SystemExit: after --help.
    """
    parser = Parser(
        prog="python search.py",
        usage="python search.py [--flag VALUE ...]",
        description="Search for better hyperparameters: many short runs, compared by their val loss.",
        epilog="The flags below `search` are train.py's: they hold for every trial.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    search = parser.add_argument_group("search")
    space = Limits("what is searched", stands_for=(".yaml", A_PATH))
    search.add_argument("--space", action=Flag, default="configs/search.yaml", metavar="PATH", limits=space)
    study = Limits("of its folder in searches/ (the space file's name)")
    search.add_argument("--study", action=Flag, default=None, metavar="NAME", limits=study)
    trials = Limits("in all, those of earlier starts too", minimum=1)
    search.add_argument("--trials", action=Flag, type=int, default=20, limits=trials)
    workers = Limits("trials at a time", minimum=1)
    search.add_argument("--workers", action=Flag, type=int, default=1, limits=workers)
    sampler = Limits("what chooses the next trial; tpe is Bayesian", choices=("tpe", "random", "grid"))
    search.add_argument("--sampler", action=Flag, default="tpe", limits=sampler)
    seed = Limits("of its draws", minimum=0)
    search.add_argument("--sampler-seed", action=Flag, type=int, default=0, limits=seed)
    search.add_argument(
        "--no-prune",
        dest="prune",
        default=True,
        action="store_false",
        help="let hopeless trials run to their end",
    )
    storage = Limits("a journal file or a database (the study's own)")
    search.add_argument("--storage", action=Flag, default=None, metavar="PATH|URL", limits=storage)
    add_config_flag(search)
    add_parameter_flags(parser)
    namespace, problems = parser.parse_with_suggestions(argv)
    values, given = split_parameters(namespace)
    training = Options(values=values, config=given.pop("config", None))
    options = SearchOptions(training=training, **given)
    raise_problems([*problems, *name_problems(options)], f"{parser.prog} --help lists every flag")
    return options


def name_problems(options: SearchOptions) -> list[Problem]:
    """What is wrong with the study's name."""
    from utils_alg1.run_directory import sanitise_tag

    good = sanitise_tag(options.name) == options.name and 0 < len(options.name) <= LONGEST_NAME
    if good:
        return []
    wanted = f"letters, digits, - _ and . within, at most {LONGEST_NAME}"
    return [Problem(f"--study {options.name!r}: must be a name of {wanted}", ())]


def main(argv: list[str] | None = None) -> int:
    # 1. Command line and space, checked before anything is created.
    options = parse_command_line(argv)
    require_optuna()
    from utils_alg1.console.signals import StopSignals
    from utils_alg1.search import report as report_module
    from utils_alg1.search import space as space_module
    from utils_alg1.search import study as study_module
    from utils_alg1.search import trials as trials_module

    space = space_module.read_space(options.space, options.sampler == "grid")
    plan = space_module.make_plan(space, options.training)
    space_module.check_surroundings(plan)

    # 2. The study: a new one, or one that goes on.
    settings = study_module.Settings(
        options.name,
        SEARCHES_DIR / options.name,
        options.storage,
        options.trials,
        options.sampler,
        options.sampler_seed,
        options.prune,
    )
    study = study_module.Study(plan, settings)
    with contextlib.closing(Console()) as console:
        console.log_to(study.folder / "search.log")
        console.block(report_module.describe_start(study, options.space, options.workers))
        if plan.no_defaults and options.sampler != "grid":
            console.say(f"the defaults are not tried, they are outside the space: {plan.no_defaults}")

        # 3. Trials, until all have ended or a signal comes.
        search = trials_module.Search(study, console, threads_of_a_trial(plan, options.workers))
        with StopSignals(lambda: "stopping: the trials save and leave") as signals:
            trials_module.run_workers(search, options.workers, lambda: signals.received is not None)
        n_finished = len(study.finished())
        if signals.received and n_finished < study.wanted:
            again = shlex.join(["python", "search.py", *(sys.argv[1:] if argv is None else argv)])
            console.say(f"stopped after {n_finished} of {study.wanted} trials; go on with: {again}")
            return 128 + signals.received

        # 4. Tables, pictures and the best parameters.
        report_module.write_results(study, console)
        report_module.show_table(study, console)
        console.block(report_module.describe_end(study))
        return DONE


def require_optuna() -> None:
    """Raise Alg1Error where Optuna is not installed; keep it quiet where it is."""
    try:
        import optuna
    except ImportError:
        raise Alg1Error(
            "search.py needs Optuna, which is not installed", "pip install -e '.[search]'"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # In Optuna 4 the sampler's way of serving several workers counts as experimental.
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def threads_of_a_trial(plan: Plan, n_workers: int) -> int | None:
    """A fair share of the cores for each of several workers; None where a parameter or train.py decides."""
    if n_workers == 1 or "threads" in plan.given.values or plan.fixed.get("threads") != 0:
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // n_workers)


if __name__ == "__main__":
    run_script(main)
