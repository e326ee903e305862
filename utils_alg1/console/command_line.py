"""The command line: argparse, with errors as Alg1Error and what an unknown flag most likely means."""

from __future__ import annotations

import argparse
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from parameters import PARTS, specs
from utils_alg1.base.errors import Alg1Error
from utils_alg1.base.other_names import answer_to, bare
from utils_alg1.base.problems import Problem, raise_problems, shown, similar
from utils_alg1.base.scripts import command
from utils_alg1.base.settings import Limits, coerce
from utils_alg1.base.text import shell_quote

TEXTS = ("data_path", "val_data", "vocabulary", "score")  # flags that name a text
OF_STEPS = (  # parameters that nothing but further steps depend on
    *("max_iters", "max_seconds", "eval_interval", "patience", "gradient_norm_interval", "speed_interval"),
    *("histogram_interval", "checkpoint_interval", "checkpoint_minutes", "keep_checkpoints"),
)
Uses = dict[str, list[tuple[str, list[str]]]]  # name -> each use of its flag, with the words behind it
METAVARS = {int: "N", float: "X", str: "TEXT"}


@dataclass
class Options:
    """The command line of train.py: the flags of parameters, not checked yet, and all other flags."""

    values: dict[str, str | bool] = field(default_factory=dict)  # by the name of the parameter
    config: str | None = None
    resume: str | None = None
    init_from: str | None = None
    finish: bool = False
    print_config: bool = False
    quiet: bool = False
    verbose: bool = False
    serve_tensorboard: bool = False


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises Alg1Error, with `hint`, instead of printing its usage and exiting."""

    def __init__(self, hint: str = "", **options: Any):
        super().__init__(allow_abbrev=False, **options)
        self.hint = hint or f"{self.prog} --help lists every flag"
        self._negative_number_matcher = re.compile(r"-\.?\d")  # a value, also with an exponent: -1e-3
        self.given: list[str] = []  # the flags that stood on the command line, once it is parsed

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse the command line. An Alg1Error names every unknown flag, or else the first mistake."""
        args = self._with_dashes(sys.argv[1:] if args is None else args)
        namespace, unknown = self.parse_known_args(args, namespace)
        raise_problems([*self._unknown_flags(unknown)], self.hint)
        uses = self._uses(args)
        self._refuse_repeats(uses)
        self.given = [flag for (flag, _), *_ in uses.values()]
        words = " ".join(shown(word) for word in unknown if word != "--")
        if words:
            hint = "every value follows its flag; switches take none"
            if "--config" in self._option_string_actions and words.endswith((".py'", ".yaml'", ".json'")):
                hint = "settings are read from a YAML or JSON file: --config PATH"
            self.error(f"belongs to no flag: {words}", hint)
        return namespace

    def _with_dashes(self, args: Sequence[str]) -> list[str]:
        """Return a command line with the flags as they are listed: --max_iters means --max-iters."""
        words, known = list(args), self._option_string_actions
        for i, word in enumerate(itertools.takewhile(lambda word: word != "--", args)):
            flag, is_given, value = word.partition("=")
            if flag not in known and flag.replace("_", "-") in known:
                words[i] = flag.replace("_", "-") + is_given + value
        return words

    def _unknown_flags(self, words: list[str]) -> Iterator[Problem]:
        """Yield a problem for each flag among the words that belong to no known one."""
        known = self._option_string_actions  # a flag behind "--" is one of these
        for word, next_word in itertools.zip_longest(words, words[1:], fillvalue="-"):
            flag, is_given, text = word.partition("=")
            if not re.match("--?[A-Za-z]", word) or flag in known:
                continue
            value = text if is_given or next_word.startswith("-") else next_word
            meant = answer_to(flag, known, value)
            if not meant and bare(flag) in specs():
                meant = ": it is a flag of train.py"
            yield Problem(f"unknown flag {flag}{meant or similar(flag, known)}")

    def _uses(self, args: Sequence[str]) -> Uses:
        """Return the uses of each flag on a command line, by the name of its value."""
        uses: Uses = {}
        current: list[str] = []  # the words behind the last flag
        for word in itertools.takewhile(lambda word: word != "--", args):
            flag, has_value, value = word.partition("=")
            if flag in self._option_string_actions:
                current = [value] if has_value else []
                uses.setdefault(self._option_string_actions[flag].dest, []).append((flag, current))
            else:
                current.append(word)
        return uses

    def _refuse_repeats(self, uses: Uses) -> None:
        """Raise Alg1Error for a flag that is given twice, or with several values: argparse takes the last."""
        for name, given in uses.items():
            flag, values = given[0][0], [word for _, words in given for word in words]
            hint = f"{several_texts(flag, values)}; {self.hint}" if name in TEXTS else self.hint
            if len(given) > 1:
                listed = ", ".join(" ".join([flag, *map(shell_quote, words)]) for flag, words in given)
                raise Alg1Error(f"{flag} is given {len(given)} times: {listed}", f"give it once; {hint}")
            if len(values) > 1 and self._option_string_actions[flag].nargs is None:
                text = f"{flag} takes one value, and was given {len(values)}: {' '.join(map(shown, values))}"
                raise Alg1Error(text, f"put a value with spaces or * in quotes; {hint}")

    def error(self, message: str, hint: str = "") -> NoReturn:
        """Raise Alg1Error with the hints of this mistake and of the parser."""
        if message.endswith("expected one argument"):
            hint = "a value that begins with a dash is written --flag=VALUE"
        for argparse_words, ours in (
            ("expected one argument", "needs a value"),
            ("ignored explicit argument", "takes no value, and was given"),
        ):
            message = message.replace(argparse_words, ours)
        raise Alg1Error(message.removeprefix("argument "), f"{hint}; {self.hint}" if hint else self.hint)


def several_texts(flag: str, names: list[str]) -> str:
    """Return how a flag names several texts: by a pattern, where one matches these files and no others."""
    paths = {Path(name) for name in names}
    patterns = {path.parent / f"*{path.suffix}" for path in paths}
    matching = [pattern for pattern in patterns if set(pattern.parent.glob(pattern.name)) == paths]
    example = str(matching[0]) if matching else "books/*.txt"
    return f"several texts are their folder, or a pattern in quotes: {flag} {shell_quote(example)}"


def number(
    kind: type, *, above: float | None = None, minimum: float | None = None, maximum: float | None = None
) -> Callable[[str], Any]:
    """Return an argparse type: an int or a float within limits."""
    limits = Limits(type=kind, above=above, minimum=minimum, maximum=maximum)

    def convert(text: str) -> Any:
        try:
            value = coerce(limits, text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{shown(text)} {error}") from None
        if wrong := limits.violation(value):
            raise argparse.ArgumentTypeError(f"{value} {wrong}")
        return value

    return convert


def not_empty(text: str) -> str:
    """An argparse type: any text but ""."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def path_name(text: str) -> str:
    """An argparse type: a path, which may begin with ~."""
    return os.path.expanduser(not_empty(text))


def database_url(text: str) -> str:
    """An argparse type: the URL of a database, whose path may begin with ~: sqlite:///~/study.db."""
    driver, separator, path = not_empty(text).partition(":///")
    return driver + separator + os.path.expanduser(path)


def utf8_text(text: str) -> str:
    """An argparse type: a text in UTF-8, whatever the locale, which Python decodes arguments by."""
    try:
        return os.fsencode(text).decode()
    except UnicodeError:
        return text


def parse_command_line(argv: list[str] | None = None) -> Options:
    """Parse train.py's command line. Parameters stay text, which ConfigLoader checks with the files."""
    parser = Parser(
        prog=command("train.py"),
        usage="%(prog)s [--flag VALUE ...]",
        description="Train a character-level GPT. With no flags: the reference model on data/input.txt.",
        epilog="Every parameter can also be set in a file of configs/: --batch-size 8 is batch_size: 8.",
        argument_default=argparse.SUPPRESS,
    )
    run = parser.add_argument_group("run")
    add_config_flag(run)
    start = run.add_mutually_exclusive_group()
    resume = "run to continue: its name or directory, or latest: the newest that was interrupted"
    start.add_argument("--resume", type=path_name, metavar="RUN", help=resume)
    start.add_argument("--init-from", type=path_name, metavar="PATH", help="exported model to start from")
    finish = "with --resume: take no further step; write the export, results and report of what is saved"
    run.add_argument("--finish", action="store_true", help=finish)
    shows = "print every parameter with its origin as YAML and exit"
    run.add_argument("--print-config", action="store_true", help=shows)
    volume = run.add_mutually_exclusive_group()
    volume.add_argument("--quiet", action="store_true", help="print only warnings and errors")
    volume.add_argument("--verbose", action="store_true", help="print debug messages too")
    run.add_argument("--serve-tensorboard", action="store_true", help="serve TensorBoard while training")
    add_parameter_flags(parser)
    values, given = split_parameters(parser.parse_args(argv))
    if given.get("finish") and "resume" not in given:
        parser.error("--finish needs a run", "name it: --resume RUN --finish")
    if given.get("finish") and (idle := [specs()[name].flag for name in values if name in OF_STEPS]):
        raise Alg1Error(f"--finish takes no step: leave {', '.join(idle)} out", parser.hint)
    if given.get("print_config"):
        given["quiet"] = True  # the standard output is YAML and nothing else
    return Options(values=values, **given)


def prints_only(argv: list[str] | None = None) -> bool:
    """Return whether a command line of train.py asks for --help or --print-config, and nothing else."""
    words = sys.argv[1:] if argv is None else argv
    return not {"-h", "--help", "--print-config", "--print_config"}.isdisjoint(words)


def add_config_flag(group: Any) -> None:
    text = "JSON or YAML file of parameters, or a folder (a preset) in place of configs/"
    group.add_argument("--config", type=path_name, metavar="PATH", help=text)


def add_runs_dir_flag(parser: argparse.ArgumentParser) -> None:
    """Add --runs-dir to a script that reads runs; see ConfigLoader.runs_dir."""
    text = "folder of the run directories (default: as in training)"
    parser.add_argument("--runs-dir", type=path_name, metavar="PATH", help=text)


def add_parameter_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each parameter, in the groups of PARTS. Only given flags appear in the namespace."""
    groups = {part: parser.add_argument_group(part, config.__doc__) for part, config in PARTS.items()}
    for spec in specs().values():
        text = spec.help + ("" if spec.default in (None, "") else f" ({spec.default})")
        options: dict[str, Any] = {"dest": spec.name, "default": argparse.SUPPRESS, "help": text}
        if spec.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["metavar"] = "|".join(spec.choices) or METAVARS[spec.type]
        groups[spec.part].add_argument(spec.flag, **options)


def split_parameters(namespace: argparse.Namespace) -> tuple[dict[str, str | bool], dict[str, Any]]:
    """Split what was given on the command line into parameters and other flags, by name."""
    given = vars(namespace)
    values = {name: given.pop(name) for name in list(given) if name in specs()}
    return values, given
