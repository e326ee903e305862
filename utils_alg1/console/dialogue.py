"""The dialogue of inference.py --interactive, and the sampling settings that it shares with the flags."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from parameters import specs
from utils_alg1.base.errors import DONE, Alg1Error
from utils_alg1.base.problems import nearest, shown
from utils_alg1.base.settings import Limits
from utils_alg1.console.command_line import read_value
from utils_alg1.console.messages import print_error

OFF = "off"  # how None is written
UNKNOWN = ("error", "skip", "replace")  # what to do with characters that are not in the vocabulary
INTRODUCTION = "a prompt, then Enter; :help lists the commands, Ctrl-C stops a text, Ctrl-D ends"


class Setting(NamedTuple):
    """A sampling setting: a flag of inference.py and a command of the dialogue."""

    type: type
    default: Any  # None: off
    limits: Limits  # with the help on the flag
    meaning: str  # the help on the command


_SEED = specs()["seed"]
SETTINGS = {
    "max_new_tokens": Setting(int, 500, Limits("number of characters", minimum=0), "number of characters"),
    "temperature": Setting(
        float, 1.0, Limits("sampling temperature; 0: greedy", minimum=0), "sampling temperature; 0: greedy"
    ),
    "top_k": Setting(
        int,
        None,
        Limits("sample from the N most likely characters", minimum=1),
        "sample from so many of the most likely characters; off: from all",
    ),
    "top_p": Setting(
        float,
        None,
        Limits(
            "sample from the most likely characters with total probability X (nucleus)", above=0, maximum=1
        ),
        "sample from the most likely characters with this total probability; off: from all",
    ),
    "seed": Setting(
        int,
        _SEED.default,
        dataclasses.replace(_SEED.limits, help="random seed of the samples"),
        "random seed; sampling restarts from it",
    ),
    "unknown": Setting(
        str,
        "error",
        Limits("what to do with characters of a prompt that are not in the vocabulary", choices=UNKNOWN),
        "characters of a prompt that are not in the vocabulary: error, skip or replace",
    ),
}
COMMANDS = {
    ":temperature": "temperature",
    ":length": "max_new_tokens",
    ":top-k": "top_k",
    ":top-p": "top_p",
    ":seed": "seed",
    ":unknown": "unknown",
}
ALL_COMMANDS = (*COMMANDS, ":help", ":quit")


def interact(
    arguments: argparse.Namespace, answer: Callable[[str], None], seed: Callable[[int], object]
) -> int:
    """Reads prompts and continues them; commands change the settings in between (see COMMANDS).

    Ctrl-C ends a text, Ctrl-D the program.

    Args:
        arguments: the settings, by the names of SETTINGS; commands change them.
        answer: writes a prompt and its continuation.
        seed: restarts sampling from a seed.
    """
    enable_history()
    if hasattr(sys.stdin, "reconfigure"):  # invalid bytes become an unknown character, not an error
        sys.stdin.reconfigure(errors="replace")
    asks = sys.stdin.isatty()  # if the lines come from a file or a pipe, no prompt sign is written
    print(INTRODUCTION, file=sys.stderr)
    while True:
        try:
            line = input("> " if asks else "")
            typed = line.lstrip()
            if typed.startswith("::"):  # a prompt that begins with a colon
                line = line.replace("::", ":", 1)
            elif typed.startswith(":"):
                obey(typed, arguments, seed)
                continue
            answer(line)
        except EOFError:
            print("\n" * asks, end="")
            return DONE
        except Alg1Error as error:
            print_error(error)
        except KeyboardInterrupt:
            print()


def obey(line: str, arguments: argparse.Namespace, seed: Callable[[int], object]) -> None:
    """Executes a line such as ":temperature 0.7"; a command without a value prints the current one.

    Raises:
        Alg1Error: there is no such command, or its value is wrong; nothing has changed.
        EOFError: the command is :quit.
    """
    word, *values = line.split(maxsplit=1)
    text = values[0].strip() if values else ""
    if word in (":help", ":quit"):
        if text:
            raise Alg1Error(f"{word} {shown(text)}: it takes no value", f"type {word}")
        if word == ":quit":
            raise EOFError
        print(help_on_commands(arguments), file=sys.stderr)
        return
    if word not in COMMANDS:
        suggestion = nearest(word, ALL_COMMANDS)
        raise Alg1Error(
            f"unknown command {word}{suggestion}", "type :help, or :: for a prompt that begins with :"
        )
    name = COMMANDS[word]
    if text:
        value = value_of(word, text, arguments)
        setattr(arguments, name, value)
        if name == "seed":
            seed(value)
    print(f"{word} {shown_value(arguments, name)}", file=sys.stderr)


def value_of(word: str, text: str, arguments: argparse.Namespace) -> Any:
    """Converts the value after a command.

    Raises:
        Alg1Error: it has the wrong type or is out of range.
    """
    name = COMMANDS[word]
    setting = SETTINGS[name]
    may_be_off = setting.default is None
    if may_be_off and text == OFF:
        return None
    try:
        return read_value(setting.type, setting.limits, text)
    except ValueError as error:
        raise Alg1Error(
            f"{word} {error}{', or off' * may_be_off}",
            f"it stays {shown_value(arguments, name)}; :help explains every command",
        ) from None


def shown_value(arguments: argparse.Namespace, name: str) -> str:
    value = getattr(arguments, name)
    return OFF if value is None else str(value)


def help_on_commands(arguments: argparse.Namespace) -> str:
    """Returns the list of commands with their current values."""
    rows = [
        (f"{word} {shown_value(arguments, name)}", SETTINGS[name].meaning) for word, name in COMMANDS.items()
    ]
    rows += [
        (":help", "this list"),
        ("::TEXT", "the prompt :TEXT"),
        ("Ctrl-C", "stops a text"),
        (":quit, Ctrl-D", "ends"),
    ]
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"{what:{width}}  {meaning}" for what, meaning in rows)


def enable_history() -> None:
    """Gives input() a history and completes commands, if Python was built with readline."""
    with contextlib.suppress(ImportError):
        import readline

        def complete(text: str, n: int) -> str | None:
            fitting = [word for word in ALL_COMMANDS if text and word.startswith(text)]
            return fitting[n] if n < len(fitting) else None

        readline.set_completer(complete)
        readline.set_completer_delims(" ")
        libedit = "libedit" in (readline.__doc__ or "")  # Python's readline on macOS
        readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
