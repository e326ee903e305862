"""The command line: which flags there are, and every mistake in them in one message."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from parameters import PARTS, Spec, as_number, specs
from problems import Problem, nearest, shown

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


# The names of flags that are no parameters, which a file cannot hold.
FLAGS_ONLY = {option.name for option in fields(Options)} - {"values", "problems"}


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
