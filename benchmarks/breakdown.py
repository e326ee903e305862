"""Where the time of a training step goes, by torch.profiler.

    python benchmarks/breakdown.py --data TEXT
    python benchmarks/breakdown.py --data TEXT --size "384/6/6 T256 B8" --dtype float32 --dropout 0.1

Milliseconds a step in PyTorch's operators, each without the operators that it calls. "All else" is views,
autograd, Python, and numpy, which draws what dropout keeps. The profiler slows small operators
down: a group's time is its fraction of a profiled step times the median of a step without the profiler.
"""

from __future__ import annotations

import argparse
import collections
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import SIZES, Steps, build_trainer, machine, parser, repeat, seconds_per_step, table, text_or_docs

# What an operator belongs to: the first group with a part of its name.
GROUPS = {
    "loss": ("log_softmax", "nll_loss", "gather", "scatter"),
    "attention": ("scaled_dot_product", "bmm", "softmax"),
    "products of weights": ("::mm", "addmm", "linear", "convolution"),
    "layer norms": ("layer_norm",),
    "ReLU": ("relu", "threshold"),
    "copies and conversions": ("copy", "::cat", "fill_", "zero_"),
    "optimizer, norm of the gradient": ("adam", "vector_norm", "foreach"),
    "element by element": ("add", "sub", "mul", "div", "sum", "exp", "where"),
}
REST = "all else"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--data", help="a text (default: Python's documentation)")
    options.add_argument("--threads", type=int, default=0, help="0: train.py's choice")
    options.add_argument("--size", choices=SIZES, help="only this one")
    options.add_argument("--dtype", default="auto", help="as train.py's (auto)")
    options.add_argument("--dropout", type=float, default=0.0)
    options.add_argument("--seconds", type=float, default=3.0, help="of steps with the profiler, and without")
    args = options.parse_args()
    if args.quick:
        args.size, args.seconds = next(iter(SIZES)), 0.01
    print(machine(), flush=True)
    columns = {}
    with tempfile.TemporaryDirectory() as folder:
        text = text_or_docs(args.data, Path(folder))
        for size in [args.size] if args.size else SIZES:
            settings = {"threads": args.threads, "dtype": args.dtype, "dropout": args.dropout}
            trainer = build_trainer(text, **SIZES[size], **settings)
            heading = f"{size}, {trainer.runtime.arithmetic.dtype}, threads: {trainer.runtime.threads}"
            columns[heading] = measure(trainer, args)
    names = [*GROUPS, REST, "a step"]
    table([{"ms/step": name, **{h: column[name] for h, column in columns.items()}} for name in names])


def measure(trainer: Any, args: argparse.Namespace) -> dict[str, float]:
    """Return the milliseconds of a step in each group, and in all."""
    from torch.profiler import ProfilerActivity, profile

    take = repeat(Steps(trainer, 1))
    step = statistics.median(seconds_per_step({"step": take}, 5, args.seconds / 5)["step"])
    count = max(1, round(args.seconds / step))
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        began = time.perf_counter()
        take(count)
        wall = time.perf_counter() - began
    found: dict[str, float] = collections.defaultdict(float)
    for event in profiled.key_averages():
        groups = (name for name, parts in GROUPS.items() if any(part in event.key for part in parts))
        found[next(groups, REST)] += 1e-6 * event.self_cpu_time_total / wall
    found[REST] += 1 - sum(found.values())
    return {"a step": 1e3 * step, **{name: 1e3 * step * found[name] for name in [*GROUPS, REST]}}


if __name__ == "__main__":
    main()
