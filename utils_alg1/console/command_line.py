"""The command line: the flags of the scripts, and all mistakes in one message."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from parameters import PARTS, specs
from utils_alg1.base.problems import Problem, nearest, shown
from utils_alg1.base.settings import A_FOLDER, A_PATH, A_WORD, Limits, Spec, as_number

SWITCH_VALUES = ("true", "false", "yes", "no", "on", "off", "0", "1")
METAVARS: dict[Any, str] = {int: "N", float: "X", str: "TEXT"}


@dataclass
class Options:
    """The command line of train.py: the flags of parameters, not checked yet, and all other flags."""

    values: dict[str, str | bool] = field(default_factory=dict)  # by the name of the parameter
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
        """Whether some parameters come from a run or a model that must be read first."""
        return self.resume is not None or self.init_from is not None


# Flags that are not parameters: no file can set them.
FLAGS_ONLY = {option.name for option in fields(Options)} - {"values", "problems"}


class Flag(argparse.Action):
    """A flag with a value of a type and within limits, which contain its help too.

    Used as `add_argument(name, action=Flag, limits=Limits(help, ...))`.
    """

    def __init__(
        self,
        option_strings: Sequence[str],
        dest: str,
        limits: Limits,
        type: Any = str,
        default: Any = None,
        metavar: str | None = None,
    ):
        metavar = metavar or "|".join(limits.choices) or METAVARS[type]
        text = help_text(limits, default)
        super().__init__(option_strings, dest, type=type, default=default, metavar=metavar, help=text)
        self.limits = limits

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any, flag: Any = None
    ) -> None:
        setattr(namespace, self.dest, value)

    def read(self, flag: str, text: str) -> Any:
        """Convert the text after the flag to its value. Raises ValueError with what is wrong."""
        try:
            return read_value(self.type, self.limits, text)
        except ValueError as error:
            raise ValueError(f"{flag} {error}") from None


class ParameterFlag(Flag):
    """The flag of a parameter. Its value stays a string, which is checked together with the files."""

    def __init__(self, option_strings: Sequence[str], dest: str, spec: Spec, default: Any):
        super().__init__(option_strings, dest, spec.limits, spec.type, spec.default)
        self.default = default  # argparse.SUPPRESS: only what was given counts; spec.default is for the help

    def read(self, flag: str, text: str) -> str:
        return text


def read_value(kind: Any, limits: Limits, text: str) -> Any:
    """Convert text to a type and check the limits.

    Raises:
        ValueError: with the value as a message shows it, and what is wrong.
    """
    if not text and not limits.may_be_empty:
        raise ValueError("'': must not be empty")
    try:
        value = as_number(kind, text) if kind in (int, float) else text
    except ValueError as error:
        raise ValueError(f"{shown(text)}: {error}") from None
    if wrong := limits.violation(value):
        raise ValueError(f"{shown(value)}: {wrong}")
    return value


def help_text(limits: Limits, default: Any) -> str:
    """Return the help on a flag for argparse, with the default unless it is None or empty."""
    shown_default = "" if default in (None, "", argparse.SUPPRESS) else f" ({default})"
    return (limits.help + shown_default).replace("%", "%%")


class Parser(argparse.ArgumentParser):
    """Defines a script's flags, each of them a Flag or a switch of argparse, and parses the command line.

    argparse's own parsing would stop at the first mistake; this one reports all of them.
    """

    @property
    def flags(self) -> Mapping[str, argparse.Action]:
        """Every flag, by each of its names."""
        return self._option_string_actions

    def parse_with_suggestions(
        self, argv: list[str] | None = None
    ) -> tuple[argparse.Namespace, list[Problem]]:
        """Return the values of the flags and a problem for each mistake; such a flag keeps its default.

        Raises:
            SystemExit: after --help.
        """
        namespace = self.parse_args([])  # the defaults
        problems: list[Problem] = []
        given: dict[argparse.Action, str] = {}  # the flags as they were typed
        words = list(sys.argv[1:] if argv is None else argv)
        before = ""  # the last known flag
        lost = False  # after an unknown flag or a stray word: further words probably belong to it
        while words:
            word = words.pop(0)
            flag, assigned, value = word.partition("=")
            if flag in self.flags:
                given[self.flags[flag]] = before = flag
                problems += self._apply_flag(flag, value if assigned else None, words, namespace)
                lost = False
            elif self._is_flag(word):
                problems.append(Problem(f"unknown flag {flag}{nearest(flag, self.flags)}", ()))
                lost = True
            elif word != "--" and not lost:  # `--` only ends the flags: there are no positional arguments
                problems.append(self._unexpected_word(word, before))
                lost = True
        return namespace, [*problems, *self._exclusions(given)]

    def _is_flag(self, word: str) -> bool:
        """Return whether a word is a known or unknown flag, not a value such as -1, "- a" or "-"."""
        flag = word.split("=")[0]
        if not flag.startswith("-") or flag.strip("-") == "" or len(flag.split()) > 1:
            return False
        try:
            float(flag)
        except ValueError:
            return True
        return False

    def _apply_flag(
        self, flag: str, value: str | None, words: list[str], namespace: argparse.Namespace
    ) -> list[Problem]:
        """Apply a known flag with the `value` after its `=`, or else with the first of `words`."""
        action = self.flags[flag]
        try:
            if isinstance(action, Flag):
                text = self._value_behind(flag, words) if value is None else value
                action(self, namespace, action.read(flag, text), flag)
            else:
                _refuse_value(action, flag, value, words)
                action(self, namespace, None, flag)
        except ValueError as error:
            return [Problem(str(error), (action.dest,))]
        return []

    def _value_behind(self, flag: str, words: list[str]) -> str:
        """Remove the value of a flag from the words that follow it, and return it.

        Raises:
            ValueError: there is none, or it looks like a flag.
        """
        if words and not self._is_flag(words[0]):
            return words.pop(0)
        next_flag = words[0].split("=")[0] if words else ""
        meant = next_flag.startswith("--") and nearest(next_flag, self.flags)
        if not words or next_flag in self.flags or meant:
            raise ValueError(f"{flag}: needs a value")
        assigned = f"{flag}={shlex.quote(words.pop(0))}"
        raise ValueError(f"{flag}: needs a value; one that begins with a dash is written {assigned}")

    def _unexpected_word(self, word: str, before: str) -> Problem:
        """Return the problem of a word that belongs to no flag; `before` is the last flag before it."""
        suggestion = ""
        if meant := self._suggested_flag(word):
            suggestion = f"; did you mean {meant} {shlex.quote(word)}?"
        if before and self.flags[before].nargs == 0 and not os.path.exists(word):
            suggestion = f"; {before} takes no value"
        return Problem(f"{shown(word)} belongs to no flag{suggestion}", ())

    def _suggested_flag(self, word: str) -> str:
        """Return the first flag that takes such a word (see Limits.suggested_for), or ""."""
        kinds = [A_FOLDER if os.path.isdir(word) else Path(word).suffix, A_WORD]
        if os.path.exists(word):
            kinds.insert(1, A_PATH)
        for kind in kinds:
            for flag, action in self.flags.items():
                if isinstance(action, Flag) and kind in action.limits.suggested_for:
                    return flag
        return ""

    def _exclusions(self, given: Mapping[argparse.Action, str]) -> list[Problem]:
        """Return a problem for each group of mutually exclusive flags of which several were given."""
        problems = []
        for group in self._mutually_exclusive_groups:
            flags = [flag for action, flag in given.items() if action in group._group_actions]
            if len(flags) > 1:
                problems.append(Problem(f"{' and '.join(flags)} exclude each other: leave one out", ()))
        return problems


def _refuse_value(switch: argparse.Action, flag: str, value: str | None, words: list[str]) -> None:
    """Raise ValueError if a switch was given a value, which is removed from `words` if it is there."""
    if value is None and words and words[0].lower() in SWITCH_VALUES:
        value = words.pop(0)
    if value is not None:
        on_and_off = [name for name in switch.option_strings if name.startswith("--")]
        say = ": {} is on, {} is off".format(*on_and_off) if len(on_and_off) == 2 else ""
        raise ValueError(f"{flag} {shown(value)}: a switch takes no value{say}")


def parse_command_line(argv: list[str] | None = None) -> Options:
    """Parse train.py's command line. Parameters stay strings: ConfigLoader reports all problems together.

    Raises:
        SystemExit: after --help.
    """
    parser = Parser(
        prog="python train.py",
        usage="python train.py [--flag VALUE ...]",
        description="Train a character-level GPT. With no flags: the reference model on data/input.txt.",
        epilog="Every parameter can also be set in a file of configs/: --batch-size 8 is batch_size: 8.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    run = parser.add_argument_group("run")
    add_config_flag(run)
    start = run.add_mutually_exclusive_group()
    start.add_argument(
        "--resume",
        action=Flag,
        metavar="RUN",
        limits=Limits("run to continue: latest, a run id or a run directory"),
    )
    weights = Limits("exported model to start from", suggested_for=(".safetensors",))
    start.add_argument("--init-from", action=Flag, metavar="PATH", limits=weights)
    run.add_argument(
        "--print-config", action="store_true", help="print every parameter with its origin as YAML and exit"
    )
    volume = run.add_mutually_exclusive_group()
    volume.add_argument("--quiet", action="store_true", help="print only warnings and errors")
    volume.add_argument("--verbose", action="store_true", help="print debug messages too")
    run.add_argument("--serve-tensorboard", action="store_true", help="serve TensorBoard while training")
    add_parameter_flags(parser)
    namespace, problems = parser.parse_with_suggestions(argv)
    values, given = split_parameters(namespace)
    if given.get("print_config"):
        given["quiet"] = True  # the standard output is YAML and nothing else
    return Options(values=values, problems=problems, **given)


def add_config_flag(group: Any) -> None:
    """Add --config."""
    limits = Limits(
        "JSON or YAML file of parameters, or a folder (a preset) in place of configs/",
        suggested_for=(A_FOLDER, ".json", ".yaml"),
    )
    group.add_argument("--config", action=Flag, metavar="PATH", limits=limits)


def add_runs_dir_flag(parser: argparse.ArgumentParser) -> None:
    """Add --runs-dir to a script that reads runs; see ConfigLoader.runs_dir."""
    limits = Limits("folder of the run directories (default: as in training)", suggested_for=(A_PATH,))
    parser.add_argument("--runs-dir", action=Flag, metavar="PATH", limits=limits)


def add_parameter_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each parameter, in the groups of PARTS; the parser's default must be SUPPRESS."""
    for part, config_class in PARTS.items():
        group = parser.add_argument_group(part, config_class.__doc__)
        for spec in specs().values():
            if spec.part == part:
                _add_flag(group, spec)


def split_parameters(namespace: argparse.Namespace) -> tuple[dict[str, str | bool], dict[str, Any]]:
    """Split what was given on the command line into parameters and other flags, by name."""
    given = vars(namespace)
    values = {name: given.pop(name) for name in list(given) if name in specs()}
    return values, given


def _add_flag(group: Any, spec: Spec) -> None:
    if spec.type is bool:
        text = help_text(spec.limits, spec.default)
        group.add_argument(spec.flag, dest=spec.name, action=argparse.BooleanOptionalAction, help=text)
    else:
        group.add_argument(spec.flag, dest=spec.name, action=ParameterFlag, spec=spec)
