"""The search space: reads the space file and combines it with the command line into a plan."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parameters import TensorBoardConfig, specs
from utils_alg1.base.errors import Alg1Error
from utils_alg1.base.problems import Problem, nearest, raise_problems, shown
from utils_alg1.base.settings import Spec, coerce, field_names
from utils_alg1.console.command_line import Options
from utils_alg1.utils_config_loader import ConfigLoader

if TYPE_CHECKING:
    import optuna

MAX_GRID_POINTS = 100_000
# These cannot be searched, because the losses of the trials would not be comparable.
EVALUATION_PARAMETERS = ("seed", "data_path", "train_split", "val_split", "eval_iters", "eval_interval")
# The search sets these itself: it names the runs, and several runs cannot share one --output.
RESERVED_PARAMETERS = ("run_tag", "output")
# These cannot be searched, because they only determine where a run is stored.
STORAGE_PARAMETERS = ("runs_dir", *RESERVED_PARAMETERS)
# These may change when a study is continued, because they do not affect the loss of a trial.
CHANGEABLE_PARAMETERS = (
    *RESERVED_PARAMETERS,
    *("device", "compile", "threads", "aim", *field_names(TensorBoardConfig)),
    *("checkpoint_interval", "keep_checkpoints", "export"),
)
SPACE_HINT = "configs/search.yaml shows how a space is written; python train.py --help explains every name"
PATH_HINT = "name a space with --space: a YAML file such as configs/search.yaml, which comes with ALG1"


# --- the space ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choices:
    """A list of values for a parameter."""

    values: tuple[Any, ...]

    def suggest(self, trial: optuna.Trial, name: str) -> Any:
        """Let Optuna choose the value of a trial."""
        return trial.suggest_categorical(name, self.values)

    def grid(self) -> list[Any]:
        """Return every value."""
        return list(self.values)

    def contains(self, value: Any) -> bool:
        """Return whether the value is one of the choices."""
        return value in self.values

    def as_json(self) -> Any:
        """Return the form in which the study is stored."""
        return list(self.values)


@dataclass(frozen=True)
class Range:
    """A range of numbers; both bounds are inclusive.

    Attributes:
        low: the lower bound.
        high: the upper bound.
        step: the distance between two values; None for any value in between.
        log: whether values are sampled on a logarithmic scale.
    """

    low: float
    high: float
    step: float | None = None
    log: bool = False

    def suggest(self, trial: optuna.Trial, name: str) -> Any:
        """Let Optuna choose the value of a trial."""
        if isinstance(self.low, int):
            return trial.suggest_int(name, self.low, int(self.high), step=int(self.step or 1), log=self.log)
        return round_float(trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log))

    def grid(self) -> list[Any]:
        """Return the value of every step."""
        assert self.step is not None  # checked by read_range
        return [self._at(i) for i in range(self._n_steps + 1)]

    def contains(self, value: Any) -> bool:
        """Return whether the value lies in the range, on a step if there are steps."""
        if not self.low <= value <= self.high:
            return False
        return self.step is None or math.isclose(value, self._at(round((value - self.low) / self.step)))

    def as_json(self) -> Any:
        """Return the form in which the study is stored."""
        return {"low": self.low, "high": self.high, "step": self.step, "log": self.log}

    @property
    def _n_steps(self) -> int:
        return math.floor((self.high - self.low) / (self.step or 1) + 1e-9)

    def _at(self, i: int) -> Any:
        return round_float(self.low + i * (self.step or 0))

    def with_high_on_step(self) -> Range:
        """Return the same range with `high` lowered to the last step."""
        return self if self.step is None else replace(self, high=self._at(self._n_steps))


def round_float(value: Any) -> Any:
    """Round a float to 12 significant digits (0.3, not 0.30000000000000004); return other types unchanged."""
    return float(f"{value:.12g}") if isinstance(value, float) else value


Space = dict[str, Choices | Range]


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
        entries = ConfigLoader.load_file(path)
    except Alg1Error as error:
        is_config = Path(path).suffix in (".yaml", ".yml", ".json") and os.path.exists(path)
        raise Alg1Error(error.message, error.hint if is_config else PATH_HINT) from None
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
    if for_grid and math.prod(len(domain.grid()) for domain in space.values()) > MAX_GRID_POINTS:
        raise Alg1Error(f"{path}: the grid has more than {MAX_GRID_POINTS:,} points", "use --sampler random")
    return space


def read_domain(name: Any, domain: Any, for_grid: bool) -> Choices | Range:
    """Read an entry of a space file. Raises ValueError with one argument per problem."""
    if name not in specs():
        raise ValueError(f"unknown name {shown(name)}{nearest(str(name), specs())}")
    if name in STORAGE_PARAMETERS:
        raise ValueError(f"{name} says where a run is kept; it cannot be searched")
    if name in EVALUATION_PARAMETERS:
        raise ValueError(f"{name} changes how the loss is measured; losses could not be compared")
    spec = specs()[name]
    if isinstance(domain, list):
        return read_choices(spec, domain)
    if isinstance(domain, dict):
        return read_range(spec, domain, for_grid)
    raise ValueError(f"{name} = {shown(domain)} must be a list of choices, or low and high")


def read_choices(spec: Spec, values: list[Any]) -> Choices:
    """Read a list of choices. Raises ValueError with one argument per problem."""
    errors: list[str] = []
    choices = [read_value(spec, value, errors) for value in values]
    if not values:
        errors.append(f"{spec.name} has no choices")
    repeated = {value for value in choices if value is not None and choices.count(value) > 1}
    errors += [f"{spec.name}: {shown(value)} stands there twice" for value in repeated]
    if errors:
        raise ValueError(*errors)
    return Choices(tuple(choices))


def read_range(spec: Spec, entry: dict[Any, Any], for_grid: bool) -> Range:
    """Read a range of numbers. Raises ValueError with one argument per problem."""
    name, known = spec.name, ("low", "high", "step", "log")
    if spec.type not in (int, float):
        raise ValueError(f"{name} is no number; give a list of choices")
    errors = [
        f"{name}: unknown key {shown(key)}{nearest(str(key), known)}" for key in entry if key not in known
    ]
    errors += [f"{name}: {key} is missing" for key in ("low", "high") if key not in entry]
    low, high = (read_value(spec, entry[key], errors) for key in ("low", "high")) if not errors else (0, 0)
    log, step = entry.get("log", False), entry.get("step")
    if not isinstance(log, bool):
        errors.append(f"{name}: log = {shown(log)} must be true or false")
    if step is not None:
        step = read_step(spec, step, errors)
    if not errors:
        if not low < high:
            errors.append(f"{name}: low = {low} must be below high = {high}")
        if step is not None and step > high - low:
            errors.append(f"{name}: step = {step} is wider than the range")
        if log and not low > 0:
            errors.append(f"{name}: low = {low} must be above 0 on a log scale")
        if log and step is not None:
            errors.append(f"{name}: a log scale has no steps; leave step or log out")
        if for_grid and step is None:
            errors.append(f"{name}: a grid needs a list of choices, or a range with a step")
    if errors:
        raise ValueError(*errors)
    return Range(low, high, step, log).with_high_on_step()


def read_value(spec: Spec, value: Any, errors: list[str]) -> Any:
    """Convert a value to the type of the parameter; on failure return None and append the reason."""
    try:
        coerced = coerce(spec, value)
        reason = "must have a value" if coerced is None else spec.violation(coerced)
    except ValueError as error:
        reason = str(error)
    if reason is None:
        return coerced
    errors.append(f"{spec.name} = {shown(value)} {reason}")
    return None


def read_step(spec: Spec, step: Any, errors: list[str]) -> Any:
    """Convert a step to the type of the parameter; on failure return None and append the reason."""
    with contextlib.suppress(ValueError):
        coerced = coerce(spec, step)
        if coerced is not None and coerced > 0:
            return coerced
    expected = "a whole number above 0" if spec.type is int else "a number above 0"
    errors.append(f"{spec.name}: step = {shown(step)} must be {expected}")
    return None


def grid_points(space: Space, seed: int) -> list[dict[str, Any]]:
    """Return every combination of values, shuffled so that the first --trials ones cover the whole grid."""
    combinations = itertools.product(*(domain.grid() for domain in space.values()))
    points = [dict(zip(space, values, strict=True)) for values in combinations]
    random.Random(seed).shuffle(points)
    return points


# --- the plan -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """The search space and the parameters that are the same in every trial.

    Attributes:
        space: the searched parameters.
        base_options: the flags of train.py on the command line of search.py, and its --config.
        fixed: the value of every parameter that is not searched.
        defaults: the values of the searched parameters without a search; None if they are not in the space.
        no_defaults_reason: why `defaults` is None.
    """

    space: Space
    base_options: Options
    fixed: dict[str, Any]
    defaults: dict[str, Any] | None
    no_defaults_reason: str = ""

    def trial_options(self, parameters: dict[str, Any]) -> Options:
        """Return the command line of train.py for a trial."""
        return replace(self.base_options, values=self.base_options.values | parameters)

    def invalid_reason(self, parameters: dict[str, Any]) -> str | None:
        """Return why train.py would refuse a combination of values; None if it is valid."""
        try:
            ConfigLoader(self.trial_options(parameters)).resolve()
        except Alg1Error as error:
            return " ".join(error.message.split())
        return None

    def as_json(self) -> dict[str, Any]:
        """Return what must not change when a study is continued: the domain or value of each parameter."""
        fixed = {name: value for name, value in self.fixed.items() if name not in CHANGEABLE_PARAMETERS}
        return fixed | {name: domain.as_json() for name, domain in self.space.items()}


def check_environment(plan: Plan) -> None:
    """Check once what would make every trial fail: the runs folder, the device and the text.

    Raises:
        Alg1Error: the runs folder is a file, the device does not exist, or the text is missing, not UTF-8 or
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


def make_plan(space: Space, base_options: Options) -> Plan:
    """Combine the search space and the command line.

    Raises:
        Alg1Error: a parameter is both fixed and searched, or the value of a fixed one is invalid.
    """
    both = [
        Problem(f"{name} is fixed by {specs()[name].flag} and searched in the space file", ())
        for name in space
        if name in base_options.values
    ]
    reserved = [
        Problem(f"{specs()[name].flag} cannot be given: the search names its runs itself", ())
        for name in RESERVED_PARAMETERS
        if name in base_options.values
    ]
    raise_problems([*both, *reserved], "leave the flag out, or take the name out of the space file")
    params, problems = ConfigLoader(base_options).merge()
    of_parts = params.problems()
    # A problem that involves a searched parameter excludes the default values, not the whole search.
    of_defaults = [problem for problem in of_parts if set(problem.names) & space.keys()]
    raise_problems([*problems, *(problem for problem in of_parts if problem not in of_defaults)])

    flat = params.flat()
    fixed = {name: value for name, value in flat.items() if name not in space}
    outside = [f"{name} = {flat[name]}" for name, domain in space.items() if not domain.contains(flat[name])]
    reasons = [problem.text for problem in of_defaults] or ([", ".join(outside)] if outside else [])
    defaults = {name: flat[name] for name in space}
    return Plan(space, base_options, fixed, None if reasons else defaults, "; ".join(reasons))
