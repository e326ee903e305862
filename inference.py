"""Sample text from a trained model.

    python inference.py                                  the latest run
    python inference.py --run 2026-01-31_001             a run, by its id or directory
    python inference.py --model model.safetensors        an exported file or a checkpoint
    python inference.py --prompt "ROMEO:" --max-new-tokens 300 --temperature 0.8
    python inference.py --interactive                    prompt after prompt; :help lists its commands

Characters appear as they are drawn. The same model, prompt, settings and --seed give the same text.
"""

from __future__ import annotations

import argparse
import io
import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from parameters import specs
from utils import show_characters
from utils_alg1.base.errors import DONE, Alg1Error
from utils_alg1.console.command_line import Parser, add_runs_dir_flag, not_empty, number
from utils_alg1.console.dialogue import add_settings, interact
from utils_alg1.console.messages import print_warning, text_for_stream
from utils_alg1.console.script import importing, run_script
from utils_alg1.utils_config_loader import ConfigLoader

if TYPE_CHECKING:
    import torch

    from model import BigramLanguageModel
    from utils import Tokenizer


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

    with importing():
        import torch

        from utils import Tokenizer
        from utils_alg1.training.runtime import find_device

    device = find_device(arguments.device)
    model, path = load_model(arguments)
    model.to(device).eval()
    print(text_for_stream(sys.stderr, str(path)), file=sys.stderr)
    assert model.vocabulary is not None  # load_model has seen to it
    tokenizer = Tokenizer(model.vocabulary)
    if never_drawn := tokenizer.unseen(arguments.stop or ""):
        raise Alg1Error(
            f"--stop: not in the model's vocabulary: {show_characters(never_drawn)}",
            "no text would ever stop there: leave --stop out, or name characters that the model knows",
        )
    generator = torch.Generator(device).manual_seed(arguments.seed)

    if arguments.interactive:

        def answer(line: str) -> None:
            prompt = handle_unknown(line, tokenizer, arguments.unknown, ":unknown")
            write_sample(model, tokenizer, prompt, arguments, generator)

        return interact(arguments, answer, generator.manual_seed)

    prompt = handle_unknown(arguments.prompt or "", tokenizer, arguments.unknown)
    for i in range(arguments.num_samples):
        if arguments.num_samples > 1:
            print(f"--- sample {i + 1}")
        generator.manual_seed(arguments.seed + i)
        write_sample(model, tokenizer, prompt, arguments, generator)
    return DONE


def load_model(arguments: argparse.Namespace) -> tuple[BigramLanguageModel, Path]:
    """Load the model that the flags name, with its vocabulary, on the CPU; return it and its file."""
    from utils_alg1.training.resume import find_weights, load_model_file

    named = arguments.model and Path(arguments.model)
    path = named or find_weights(arguments.runs_dir or ConfigLoader().runs_dir, arguments.run)
    model = load_model_file(path)
    if model.vocabulary is None:
        model.vocabulary = read_vocabulary(arguments.vocabulary, model, path)
    elif arguments.vocabulary is not None:
        print_warning("--vocabulary is not used: the model holds its own; leave the flag out")
    return model, path


def read_vocabulary(text_path: str | None, model: BigramLanguageModel, path: Path) -> list[str]:
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
    if len(vocabulary) != model.config.vocab_size:
        of_model = f"{path} is for {model.config.vocab_size}"
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


def write_sample(
    model: BigramLanguageModel,
    tokenizer: Tokenizer,
    prompt: str,
    arguments: argparse.Namespace,
    generator: torch.Generator,
) -> None:
    """Write the prompt and its continuation to stdout, character by character, and a final newline."""
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
    # Holds back a trailing "\r", so that `without_controls` sees a CRLF as one line end.
    newlines = io.IncrementalNewlineDecoder(None, translate=False)
    for text in itertools.chain([prompt], (tokenizer.decode(token.tolist()) for token in stream), ["\n"]):
        sys.stdout.write(text_for_stream(sys.stdout, newlines.decode(text)))
        sys.stdout.flush()


if __name__ == "__main__":
    run_script(main)
