"""Sampling speed in characters per second, compared with nanoGPT and Hugging Face transformers.

    python benchmarks/sample.py --nanogpt PATH          nanoGPT's checkout
    python benchmarks/sample.py --nanogpt PATH --transformers

The models have the same sizes and random weights, and each its own sampling loop, at temperature 1. The texts
are longer than block_size. "ALG1" is how inference.py draws texts on a CPU; `generate` also makes its decoder
for each text. The figures are medians over rounds in which the programs take turns.
"""

from __future__ import annotations

import contextlib
import functools
import random
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import interleave, load, machine, parser, ratio, table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import BigramLanguageModel
from parameters import ModelConfig
from utils_alg1.network.decoder import Decoder
from utils_alg1.network.sampling import Sampling, draw_with, generate_tokens

VOCAB_SIZE = 65
SIZES = [(64, 4, 4, 32), (128, 4, 4, 64), (384, 6, 6, 256)]  # n_embd, n_head, n_layer, block_size

Sampler = Callable[[], object]


def alg1(size: tuple[int, ...], streams: int, n: int) -> dict[str, Sampler]:
    """Return the samplers of ALG1: as inference.py draws texts, and `generate`."""
    n_embd, n_head, n_layer, block_size = size
    config = ModelConfig(n_embd, n_head, n_layer, block_size, vocab_size=VOCAB_SIZE)
    model = BigramLanguageModel(config).eval()
    start = torch.zeros(streams, 1, dtype=torch.int64)
    decoder = Decoder(config, {name: t.numpy() for name, t in model.state_dict().items()})
    draw = draw_with([random.Random(seed) for seed in range(streams)])

    def sample() -> None:
        for _ in generate_tokens(decoder, start.numpy(), n, Sampling(), draw):
            pass

    return {"ALG1": sample, "generate": functools.partial(model.generate, start, n)}


def nanogpt(path: str, size: tuple[int, ...], streams: int, n: int) -> Sampler:
    n_embd, n_head, n_layer, block_size = size
    peer = load(Path(path) / "model.py", "nanogpt_model")
    config = peer.GPTConfig(block_size, VOCAB_SIZE, n_layer, n_head, n_embd, dropout=0.0, bias=False)
    with contextlib.redirect_stdout(None):  # it prints its number of parameters
        model = peer.GPT(config).eval()
    return functools.partial(model.generate, torch.zeros(streams, 1, dtype=torch.int64), n)


def transformers_gpt2(size: tuple[int, ...], streams: int, n: int) -> Sampler:
    """Its cache cannot outgrow its position embeddings, so it has one for every character to sample."""
    import transformers  # type: ignore[import-not-found]

    n_embd, n_head, n_layer, _ = size
    config = transformers.GPT2Config(
        vocab_size=VOCAB_SIZE, n_positions=n + 1, n_embd=n_embd, n_layer=n_layer, n_head=n_head,
        bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    start = torch.zeros(streams, 1, dtype=torch.int64)
    mask = torch.ones_like(start)
    return lambda: model.generate(start, attention_mask=mask, max_new_tokens=n, do_sample=True, top_k=0)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--nanogpt", metavar="PATH", help="a checkout of karpathy/nanoGPT")
    options.add_argument("--transformers", action="store_true", help="compare with Hugging Face's GPT-2 too")
    options.add_argument("--rounds", type=int, default=5, metavar="N", help="number of rounds (5)")
    options.add_argument(
        "--characters", type=int, metavar="N", help="length of a text (1.5 times block_size, >= 200)"
    )
    options.add_argument("--sizes", metavar="N,N", help="which sizes, by n_embd (64,128,384)")
    options.add_argument("--streams", default="1,16", metavar="N,N", help="batch sizes (1,16)")
    options.add_argument(
        "--threads", type=int, metavar="N", help="torch threads, for all programs (torch's default)"
    )
    arguments = options.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    if arguments.transformers:
        try:
            import transformers  # noqa: F401
        except ImportError:
            print("transformers is not installed: left out", file=sys.stderr)
            arguments.transformers = False
    sizes = [s for s in SIZES if arguments.sizes is None or str(s[0]) in arguments.sizes.split(",")]
    rounds = arguments.rounds
    if arguments.quick:
        sizes, rounds, arguments.characters = sizes[:1], 1, 20

    print(f"{machine()}; {torch.get_num_threads()} threads, tok/s, medians of {rounds} rounds")
    rows: list[dict[str, Any]] = []
    for streams in map(int, arguments.streams.split(",")):
        for size in sizes:
            n = arguments.characters or max(200, size[-1] * 3 // 2)
            samplers = alg1(size, streams, n)
            if arguments.nanogpt is not None:
                samplers["nanoGPT"] = nanogpt(arguments.nanogpt, size, streams, n)
            if arguments.transformers:
                samplers["transformers"] = transformers_gpt2(size, streams, n)
            seconds = interleave(samplers, rounds)
            n_embd, n_head, n_layer, block_size = size
            row: dict[str, Any] = {"streams": streams, "size": f"{n_embd}/{n_head}/{n_layer} T{block_size}"}
            for name, times in seconds.items():
                row[name] = streams * n / statistics.median(times)
                if name not in ("ALG1", "generate"):
                    row[f"ratio to {name}"] = ratio(times, seconds["ALG1"])
            rows.append(row)
    table(rows)


if __name__ == "__main__":
    main()
