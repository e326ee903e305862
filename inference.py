"""Sample text from a trained model.

    python inference.py                                  the latest run
    python inference.py --run 2026-01-31_001             a run, by its id or directory
    python inference.py --model model.safetensors        an exported file or a checkpoint
    python inference.py --prompt "ROMEO:" --max-new-tokens 300 --temperature 0.8
    python inference.py --interactive                    prompt after prompt; :help lists its commands

Characters appear as they are drawn. The same model, prompt, settings and --seed give the same text. On a CPU
PyTorch is not imported: the forward pass is utils_alg1/network/decoder.py.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import io
import itertools
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from parameters import specs
from utils import Tokenizer, show_characters
from utils_alg1.base.errors import DONE, Alg1Error
from utils_alg1.console.command_line import Parser, add_runs_dir_flag, not_empty, number
from utils_alg1.console.dialogue import add_settings, interact
from utils_alg1.console.messages import print_line, print_warning, text_for_stream
from utils_alg1.console.script import importing, run_script
from utils_alg1.run_directory import find_weights, refuse_run
from utils_alg1.utils_config_loader import ConfigLoader

if TYPE_CHECKING:
    import torch

    from utils_alg1.network.sampling import LogitsDecoder
    from utils_alg1.network.weights import Weights

BATCH_TOKENS = 8192  # of context: so many texts of --num-samples are drawn at a time, for the sake of memory


def parse_command_line(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line of inference.py. Raises Alg1Error, or SystemExit after --help."""
    parser = Parser(prog="python inference.py", description="Sample text from a trained model.")
    source = parser.add_mutually_exclusive_group()
    run = "a run id or directory (default: the latest)"
    source.add_argument("--run", type=not_empty, metavar="RUN", help=run)
    source.add_argument("--model", type=not_empty, metavar="PATH", help="an exported file or a checkpoint")
    text = parser.add_argument_group("text")
    prompts = text.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", metavar="TEXT", help="the text to continue")
    prompts.add_argument("--interactive", action="store_true", help="ask for one prompt after another")
    add_settings(text)
    samples = "number of texts to draw (%(default)s)"
    text.add_argument("--num-samples", type=number(int, minimum=1), default=1, metavar="N", help=samples)
    text.add_argument("--stop", metavar="TEXT", help="end a text after it has drawn this string")
    spec = specs()["device"]
    device = f"{spec.help} (%(default)s)"
    parser.add_argument("--device", type=not_empty, default=spec.default, metavar="NAME", help=device)
    vocabulary = "the text that the weights were trained on, if they come without a vocabulary"
    parser.add_argument("--vocabulary", type=not_empty, metavar="PATH", help=vocabulary)
    add_runs_dir_flag(parser)
    arguments = parser.parse_args(argv)
    if arguments.interactive and arguments.num_samples != 1:
        parser.error("--interactive draws one text for each prompt: leave --num-samples out")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse_command_line(argv)
    device = find_device(arguments.device)
    weights, path = load_weights(arguments)
    decoder = create_decoder(weights, device)
    print(text_for_stream(sys.stderr, str(path)), file=sys.stderr)
    assert weights.vocabulary is not None  # load_weights has seen to it
    tokenizer = Tokenizer(weights.vocabulary)
    if never_drawn := tokenizer.unseen(arguments.stop or ""):
        raise Alg1Error(
            f"--stop: not in the model's vocabulary: {show_characters(never_drawn)}",
            "no text would ever stop there: leave --stop out, or name characters that the model knows",
        )

    def write(prompt: str, generators: list[random.Random], headings: list[str]) -> None:
        characters = draw_characters(decoder, tokenizer, prompt, arguments, generators)
        try:
            write_texts(prompt, characters, headings)
        except RuntimeError as error:
            raise Alg1Error(f"{path}: {error}", "use weights of a run that has not diverged") from error

    if arguments.interactive:
        generator = random.Random(arguments.seed)

        def answer(line: str) -> None:
            write(handle_unknown(line, tokenizer, arguments.unknown, ":unknown"), [generator], [""])

        return interact(arguments, answer, generator.seed)

    prompt, n = handle_unknown(arguments.prompt or "", tokenizer, arguments.unknown), arguments.num_samples
    batch_size = max(1, BATCH_TOKENS // decoder.block_size)
    for first in range(0, n, batch_size):
        numbers = range(first, min(first + batch_size, n))
        generators = [random.Random(arguments.seed + i) for i in numbers]
        write(prompt, generators, [f"--- sample {i + 1}\n" if n > 1 else "" for i in numbers])
    return DONE


def find_device(name: str) -> torch.device | None:
    """Return the device of PyTorch that --device names, or None for the CPU, which needs no PyTorch.

    Raises:
        Alg1Error: there is no such device.
    """
    if name == "cpu" or (name == "auto" and not may_have_gpu()):
        return None
    with importing():
        from utils_alg1.training import runtime
    device = runtime.find_device(name)
    return None if device.type == "cpu" else device


def may_have_gpu() -> bool:
    """Return whether the machine has a GPU that PyTorch may support, without importing PyTorch."""
    for driver_name in ("libcuda.so.1", "nvcuda.dll"):
        with contextlib.suppress(OSError, AttributeError):  # it is not there, or not such a driver
            driver, count = ctypes.CDLL(driver_name), ctypes.c_int()
            return driver.cuInit(0) == driver.cuDeviceGetCount(ctypes.byref(count)) == 0 < count.value
    return os.path.exists("/dev/kfd")  # of AMD's driver


def create_decoder(weights: Weights, device: torch.device | None) -> LogitsDecoder:
    """Return what computes the logits of a text on a device; None is the CPU."""
    if device is None:
        from utils_alg1.network.decoder import Decoder

        return Decoder(weights.config, weights.tensors)
    from model import BigramLanguageModel
    from utils_alg1.network.cache import CachedForward

    return CachedForward(BigramLanguageModel().load(weights).to(device).eval())


def load_weights(arguments: argparse.Namespace) -> tuple[Weights, Path]:
    """Load the weights that the flags name, with their vocabulary; return them and their file."""
    with importing():
        from utils_alg1.network.weights import read_weights

    named = arguments.model and Path(arguments.model)
    path = named or find_weights(arguments.runs_dir or ConfigLoader().runs_dir, arguments.run)
    refuse_run(path)
    weights = read_weights(path)
    if weights.note:
        print_line(sys.stderr, weights.note)
    if weights.vocabulary is None:
        weights.vocabulary = read_vocabulary(arguments.vocabulary, weights, path)
    elif arguments.vocabulary is not None:
        print_warning("--vocabulary is not used: the model holds its own; leave the flag out")
    return weights, path


def read_vocabulary(text_path: str | None, weights: Weights, path: Path) -> list[str]:
    """Return the characters of a text, for weights of another program that come without a vocabulary."""
    from utils_alg1.data.corpus import open_corpus
    from utils_alg1.data.sources import find_corpus

    hint = "name the text that it was trained on: --vocabulary PATH"
    if text_path is None:
        raise Alg1Error(f"{path}: it does not hold its vocabulary", hint)
    try:
        path_of_text = find_corpus(text_path)
    except Alg1Error as error:  # its own hint names --data
        raise Alg1Error(error.message, hint) from None
    vocabulary = open_corpus(path_of_text).tokenizer.vocabulary
    if len(vocabulary) != weights.config.vocab_size:
        of_model = f"{path} is for {weights.config.vocab_size}"
        raise Alg1Error(f"{text_path}: the text has {len(vocabulary)} characters, {of_model}", hint)
    return vocabulary


def handle_unknown(prompt: str, tokenizer: Tokenizer, unknown: str, flag: str = "--unknown") -> str:
    """Skip or replace the characters that the model does not know, or raise Alg1Error that names `flag`."""
    unseen = set(tokenizer.unseen(prompt))
    if unseen and unknown == "error":
        raise Alg1Error(
            f"not in the model's vocabulary: {show_characters(unseen)}",
            f"leave them out with {flag} skip, or {flag} replace",
        )
    replacement = "" if unknown == "skip" else tokenizer.replacement
    return "".join(replacement if character in unseen else character for character in prompt)


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

    tokens = np.array([tokenizer.encode(prompt or tokenizer.default_prompt)] * len(generators))
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
