"""Sample text from a trained model.

    python inference.py                                  the latest run
    python inference.py --run 2026-01-31_001             a run, by its id or directory
    python inference.py --model model.safetensors        an exported file or a checkpoint
    python inference.py --prompt "ROMEO:" --max-new-tokens 300 --temperature 0.8
    python inference.py --interactive                    prompt after prompt; :help lists its commands

Text appears as it is drawn. The same model, prompt, settings and --seed give the same text.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from errors import DONE, Alg1Error
from parameters import as_number, specs
from problems import Problem, nearest, raise_problems, shown
from utils import show_characters
from utils_alg1.utils_command_line import Parser
from utils_alg1.utils_config_loader import ConfigLoader
from utils_alg1.utils_output import Typewriter, print_error, print_warning, shown_on
from utils_alg1.utils_script import importing, run_script

if TYPE_CHECKING:
    import torch

    from model import BigramLanguageModel
    from utils import Tokenizer


def parse_command_line(argv: list[str] | None = None) -> argparse.Namespace:
    """Read inference.py's command line.

    Raises:
        Alg1Error: unknown flags, or values out of range.
        SystemExit: after --help.
    """
    parser = Parser(
        prog="python inference.py",
        description="Sample text from a trained model.",
        allow_abbrev=False,
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--run", metavar="RUN", help="a run id or directory (default: the latest)")
    source.add_argument("--model", metavar="PATH", help="an exported file or a checkpoint")
    parser.add_argument("--prompt", metavar="TEXT", help="what the text begins with")
    parser.add_argument("--max-new-tokens", type=int, default=500, metavar="N", help="characters (500)")
    parser.add_argument(
        "--temperature", type=float, default=1.0, metavar="X", help="0 takes the likeliest (1.0)"
    )
    parser.add_argument("--top-k", type=int, metavar="N", help="draw from the N likeliest only")
    parser.add_argument("--top-p", type=float, metavar="X", help="draw from the fewest that make up X only")
    parser.add_argument("--num-samples", type=int, default=1, metavar="N", help="how many texts (1)")
    parser.add_argument(
        "--seed",
        type=int,
        default=specs()["seed"].default,
        metavar="N",
        help=f"of the draws ({specs()['seed'].default})",
    )
    parser.add_argument("--stop", metavar="TEXT", help="end a text once it has drawn this")
    parser.add_argument(
        "--unknown",
        choices=UNKNOWN,
        default="error",
        help="what to do with prompt characters that the model does not know (error)",
    )
    parser.add_argument("--device", default=specs()["device"].default, metavar="NAME", help="as in training")
    parser.add_argument(
        "--vocabulary", metavar="PATH", help="the text that weights without a vocabulary were trained on"
    )
    parser.add_argument("--interactive", action="store_true", help="ask for prompts")
    parser.add_argument(
        "--runs-dir", metavar="PATH", help="where runs are looked for (default: as in training)"
    )
    arguments, problems = parser.parse_with_suggestions(argv, "--model", "--prompt")
    if arguments.interactive and arguments.prompt is not None:
        problems.append(Problem("--interactive asks for prompts: leave --prompt out", ("prompt",)))
    for name in NUMBERS:
        value = getattr(arguments, name)
        if wrong := None if value is None else out_of_range(name, value):
            problems.append(Problem(f"--{name.replace('_', '-')} {wrong}", (name,)))
    if arguments.interactive and arguments.num_samples != 1:
        text = "--interactive draws one text for each prompt: leave --num-samples out"
        problems.append(Problem(text, ("interactive", "num_samples")))
    raise_problems(problems, f"{parser.prog} --help lists every flag")
    return arguments


UNKNOWN = ("error", "skip", "replace")  # what can be done with prompt characters that the model does not know


class Number(NamedTuple):
    """What the number behind a flag, or a command of --interactive, must be."""

    type: type
    good: Callable[[Any], bool]
    wanted: str


NUMBERS = {
    "max_new_tokens": Number(int, lambda n: n >= 0, "at least 0"),
    "num_samples": Number(int, lambda n: n >= 1, "at least 1"),
    "temperature": Number(float, lambda x: x >= 0, "0 or above"),
    "top_k": Number(int, lambda n: n >= 1, "at least 1"),
    "top_p": Number(float, lambda x: 0 < x <= 1, "above 0, at most 1"),
    "seed": Number(int, lambda n: 0 <= n < 2**63, "at least 0 and below 2**63"),
}


def out_of_range(name: str, value: int | float) -> str | None:
    """What is wrong with the value of one of NUMBERS, if anything is."""
    number = NUMBERS[name]
    return None if number.good(value) else f"{shown(value)}: must be {number.wanted}"


def main(argv: list[str] | None = None) -> int:
    arguments = parse_command_line(argv)

    with importing():
        import torch

        from utils import Tokenizer
        from utils_alg1.utils_runtime import find_device
        from utils_alg1.utils_start import find_weights, load_model_file

    device = find_device(arguments.device)
    if arguments.model is not None:
        path = Path(arguments.model)
    else:
        runs_dir = ConfigLoader.runs_dir(arguments.runs_dir)
        path = find_weights(runs_dir, arguments.run)
    model = load_model_file(path)
    if model.vocabulary is None:
        model.vocabulary = vocabulary_of(arguments.vocabulary, model, path)
    elif arguments.vocabulary is not None:
        print_warning("--vocabulary is not used: the model holds its own; leave the flag out")
    model.to(device).eval()
    print(shown_on(sys.stderr, str(path)), file=sys.stderr)
    tokenizer = Tokenizer(model.vocabulary)
    if unseen := tokenizer.unseen(arguments.stop or ""):
        raise Alg1Error(
            f"--stop: not in the model's vocabulary: {show_characters(unseen)}",
            "no text would ever stop there: leave --stop out, or name characters that the model knows",
        )
    if arguments.interactive:
        return interact(model, tokenizer, arguments)
    prompt = known_characters(arguments.prompt or "", tokenizer, arguments.unknown)
    for i in range(arguments.num_samples):
        if arguments.num_samples > 1:
            print(f"--- sample {i + 1}")
        generator = torch.Generator(device).manual_seed(arguments.seed + i)
        write_sample(model, tokenizer, prompt, arguments, generator)
    return DONE


def vocabulary_of(text_path: str | None, model: BigramLanguageModel, path: Path) -> list[str]:
    """The characters of a text, for weights of another program that do not hold theirs.

    Raises:
        Alg1Error: no text was named, or it has another number of characters.
    """
    from data import find_corpus, open_corpus

    hint = "name the text that it was trained on: --vocabulary PATH"
    if text_path is None:
        raise Alg1Error(f"{path}: it does not hold its vocabulary", hint)
    try:
        path_of_text = find_corpus(text_path)
    except Alg1Error as error:  # its own hint speaks of --data
        raise Alg1Error(error.message, hint) from None
    vocabulary = open_corpus(path_of_text).tokenizer.vocabulary
    if len(vocabulary) != model.config.vocab_size:
        raise Alg1Error(
            f"{text_path}: the text has {len(vocabulary)} characters,"
            f" {path} is for {model.config.vocab_size}",
            "name the text that it was trained on",
        )
    return vocabulary


def known_characters(prompt: str, tokenizer: Tokenizer, unknown: str, flag: str = "--unknown") -> str:
    """The prompt in characters that the model knows; `flag` is what the hint names.

    Raises:
        Alg1Error: there are others, and `unknown` is "error".
    """
    unseen = set(tokenizer.unseen(prompt))
    if unseen and unknown == "error":
        raise Alg1Error(
            f"not in the model's vocabulary: {show_characters(unseen)}",
            f"leave them out with {flag} skip, or {flag} replace",
        )
    stand_in = "" if unknown == "skip" else tokenizer.stand_in
    return "".join(stand_in if character in unseen else character for character in prompt)


def write_sample(
    model: BigramLanguageModel,
    tokenizer: Tokenizer,
    prompt: str,
    arguments: argparse.Namespace,
    generator: torch.Generator,
) -> None:
    """Write the prompt and its continuation, character by character; one more line end closes it."""
    import torch

    device = model.lm_head.weight.device
    tokens = tokenizer.encode(prompt or tokenizer.default_prompt)
    stream = model.generate_stream(
        torch.tensor([tokens], device=device),
        arguments.max_new_tokens,
        arguments.temperature,
        arguments.top_k,
        arguments.top_p,
        generator,
        stop=tokenizer.encode(arguments.stop or ""),
    )
    screen = Typewriter(sys.stdout)
    screen.write(prompt)
    for token in stream:
        screen.write(tokenizer.decode(token.tolist()))
        sys.stdout.flush()
    screen.write("\n")
    sys.stdout.flush()


OFF = "off"
WAYS = ", ".join(UNKNOWN[:-1]) + f" or {UNKNOWN[-1]}"


class Command(NamedTuple):
    """A command of --interactive: which argument it changes, and how :help explains it."""

    name: str
    help: str
    words: tuple[str, ...] = ()  # that are values, too


COMMANDS = {
    ":temperature": Command("temperature", "0 takes the likeliest"),
    ":length": Command("max_new_tokens", "characters of a text"),
    ":top-k": Command("top_k", "draw from so many likeliest only; off: from all", (OFF,)),
    ":top-p": Command("top_p", "draw from the fewest that make up so much; off: from all", (OFF,)),
    ":seed": Command("seed", "of the draws, which begin anew"),
    ":unknown": Command("unknown", "unknown characters of a prompt: " + WAYS, UNKNOWN),
}
ALL_COMMANDS = (*COMMANDS, ":help", ":quit")
INTRODUCTION = "a prompt, then Enter; :help lists the commands, Ctrl-C stops a text, Ctrl-D ends"


def interact(model: BigramLanguageModel, tokenizer: Tokenizer, arguments: argparse.Namespace) -> int:
    """Continue prompt after prompt, and change settings in between (see COMMANDS).

    Ctrl-C ends a text, Ctrl-D the program.
    """
    import torch

    with_history()
    if hasattr(sys.stdin, "reconfigure"):  # bytes that are no text are an unknown character, not an end
        sys.stdin.reconfigure(errors="replace")
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(arguments.seed)
    print(INTRODUCTION, file=sys.stderr)
    while True:
        try:
            line = input("> ")
            typed = line.lstrip()
            if typed.startswith("::"):  # a prompt that begins with a colon
                line = line.replace("::", ":", 1)
            elif typed.startswith(":"):
                obey(typed, arguments, generator)
                continue
            prompt = known_characters(line, tokenizer, arguments.unknown, ":unknown")
            write_sample(model, tokenizer, prompt, arguments, generator)
        except EOFError:
            print()
            return DONE
        except Alg1Error as error:
            print_error(error)
        except KeyboardInterrupt:
            print()


def obey(line: str, arguments: argparse.Namespace, generator: torch.Generator) -> None:
    """Do what a line such as ":temperature 0.7" says; a command without a value shows the present one.

    Raises:
        Alg1Error: there is no such command, or its value is wrong; nothing has changed.
        EOFError: it is the one that ends.
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
    command = COMMANDS[word]
    if text:
        value = read_value(word, command, text, arguments)
        setattr(arguments, command.name, value)
        if command.name == "seed":
            generator.manual_seed(value)
    print(f"{word} {shown_value(arguments, command)}", file=sys.stderr)


def read_value(word: str, command: Command, text: str, arguments: argparse.Namespace) -> Any:
    """The value behind a command.

    Raises:
        Alg1Error: it is none of its words, and not the number that it must be.
    """
    hint = f"it stays {shown_value(arguments, command)}; :help explains every command"
    if text in command.words:
        return None if text == OFF else text
    if command.name not in NUMBERS:
        raise Alg1Error(f"{word} {shown(text)}: must be {WAYS}", hint)
    try:
        value = as_number(NUMBERS[command.name].type, text)
        wrong = out_of_range(command.name, value)
    except ValueError as error:
        wrong = f"{shown(text)}: {error}"
    if wrong:
        raise Alg1Error(f"{word} {wrong}{', or off' * (OFF in command.words)}", hint)
    return value


def shown_value(arguments: argparse.Namespace, command: Command) -> str:
    value = getattr(arguments, command.name)
    return OFF if value is None else str(value)


def help_on_commands(arguments: argparse.Namespace) -> str:
    """Every command, with its present value."""
    rows = [(f"{word} {shown_value(arguments, command)}", command.help) for word, command in COMMANDS.items()]
    rows += [
        (":help", "this list"),
        ("::TEXT", "the prompt :TEXT"),
        ("Ctrl-C", "stops a text"),
        (":quit, Ctrl-D", "ends"),
    ]
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"{what:{width}}  {meaning}" for what, meaning in rows)


def with_history() -> None:
    """Let input() remember what was typed and complete commands, where Python was built with readline."""
    with contextlib.suppress(ImportError):
        import readline

        def complete(text: str, n: int) -> str | None:
            fitting = [word for word in ALL_COMMANDS if text and word.startswith(text)]
            return fitting[n] if n < len(fitting) else None

        readline.set_completer(complete)
        readline.set_completer_delims(" ")
        libedit = "libedit" in (readline.__doc__ or "")  # Python's readline on macOS
        readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")


if __name__ == "__main__":
    run_script(main)
