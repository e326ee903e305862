"""Training steps per second in steady state, for three sizes, beside nanoGPT and the lecture's gpt.py.

    python benchmarks/training.py --nanogpt PATH --lecture PATH              PyTorch's choice of threads
    python benchmarks/training.py --nanogpt PATH --lecture PATH --threads 1
    python benchmarks/training.py --nanogpt PATH --threads best              each with its own best number
    python benchmarks/training.py --nanogpt PATH --compile                   compiled too

ALG1 is measured as the Trainer of train.py, with the loss read at every step and the gradient clipped at 1.0
as nanoGPT does. "of SGEMM peak" counts six operations per matrix weight and token, without the products
inside attention, against a large SGEMM in the same rounds and with the same number of threads.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import SIZES, Steps, build_trainer, interleave, machine, parser, ratio, table, text_or_docs

PEAK = "SGEMM"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    options.add_argument("--lecture", type=Path, help="a checkout of the lecture (ng-video-lecture)")
    options.add_argument("--data", help="a text (default: Python's documentation)")
    options.add_argument(
        "--threads",
        default="0",
        help="of all contestants; 0: PyTorch's choice; best: each one's own best number",
    )
    options.add_argument("--compile", action="store_true", help="also measure nanoGPT and ALG1 compiled")
    options.add_argument("--size", choices=SIZES, help="only this one")
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--seconds", type=float, default=1.0, help="of each turn, roughly")
    args = options.parse_args()
    if args.quick:
        args.rounds, args.seconds, args.threads = 2, 0.01, "1"
        args.size = args.size or next(iter(SIZES))
    print(machine(), flush=True)
    rows = []
    for name, size in SIZES.items():
        if args.size in (None, name):
            with tempfile.TemporaryDirectory() as folder:
                rows += measure(name, size, args, Path(folder))
    table(rows)


def measure(name: str, size: dict[str, int], args: Any, folder: Path) -> list[dict[str, Any]]:
    """Return the rows of one size."""
    import torch

    chosen = torch.get_num_threads() if args.threads == "0" else args.threads
    counts = range(1, (os.cpu_count() or 1) + 1) if chosen == "best" else [int(chosen)]
    steps: dict[tuple[str, int], Steps | Peer | Product] = {}
    for threads in counts:
        for who, function in contestants(size, args, folder, threads).items():
            steps[who, threads] = function

    turns: dict[str, Callable[[], None]] = {}
    for (who, threads), function in steps.items():
        turns[f"{who} {threads}"] = turn(function, threads, args.seconds)
    seconds = interleave(turns, args.rounds)

    per_step = {key: [s / steps[key].count for s in seconds["{} {}".format(*key)]] for key in steps}
    best: dict[str, tuple[str, int]] = {}  # who -> the key with its best number of threads
    for key, times in per_step.items():
        who = key[0]
        if who not in best or statistics.median(times) < statistics.median(per_step[best[who]]):
            best[who] = key
    tokens = size["batch_size"] * size["block_size"]
    peers = [who for who in best if who.startswith("nanoGPT")]
    rival = min(peers, key=lambda who: statistics.median(per_step[best[who]]), default=None)
    rows = []
    for who, key in best.items():
        if who == PEAK:
            continue
        gflops = flops_per_token(size) * tokens / statistics.median(per_step[key]) / 1e9
        peak = Product.flops / min(per_step[PEAK, key[1]]) / 1e9
        rows.append(
            {
                "size": name,
                "who": who,
                "threads": key[1],
                "ms/step": 1e3 * statistics.median(per_step[key]),
                "best": 1e3 * min(per_step[key]),
                "tok/s": tokens / statistics.median(per_step[key]),
                "x nanoGPT's best": ratio(per_step[best[rival]], per_step[key]) if rival else None,
                "GFLOP/s": gflops,
                "of SGEMM peak": f"{gflops / peak:.0%} of {peak:.0f}",
            }
        )
    return rows


def contestants(size: dict[str, int], args: Any, folder: Path, threads: int) -> dict[str, Any]:
    """Return what is measured, by name."""
    import torch

    from utils_alg1.data.corpus import open_corpus

    torch.set_num_threads(threads)
    text = text_or_docs(args.data, folder)
    corpus = open_corpus(text)
    tokens = corpus.split()[0]
    vocab_size = corpus.tokenizer.vocab_size
    found: dict[str, Any] = {}
    for compile in [False, True] if args.compile else [False]:
        suffix = " compiled" if compile else ""
        flags = {"compile": "on"} if compile else {}
        trainer = build_trainer(text, **size, threads=threads, grad_clip=1.0, **flags)
        found[f"ALG1{suffix}"] = Steps(trainer, 1)
        if args.nanogpt:
            from peers import nanogpt_step

            step = nanogpt_step(args.nanogpt, tokens, vocab_size, size, folder, compile)
            found[f"nanoGPT{suffix}"] = Peer(step)
    if args.lecture:
        from peers import lecture_step

        found["lecture gpt.py"] = Peer(lecture_step(args.lecture, tokens, vocab_size, size))
    return found | {PEAK: Product()}


class Peer:
    """Takes `count` steps of a peer per call."""

    def __init__(self, step: Callable[[], float]):
        self._step = step
        self.count = 1

    def __call__(self) -> None:
        for _ in range(self.count):
            self._step()


class Product(Peer):
    """Multiplies two large float32 matrices: the peak speed of this machine."""

    side = 1536
    flops = 2 * side**3

    def __init__(self) -> None:
        import torch

        a, b = torch.randn(self.side, self.side), torch.randn(self.side, self.side)
        super().__init__(lambda: float((a @ b)[0, 0]))


def turn(function: Any, threads: int, seconds: float) -> Callable[[], None]:
    """Warm up `function`, whose first steps are slower; returns a turn of it of about `seconds`."""
    import time

    import torch

    torch.set_num_threads(threads)
    for _ in range(3):
        function()
    began = time.perf_counter()
    function()
    function.count = max(1, round(seconds / (time.perf_counter() - began)))

    def take() -> None:
        torch.set_num_threads(threads)
        function()

    return take


def flops_per_token(size: dict[str, int]) -> float:
    """Return the operations of a training step per token: six for each weight of the blocks' matrices."""
    return 6.0 * 12 * size["n_layer"] * size["n_embd"] ** 2


if __name__ == "__main__":
    main()
