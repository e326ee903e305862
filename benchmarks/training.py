"""Training steps per second in steady state, beside nanoGPT, a JAX step and the lecture's gpt.py.

    python benchmarks/training.py --nanogpt PATH --lecture PATH              PyTorch's choice of threads
    python benchmarks/training.py --nanogpt PATH --jax --threads best        each with its own best number
    python benchmarks/training.py --nanogpt PATH --compile --dtype float32 bfloat16 auto
    python benchmarks/training.py --nanogpt PATH --dropout 0.1 --size "384/6/6 T256 B8"
    python benchmarks/training.py --nanogpt PATH --compile --device cuda

ALG1 is measured as the Trainer of train.py, with the loss read at every step and the gradient clipped at 1.0
as nanoGPT does. GFLOP/s counts six operations per matrix weight and token, without the products inside
attention. "of peak" divides by the fastest large product that the machine shows in that data type, in the
same rounds and with the same number of threads.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import (
    SIZES,
    Steps,
    build_trainer,
    machine,
    parser,
    ratio,
    repeat,
    seconds_per_step,
    table,
    text_or_docs,
)

GPU_SIZES = {"384/6/6 T256 B64": SIZES["384/6/6 T256 B8"] | {"batch_size": 64}}


def main() -> None:
    import torch

    options = parser(__doc__)
    options.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    options.add_argument("--lecture", type=Path, help="a checkout of the lecture (ng-video-lecture)")
    options.add_argument("--jax", action="store_true", help="a JAX step of the same model too")
    options.add_argument("--data", help="a text (default: Python's documentation)")
    options.add_argument(
        "--threads",
        default="0",
        help="of all contestants; 0: PyTorch's choice; best: each one's own best number",
    )
    options.add_argument("--compile", action="store_true", help="also measure nanoGPT and ALG1 compiled")
    options.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="of all contestants (cpu)")
    options.add_argument(
        "--dtype", nargs="+", choices=("float32", "bfloat16", "auto"), default=["auto"], metavar="DTYPE",
        help="float32, bfloat16, auto: train.py's choice, and nanoGPT's (float32 on a CPU)",
    )  # fmt: skip
    options.add_argument("--dropout", type=float, default=0.0, help="of all contestants (0)")
    options.add_argument("--size", choices=SIZES | GPU_SIZES, help="only this one")
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--seconds", type=float, default=1.0, help="of each turn, roughly")
    args = options.parse_args()
    if args.quick:
        args.rounds, args.seconds, args.threads = 2, 0.01, "1"
        args.size = args.size or next(iter(SIZES))
    if args.jax and (args.dropout or args.device != "cpu"):
        options.error("the JAX step is for a CPU and has no dropout")
    if args.jax and not importlib.util.find_spec("jax"):
        print("jax is not installed: left out (pip install jax)", file=sys.stderr)
        args.jax = False
    print(machine(), flush=True)
    if args.device == "cuda" and not torch.cuda.is_available():
        options.error("this machine has no CUDA device")
    sizes = SIZES | GPU_SIZES if args.size or args.device != "cpu" else SIZES
    rows = []
    for name in [args.size] if args.size else sizes:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(name, sizes[name], args, Path(folder))
    table(rows)


@dataclass
class Contestant:
    """Something that is timed, with a number of threads.

    Attributes:
        dtype: as the table shows it.
        arithmetic: the data type of its products of matrices.
        take: takes so many steps.
        flops: of a step.
        times: the seconds of a step, in each round.
    """

    who: str
    dtype: str
    arithmetic: str
    threads: int
    take: Callable[[int], Any]
    flops: float
    times: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return statistics.median(self.times)


def measure(name: str, size: dict[str, int], args: Any, folder: Path) -> list[dict[str, Any]]:
    """Return the rows of one size."""
    import torch

    chosen = torch.get_num_threads() if args.threads == "0" else args.threads
    counts = range(1, (os.cpu_count() or 1) + 1) if chosen == "best" else [int(chosen)]
    if args.compile:
        torch.compiler.reset()  # else what was compiled for another size is compiled for any size, and slower
    entered: list[Contestant] = []
    for threads in counts:
        torch.set_num_threads(threads)
        entered += contestants(size, args, folder, threads)
    used = {(one.arithmetic, one.threads) for one in entered}
    peaks = [
        product for arithmetic, threads in used for product in products(arithmetic, threads, args.device)
    ]
    take_turns(entered + peaks, args)

    best: dict[tuple[str, str], Contestant] = {}  # each with its own best number of threads
    for one in entered:
        key = one.who, one.dtype
        best[key] = min(best.get(key, one), one, key=lambda each: each.seconds)
    nanogpt = [one for one in best.values() if one.who.startswith("nanoGPT")]
    rivals = [one for one in nanogpt if one.arithmetic == "float32"] or nanogpt
    rival = min(rivals, key=lambda one: one.seconds, default=None)
    against = f"x nanoGPT's best in {rival.arithmetic}" if rival else "x nanoGPT's best"
    tokens = size["batch_size"] * size["block_size"]
    rows = []
    for one in best.values():
        alike = [p for p in peaks if (p.arithmetic, p.threads) == (one.arithmetic, one.threads)]
        peak = min(alike, key=lambda product: min(product.times))
        gflops, limit = one.flops / one.seconds / 1e9, peak.flops / min(peak.times) / 1e9
        rows.append(
            {
                "size": name,
                "who": one.who,
                "dtype": one.dtype,
                "threads": one.threads,
                "ms/step": 1e3 * one.seconds,
                "best": 1e3 * min(one.times),
                "tok/s": tokens / one.seconds,
                against: ratio(rival.times, one.times) if rival else None,
                "GFLOP/s": gflops,
                "of peak": f"{gflops / limit:.0%} of {limit:,.0f} ({peak.who})",
            }
        )
    return rows


def contestants(size: dict[str, int], args: Any, folder: Path, threads: int) -> Iterator[Contestant]:
    """Yield all programs that take training steps of this size, in each data type."""
    from utils_alg1.data.corpus import open_corpus

    text = text_or_docs(args.data, folder)
    corpus = open_corpus(text)
    tokens, vocab_size = corpus.split()[0], corpus.tokenizer.vocab_size
    # Six operations for each token and weight of the blocks' matrices.
    flops = 6.0 * 12 * size["n_layer"] * size["n_embd"] ** 2 * size["batch_size"] * size["block_size"]
    settings = {**size, "dropout": args.dropout, "threads": threads, "device": args.device, "grad_clip": 1.0}
    peer = {**size, "vocab_size": vocab_size, "dropout": args.dropout, "device": args.device}
    nanogpt_auto = "float32" if args.device == "cpu" else "bfloat16"
    for compile in [False, True] if args.compile else [False]:
        suffix = " compiled" if compile else ""
        for dtype in args.dtype:
            trainer = build_trainer(text, **settings, dtype=dtype, compile="on" if compile else "off")
            found = str(trainer.runtime.dtype).removeprefix("torch.")
            shown = f"auto: {found}" if dtype == "auto" else dtype
            yield Contestant(f"ALG1{suffix}", shown, found, threads, repeat(Steps(trainer, 1)), flops)
        for dtype in dict.fromkeys(nanogpt_auto if name == "auto" else name for name in args.dtype):
            if args.nanogpt:
                from peers import nanogpt_step

                step = nanogpt_step(args.nanogpt, tokens, peer, dtype, folder, compile)
                yield Contestant(f"nanoGPT{suffix}", dtype, dtype, threads, repeat(step), flops)
    if args.jax:
        from jax_peer import JaxSteps

        weights = {name: weight.detach().cpu().numpy() for name, weight in trainer.model.named_parameters()}
        for dtype in dict.fromkeys("float32" if name == "auto" else name for name in args.dtype):
            steps = JaxSteps(weights, tokens, size, dtype, threads, folder)
            yield Contestant("JAX", dtype, dtype, threads, steps, flops)
    if args.lecture:
        from peers import lecture_step

        step = lecture_step(args.lecture, tokens, peer)
        yield Contestant("lecture gpt.py", "float32", "float32", threads, repeat(step), flops)


def products(arithmetic: str, threads: int, device: str) -> Iterator[Contestant]:
    """Yield products of two large matrices, by each library: their speed is the peak of this machine."""
    import torch

    from utils_alg1.network.products import Products, onednn_works

    side = 1536 if device == "cpu" else 8192
    a, b = torch.randn(2, side, side, device=device, dtype=getattr(torch, arithmetic))
    mkl = device == "cpu" and arithmetic == "float32" and torch.backends.mkl.is_available()
    libraries = {"MKL" if mkl else "PyTorch": Products(a.dtype)}
    if device == "cpu" and onednn_works():
        libraries["oneDNN"] = Products(a.dtype, onednn=True)
    for library, by in libraries.items():
        take = repeat(functools.partial(by.linear, a, b, None))
        yield Contestant(f"{library} {arithmetic}", "", arithmetic, threads, take, 2.0 * side**3)


def take_turns(entered: Sequence[Contestant], args: Any) -> None:
    """Time all contestants, in turns of about `--seconds`."""
    import torch

    def turn(one: Contestant, count: int) -> None:
        torch.set_num_threads(one.threads)
        one.take(count)
        if args.device != "cpu":
            torch.cuda.synchronize()

    turns = {str(i): functools.partial(turn, one) for i, one in enumerate(entered)}
    times = seconds_per_step(turns, args.rounds, args.seconds)
    for i, one in enumerate(entered):
        one.times = times[str(i)]


if __name__ == "__main__":
    main()
