"""Sample text from a trained model, score a text with it, or make a page of it.

    python inference.py                                  the latest run
    python inference.py --run 2026-01-31_001             a run, by its id or directory
    python inference.py --model model.safetensors        an exported file or a checkpoint
    python inference.py --prompt "ROMEO:" --max-new-tokens 300 --temperature 0.8
    python inference.py --interactive                    prompt after prompt; :help lists its commands
    python inference.py --score text.txt                 how well the model predicts a text
    python inference.py --page model.html                a page for a browser, in which the model answers

Characters appear as they are drawn. The same model, prompt, settings and --seed give the same text. On a CPU
PyTorch is not imported: the forward pass is utils_alg1/network/decoder.py.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import random
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from parameters import specs
from utils import Tokenizer
from utils_alg1.base.errors import DONE, Alg1Error
from utils_alg1.base.scripts import command
from utils_alg1.console.command_line import (
    Parser,
    add_runs_dir_flag,
    not_empty,
    number,
    path_name,
    utf8_text,
)
from utils_alg1.console.dialogue import add_settings, interact
from utils_alg1.console.messages import text_for_stream
from utils_alg1.console.script import run_script
from utils_alg1.inference.loading import create_decoder, find_device, load_weights
from utils_alg1.inference.prompts import fit_prompt, fit_stop, note_unread_input, read_prompt

if TYPE_CHECKING:
    from utils_alg1.network.sampling import LogitsDecoder

BATCH_TOKENS = 8192  # of context: so many texts of --num-samples are drawn at a time, for the sake of memory
OF_A_MODEL = {"--run", "--model", "--runs-dir", "--vocabulary"}
DRAWING_NOTHING = {  # what else may stand beside a flag with which no text is drawn
    "--score": {"--device", "--unknown"},
    "--page": set[str](),
}


def parse_command_line(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line of inference.py. Raises Alg1Error, or SystemExit after --help."""
    parser = Parser(
        prog=command("inference.py"),
        description="Sample text from a trained model, score one, or make a page.",
    )
    source = parser.add_mutually_exclusive_group()
    run = "a run id or directory (default: the latest)"
    source.add_argument("--run", type=path_name, metavar="RUN", help=run)
    source.add_argument("--model", type=path_name, metavar="PATH", help="an exported file or a checkpoint")
    text = parser.add_argument_group("text")
    prompts = text.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", type=utf8_text, metavar="TEXT", help="the text to continue")
    file = "a file with the text to continue, to its last line end; - is the standard input"
    prompts.add_argument("--prompt-file", type=path_name, metavar="PATH", help=file)
    prompts.add_argument("--interactive", action="store_true", help="ask for one prompt after another")
    scored = "draw nothing, and measure how well the model predicts this text; - is the standard input"
    prompts.add_argument("--score", type=path_name, metavar="PATH", help=scored)
    page = "draw nothing, and write a page for a browser, in which the model continues what one types"
    prompts.add_argument("--page", type=path_name, metavar="PATH", help=page)
    add_settings(text, read_stop=utf8_text)
    samples = "number of texts to draw (%(default)s)"
    text.add_argument("--num-samples", type=number(int, minimum=1), default=1, metavar="N", help=samples)
    spec = specs()["device"]
    device = f"{spec.help} (%(default)s)"
    parser.add_argument("--device", type=not_empty, default=spec.default, metavar="NAME", help=device)
    vocabulary = "the text that the weights were trained on, if they come without a vocabulary"
    parser.add_argument("--vocabulary", type=path_name, metavar="PATH", help=vocabulary)
    add_runs_dir_flag(parser)
    arguments = parser.parse_args(argv)
    if arguments.interactive and arguments.num_samples != 1:
        parser.error("--interactive draws one text for each prompt: leave --num-samples out")
    for mode, beside in DRAWING_NOTHING.items():
        other = [flag for flag in parser.given if flag not in OF_A_MODEL | beside | {mode}]
        if mode in parser.given and other:
            parser.error(f"{mode} draws no text: leave {', '.join(other)} out")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse_command_line(argv)
    if arguments.page is not None:
        return make_page(arguments)
    prompt = read_prompt(arguments.prompt, arguments.prompt_file)
    device = find_device(arguments.device)
    weights, path = load_weights(arguments)
    decoder = create_decoder(weights, device)
    print(text_for_stream(sys.stderr, str(path)), file=sys.stderr)
    assert weights.vocabulary is not None  # load_weights has seen to it
    tokenizer = Tokenizer(weights.vocabulary)
    from utils_alg1.network.sampling import NotFiniteError

    try:
        if arguments.score is not None:
            from utils_alg1.inference.score import score_text

            score = score_text(arguments.score, decoder, tokenizer, arguments.unknown)
            print(score.lines(arguments.unknown))
            return DONE
        arguments.stop = fit_stop(arguments.stop or "", tokenizer)
        if arguments.interactive:
            return converse(decoder, tokenizer, arguments)
        if arguments.prompt is None and arguments.prompt_file is None:
            note_unread_input()
        sample(decoder, tokenizer, prompt, arguments)
    except NotFiniteError as error:
        raise Alg1Error(f"{path}: {error}", "use weights of a run that has not diverged") from error
    return DONE


def make_page(arguments: argparse.Namespace) -> int:
    """Write the page of --page, which is named after the weights' run or file."""
    from utils_alg1.report.playground import check_page, write_page

    check_page(arguments.page)
    weights, path = load_weights(arguments)
    print(text_for_stream(sys.stderr, str(path)), file=sys.stderr)
    write_page(arguments.page, weights, str(weights.provenance.get("run_id") or path.stem))
    size = os.path.getsize(arguments.page) / 1e6
    print(text_for_stream(sys.stdout, f"{arguments.page}: {size:.1f} MB, for any browser, without a network"))
    return DONE


def converse(decoder: LogitsDecoder, tokenizer: Tokenizer, arguments: argparse.Namespace) -> int:
    """Continue the prompts of a dialogue, all of them with one generator."""
    generator, line_end = random.Random(arguments.seed), "Ctrl-V Ctrl-J"

    def answer(line: str) -> None:
        prompt = fit_prompt(line, tokenizer, arguments.unknown, ":unknown", line_end)
        characters = draw_characters(decoder, tokenizer, prompt, arguments, [generator])
        write_texts(prompt, characters, [""])

    def read_stop(text: str) -> str:
        return fit_stop(text, tokenizer, ":stop", line_end)

    return interact(arguments, answer, generator.seed, read_stop)


def sample(decoder: LogitsDecoder, tokenizer: Tokenizer, prompt: str, arguments: argparse.Namespace) -> None:
    """Write the continuations of a prompt, each drawn with a generator of its own."""
    prompt, n = fit_prompt(prompt, tokenizer, arguments.unknown), arguments.num_samples
    batch_size = max(1, BATCH_TOKENS // decoder.block_size)
    for first in range(0, n, batch_size):
        numbers = range(first, min(first + batch_size, n))
        generators = [random.Random(arguments.seed + i) for i in numbers]
        characters = draw_characters(decoder, tokenizer, prompt, arguments, generators)
        write_texts(prompt, characters, [f"--- sample {i + 1}\n" if n > 1 else "" for i in numbers])


def draw_characters(
    decoder: LogitsDecoder,
    tokenizer: Tokenizer,
    prompt: str,
    arguments: argparse.Namespace,
    generators: list[random.Random],
) -> Iterator[list[str]]:
    """Draw a continuation of the prompt with each generator, and yield the next character of all of them.

    It is "" for a text that has ended with --stop.
    """
    import numpy as np

    from utils_alg1.network.sampling import Sampling, draw_with, generate_tokens

    context = (prompt or tokenizer.default_prompt)[-decoder.block_size :]
    tokens = np.array([tokenizer.encode(context)] * len(generators))
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    stop = arguments.stop or ""
    ends = [""] * len(generators)  # the newest characters of each text, as many as --stop has
    for token in generate_tokens(
        decoder, tokens, arguments.max_new_tokens, sampling, draw_with(generators), tokenizer.encode(stop)
    ):
        characters = list(tokenizer.decode(token.tolist()))
        if stop:
            characters = ["" if end == stop else c for end, c in zip(ends, characters, strict=True)]
            ends = [(end + c)[-len(stop) :] for end, c in zip(ends, characters, strict=True)]
        yield characters


def write_texts(prompt: str, characters: Iterator[list[str]], headings: list[str]) -> None:
    """Write texts that are drawn together: the first as its characters come, the others when all are drawn.

    Each is a heading, the prompt, its continuation and a newline.
    """
    kept: list[list[str]] = []  # of all texts, if there are others

    def first() -> Iterator[str]:
        for of_all in characters:
            if len(headings) > 1:
                kept.append(of_all)
            yield of_all[0]

    for i, heading in enumerate(headings):
        continuation = (of_all[i] for of_all in kept) if i else first()
        # Holds back a trailing "\r", so that `without_controls` sees a CRLF as one line end.
        newlines = io.IncrementalNewlineDecoder(None, translate=False)
        for text in itertools.chain([heading + prompt], continuation, ["\n"]):
            sys.stdout.write(text_for_stream(sys.stdout, newlines.decode(text)))
            sys.stdout.flush()


if __name__ == "__main__":
    run_script(main)
