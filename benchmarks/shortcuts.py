"""What each shortcut that exists only for speed earns: the same work with it and without it, in turns.

    python benchmarks/shortcuts.py --data TEXT          TEXT is tiny Shakespeare in the README
    python benchmarks/shortcuts.py --data TEXT --size "64/4/4 T32 B4" --threads 1

The ratio is how many times longer it takes without the shortcut: the median over the rounds, with quartiles.
Everything else is as train.py chooses it. The decoder reads block_size characters, 64 at most.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from common import (
    SIZES,
    Steps,
    build_trainer,
    cell,
    child,
    machine,
    parser,
    repeat,
    seconds_per_step,
    table,
    text_or_docs,
)

# Training steps: name -> what `build_trainer` is given, with the shortcut and without it.
STEPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "written-out gradient, against autograd": ({"gradient": "manual"}, {"gradient": "autograd"}),
    "its dropout, against autograd's": (
        {"dropout": 0.1, "gradient": "manual"},
        {"dropout": 0.1, "gradient": "autograd"},
    ),
    "weights side by side, against one by one": ({"joined": True}, {"joined": False}),
    "products by oneDNN, against PyTorch's": (
        {"dtype": "float32", "products": "onednn"},
        {"dtype": "float32", "products": "pytorch"},
    ),
    "bfloat16, against float32": ({"dtype": "bfloat16"}, {"dtype": "float32"}),
    "Muon in bfloat16, against float32": (
        {"optimizer": "muon", "muon": "bfloat16"},
        {"optimizer": "muon", "muon": "float32"},
    ),
    "compiled, against eager": ({"compile": "on"}, {"compile": "off"}),
}
CREATE = """
import torch
from model import BigramLanguageModel
from parameters import ModelConfig, TrainConfig
from utils_alg1.training.arithmetic import Arithmetic
from utils_alg1.training.optimizers import create_optimizer
model = BigramLanguageModel(ModelConfig(vocab_size=65))
began = time.perf_counter()
if sys.argv[1] == "ours":
    create_optimizer(model, TrainConfig(), Arithmetic())
else:
    torch.optim.AdamW(model.parameters(), fused=True)
report(seconds=time.perf_counter() - began)
"""


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data", help="a text (default: Python's documentation)")
    options.add_argument("--threads", type=int, default=0, help="0: train.py's choice")
    options.add_argument("--size", choices=SIZES, help="only this one")
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--seconds", type=float, default=1.0, help="of each turn, roughly")
    args = options.parse_args()
    if args.quick:
        args.rounds, args.seconds, args.size = 2, 0.0, next(iter(SIZES))
    print(machine(), flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = text_or_docs(args.data, folder)
        for size in [args.size] if args.size else SIZES:
            for shortcut, pair in pairs(text, SIZES[size], args):
                rows.append(row(shortcut, size, **seconds_per_step(pair, args.rounds, args.seconds)))
        both = [
            [child(CREATE, who, folder=folder)["seconds"] for _ in range(3)] for who in ("ours", "theirs")
        ]
        rows.append(row("creating AdamW, against torch.optim's", "64/4/4 T32 B4", *both))
    table(rows)


def pairs(
    text: Path, size: dict[str, int], args: Any
) -> Iterator[tuple[str, dict[str, Callable[[int], Any]]]]:
    """Yield the name of each shortcut, and the work with it and without it."""
    import torch

    from utils_alg1.network.attention import BFLOAT16_ATTENTION_MIN_T

    torch.compiler.reset()  # else what was compiled for another size is compiled for any size, and slower
    settings = {**size, "threads": args.threads}
    for shortcut, sides in STEPS.items():
        if not (args.quick and "compiled" in shortcut):  # compiling takes too long for that
            with_it, without = (repeat(Steps(build_trainer(text, **settings | side), 1)) for side in sides)
            yield shortcut, {"with_it": with_it, "without": without}
    if size["block_size"] >= BFLOAT16_ATTENTION_MIN_T:
        yield "attention in bfloat16, against PyTorch's kernel in float32", attentions(size)
    yield "AdamW, against torch.optim's", optimizer_steps(build_trainer(text, **settings))
    yield "decoder, against the model's forward", decoders(build_trainer(text, **settings).model.eval())


def attentions(size: dict[str, int]) -> dict[str, Callable[[int], Any]]:
    """Return causal attention of bfloat16 with its gradient: as chosen, and by the kernel in float32."""
    import torch

    from utils_alg1.network.attention import choose_attention, flash_attention

    T = size["block_size"]
    shape = size["batch_size"], size["n_head"], T, size["n_embd"] // size["n_head"]
    qkv = torch.randn(3, *shape, dtype=torch.bfloat16)

    def both_ways(attention: Callable, dtype: torch.dtype) -> None:
        out, backward = attention(*qkv.to(dtype))
        for gradient in backward(out):
            gradient.to(qkv.dtype)

    chosen = choose_attention(qkv.dtype, T)
    return {
        "with_it": repeat(lambda: both_ways(*chosen)),
        "without": repeat(lambda: both_ways(flash_attention, torch.float32)),
    }


def optimizer_steps(trainer: Any) -> dict[str, Callable[[int], Any]]:
    """Return our update of the weights, and that of torch.optim with the same fused operator."""
    import torch

    trainer.forward_backward()
    theirs = torch.optim.AdamW(trainer.model.parameters(), fused=True)
    return {"with_it": repeat(trainer.optimizer.step), "without": repeat(theirs.step)}


def decoders(model: Any) -> dict[str, Callable[[int], Any]]:
    """Return functions that compute the logits of a text: by the decoder, and by the model itself."""
    import numpy as np

    from utils_alg1.network.cache import CachedForward

    def read(decoder: Any) -> None:
        decoder.start(batch_size=1)
        for _ in range(min(64, model.config.block_size)):
            decoder.logits(np.zeros((1, 1), dtype=np.int64))

    with_it, without = model._decoder(), CachedForward(model)
    return {"with_it": repeat(lambda: read(with_it)), "without": repeat(lambda: read(without))}


def row(shortcut: str, size: str, with_it: Sequence[float], without: Sequence[float]) -> dict[str, Any]:
    """Return a row of the table from the seconds of both in each round."""
    import torch

    ratios = [b / a for a, b in zip(with_it, without, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "shortcut": shortcut,
        "size": size,
        "threads": torch.get_num_threads(),
        "with it, ms": 1e3 * statistics.median(with_it),
        "without, ms": 1e3 * statistics.median(without),
        "ratio": middle,
        "quartiles": f"{cell(low)} to {cell(high)}",
    }


if __name__ == "__main__":
    main()
