"""The search space: reads the space file and combines it with the command line into a plan."""

from __future__ import annotations

import itertools
import math
import os
import random
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parameters import specs
from utils_alg1.base.errors import Alg1Error
from utils_alg1.base.problems import Problem, explain, raise_problems, shown
from utils_alg1.base.scripts import command, shipped
from utils_alg1.base.settings import Spec, coerce
from utils_alg1.console.command_line import Options
from utils_alg1.utils_config_loader import ConfigLoader

if TYPE_CHECKING:
    import optuna

Space = dict[str, Any]  # the Optuna distribution of each searched parameter
MAX_GRID_POINTS = 100_000
# These cannot be searched: the losses of the trials would not be comparable.
EVALUATION_PARAMETERS = (
    "seed",
    "data_path",
    "val_data",
    "train_split",
    "val_split",
    "eval_iters",
    "eval_interval",
)
# The search sets these itself: it names the runs, and several runs cannot share one --output.
RESERVED_PARAMETERS = ("run_tag", "output")
# These have no place in a search, wherever they come from: a trial that ends by max_seconds would be resumed
# again and again, and every trial would write its export to the same place.
UNUSABLE = {"max_seconds": "a trial would be resumed again and again", "output": "trials cannot share one"}
# A resumed run may change these, but not a study that is continued: its trials would not be comparable.
BUDGET_PARAMETERS = ("max_iters", "eval_interval", "eval_iters", "patience")
SHOWN_DIGITS = 16  # of the SHA-256 of the text
SPACE_HINT = (
    f"configs/search.yaml shows how a space is written; {command('train.py')} --help explains every name"
)


def read_space(path: str | Path, for_grid: bool) -> Space:
    """Read a space file, which maps each parameter to a list of choices or to a range with low and high.

    Args:
        path: a YAML or JSON file.
        for_grid: require that the number of values is finite.

    Raises:
        Alg1Error: the file is invalid; the message lists every problem.
    """
    space: Space = {}
    problems: list[Problem] = []
    try:
        entries = ConfigLoader.load_file(shipped(path))
    except Alg1Error as error:
        raise Alg1Error(error.message, f"{error.hint}, or name another --space") from None
    for name, entry in entries.items():
        try:
            space[name] = read_domain(name, entry)
            if for_grid:
                grid_values(space[name])
        except ValueError as error:
            problems += [Problem(f"{path}: {name}: {text}") for text in error.args]
    if not space and not problems:
        problems.append(Problem(f"{path}: names no parameter to search"))
    raise_problems(problems, SPACE_HINT)
    if for_grid and math.prod(len(grid_values(domain)) for domain in space.values()) > MAX_GRID_POINTS:
        raise Alg1Error(f"{path}: the grid has more than {MAX_GRID_POINTS:,} points", "use --sampler random")
    return space


def read_domain(name: Any, entry: Any) -> Any:
    """Return the Optuna distribution of an entry of a space file. Raises ValueError with what is wrong."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if name not in specs():
        raise ValueError(f"unknown name{explain(str(name), specs())}")
    if name in ("runs_dir", *RESERVED_PARAMETERS):
        raise ValueError("says where a run is kept; it cannot be searched")
    if name in EVALUATION_PARAMETERS:
        raise ValueError("changes how the loss is measured; losses could not be compared")
    if name in UNUSABLE:
        raise ValueError(f"cannot be searched: {UNUSABLE[name]}")
    spec = specs()[name]
    if isinstance(entry, list):
        return CategoricalDistribution(list(dict.fromkeys(read_values(spec, entry))))
    kind = {int: IntDistribution, float: FloatDistribution}.get(spec.type)
    if kind is None or not isinstance(entry, dict):
        raise ValueError("must be a list of choices" + (", or have low and high" if kind else ""))
    if not {"low", "high"} <= entry.keys() <= {"low", "high", "step", "log"}:
        raise ValueError(f"{shown(entry)} must have low and high, and may have step, or log: true")
    if not isinstance(log := entry.get("log", False), bool):
        raise ValueError(f"log: {shown(log)} must be true or false")
    numbers = [key for key in entry if key != "log"]
    bounds = dict(zip(numbers, read_values(spec, [entry[key] for key in numbers]), strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a range whose `high` is not on a step ends at the last step below
        return kind(log=log, **bounds)


def read_values(spec: Spec, values: list[Any]) -> list[Any]:
    """Convert values to the type of the parameter. Raises ValueError with an argument per wrong value."""
    converted, wrong = [], []
    for value in values:
        try:
            converted.append(coerce(spec, value))
            reason = "must have a value" if converted[-1] is None else spec.violation(converted[-1])
        except ValueError as error:
            reason = str(error)
        if reason:
            wrong.append(f"{shown(value)} {reason}")
    if wrong:
        raise ValueError(*wrong)
    return converted


def grid_values(domain: Any) -> list[Any]:
    """Return the values of a distribution. Raises ValueError if they are not finitely many."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    if isinstance(domain, CategoricalDistribution):
        return list(domain.choices)
    if isinstance(domain, IntDistribution):
        return list(range(domain.low, domain.high + 1, domain.step))
    if domain.step is None:
        raise ValueError("a grid needs a list of choices, or a range with a step")
    return [domain.low + i * domain.step for i in range(round((domain.high - domain.low) / domain.step) + 1)]


def grid_points(space: Space) -> list[dict[str, Any]]:
    """Return every combination of values, in an order that looks random and is always the same."""
    products = itertools.product(*(grid_values(domain) for domain in space.values()))
    points = [dict(zip(space, values, strict=True)) for values in products]
    random.Random(0).shuffle(points)
    return points


def suggest(trial: optuna.Trial, name: str, domain: Any) -> Any:
    """Let Optuna choose the value of a parameter in a trial."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    if isinstance(domain, CategoricalDistribution):
        return trial.suggest_categorical(name, domain.choices)
    choose = trial.suggest_int if isinstance(domain, IntDistribution) else trial.suggest_float
    return choose(name, domain.low, domain.high, step=domain.step, log=domain.log)


def shapes_training(name: str) -> bool:
    """Return whether a parameter determines what a step of training does."""
    return not specs()[name].may_change or name in ("data_path", "val_data", "grad_accum_steps")


@dataclass(frozen=True)
class Plan:
    """The search space and the parameters that are the same in every trial."""

    space: Space
    options: Options  # the flags of train.py on the command line of search.py, its --config, the text found
    fixed: dict[str, Any]  # the value of every parameter that is not searched
    defaults: dict[str, Any]  # the values of the searched parameters without a search
    text: str  # Text.describe()
    text_sha256: str  # Corpus.sha256

    def arguments(self, parameters: dict[str, Any]) -> list[str]:
        """Return the command line of train.py for a trial."""
        config = [] if self.options.config is None else [f"--config={self.options.config}"]
        values = {"playground": False} | self.options.values | parameters  # of no use in so many reports
        return config + [specs()[name].word(value) for name, value in values.items()]

    def invalid_reason(self, parameters: dict[str, Any]) -> str | None:
        """Return why train.py would refuse a combination of values; None if it is valid."""
        try:
            ConfigLoader(replace(self.options, values=self.options.values | parameters)).resolve()
        except Alg1Error as error:
            return " ".join(error.message.split())
        return None

    def lasting(self) -> dict[str, Any]:
        """Return what must not change when a study is continued: each parameter's value or distribution."""
        names = [name for name in self.fixed if shapes_training(name) or name in BUDGET_PARAMETERS]
        fixed = {name: self.fixed[name] for name in names}
        searched = {name: str(domain) for name, domain in self.space.items()}
        text_sha256 = "+".join(digest[:SHOWN_DIGITS] for digest in self.text_sha256.split("+"))
        return fixed | searched | {"text_sha256": text_sha256}

    def check_again(self) -> None:
        """Raise Alg1Error if a search with these options could not start now, or with other settings only."""
        now = make_plan(self.space, self.options)
        if changes := changed_settings(self.lasting(), now.lasting()):
            raise Alg1Error(f"other settings than at the start of the search: {changes}", "put them back")


def changed_settings(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Return what differs of what must not change while a study lasts (see `Plan.lasting`); "" if nothing."""
    changed = [name for name in before if before[name] != now.get(name)]
    return ", ".join(f"{name}: {shown(before[name])} -> {shown(now.get(name))}" for name in changed)


def make_plan(space: Space, options: Options) -> Plan:
    """Combine the search space and the command line, and check what would make every trial fail.

    Raises:
        Alg1Error: a parameter is both fixed and searched, a fixed one is invalid, the device does not exist,
            the text cannot be used, or the runs folder is a file.
    """
    from utils_alg1.data.corpus import find_corpus
    from utils_alg1.data.sources import name_text
    from utils_alg1.training.devices import find_device

    clashes = dict.fromkeys(space, "it is searched")
    clashes |= dict.fromkeys(RESERVED_PARAMETERS, "the search names its runs itself")
    clashes |= UNUSABLE
    given = [name for name in clashes if name in options.values]
    problems = [Problem(f"{specs()[name].flag} cannot be given: {clashes[name]}") for name in given]
    raise_problems(problems, "leave the flag out, or take the name out of the space file")
    params, problems = ConfigLoader(options).merge()
    # A problem that involves a searched parameter is one of the defaults only.
    raise_problems([*problems, *(p for p in params.problems() if not set(p.names) & space.keys())])
    set_in_file = [name for name in UNUSABLE if params.flat()[name] != specs()[name].default]
    problems = [Problem(f"{params.origins[name]}: {name}: {UNUSABLE[name]}") for name in set_in_file]
    raise_problems(problems, "take it out of the file for the search")
    asked = params.data.data_path
    name_text(params, print)
    flat = params.flat()
    if flat["data_path"] != asked:  # neither the trials nor `check_again` look for the missing text again
        options = replace(options, values=options.values | {"data_path": flat["data_path"]})
    defaults = {name: flat.pop(name) for name in space}
    if os.path.isfile(flat["runs_dir"]):
        raise Alg1Error(f"--runs-dir {flat['runs_dir']}: this is a file", "name a folder")
    find_device(flat.get("device", "auto"))
    corpus = find_corpus(params.data)
    if "block_size" in flat:
        corpus.check_block_size(flat["block_size"], flat["train_split"], flat["val_split"])
    return Plan(space, options, flat, defaults, corpus.text.describe(), corpus.sha256)
