"""What a hyperparameter search tries: the space file, and the plan that it makes with the command line."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parameters import TensorBoardConfig, build_parts, part_problems, specs
from utils_alg1.base.errors import Alg1Error
from utils_alg1.base.problems import Problem, nearest, raise_problems, shown
from utils_alg1.base.settings import Spec, coerce, field_names
from utils_alg1.console.command_line import Options
from utils_alg1.utils_config_loader import ConfigLoader

if TYPE_CHECKING:
    import optuna

LARGEST_GRID = 100_000
MEASURE = ("seed", "data_path", "train_split", "val_split", "eval_iters", "eval_interval")
OWN = ("run_tag", "output")  # the search names the runs itself, and one file cannot take every export
WHERE = ("runs_dir", *OWN)
MAY_VARY = (  # neither shape the result of a trial nor where it is found
    *OWN,
    *("device", "compile", "threads", "aim", *field_names(TensorBoardConfig)),
    *("checkpoint_interval", "keep_checkpoints", "export"),
)
SPACE_HINT = "configs/search.yaml shows how a space is written; python train.py --help explains every name"
PATH_HINT = "name a space with --space: a YAML file such as configs/search.yaml, which comes with ALG1"


# --- the space ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choices:
    """The values that a parameter may take."""

    values: tuple[Any, ...]

    def suggest(self, trial: optuna.Trial, name: str) -> Any:
        """The trial's value."""
        return trial.suggest_categorical(name, self.values)

    def grid(self) -> list[Any]:
        """Every value."""
        return list(self.values)

    def holds(self, value: Any) -> bool:
        """Whether a trial may have this value."""
        return value in self.values

    def describe(self) -> Any:
        """What the study remembers."""
        return list(self.values)


@dataclass(frozen=True)
class Range:
    """The bounds, both inclusive, that a number lies between."""

    low: float
    high: float
    step: float | None = None
    log: bool = False

    def suggest(self, trial: optuna.Trial, name: str) -> Any:
        """The trial's value."""
        if isinstance(self.low, int):
            return trial.suggest_int(name, self.low, int(self.high), step=int(self.step or 1), log=self.log)
        return tidy(trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log))

    def grid(self) -> list[Any]:
        """Every step of it."""
        assert self.step is not None  # read_space has seen to it
        return [self._at(i) for i in range(self._steps + 1)]

    def holds(self, value: Any) -> bool:
        """Whether a trial may have this value."""
        if not self.low <= value <= self.high:
            return False
        return self.step is None or math.isclose(value, self._at(round((value - self.low) / self.step)))

    def describe(self) -> Any:
        """What the study remembers."""
        return {"low": self.low, "high": self.high, "step": self.step, "log": self.log}

    @property
    def _steps(self) -> int:
        return math.floor((self.high - self.low) / (self.step or 1) + 1e-9)

    def _at(self, i: int) -> Any:
        value = self.low + i * (self.step or 0)
        return tidy(value)

    def ending_on_a_step(self) -> Range:
        """The same values, with a `high` that is one of them."""
        return self if self.step is None else replace(self, high=self._at(self._steps))


def tidy(value: Any) -> Any:
    """A number as a person would write it: 0.3, not 0.30000000000000004; anything else as it is."""
    return float(f"{value:.12g}") if isinstance(value, float) else value


Space = dict[str, Choices | Range]


def read_space(path: str | Path, for_grid: bool) -> Space:
    """Read a space file: names of parameters, each with a list of choices or with low and high.

    Raises:
        Alg1Error: every problem of the file in one message.
    """
    space: Space = {}
    problems: list[Problem] = []
    try:
        entries = ConfigLoader.load_search_space(path)
    except Alg1Error as error:
        text = Path(path).suffix in (".yaml", ".yml", ".json") and os.path.exists(path)
        raise Alg1Error(error.message, error.hint if text else PATH_HINT) from None
    for name, domain in entries.items():
        if name == "_comment":
            continue
        try:
            space[name] = read_domain(name, domain, for_grid)
        except ValueError as error:
            problems += [Problem(f"{path}: {text}", ()) for text in error.args]
    if not space and not problems:
        problems.append(Problem(f"{path}: names no parameter to search", ()))
    raise_problems(problems, SPACE_HINT)
    if for_grid and math.prod(len(domain.grid()) for domain in space.values()) > LARGEST_GRID:
        raise Alg1Error(f"{path}: the grid has more than {LARGEST_GRID:,} points", "use --sampler random")
    return space


def read_domain(name: Any, domain: Any, for_grid: bool) -> Choices | Range:
    """One entry of a space file. Raises ValueError with a text for each problem."""
    if name not in specs():
        raise ValueError(f"unknown name {shown(name)}{nearest(str(name), specs())}")
    if name in WHERE:
        raise ValueError(f"{name} says where a run is kept; it cannot be searched")
    if name in MEASURE:
        raise ValueError(f"{name} changes how the loss is measured; losses could not be compared")
    spec = specs()[name]
    if isinstance(domain, list):
        return read_choices(spec, domain)
    if isinstance(domain, dict):
        return read_range(spec, domain, for_grid)
    raise ValueError(f"{name} = {shown(domain)} must be a list of choices, or low and high")


def read_choices(spec: Spec, values: list[Any]) -> Choices:
    """A list of choices. Raises ValueError with a text for each problem."""
    faults: list[str] = []
    good = [read_value(spec, value, faults) for value in values]
    if not values:
        faults.append(f"{spec.name} has no choices")
    repeated = {value for value in good if value is not None and good.count(value) > 1}
    faults += [f"{spec.name}: {shown(value)} stands there twice" for value in repeated]
    if faults:
        raise ValueError(*faults)
    return Choices(tuple(good))


def read_range(spec: Spec, entry: dict[Any, Any], for_grid: bool) -> Range:
    """A range of numbers. Raises ValueError with a text for each problem."""
    name, known = spec.name, ("low", "high", "step", "log")
    if spec.type not in (int, float):
        raise ValueError(f"{name} is no number; give a list of choices")
    faults = [
        f"{name}: unknown key {shown(key)}{nearest(str(key), known)}" for key in entry if key not in known
    ]
    faults += [f"{name}: {key} is missing" for key in ("low", "high") if key not in entry]
    low, high = (read_value(spec, entry[key], faults) for key in ("low", "high")) if not faults else (0, 0)
    log, step = entry.get("log", False), entry.get("step")
    if not isinstance(log, bool):
        faults.append(f"{name}: log = {shown(log)} must be true or false")
    if step is not None:
        step = read_step(spec, step, faults)
    if not faults:
        if not low < high:
            faults.append(f"{name}: low = {low} must be below high = {high}")
        if step is not None and step > high - low:
            faults.append(f"{name}: step = {step} is wider than the range")
        if log and not low > 0:
            faults.append(f"{name}: low = {low} must be above 0 on a log scale")
        if log and step is not None:
            faults.append(f"{name}: a log scale has no steps; leave step or log out")
        if for_grid and step is None:
            faults.append(f"{name}: a grid needs a list of choices, or a range with a step")
    if faults:
        raise ValueError(*faults)
    return Range(low, high, step, log).ending_on_a_step()


def read_value(spec: Spec, value: Any, faults: list[str]) -> Any:
    """A value as the parameter's type, within its limits; else None, and what is wrong is added."""
    try:
        coerced = coerce(spec, value)
        complaint = "must have a value" if coerced is None else spec.limits.broken_by(coerced)
    except ValueError as error:
        complaint = str(error)
    if complaint is None:
        return coerced
    faults.append(f"{spec.name} = {shown(value)} {complaint}")
    return None


def read_step(spec: Spec, step: Any, faults: list[str]) -> Any:
    """The step of a range as the parameter's type; else None, and what is wrong is added."""
    with contextlib.suppress(ValueError):
        coerced = coerce(spec, step)
        if coerced is not None and coerced > 0:
            return coerced
    wanted = "a whole number above 0" if spec.type is int else "a number above 0"
    faults.append(f"{spec.name}: step = {shown(step)} must be {wanted}")
    return None


def grid_points(space: Space, seed: int) -> list[dict[str, Any]]:
    """Every combination, shuffled: a grid that --trials cuts short should not be its first corner."""
    combinations = itertools.product(*(domain.grid() for domain in space.values()))
    points = [dict(zip(space, values, strict=True)) for values in combinations]
    random.Random(seed).shuffle(points)
    return points


# --- what all trials share ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What is searched, and what is the same in every trial.

    Attributes:
        given: the flags of train.py on search.py's command line, and its --config.
        fixed: the value of every parameter that is not searched.
        defaults: what the searched ones are without a search; None where that is no point of the space.
        no_defaults: why it is none.
    """

    space: Space
    given: Options
    fixed: dict[str, Any]
    defaults: dict[str, Any] | None
    no_defaults: str = ""

    def options(self, drawn: dict[str, Any]) -> Options:
        """The command line of a trial with these values."""
        return replace(self.given, values=self.given.values | drawn)

    def refusal(self, drawn: dict[str, Any]) -> str | None:
        """Why train.py would refuse this combination; None where it would not."""
        try:
            ConfigLoader.resolve(self.options(drawn))
        except Alg1Error as error:
            return " ".join(error.message.split())
        return None

    def describe(self) -> dict[str, Any]:
        """What a study may not change once it has begun: for each name its domain or its value."""
        kept = {name: value for name, value in self.fixed.items() if name not in MAY_VARY}
        return kept | {name: domain.describe() for name, domain in self.space.items()}


def check_surroundings(plan: Plan) -> None:
    """Check once what every trial would trip over: the folder of the runs, the device and the text.

    Raises:
        Alg1Error: that folder is a file, there is no such device, or the text is missing, not UTF-8 or
            too short.
    """
    from utils_alg1.data.corpus import check_block_size, open_corpus
    from utils_alg1.data.sources import find_corpus
    from utils_alg1.training.runtime import find_device

    fixed = plan.fixed
    if os.path.isfile(fixed["runs_dir"]):
        raise Alg1Error(f"--runs-dir {fixed['runs_dir']}: this is a file", "name a folder")
    find_device(fixed.get("device", "auto"))
    path = find_corpus(fixed["data_path"])
    length = len(open_corpus(path).tokens)
    if "block_size" in fixed:
        check_block_size(path, length, fixed["block_size"], fixed["train_split"], fixed["val_split"])


def make_plan(space: Space, given: Options) -> Plan:
    """Put the space and the command line together.

    Raises:
        Alg1Error: a parameter is both fixed and searched, or a fixed one is wrong.
    """
    both = [
        Problem(f"{name} is fixed by {specs()[name].flag} and searched in the space file", ())
        for name in space
        if name in given.values
    ]
    own = [
        Problem(f"{specs()[name].flag} cannot be given: the search names its runs itself", ())
        for name in OWN
        if name in given.values
    ]
    raise_problems([*both, *own], "leave the flag out, or take the name out of the space file")
    values, origins, faults = ConfigLoader.read(given).merge()
    parts = build_parts(values)
    further = part_problems(parts, origins)
    # What is wrong only together with a searched parameter is wrong with the defaults, not with the search.
    of_defaults = [problem for problem in further if set(problem.names) & space.keys()]
    raise_problems([*faults, *(problem for problem in further if problem not in of_defaults)])

    flat = {name: getattr(parts[spec.part], name) for name, spec in specs().items()}
    fixed = {name: value for name, value in flat.items() if name not in space}
    outside = [f"{name} = {flat[name]}" for name, domain in space.items() if not domain.holds(flat[name])]
    reasons = [problem.text for problem in of_defaults] or ([", ".join(outside)] if outside else [])
    defaults = {name: flat[name] for name in space}
    return Plan(space, given, fixed, None if reasons else defaults, "; ".join(reasons))
