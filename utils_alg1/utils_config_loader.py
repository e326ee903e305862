"""Files and command line -> parameters, each with where its value came from.

Priority, highest first: command line, the file or folder named by --config (or, when a run is resumed, the
run's own parameters), configs/*, config.json, the defaults of `parameters.py`.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from config import load_config
from errors import Alg1Error
from parameters import (
    PARTS,
    Parameters,
    Problem,
    Spec,
    as_number,
    coerce_all,
    nearest,
    read_json_object,
    read_text,
    refuse_repeats,
    shown,
    specs,
)

LOGGER = logging.getLogger("alg1")
CONFIG_DIR = "configs"
RESUMED = "resumed run"  # the origin of its values
LEGACY_FILE = "config.json"
PATH_HINT = "name a JSON or YAML file, or a folder like configs/"
YAML_HINT = "write one `name: value` a line, with a space behind the colon and no tab"
CONFIG_FILES = ("model.json", "train.yaml", "data.yaml", "tensorboard.json")  # in merging order
SWITCH_VALUES = ("true", "false", "yes", "no", "on", "off", "0", "1")
MAY_BE_EMPTY = ("prompt", "stop", "tag")
# The flags that a file or a folder may be meant for, by its suffix; the first that a script has counts.
FLAGS_FOR = {
    "a folder": ("--run", "--config"),
    ".json": ("--config",),
    ".yaml": ("--space", "--config"),
    ".safetensors": ("--model", "--init-from"),
}


@dataclass
class Options:
    """The command line of train.py: parameter flags, unchecked, and what else it can ask for."""

    values: dict[str, str | bool] = field(default_factory=dict)  # by parameter name
    problems: list[Problem] = field(default_factory=list)
    config: str | None = None
    resume: str | None = None
    init_from: str | None = None
    print_config: bool = False
    quiet: bool = False
    verbose: bool = False
    serve_tensorboard: bool = False

    @property
    def starts_from_weights(self) -> bool:
        """Whether parameters come from a run or a model that must be read first."""
        return self.resume is not None or self.init_from is not None


class Parser(argparse.ArgumentParser):
    """Describes a script's flags. The command line is read here: argparse stops at the first mistake, and
    says it in words of its own.
    """

    def parse_with_suggestions(
        self, argv: list[str] | None, for_a_path: str = "", for_a_word: str = ""
    ) -> tuple[argparse.Namespace, list[Problem]]:
        """The flags' values, and a problem for each mistake; the flag of a mistake keeps its default.

        Args:
            for_a_path, for_a_word: the flag that is meant where something that exists, or any other word,
                stands there without one.

        Raises:
            SystemExit: after --help.
        """
        namespace = self.parse_args([])  # the defaults
        problems: list[Problem] = []
        given: dict[argparse.Action, str] = {}  # the flags, as they were typed
        words = list(sys.argv[1:] if argv is None else argv)
        switch = ""  # the flag before a word, where it takes none
        lost = False  # a word that belongs to no flag may be the value of an unknown one, or the next of many
        while words:
            word = words.pop(0)
            if word == "--":  # behind which there are no flags, for programs that read words without
                continue
            flag, assigned, value = word.partition("=")
            action = self._option_string_actions.get(flag)
            if action is None and self._is_flag(word):
                problems.append(Problem(f"unknown flag {flag}{self._nearest(flag)}", ()))
                lost = True
            elif action is None:
                if not lost:
                    meant = self._meant(word, for_a_path, for_a_word)
                    suggestion = f"; did you mean {meant} {shlex.quote(word)}?" if meant else ""
                    if switch and not os.path.exists(word):
                        suggestion = f"; {switch} takes no value"
                    problems.append(Problem(f"{shown(word)} belongs to no flag{suggestion}", ()))
                lost = True
            else:
                given[action] = flag
                switch = flag if action.nargs == 0 else ""
                try:
                    read = self._read(action, flag, value if assigned else None, words)
                    action(self, namespace, read, flag)
                except ValueError as error:
                    problems.append(Problem(str(error), (action.dest,)))
        for group in self._mutually_exclusive_groups:
            flags = [flag for action, flag in given.items() if action in group._group_actions]
            if len(flags) > 1:
                problems.append(Problem(f"{' and '.join(flags)} exclude each other: leave one out", ()))
        return namespace, problems

    def _nearest(self, flag: str) -> str:
        return nearest(flag, self._option_string_actions)

    def _is_flag(self, word: str) -> bool:
        """Whether a word is a flag, known or not, and no text, number or lone dash that a flag may have."""
        flag = word.split("=")[0]
        if not flag.startswith("-") or flag.strip("-") == "" or len(flag.split()) > 1:
            return False
        try:
            float(flag)
        except ValueError:
            return True
        return False

    def _meant(self, word: str, for_a_path: str, for_a_word: str) -> str:
        """The flag that a word without one may be the value of; "" if there is none to name."""
        kind = "a folder" if os.path.isdir(word) else Path(word).suffix
        fitting = [flag for flag in FLAGS_FOR.get(kind, ()) if flag in self._option_string_actions]
        return fitting[0] if fitting else for_a_path if os.path.exists(word) else for_a_word

    def _read(self, action: argparse.Action, flag: str, value: str | None, words: list[str]) -> Any:
        """A flag's value, which is taken from the words behind it where it was not given with `=`.

        Raises:
            ValueError: with what is wrong.
        """
        if action.nargs == 0:
            if value is None and words and words[0].lower() in SWITCH_VALUES:
                value = words.pop(0)
            if value is not None:
                on_and_off = [name for name in action.option_strings if name.startswith("--")]
                say = ": {} is on, {} is off".format(*on_and_off) if len(on_and_off) == 2 else ""
                raise ValueError(f"{flag} {shown(value)}: a switch takes no value{say}")
            return None
        if value is None:
            value = self._value_behind(flag, words)
        checked_later = action.default is argparse.SUPPRESS and action.dest in specs()
        if not value and action.dest not in MAY_BE_EMPTY and not checked_later:
            raise ValueError(f"{flag} '': must not be empty")
        if isinstance(action.type, type):  # int or float
            try:
                return as_number(action.type, value)
            except ValueError as error:
                raise ValueError(f"{flag} {shown(value)}: {error}") from None
        if action.choices and value not in action.choices:
            raise ValueError(f"{flag} {shown(value)}: must be one of {', '.join(action.choices)}")
        return value

    def _value_behind(self, flag: str, words: list[str]) -> str:
        """Take the value of a flag from the words behind it.

        Raises:
            ValueError: there is none, or it looks like a flag.
        """
        if words and not self._is_flag(words[0]):
            return words.pop(0)
        next_flag = words[0].split("=")[0] if words else ""
        meant = next_flag.startswith("--") and self._nearest(next_flag)
        if not words or next_flag in self._option_string_actions or meant:
            raise ValueError(f"{flag}: needs a value")
        with_it = f"{flag}={shlex.quote(words.pop(0))}"
        raise ValueError(f"{flag}: needs a value; one that begins with a dash is written {with_it}")


def parse_command_line(argv: list[str] | None = None) -> Options:
    """Read train.py's command line. Values stay text: all problems are reported together, later.

    Raises:
        SystemExit: after --help.
    """
    parser = Parser(
        prog="python train.py",
        usage="python train.py [--flag VALUE ...]",
        description="Train a character-level GPT. With no flags: the reference model on data/input.txt.",
        epilog="Every flag is also a name in configs/*: --batch-size 8 is batch_size: 8.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    run = parser.add_argument_group("run")
    add_config_flag(run)
    start = run.add_mutually_exclusive_group()
    start.add_argument("--resume", metavar="RUN", help="continue a run: latest, a run id or a run directory")
    start.add_argument("--init-from", metavar="PATH", help="start from the weights of an exported model")
    run.add_argument("--print-config", action="store_true", help="show every value and its origin, then stop")
    volume = run.add_mutually_exclusive_group()
    volume.add_argument("--quiet", action="store_true", help="print only warnings and errors")
    volume.add_argument("--verbose", action="store_true", help="print what happens inside too")
    run.add_argument("--serve-tensorboard", action="store_true", help="serve TensorBoard while training")
    add_parameter_flags(parser)
    namespace, problems = parser.parse_with_suggestions(argv, for_a_path="--data")
    values, given = split_parameters(namespace)
    return Options(values=values, problems=problems, **given)


def add_config_flag(group: Any) -> None:
    """The flag that names further settings."""
    group.add_argument("--config", metavar="PATH", help="a JSON file, or a folder like configs/ (a preset)")


def add_parameter_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each parameter, in the groups of PARTS; the parser's default must be SUPPRESS."""
    for part, config_class in PARTS.items():
        group = parser.add_argument_group(part, config_class.__doc__)
        for spec in specs().values():
            if spec.part == part:
                _add_flag(group, spec)


def split_parameters(namespace: argparse.Namespace) -> tuple[dict[str, str | bool], dict[str, Any]]:
    """What was given on the command line: parameters by name, and the rest."""
    given = vars(namespace)
    values = {name: given.pop(name) for name in list(given) if name in specs()}
    return values, given


def _add_flag(group: Any, spec: Spec) -> None:
    default = "" if spec.default in (None, "") else f" ({spec.default})"
    help_text = (spec.limits.help + default).replace("%", "%%")
    if spec.type is bool:
        action = argparse.BooleanOptionalAction
        group.add_argument(spec.flag, dest=spec.name, action=action, help=help_text)
        return
    letter = {int: "N", float: "X", str: "TEXT"}[spec.type]
    metavar = "|".join(spec.limits.choices) or letter
    group.add_argument(spec.flag, dest=spec.name, metavar=metavar, help=help_text)


class ConfigLoader:
    """Reads configuration files and merges them with the command line."""

    @staticmethod
    def load_model_config(path: str | Path) -> dict[str, Any]:
        """Read model.json. Raises Alg1Error naming file and fault."""
        return _load_file(Path(path))

    @staticmethod
    def load_train_config(path: str | Path) -> dict[str, Any]:
        """Read train.yaml. Raises Alg1Error naming file and fault."""
        return _load_file(Path(path))

    @staticmethod
    def load_data_config(path: str | Path) -> dict[str, Any]:
        """Read data.yaml. Raises Alg1Error naming file and fault."""
        return _load_file(Path(path))

    @staticmethod
    def load_tensorboard_config(path: str | Path) -> dict[str, Any]:
        """Read tensorboard.json. Raises Alg1Error naming file and fault."""
        return _load_file(Path(path))

    @staticmethod
    def load_search_space(path: str | Path) -> dict[str, Any]:
        """Read the YAML or JSON file of a search space. Raises Alg1Error naming file and fault."""
        return _load_file(Path(path))

    @staticmethod
    def load_configs(config_dir: str | Path = CONFIG_DIR) -> dict[str, Any]:
        """Merge the files of a folder that are there, later ones over earlier: see CONFIG_FILES.

        Raises:
            Alg1Error: no such folder, or a file in it cannot be read.
        """
        merged: dict[str, Any] = {}
        for _, values in _folder_sources(Path(config_dir)):
            merged.update(values)
        return merged

    @staticmethod
    def resolve(
        options: Options,
        resumed: dict[str, Any] | None = None,
        initial: dict[str, Any] | None = None,
    ) -> Parameters:
        """Merge every source into validated parameters.

        Args:
            options: the command line.
            resumed: the parameters of the run that goes on; they take the place of the files.
            initial: the sizes of the model that --init-from names; they stand above the files.

        Raises:
            Alg1Error: every problem of every source in one message.
        """
        return Parameters.from_values(*ConfigLoader.merge(options, resumed, initial))

    @staticmethod
    def merge(
        options: Options,
        resumed: dict[str, Any] | None = None,
        initial: dict[str, Any] | None = None,
    ) -> tuple[dict[str, Any], dict[str, str], list[Problem]]:
        """What `resolve` builds parameters from: values of the right types, their origins, the problems."""
        if resumed is not None:
            sources = [(RESUMED, resumed), *_named_sources(options)]
        else:
            sources = _file_sources(options)
        if initial is not None:
            sources.append(("--init-from", initial))

        values: dict[str, Any] = {}
        origins: dict[str, str] = {}
        problems = list(options.problems)
        for origin, source in sources:
            LOGGER.debug("%s: %s", origin, ", ".join(map(str, source)) or "no settings")
            good, faults = coerce_all(source, origin)
            values.update(good)
            origins.update(dict.fromkeys(good, origin))
            problems += faults
        for name, value in options.values.items():
            flag = specs()[name].flag
            good, faults = coerce_all({name: value})
            values.update(good)
            origins.update(dict.fromkeys(good, flag))
            problems += [fault._replace(text=f"{fault.text} (from {flag})") for fault in faults]
        if options.serve_tensorboard and values.get("tensorboard") is False:
            text = f"--serve-tensorboard has nothing to show: tensorboard is off ({origins['tensorboard']})"
            problems.append(Problem(text, ()))
        return values, origins, problems

    @staticmethod
    def runs_dir(options: Options) -> str:
        """The folder in which --resume finds its run: it is needed before the run's parameters are."""
        sources = [*_file_sources(options), ("", options.values)]
        named = [source["runs_dir"] for _, source in sources if "runs_dir" in source]
        return str(named[-1]) if named else specs()["runs_dir"].default

    @staticmethod
    def files_used(options: Options) -> list[Path]:
        """The configuration files that `resolve` reads, for the run's records."""
        return [Path(origin) for origin, _ in _file_sources(options)]


Source = tuple[str, dict[str, Any]]  # where values came from, and the values


def _file_sources(options: Options) -> list[Source]:
    """Every file that counts, the weakest first."""
    sources: list[Source] = []
    if Path(LEGACY_FILE).exists():
        sources.append((LEGACY_FILE, load_config(LEGACY_FILE)))
    if Path(CONFIG_DIR).is_dir():
        sources += _folder_sources(Path(CONFIG_DIR))
    return sources + _named_sources(options)


def _named_sources(options: Options) -> list[Source]:
    """The files behind --config PATH."""
    if not options.config:  # an empty one is among the problems
        return []
    path = Path(options.config)
    if path.is_dir():
        sources = _folder_sources(path)
        if not sources:
            record = path / "meta" / "full_config.json"
            raise Alg1Error(
                f"--config {path}: none of {', '.join(CONFIG_FILES)} is in this folder",
                f"for the parameters of this run: --config {record}" if record.is_file() else PATH_HINT,
            )
        return sources
    if not path.exists():
        presets = [folder.name for folder in Path(CONFIG_DIR).glob("*") if folder.is_dir()]
        close = difflib.get_close_matches(path.name, presets, n=1)
        suggestion = f"; did you mean {Path(CONFIG_DIR, close[0])}?" if close else ""
        raise Alg1Error(
            f"--config {path}: no such file or folder{suggestion}",
            PATH_HINT,
        )
    return [(str(path), _load_named(path))]


def _load_named(path: Path) -> dict[str, Any]:
    """The file behind --config; of a run's meta/full_config.json the parameters.

    Raises:
        Alg1Error: naming file and fault.
    """
    if path.suffix == ".safetensors":
        raise Alg1Error(f"--config {path}: these are weights", f"to start from them: --init-from {path}")
    try:
        values = _load_file(path)
    except Alg1Error as error:
        other = path.suffix not in (".json", ".yaml", ".yml")
        raise Alg1Error(error.message, PATH_HINT if other else error.hint) from None
    recorded = values.get("parameters")
    return recorded if isinstance(recorded, dict) and "origins" in values else values


def _folder_sources(folder: Path) -> list[Source]:
    if not folder.is_dir():
        raise Alg1Error(f"{folder}: no such folder", "name one that holds " + ", ".join(CONFIG_FILES))
    paths = [folder / name for name in CONFIG_FILES]
    return [(str(path), _load_file(path)) for path in paths if path.exists()]


def _load_file(path: Path) -> dict[str, Any]:
    return _load_yaml(path) if path.suffix in (".yaml", ".yml") else read_json_object(path)


def _load_yaml(path: Path) -> dict[str, Any]:
    text = read_text(path)
    import yaml

    try:
        top = yaml.compose(text, yaml.SafeLoader)
        value = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise Alg1Error(f"{path}: {where}not YAML: {error.problem}", YAML_HINT) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise Alg1Error(f"{path}: not YAML: {reason}", YAML_HINT) from None
    if value is None:  # an empty file, or one of comments only
        return {}
    if not isinstance(value, dict):
        raise Alg1Error(f"{path}: must hold names and values", YAML_HINT)
    assert isinstance(top, yaml.MappingNode)  # since its value is a dictionary
    refuse_repeats(path, [key.value for key, _ in top.value])
    return value
