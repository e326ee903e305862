"""Sample text from a trained model.

    python inference.py                                  the latest run
    python inference.py --run 2026-01-31_001             a run, by its id or directory
    python inference.py --model model.safetensors        an exported file or a checkpoint
    python inference.py --prompt "ROMEO:" --max-new-tokens 300 --temperature 0.8
    python inference.py --interactive                    prompt after prompt

Text appears as it is drawn. The same model, prompt, settings and --seed give the same text.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from errors import DONE, Alg1Error
from parameters import Problem, raise_problems, specs
from utils import show_characters
from utils_alg1.utils_config_loader import ConfigLoader, Options, Parser
from utils_alg1.utils_output import importing, run_script

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
        choices=("error", "skip", "replace"),
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
    arguments, problems = parser.parse_with_suggestions(argv)
    limits = [
        ("max_new_tokens", arguments.max_new_tokens >= 0, "at least 0"),
        ("num_samples", arguments.num_samples >= 1, "at least 1"),
        ("temperature", 0 <= arguments.temperature < float("inf"), "0 or above"),
        ("top_k", arguments.top_k is None or arguments.top_k >= 1, "at least 1"),
        ("top_p", arguments.top_p is None or 0 < arguments.top_p <= 1, "above 0, at most 1"),
        ("seed", 0 <= arguments.seed < 2**63, "at least 0 and below 2**63"),
    ]
    if arguments.interactive and arguments.prompt is not None:
        problems.append(Problem("--interactive asks for prompts: leave --prompt out", ("prompt",)))
    for name, good, wanted in limits:
        if not good:
            flag = "--" + name.replace("_", "-")
            problems.append(Problem(f"{flag} {getattr(arguments, name)}: must be {wanted}", (name,)))
    raise_problems(problems, f"{parser.prog} --help lists every flag")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse_command_line(argv)

    with importing():
        import torch

        from utils import Tokenizer
        from utils_alg1.utils_checkpoint import find_weights, load_model_file
        from utils_alg1.utils_runtime import find_device

    device = find_device(arguments.device)
    if arguments.model is not None:
        path = Path(arguments.model)
    else:
        runs_dir = arguments.runs_dir
        if runs_dir is None:
            runs_dir = ConfigLoader.runs_dir(Options())
        path = find_weights(runs_dir, arguments.run)
    model = load_model_file(path)
    if model.vocabulary is None:
        model.vocabulary = vocabulary_of(arguments.vocabulary, model, path)
    model.to(device).eval()
    print(f"{path}", file=sys.stderr)
    tokenizer = Tokenizer(model.vocabulary)
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

    if text_path is None:
        raise Alg1Error(
            f"{path}: it does not hold its vocabulary",
            "name the text that it was trained on: --vocabulary PATH",
        )
    vocabulary = open_corpus(find_corpus(text_path)).tokenizer.vocabulary
    if len(vocabulary) != model.config.vocab_size:
        raise Alg1Error(
            f"{text_path}: the text has {len(vocabulary)} characters,"
            f" {path} is for {model.config.vocab_size}",
            "name the text that it was trained on",
        )
    return vocabulary


def known_characters(prompt: str, tokenizer: Tokenizer, unknown: str) -> str:
    """The prompt in characters that the model knows.

    Raises:
        Alg1Error: there are others, and `unknown` is "error".
    """
    unseen = set(tokenizer.unseen(prompt))
    if unseen and unknown == "error":
        raise Alg1Error(
            f"not in the model's vocabulary: {show_characters(unseen)}",
            "leave them out with --unknown skip, or --unknown replace",
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
    sys.stdout.write(prompt)
    for token in stream:
        sys.stdout.write(tokenizer.decode(token.tolist()))
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()


def interact(model: BigramLanguageModel, tokenizer: Tokenizer, arguments: argparse.Namespace) -> int:
    """Continue prompt after prompt. Ctrl-C ends a text, Ctrl-D the program."""
    import torch

    with_history()
    if hasattr(sys.stdin, "reconfigure"):  # bytes that are no text are an unknown character, not an end
        sys.stdin.reconfigure(errors="replace")
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(arguments.seed)
    print("a prompt, then Enter; Ctrl-C stops a text, Ctrl-D ends", file=sys.stderr)
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            print()
            return DONE
        except KeyboardInterrupt:
            print()
            continue
        try:
            prompt = known_characters(prompt, tokenizer, arguments.unknown)
            write_sample(model, tokenizer, prompt, arguments, generator)
        except Alg1Error as error:
            print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        except KeyboardInterrupt:
            print()


def with_history() -> None:
    """Let input() remember what was typed, where Python was built with readline."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401


if __name__ == "__main__":
    run_script(main)
