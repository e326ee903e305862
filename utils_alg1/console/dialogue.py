"""The dialogue of inference.py --interactive, and the sampling settings: its commands are flags there."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Callable
from typing import Any

from parameters import specs
from utils_alg1.base.errors import DONE, Alg1Error
from utils_alg1.base.problems import nearest
from utils_alg1.console.command_line import Parser, number
from utils_alg1.console.messages import print_error, print_note
from utils_alg1.console.signals import RaiseSignal, signal_handler

INTRODUCTION = "a prompt, then Enter; :help lists the commands, Ctrl-C stops a text, Ctrl-D ends"
COMMANDS = (":length", ":temperature", ":top-k", ":top-p", ":seed", ":stop", ":unknown", ":help", ":quit")

Read = Callable[[str], Any]  # converts what is typed, as an argparse type does


def add_settings(group: Any, prefix: str = "--", read_stop: Read = str) -> None:
    """Add the sampling settings to a parser or a group: as flags, or with the prefix ":" as commands."""

    def add(name: str, convert: Read, default: Any, text: str, **options: Any) -> None:
        help = f"{text} (%(default)s)"
        group.add_argument(prefix + name, type=convert, default=default, help=help, **options)

    length = "max-new-tokens" if prefix == "--" else "length"
    seed = specs()["seed"]
    seeds = number(int, minimum=0, maximum=seed.maximum)
    top_p = "sample from the most likely characters with total probability X"
    stop = "end a text after it has drawn this string"
    unknown = "what to do with characters of the given text that are not in the vocabulary"
    add(length, number(int, minimum=0), 500, "number of characters", metavar="N", dest="max_new_tokens")
    add("temperature", number(float, minimum=0), 1.0, "sampling temperature; 0: greedy", metavar="X")
    add("top-k", or_off(number(int, minimum=1)), "off", "sample from the N likeliest characters", metavar="N")
    add("top-p", or_off(number(float, above=0, maximum=1)), "off", top_p, metavar="X")
    add("seed", seeds, seed.default, "random seed, from which sampling starts", metavar="N")
    add("stop", or_off(read_stop), "off", stop, metavar="TEXT")
    add("unknown", str, "error", unknown, choices=("error", "skip", "replace"))


def or_off(convert: Read) -> Read:
    """Return an argparse type that reads "off" as None and other text with `convert`."""
    return lambda text: None if text == "off" else convert(text)


def interact(
    arguments: argparse.Namespace,
    answer: Callable[[str], None],
    seed: Callable[[int], object],
    read_stop: Read = str,
) -> int:
    """Read prompts until Ctrl-D; Ctrl-C ends a text. Commands change the settings in `arguments`.

    `answer` writes a prompt and its continuation, `seed` restarts sampling from a seed, and `read_stop`
    converts the text of :stop.
    """
    enable_history()
    if hasattr(sys.stdin, "reconfigure"):  # invalid bytes become an unknown character, not an error
        sys.stdin.reconfigure(errors="replace")
    asks = sys.stdin.isatty()  # if the lines come from a file or a pipe, no prompt sign is written
    print(INTRODUCTION, file=sys.stderr)
    while True:
        try:
            with signal_handler(RaiseSignal()):  # a new one: what follows a Ctrl-C is no part of its request
                line = input("> " if asks else "")
                typed = line.lstrip()
                if typed.startswith("::"):  # a prompt that begins with a colon
                    line = line.replace("::", ":", 1)
                elif typed.startswith(":"):
                    print(obey(typed, arguments, seed, read_stop), file=sys.stderr)
                    continue
                if typed.strip().removesuffix("()") in ("exit", "quit"):
                    print_note(f"{typed.strip()!r} is continued as a prompt; to leave: :quit, or Ctrl-D")
                answer(line)
        except EOFError:
            if asks:
                print()
            return DONE
        except Alg1Error as error:
            print_error(error)
        except KeyboardInterrupt:
            print()


def obey(
    line: str, arguments: argparse.Namespace, seed: Callable[[int], object], read_stop: Read = str
) -> str:
    """Execute a line such as ":temperature 0.7" and return what to print: the value, or help.

    Raises EOFError for :quit, and Alg1Error for a mistake, which changes nothing.
    """
    word, value = re.findall(r"(\S*)\s?(.*)", line, re.DOTALL)[0]
    value = value if word == ":stop" else value.strip()  # spaces and line ends may be what it stops at
    if word not in COMMANDS:
        hint = "type :help, or :: for a prompt that begins with :"
        raise Alg1Error(f"unknown command {word}{nearest(word, COMMANDS)}", hint)
    if word == ":quit":
        raise EOFError
    parser = Parser(
        hint=":help explains every command",
        usage=argparse.SUPPRESS,
        prefix_chars=":",
        add_help=False,
        epilog="::TEXT is the prompt :TEXT. Ctrl-C stops a text; :quit or Ctrl-D ends.",
    )
    add_settings(parser, ":", read_stop)
    if value and word != ":help":
        parser.parse_args([f"{word}={value}"], arguments)
        if word == ":seed":
            seed(arguments.seed)
    values = vars(arguments) | {"stop": repr(arguments.stop) if arguments.stop else None}
    settings = {name: "off" if value is None else value for name, value in values.items()}
    if word == ":help":
        parser.set_defaults(**settings)
        return parser.format_help().strip()
    name = word[1:].replace("-", "_").replace("length", "max_new_tokens")
    return f"{word} {settings[name]}"


def enable_history() -> None:
    """Give input() a history and completion of commands, if Python was built with readline."""
    with contextlib.suppress(ImportError):
        import readline

        def complete(text: str, n: int) -> str | None:
            fitting = [word for word in COMMANDS if text and word.startswith(text)]
            return fitting[n] if n < len(fitting) else None

        readline.set_completer(complete)
        readline.set_completer_delims(" ")
        libedit = "libedit" in (readline.__doc__ or "")  # Python's readline on macOS
        readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
