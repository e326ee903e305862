"""Search for better hyperparameters: many short runs of train.py, compared by their validation loss.

    python search.py                                     20 trials of configs/search.yaml
    python search.py --max-iters 500 --data book.txt     flags of train.py apply to every trial
    python search.py --space my.yaml --trials 50         another space (the study is named after the file)
    python search.py --workers 2                         two trials at a time; or start this on several
                                                         machines that share the folder
    python search.py --sampler grid                      every combination; random samples at random
    python search.py --storage sqlite:///search.db       a database instead of searches/NAME/journal.log

The same command continues the search, however it ended. Every trial is an ordinary run. Tables, plots and the
best parameters are written to searches/NAME/. Afterwards:

    python train.py --config searches/search/best

Requires Optuna: pip install -e '.[search]'
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from utils_alg1.base.errors import DONE, Alg1Error
from utils_alg1.console.command_line import (
    Options,
    Parser,
    add_config_flag,
    add_parameter_flags,
    not_empty,
    number,
    split_parameters,
)
from utils_alg1.console.script import run_script
from utils_alg1.utils_output import Console

if TYPE_CHECKING:
    from utils_alg1.search.space import Plan

SEARCHES_DIR = Path("searches")
MAX_NAME_LENGTH = 40  # characters of the name of a study, which begins the tags of its runs


@dataclass
class SearchOptions:
    """The command line of search.py; `training` holds the flags of train.py for every trial."""

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
    """Parse the command line of search.py. The values of train.py's flags stay text and are checked later.

    Raises:
        Alg1Error: unknown flags, or values out of range.
        SystemExit: after --help.
    """
    parser = Parser(
        prog="python search.py",
        usage="python search.py [--flag VALUE ...]",
        description="Search for better hyperparameters: many short runs, compared by their val loss.",
        epilog="The flags below `search` are those of train.py and apply to every trial.",
        argument_default=argparse.SUPPRESS,
    )
    add_search_flags(parser.add_argument_group("search"))
    add_parameter_flags(parser)
    values, others = split_parameters(parser.parse_args(argv))
    training = Options(values=values, config=others.pop("config", None))
    options = SearchOptions(training=training, **others)
    check_name(options.name, parser)
    return options


def add_search_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags of the search itself and --config."""
    space = "file of the search space (%(default)s)"
    group.add_argument("--space", type=not_empty, default="configs/search.yaml", metavar="PATH", help=space)
    study = "name of the study and of its folder in searches/ (default: that of the space file)"
    group.add_argument("--study", type=not_empty, default=None, metavar="NAME", help=study)
    trials = "number of trials, including those of earlier starts (%(default)s)"
    group.add_argument("--trials", type=number(int, minimum=1), default=20, metavar="N", help=trials)
    workers = "number of trials at a time (%(default)s)"
    group.add_argument("--workers", type=number(int, minimum=1), default=1, metavar="N", help=workers)
    sampler = "how values are chosen; tpe is Bayesian (%(default)s)"
    group.add_argument("--sampler", choices=("tpe", "random", "grid"), default="tpe", help=sampler)
    seed = "seed of the sampler (%(default)s)"
    group.add_argument("--sampler-seed", type=number(int, minimum=0), default=0, metavar="N", help=seed)
    no_prune = "run every trial to its end instead of stopping unpromising ones early"
    group.add_argument("--no-prune", dest="prune", default=True, action="store_false", help=no_prune)
    storage = "a journal file or a database URL (default: journal.log in the folder of the study)"
    group.add_argument("--storage", type=not_empty, default=None, metavar="PATH|URL", help=storage)
    add_config_flag(group)


def check_name(name: str, parser: Parser) -> None:
    """Raise Alg1Error if a study cannot have this name."""
    from utils_alg1.run_directory import sanitise_tag

    if sanitise_tag(name) != name or not 0 < len(name) <= MAX_NAME_LENGTH:
        expected = f"letters, digits, - _ and . within, at most {MAX_NAME_LENGTH}"
        parser.error(f"--study {name!r}: must be a name of {expected}")


def main(argv: list[str] | None = None) -> int:
    # 1. Command line and search space, checked before anything is created.
    options = parse_command_line(argv)
    require_optuna()
    from utils_alg1.console.signals import StopSignals
    from utils_alg1.search import report as report_module
    from utils_alg1.search import space as space_module
    from utils_alg1.search import study as study_module
    from utils_alg1.search import trials as trials_module

    space = space_module.read_space(options.space, options.sampler == "grid")
    plan = space_module.make_plan(space, options.training)
    space_module.check_environment(plan)

    # 2. The study: a new one, or an existing one that is continued.
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
    with Console() as console:
        console.log_to(study.folder / "search.log")
        console.block(report_module.describe_start(study, options.space, options.workers))
        if plan.no_defaults_reason and options.sampler != "grid":
            console.say(f"the defaults are not tried, they are outside the space: {plan.no_defaults_reason}")

        # 3. The trials, until all have ended or a signal arrives.
        search = trials_module.Search(study, console, threads_per_trial(plan, options.workers))
        with StopSignals(lambda: "stopping: the trials save and leave") as signals:
            trials_module.run_workers(search, options.workers, lambda: signals.received is not None)
        n_finished = len(study.finished())
        if signals.received and n_finished < study.n_trials:
            command = shlex.join(["python", "search.py", *(sys.argv[1:] if argv is None else argv)])
            console.say(f"stopped after {n_finished} of {study.n_trials} trials; go on with: {command}")
            return 128 + signals.received

        # 4. Tables, plots and the best parameters.
        report_module.write_results(study, console)
        report_module.show_table(study, console)
        console.block(report_module.describe_end(study))
        return DONE


def require_optuna() -> None:
    """Raise Alg1Error if Optuna is not installed; otherwise turn off its messages."""
    try:
        import optuna
    except ImportError:
        raise Alg1Error(
            "search.py needs Optuna, which is not installed", "pip install -e '.[search]'"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # Optuna 4 marks TPESampler(constant_liar=True), which several workers need, as experimental.
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


def threads_per_trial(plan: Plan, n_workers: int) -> int | None:
    """Divide the CPU cores among several workers; return None if --threads or train.py decides."""
    if n_workers == 1 or "threads" in plan.base_options.values or plan.fixed.get("threads") != 0:
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // n_workers)


if __name__ == "__main__":
    run_script(main)
